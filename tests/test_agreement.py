"""The same numbers as other libraries, where they define the same thing, on the same maps."""

from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch import nn

from hf_ttame.masking import apply_mask
from hf_ttame.metrics import (
    area_under,
    average_drop,
    confidence_curves,
    energy_inside,
    entropy,
    increase_in_confidence,
    judge_by,
    masked_confidence,
    pointing_game,
)


class GivenMaps:
    """What torchcam's measures ask of an extractor, with maps that are given."""

    def __init__(self, model: nn.Module, maps: torch.Tensor):
        self.model, self.maps = model, maps

    def __call__(self, class_idx=None, scores=None, normalized=True, **_):
        return [self.maps]

    def fuse_cams(self, cams):
        return cams[0]

    @contextmanager
    def _hooks_off(self):
        yield


@pytest.fixture(scope="module")
def case(timm_cnn: nn.Module) -> tuple[nn.Module, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = 2 * torch.randn(6, 3, 64, 64, generator=generator).cumsum(-1) / 8
    maps = torch.rand(6, 64, 64, generator=generator)
    maps = (maps - maps.amin((1, 2), keepdim=True)) / (
        maps.amax((1, 2), keepdim=True) - maps.amin((1, 2), keepdim=True)
    )
    with torch.no_grad():
        targets = timm_cnn(x).argmax(dim=1)
    return timm_cnn, x, maps, targets


def test_average_drop_and_increase_are_torchcam_s(case) -> None:
    """torchcam multiplies the normalised picture: our "mean" fill."""
    metrics = pytest.importorskip("torchcam.metrics")
    model, x, maps, targets = case
    theirs = metrics.ClassificationMetric(GivenMaps(model, maps), lambda logits: logits.softmax(dim=-1))
    theirs.update(x)
    found = theirs.summary()
    judge = judge_by(model)
    p = judge(x, targets).confidence
    masked = masked_confidence(judge, x, targets, maps, torch.zeros(3))["soft 100"]
    assert torch.allclose(masked, judge(apply_mask(x, maps), targets).confidence, atol=1e-6)
    assert average_drop(p, masked) == pytest.approx(100 * found["avg_drop"], abs=1e-3)
    assert increase_in_confidence(p, masked) == pytest.approx(100 * found["conf_increase"], abs=1e-4)


def test_insertion_and_deletion_are_torchcam_s(case) -> None:
    metrics = pytest.importorskip("torchcam.metrics")
    model, x, maps, targets = case
    steps = 8  # divides the pixels, so that both remove the same ones
    theirs = metrics.DeletionInsertionMetric(
        GivenMaps(model, maps), lambda logits: logits.softmax(dim=-1), steps=steps
    )
    theirs.update(x)
    found = theirs.summary()
    curves = confidence_curves(judge_by(model), x, targets, maps, torch.zeros_like(x), steps=steps)
    for name in ("insertion", "deletion"):
        assert area_under(curves[name]).mean().item() == pytest.approx(found[f"{name}_auc"], abs=1e-4)


def test_pointing_game_energy_and_entropy_are_quantus_s(case) -> None:
    quantus = pytest.importorskip("quantus")
    model, x, maps, targets = case
    regions = torch.zeros(6, 64, 64, dtype=torch.bool)
    for row in range(6):
        regions[row, 8 * row : 8 * row + 20, 10:40] = True
    regions[0] = maps[0] == maps[0].max()  # one sure hit
    common = {
        "model": model,
        "x_batch": x.numpy(),
        "y_batch": targets.numpy(),
        "a_batch": maps[:, None].numpy(),
        "s_batch": regions[:, None].numpy(),
        "device": "cpu",
    }
    quiet = {"disable_warnings": True, "display_progressbar": False, "normalise": False, "abs": False}
    hits = quantus.PointingGame(**quiet)(**common)
    assert np.array(hits, dtype=float).tolist() == pointing_game(maps, regions).tolist()
    mass = quantus.RelevanceMassAccuracy(**quiet)(**common)
    assert np.allclose(np.array(mass, dtype=float), energy_inside(maps, regions).numpy(), atol=1e-5)
    nats = quantus.Complexity(disable_warnings=True, display_progressbar=False, normalise=False)(
        **{**common, "s_batch": None}
    )
    assert np.allclose(np.array(nats, dtype=float), entropy(maps).numpy() * np.log(64 * 64), rtol=1e-4)
