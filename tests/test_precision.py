"""Dtypes, devices, attention implementations, compilation and export of the whole explainer."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import make_timm, make_vit, vit_processor

from hf_ttame import TTameModel
from hf_ttame.masking import min_max

COMPILERS = ("c++", "g++", "clang++")


def make(which: str) -> TTameModel:
    torch.manual_seed(0)
    if which == "timm":
        return TTameModel.from_backbone(make_timm("test_resnet"))
    return TTameModel.from_backbone(make_vit(), processor=vit_processor())


def noise(batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module", params=["timm", "transformers"])
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[TTameModel, Path]:
    model = make(request.param)
    folder = tmp_path_factory.mktemp("precision") / "explainer"
    model.save_pretrained(folder)
    return model, folder


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision(saved, dtype, photo, tmp_path):
    model, folder = saved
    half = TTameModel.from_pretrained(folder, dtype=dtype)
    assert {p.dtype for p in half.parameters()} == {dtype}
    output, expected = half(noise()), model(noise(), class_ids=half(noise()).class_ids)
    assert output.map_logits.dtype == dtype
    scale = expected.map_logits.abs().max()
    assert (output.map_logits.float() - expected.map_logits).abs().max() < 0.05 * scale
    (explanation,) = half.explain(photo())
    assert explanation.map.max() <= 1
    half.save_pretrained(tmp_path / "again")
    again = TTameModel.from_pretrained(tmp_path / "again", dtype=dtype)
    assert torch.equal(again(noise()).map_logits, output.map_logits)


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}])
@torch.no_grad()
def test_device_map(saved, device_map):
    model, folder = saved
    placed = TTameModel.from_pretrained(folder, device_map=device_map)
    assert torch.equal(placed(noise().to(placed.device)).map_logits.cpu(), model(noise()).map_logits)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@torch.no_grad()
def test_attention_implementation_is_the_backbones(tmp_path, implementation):
    model = make("transformers")
    model.save_pretrained(tmp_path)
    again = TTameModel.from_pretrained(tmp_path, attn_implementation=implementation)
    assert again.backbone.config._attn_implementation == implementation
    torch.testing.assert_close(again(noise()).map_logits, model(noise()).map_logits, rtol=1e-4, atol=1e-5)
    made = TTameModel.from_backbone(tmp_path / "backbone", attn_implementation=implementation)
    assert made.backbone.config._attn_implementation == implementation


@torch.no_grad()
def test_compiled_explainer_gives_the_same(saved):
    model, _ = saved
    expected = model(noise())
    _, features = model.features(noise())
    # The tracing is what can break; the eager backend spares the tests a C++ compiler.
    head = torch.compile(model.head, fullgraph=True, backend="eager")
    torch.testing.assert_close(head(features, expected.class_ids), expected.map_logits)
    torch.testing.assert_close(torch.compile(model, backend="eager")(noise()).map_logits, expected.map_logits)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where torch.compile puts what it makes: empty at first, and its headers are compiled once for both models."""
    from torch._inductor import config

    folder = tmp_path_factory.mktemp("compiled")
    with pytest.MonkeyPatch.context() as patch, config.patch(compile_threads=1):  # no pool of processes
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(folder))
        yield folder


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, COMPILERS)), reason="torch.compile needs a C++ compiler")
@torch.no_grad()
def test_compiled_by_the_default_backend_gives_the_same(saved, compiled):
    model, _ = saved
    before = set(compiled.rglob("*.so"))
    torch.compiler.reset()
    found, expected = torch.compile(model)(noise()), model(noise())
    assert set(compiled.rglob("*.so")) - before  # it was not run as it is
    assert torch.equal(found.class_ids, expected.class_ids)
    torch.testing.assert_close(found.logits, expected.logits, atol=1e-4, rtol=0)
    torch.testing.assert_close(found.map_logits, expected.map_logits, atol=1e-4, rtol=0)
    torch.testing.assert_close(min_max(found.map_logits), min_max(expected.map_logits), atol=1e-4, rtol=0)


class Plain(torch.nn.Module):
    def __init__(self, model: TTameModel):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        output = self.model(pixel_values)
        return output.logits, output.map_logits


@torch.no_grad()
def test_exported_explainer_gives_the_same(saved):
    model, _ = saved
    exported = torch.export.export(Plain(model), (noise(),), strict=False).module()
    expected = model(noise())
    logits, map_logits = exported(noise())
    torch.testing.assert_close(logits, expected.logits)
    torch.testing.assert_close(map_logits, expected.map_logits)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@torch.no_grad()
def test_on_a_gpu(saved):
    model, folder = saved
    placed = TTameModel.from_pretrained(folder, device_map="cuda")
    assert {p.device.type for p in placed.parameters()} == {"cuda"}
    output = placed(noise().cuda())
    torch.testing.assert_close(output.map_logits.cpu(), model(noise()).map_logits, rtol=1e-2, atol=1e-2)
