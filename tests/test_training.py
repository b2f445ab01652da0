"""The training stream, and real runs of the training script on tiny data."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from hf_ttame import TTameModel
from hf_ttame.image_processing import Normalisation
from training.data import TrainingStream, augment, decode, image_column, open_stream

ROOT = Path(__file__).parents[1]
PLAIN = Normalisation((1.0, 1.0, 1.0), (0.0, 0.0, 0.0), (32, 32))


def picture(seed: int) -> Image.Image:
    """A bright patch on dark noise: something to see."""
    generator = np.random.default_rng(seed)
    pixels = generator.integers(0, 60, size=(60, 80, 3), dtype=np.uint8)
    top, left = generator.integers(0, 30), generator.integers(0, 50)
    pixels[top : top + 30, left : left + 30] = generator.integers(120, 255, size=3, dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures with a space")
    for seed in range(24):
        picture(seed).save(folder / f"{seed:02d}.png")
    return folder


@pytest.fixture(scope="module")
def parquet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parquet")
    for shard in range(2):
        images = [picture(100 * shard + seed) for seed in range(10)]
        data = datasets.Dataset.from_dict({"image": images, "label": list(range(10))})
        data.to_parquet(str(folder / f"train-{shard}.parquet"))
    return folder


def first(stream: TrainingStream, count: int) -> list[torch.Tensor]:
    found = []
    for view in stream:
        found.append(view["pixel_values"])
        if len(found) == count:
            return found
    raise AssertionError("the stream ended")


def test_each_picture_comes_once_per_epoch(parquet: Path) -> None:
    dataset = open_stream(str(parquet))
    square = Normalisation((1.0, 1.0, 1.0), (0.0, 0.0, 0.0), (8, 8))
    names = []

    class Named(TrainingStream):
        def _windows(self):  # type: ignore[no-untyped-def]
            for cells in super()._windows():
                names.extend(cell["bytes"] for cell in cells)
                yield cells

    stream = Named(dataset, "image", square, window=7)
    first(stream, 40)
    assert len(names) == 40
    assert len(set(names)) == 20
    assert len(set(names[:20])) == 20


def test_the_order_depends_on_the_seed_alone(parquet: Path) -> None:
    dataset = open_stream(str(parquet))
    a, b, c = (first(TrainingStream(dataset, "image", PLAIN, seed=seed), 25) for seed in (1, 1, 2))
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert not all(torch.equal(x, y) for x, y in zip(a, c, strict=True))


def test_skipping_batches_continues_where_they_end(parquet: Path) -> None:
    dataset = open_stream(str(parquet))
    whole = first(TrainingStream(dataset, "image", PLAIN, window=7), 45)
    rest = first(TrainingStream(dataset, "image", PLAIN, window=7, skip_batches=5, batch_size=6), 15)
    assert all(torch.equal(x, y) for x, y in zip(whole[30:], rest, strict=True))


def test_unreadable_pictures_are_skipped_and_counted(tmp_path: Path) -> None:
    for seed in range(4):
        picture(seed).save(tmp_path / f"{seed}.jpg")
    (tmp_path / "broken.jpg").write_bytes(b"not a picture")
    (tmp_path / "truncated.jpg").write_bytes((tmp_path / "0.jpg").read_bytes()[:300])
    stream = iter(TrainingStream(open_stream(str(tmp_path)), "image", PLAIN))
    with pytest.warns(UserWarning, match="unreadable picture"):
        views = [next(stream) for _ in range(12)]
    assert 4 <= sum(view["unreadable"] for view in views) <= 6


def test_a_dataset_without_a_readable_picture_stops(tmp_path: Path) -> None:
    (tmp_path / "broken.jpg").write_bytes(b"not a picture")
    with pytest.warns(UserWarning, match="unreadable"), pytest.raises(ValueError, match="none of the 1 pictures"):
        next(iter(TrainingStream(open_stream(str(tmp_path)), "image", PLAIN)))


def test_augment_crops_flips_and_normalises() -> None:
    ramp = np.tile(np.linspace(0, 255, 256, dtype=np.uint8)[None, :, None], (256, 1, 3))
    normalisation = Normalisation((2.0, 2.0, 2.0), (-1.0, -1.0, -1.0), (224, 224))
    flipped = 0
    starts = set()
    for seed in range(20):
        view = augment(Image.fromarray(ramp), normalisation, np.random.default_rng(seed))
        assert view.shape == (3, 224, 224)
        row = view[0, 0]
        flipped += int(row[0] > row[-1])
        low, high = float(row.min()), float(row.max())
        assert high - low == pytest.approx(2 * 223 / 255, abs=0.02)  # 224 of the 256 columns, unscaled
        starts.add(round((low + 1) * 127.5))
    assert 4 <= flipped <= 16
    assert len(starts) > 8


@pytest.mark.parametrize("size", [(1, 1), (5, 300), (300, 5), (33, 31)])
@pytest.mark.parametrize("min_scale", [1.0, 0.3])
def test_augment_takes_any_size(size: tuple[int, int], min_scale: float) -> None:
    view = augment(Image.new("RGB", size, "white"), PLAIN, np.random.default_rng(0), min_scale)
    assert view.shape == (3, 32, 32)
    assert torch.allclose(view, torch.ones(()))


def test_image_column_is_found_or_named(parquet: Path) -> None:
    dataset = open_stream(str(parquet))
    assert image_column(dataset) == "image"
    assert image_column(dataset, "image") == "image"
    with pytest.raises(ValueError, match="its columns: image, label"):
        image_column(dataset, "photo")
    with pytest.raises(ValueError, match="no image column"):
        image_column(datasets.Dataset.from_dict({"a": [1]}).to_iterable_dataset())


def test_sources_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"neither \.parquet files nor pictures"):
        open_stream(str(tmp_path))
    with pytest.raises(ValueError, match="neither a folder nor a dataset"):
        open_stream("nobody/nothing-of-the-kind")
    with pytest.raises(ValueError, match="cannot be read"):
        decode({"bytes": b"no picture", "path": None})


def command(*arguments: str) -> list[str]:
    return [sys.executable, str(ROOT / "training" / "train.py"), *arguments]


def environment() -> dict[str, str]:
    return {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def train(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(command(*arguments), env=environment(), capture_output=True, text=True, timeout=240)


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small classifier with random weights that answers differently to different pictures."""
    from transformers import AutoImageProcessor, ResNetConfig, ResNetForImageClassification, ViTImageProcessor

    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 12, 16, 24], depths=[1, 1, 1, 1], layer_type="basic")
    config.num_labels = 5
    model = ResNetForImageClassification(config).eval()
    processor = ViTImageProcessor(size={"height": 64, "width": 64})
    folder = tmp_path_factory.mktemp("backbone")
    with torch.no_grad():  # spread the logits, so that predictions and losses mean something
        model.classifier[1].weight.mul_(40)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    AutoImageProcessor.from_pretrained(folder)
    return str(folder)


COMMON = ("--batch_size", "8", "--workers", "0", "--learning_rate", "5e-3")


def test_a_run_lowers_the_loss_and_saves_an_explainer(backbone: str, pictures: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    done = train(
        "--backbone", backbone, "--dataset", str(pictures), "--output", str(output), "--steps", "40",
        "--head_init", "random", *COMMON,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    log = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    totals = [entry["total"] for entry in log]
    assert [entry["step"] for entry in log] == list(range(1, 41))
    assert np.mean(totals[-5:]) < 0.9 * np.mean(totals[:5])
    model = TTameModel.from_pretrained(output / "explainer")
    original = TTameModel.from_backbone(backbone, head_init="random")
    for (name, a), (_, b) in zip(
        model.backbone.state_dict().items(), original.backbone.state_dict().items(), strict=True
    ):
        assert torch.equal(a, b), name
    (explanation,) = model.explain(pictures / "00.png")
    assert explanation.map.shape == (60, 80)
    record = (output / "explainer" / "training.json").read_text() + (output / "explainer" / "config.json").read_text()
    assert str(tmp_path) not in record
    assert json.loads((output / "explainer" / "training.json").read_text())["step"] == 40
    again = train("--backbone", backbone, "--dataset", str(pictures), "--output", str(output), *COMMON)
    assert again.returncode != 0
    assert "holds a trained explainer" in again.stderr


def test_a_killed_run_resumes_to_the_same_head(backbone: str, parquet: Path, tmp_path: Path) -> None:
    def arguments(output: Path) -> list[str]:
        return [
            "--backbone", backbone, "--dataset", str(parquet), "--output", str(output), "--steps", "30",
            "--save_every", "10", *COMMON,
        ]  # fmt: skip

    assert train(*arguments(tmp_path / "whole")).returncode == 0
    killed = tmp_path / "killed"
    process = subprocess.Popen(
        command(*arguments(killed)), env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while not list(killed.glob("checkpoint-*")) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (killed / "explainer").exists(), "the run ended before it could be killed"
    resumed = train(*arguments(killed), "--resume")
    assert resumed.returncode == 0, resumed.stderr
    a, b = (load_file(tmp_path / run / "explainer" / "model.safetensors") for run in ("whole", "killed"))
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--optimizer", "adam"], "adamw or sgd"),
        (["--min_crop", "0"], "min_crop"),
        (["--fill", "white"], "black or mean"),
        (["--steps", "0"], "at least 1"),
    ],
)
def test_bad_arguments_are_refused_at_once(arguments: list[str], message: str, tmp_path: Path) -> None:
    from training.train import Arguments, check

    values = dict(zip((name.removeprefix("--") for name in arguments[::2]), arguments[1::2], strict=True))
    typed = {name: type(getattr(Arguments("", "", ""), name))(value) for name, value in values.items()}
    with pytest.raises(ValueError, match=message):
        check(Arguments("backbone", "dataset", str(tmp_path), **typed))
