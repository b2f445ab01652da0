"""Every architecture, without configuration. `pytest -m sweep --shard 0/2 --report sweep.jsonl` tries them all."""

import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from architectures import (
    FULL_PARAMETERS,
    SMALLEST,
    default_config,
    excluded,
    make_on_meta,
    make_small_timm,
    make_timm,
    make_transformers,
    modules,
    plain_processor,
    processor_of,
    transformers_classes,
)
from backbone_checks import check_attached, check_trains_and_reloads, misplaced, settle
from torch import nn

from hf_ttame import TTameHead, TTameModel
from hf_ttame.backbones import NoMaps, check_spatial, wrap_backbone
from hf_ttame.features import FeatureLayer, extract
from hf_ttame.layer_choice import default_layers, probe_layers

# One architecture per layout, small enough for every run.
TIMM_SAMPLE = [
    "test_vit", "test_vit3", "test_resnet", "test_efficientnet_ln", "test_byobnet", "test_convnext2", "test_nfnet",
    "test_mambaout", "levit_128s", "xcit_nano_12_p16_224", "pit_ti_distilled_224", "mobilevit_xxs",
]  # fmt: skip
# These families begin with tens of millions of parameters: at the smallest side, narrower and shallower.
SMALL_TIMM_SAMPLE: dict[str, dict[str, Any]] = {
    "hiera_tiny_224": {"side": 192, "embed_dim": 24, "stages": [1, 1, 2, 1]},
    "swin_tiny_patch4_window7_224": {"side": 192, "embed_dim": 24, "depths": [1, 1, 2, 1], "num_heads": [1, 1, 2, 2]},
}
TRANSFORMERS_SAMPLE: dict[str, dict[str, Any]] = {
    "SwinForImageClassification": {"embed_dim": 24, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2]},
    "HieraForImageClassification": {"embed_dim": 24, "depths": [1, 1, 2, 1], "num_heads": [1, 2, 4, 8]},
    "LevitForImageClassification": {"hidden_sizes": [32, 48, 64], "depths": [1, 1, 1]},
    "PvtForImageClassification": {"depths": [1, 1, 1, 1]},
    "FocalNetForImageClassification": {"embed_dim": 24, "depths": [1, 1, 1, 1]},
    "SegformerForImageClassification": {"depths": [1, 1, 1, 1]},
    "SiglipForImageClassification": {"hidden_size": 48, "intermediate_size": 64, "num_attention_heads": 2},
    "DeiTForImageClassificationWithTeacher": {"hidden_size": 48, "intermediate_size": 64, "num_attention_heads": 2},
}
REFUSED = {
    "ImageGPTForImageClassification": {"n_embd": 16, "n_head": 2},
    "PerceiverForImageClassificationLearned": {"d_latents": 16, "num_latents": 4},
    "Siglip2ForImageClassification": {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2},
}


def record(request: pytest.FixtureRequest, **facts: Any) -> None:
    """One line of the sweep's report."""
    if path := request.config.getoption("--report"):
        with open(path, "a") as file:
            file.write(json.dumps(facts) + "\n")


def skip_if_recorded(request: pytest.FixtureRequest, name: str) -> None:
    """A sweep that was stopped continues: what its report holds as passed is not tried again."""
    path = request.config.getoption("--report")
    if path and Path(path).exists():
        rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
        if any(row["name"] == name and row["result"] != "failed" for row in rows):
            pytest.skip("recorded")


def facts_of(layers: list[FeatureLayer]) -> list[dict[str, Any]]:
    return [{"name": x.name, "grid": x.grid, "layout": x.layout, "prefix_tokens": x.prefix_tokens} for x in layers]


def try_full(
    backbone: nn.Module, processor: Any, size: tuple[int, int, int], train: bool
) -> tuple[TTameModel, list[str]]:
    """The explainer, and the layers whose place could not be shown (see `check_attached`)."""
    settle(backbone, size)
    model = TTameModel.from_backbone(backbone, processor=processor)
    unplaced = check_attached(model)
    if train:
        with tempfile.TemporaryDirectory() as folder:
            check_trains_and_reloads(model, Path(folder, "explainer"))
    return model, unplaced


@torch.no_grad()
def try_on_meta(module: nn.Module) -> list[FeatureLayer]:
    """Layers, layouts and map logits by shapes alone, where the weights would be too large."""
    side = module.pretrained_cfg["input_size"][-1]
    wrapper = wrap_backbone(module, plain_processor(side)).model.eval()
    noise = torch.zeros(2, *wrapper.config.pretrained_cfg["input_size"], device="meta")
    layers = probe_layers(wrapper, default_layers(wrapper, noise), noise)
    assert len(layers) == 3
    logits, features = extract(wrapper, noise, layers)
    assert [tuple(maps.shape) for maps in features] == [(2, x.channels, *x.grid) for x in layers]
    head = TTameHead([x.channels for x in layers], 7, layers[0].grid).to("meta").eval()
    assert head(features, logits.argmax(dim=1, keepdim=True)).shape == (2, 1, *layers[0].grid)
    return layers


@pytest.mark.parametrize("name", TIMM_SAMPLE)
def test_timm(name):
    module = make_timm(name)
    _, unplaced = try_full(module, processor_of(name, module), module.pretrained_cfg["input_size"], train=True)
    assert not unplaced


def make_small(name: str) -> tuple[nn.Module, Any]:
    if name in SMALL_TIMM_SAMPLE:
        return make_small_timm(name, **SMALL_TIMM_SAMPLE[name])
    return make_transformers(name, **TRANSFORMERS_SAMPLE[name])


@pytest.mark.parametrize("name", [*SMALL_TIMM_SAMPLE, *TRANSFORMERS_SAMPLE])
def test_small(name):
    module, processor = make_small(name)
    side = processor.size["height"]
    _, unplaced = try_full(module, processor, (3, side, side), train=True)
    assert not unplaced


def every_timm_name() -> Iterator[str]:
    return (name for names in modules().values() for name in names)


def sweep_timm(name: str, request: pytest.FixtureRequest, train: bool) -> None:
    skip_if_recorded(request, name)
    family = next(key for key, names in modules().items() if name in names)
    facts: dict[str, Any] = {"library": "timm", "family": family, "name": name}
    if reason := excluded(name):
        record(request, **facts, result="excluded", reason=reason)
        pytest.skip(reason)
    began = time.perf_counter()
    try:
        meta = make_on_meta(name)
        facts["parameters"] = sum(p.numel() for p in meta.parameters())
        if train or facts["parameters"] <= FULL_PARAMETERS:
            try:
                module = make_timm(name)
                size = module.pretrained_cfg["input_size"]
                model, unplaced = try_full(module, processor_of(name, module), size, train=train)
            except (AssertionError, RuntimeError):  # a smaller side than its own does not suit everything
                module = make_timm(name, own_size=True)
                size = module.pretrained_cfg["input_size"]
                model, unplaced = try_full(module, processor_of(name, module), size, train=train)
            layers = model.layers
            facts |= {"path": "trained" if train else "explained", "head_init": model.config.head_init, "input": size}
            facts |= {"unplaced": unplaced} if unplaced else {}
        else:
            facts["path"] = "meta"
            layers = try_on_meta(meta)
    except Exception as error:
        record(request, **facts, result="failed", reason=f"{type(error).__name__}: {error}"[:300])
        raise
    seconds = round(time.perf_counter() - began, 1)
    record(request, **facts, result="passed", layers=facts_of(layers), seconds=seconds)


@pytest.mark.sweep
@pytest.mark.parametrize("name", SMALLEST)
def test_smallest_of_every_timm_module(name, request):
    sweep_timm(name, request, train=True)


@pytest.mark.sweep
@pytest.mark.parametrize("name", sorted(set(every_timm_name()) - set(SMALLEST)))
def test_every_other_timm_name(name, request):
    sweep_timm(name, request, train=False)


@pytest.mark.sweep
@pytest.mark.parametrize("name", transformers_classes())
def test_every_transformers_class(name, request):
    skip_if_recorded(request, name)
    facts: dict[str, Any] = {"library": "transformers", "name": name}
    try:
        check_spatial(default_config(name))  # as from_backbone does, before any weight is loaded
    except NoMaps as error:
        record(request, **facts, family=default_config(name).model_type, result="refused", reason=str(error))
        return
    try:
        module, processor = make_transformers(name)
        facts["family"] = module.config.model_type
    except ImportError as error:
        record(request, **facts, result="excluded", reason=str(error).strip().splitlines()[0])
        pytest.skip("a package that it needs is not installed")
    except (AttributeError, ValueError, TypeError) as error:
        record(request, **facts, result="failed", reason=f"{type(error).__name__}: {error}"[:300])
        raise
    side = processor.size["height"]
    try:
        model, unplaced = try_full(module, processor, (3, side, side), train=True)
    except Exception as error:
        record(request, **facts, result="failed", reason=f"{type(error).__name__}: {error}"[:300])
        raise
    record(
        request, **facts, result="passed", path="trained", input=[3, side, side], unplaced=unplaced,
        head_init=model.config.head_init, layers=facts_of(model.layers),
    )  # fmt: skip


# ---- the checks themselves can fail -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("hiera_tiny_224", "transposed"),
        ("hiera_tiny_224", "mirrored"),
        ("hiera_tiny_224", "mask units"),
        ("swin_tiny_patch4_window7_224", "transposed"),  # NHWC
        ("levit_128s", "transposed"),
    ],
)
def test_a_wrong_grid_is_noticed(name, wrong, monkeypatch):
    if name in SMALL_TIMM_SAMPLE:
        module, processor = make_small(name)
        side = processor.size["height"]
    else:
        module, processor = make_timm(name), None
        side = module.pretrained_cfg["input_size"][-1]
    settle(module, (3, side, side))
    model = TTameModel.from_backbone(module, processor=processor)
    assert misplaced(model) == []
    right = FeatureLayer.to_maps

    def disorder(self: FeatureLayer, output: torch.Tensor, class_token: str = "drop") -> torch.Tensor:
        maps = right(self, output, class_token)
        if wrong == "transposed":
            return maps.transpose(2, 3)
        if wrong == "mirrored":
            return maps.flip(3)
        b, c, h, w = maps.shape  # every 2 x 2 block one after the other, as inside Hiera
        blocks = maps.reshape(b, c, h // 2, 2, w // 2, 2).permute(0, 1, 2, 4, 3, 5) if h % 2 == 0 else maps
        return blocks.reshape(b, c, h, w)

    monkeypatch.setattr(FeatureLayer, "to_maps", disorder)
    assert misplaced(model)


def test_tokens_in_mask_unit_order_are_refused():
    module, processor = make_small("hiera_tiny_224")
    with pytest.raises(ValueError, match=r"mask-unit order.*hidden_states\[2\]"):
        TTameModel.from_backbone(module, processor=processor, feature_layers=["blocks.1", "blocks.2"])


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_maps_is_refused_with_the_reason(name):
    module, processor = make_transformers(name, **REFUSED[name])
    with pytest.raises(ValueError, match="cannot be explained by a map: it"):
        TTameModel.from_backbone(module, processor=processor)


def test_every_module_of_timm_is_in_the_sweep():
    assert set(every_timm_name()) == set(timm.list_models())
    assert all(len(set(names) & set(SMALLEST)) == 1 for names in modules().values())
