"""Validation pictures: what is kept of them, what is counted, how they are drawn; a loss that is no number."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from conftest import make_timm
from PIL import Image
from torch import nn

from hf_ttame import TTameModel
from hf_ttame.image_processing import load_picture, preprocess
from training.train import follow_step
from training.validation import HeldOut, draw_samples, to_pictures, validate
from training.watch import LossWatch

PICTURES = 11


def explainer(channels: int = 3) -> TTameModel:
    cfg = {"input_size": (channels, 64, 64), "mean": (0.4,) * channels, "std": (0.2,) * channels}
    backbone = make_timm("test_resnet", in_chans=channels, pretrained_cfg_overlay=cfg)
    torch.manual_seed(0)
    return TTameModel.from_backbone(backbone, head_init="random").eval()


@pytest.fixture(scope="module")
def cells(photo: Callable[..., Image.Image], tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """Eleven photographs far larger than the model's input, and two cells that cannot be read."""
    folder = tmp_path_factory.mktemp("photographs")
    paths = []
    for seed in range(PICTURES):
        paths.append(str(folder / f"{seed:02d}.jpg"))
        photo(600, 400, seed).save(paths[-1])
    return [*paths[:3], {"bytes": b"damaged", "path": "bad.jpg"}, *paths[3:], str(folder / "absent.png")]


@pytest.mark.parametrize("channels", [1, 3])
def test_the_values_are_those_of_all_pictures_at_once(cells: list[Any], channels: int) -> None:
    model = explainer(channels)
    readable = [cell for cell in cells if isinstance(cell, str) and Path(cell).exists()]
    expected = preprocess(model.image_processor, [load_picture(cell, channels) for cell in readable])
    whole = HeldOut(model, cells)
    assert torch.equal(torch.stack(whole.pixel_values), expected)
    for rank in range(3):
        part = HeldOut(model, iter(cells), rank, 3)
        assert len(part) == len(whole) == PICTURES
        assert part.unreadable == whole.unreadable
        assert torch.equal(torch.stack(part.pixel_values), expected[rank::3])
        assert torch.equal(torch.stack(part.samples), expected[:8]), "the same eight are drawn, however many processes"


def test_photographs_are_not_kept(cells: list[Any]) -> None:
    held_out = HeldOut(explainer(), cells)
    for values in (*held_out.pixel_values, *held_out.samples):
        assert values.shape == (3, 64, 64)
        assert values.untyped_storage().nbytes() == 3 * 64 * 64 * 4, "no view of something larger"


def test_unreadable_pictures_are_named(cells: list[Any]) -> None:
    bad, absent = HeldOut(explainer(), cells).unreadable
    assert bad == "bad.jpg (number 3 for validation): picture of 7 bytes cannot be read: no picture format"
    assert absent.startswith("picture (number 12 for validation): ")
    assert "absent.png" in absent


def test_a_process_without_pictures_adds_none(cells: list[Any]) -> None:
    model = explainer()
    held_out = HeldOut(model, cells[:2], rank=1, ranks=3)
    found = validate(model, held_out, Accelerator(cpu=True), batch_size=4)
    assert {len(column) for column in found.values()} == {1}
    assert HeldOut(model, cells[:2], rank=2, ranks=3).pixel_values == []


@pytest.mark.parametrize("channels", [1, 3])
def test_samples_are_drawn_in_colour(cells: list[Any], channels: int) -> None:
    model = explainer(channels)
    held_out = HeldOut(model, cells)
    drawn = draw_samples(model, held_out, torch.device("cpu"))
    assert [(picture.size, picture.mode) for picture in drawn] == [((160, 160), "RGB")] * 8
    for picture, values in zip(to_pictures(model, torch.stack(held_out.samples)), held_out.samples, strict=True):
        pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(64, 64, 3).permute(2, 0, 1)
        torch.testing.assert_close(pixels / 255, (values * 0.2 + 0.4).expand(3, -1, -1), rtol=0, atol=0.5 / 255 + 1e-5)


def lines(*totals: float) -> list[dict[str, Any]]:
    return [{"step": step, "total": total} for step, total in enumerate(totals, start=7)]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_no_number_ends_the_run(bad: float) -> None:
    LossWatch().see(lines(1.0, 2.0))
    with pytest.raises(FloatingPointError, match=rf"^the loss became {bad} at step 8; lower --learning_rate$"):
        LossWatch().see(lines(1.0, bad, 1.0))


def test_with_patience_only_an_unbroken_row_ends_the_run() -> None:
    watch = LossWatch(patience=4)
    watch.see(lines(math.nan, math.nan, math.inf, 1.0, math.nan))
    watch.see(lines(math.nan, math.nan, 1.0))
    watch.see(lines(2.0, math.nan, math.nan))  # a row may span two logs
    with pytest.raises(FloatingPointError, match="nan at step 8 and was no number for 4 steps running; lower --learn"):
        watch.see(lines(math.inf, math.nan))


def test_nothing_follows_a_step_that_the_scaler_passed_over() -> None:
    """fp16 needs a GPU; its scaler works on a CPU too."""
    accelerator = Accelerator(cpu=True)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    head = nn.Linear(2, 1)
    plain = torch.optim.SGD(head.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.LinearLR(plain)
    optimizer = accelerator.prepare(plain)
    followed = []
    for factor in (1.0, math.inf, 1.0, math.nan):
        before = head.weight.detach().clone()
        accelerator.backward((head(torch.ones(1, 2)) * factor).sum())
        optimizer.step()
        optimizer.zero_grad()
        follow_step(accelerator, schedule)
        assert torch.equal(before, head.weight) == (not math.isfinite(factor))
        followed.append(schedule.last_epoch)
    assert followed == [1, 1, 2, 2]
