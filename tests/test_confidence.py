"""Average drop and increase in confidence, against values worked out by hand."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from map_pairs import map_and_increased

from hf_ttame.masking import min_max
from hf_ttame.metrics import average_drop, increase_in_confidence
from hf_ttame.metrics.confidence import drops, masked_confidence
from hf_ttame.metrics.judging import Judgement


def test_average_drop_and_increase_by_hand() -> None:
    p = torch.tensor([0.8, 0.5, 0.4, 1.0])
    p_masked = torch.tensor([0.4, 0.6, 0.4, 0.0])
    # Drops: half, none (it rose), none (equal), all. Increases: only the second; an equal confidence is no increase.
    assert drops(p, p_masked).tolist() == [50.0, 0.0, 0.0, 100.0]
    assert average_drop(p, p_masked) == pytest.approx(37.5)
    assert increase_in_confidence(p, p_masked) == pytest.approx(25.0)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.floats(0.01, 1), st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=6))
def test_more_confidence_on_the_masked_image_never_raises_the_drop_or_lowers_the_increase(
    images: list[tuple[float, float, float]],
) -> None:
    p, low, high = torch.tensor(images).unbind(dim=1)
    low, high = torch.minimum(low, high), torch.maximum(low, high)
    assert average_drop(p, high) <= average_drop(p, low)
    assert increase_in_confidence(p, high) >= increase_in_confidence(p, low)


@pytest.mark.parametrize(
    ("p", "p_masked"),
    [([0.5], [0.5, 0.5]), ([], []), ([0.0], [0.5]), ([3.0], [0.5]), ([0.5], [-0.1]), ([0.5], [float("nan")])],
)
def test_what_is_no_probability_is_refused(p: list[float], p_masked: list[float]) -> None:
    with pytest.raises(ValueError, match="p "):
        average_drop(torch.tensor(p), torch.tensor(p_masked))


def brightness(pixel_values: torch.Tensor, class_ids: torch.Tensor) -> Judgement:
    """A judge whose confidence in class 0 is the mean pixel, for pixels in [0, 1]."""
    mean = pixel_values.mean(dim=(1, 2, 3))
    return Judgement(torch.where(class_ids == 0, mean, 1 - mean), mean > 0.5)


def test_masked_confidence_on_a_white_image() -> None:
    white = torch.ones(1, 3, 4, 5)
    maps = torch.arange(20.0).reshape(1, 4, 5)
    found = masked_confidence(brightness, white, torch.tensor([0]), maps, torch.zeros(3))
    # The map scaled to [0, 1] is k / 19; 10 and 3 of the 20 pixels are kept.
    assert found["mean"].item() == pytest.approx(0.5)
    assert found["soft 100"].item() == pytest.approx(0.5)
    assert found["soft 50"].item() == pytest.approx(sum(range(10, 20)) / 19 / 20)
    assert found["soft 15"].item() == pytest.approx((17 + 18 + 19) / 19 / 20)
    assert found["binary 50"].item() == pytest.approx(0.5)
    assert found["binary 15"].item() == pytest.approx(0.15)


def test_an_all_ones_map_keeps_everything_at_100_and_only_the_share_below() -> None:
    white = torch.ones(1, 3, 4, 5)
    found = masked_confidence(brightness, white, torch.tensor([0]), torch.ones(1, 2, 2), torch.zeros(3))
    assert found["soft 100"].item() == pytest.approx(1.0)
    assert found["soft 50"].item() == found["binary 50"].item() == pytest.approx(0.5)
    assert found["soft 15"].item() == pytest.approx(0.15)


def test_the_black_fill_is_black_in_normalised_space() -> None:
    pixels = torch.rand(1, 3, 4, 5)
    scale, shift = 2.0, -1.0
    maps = torch.rand(1, 4, 5)
    seen: list[torch.Tensor] = []

    def record(x: torch.Tensor, class_ids: torch.Tensor) -> Judgement:
        seen.append(x)
        return brightness(x.clamp(0, 1), class_ids)

    masked_confidence(record, pixels * scale + shift, torch.tensor([0]), maps, torch.full((3,), shift))
    assert torch.allclose((seen[0] - shift) / scale, pixels * min_max(maps)[:, None], atol=1e-6)


PICTURE = torch.rand(1, 3, 6, 6, generator=torch.Generator().manual_seed(0))


@settings(max_examples=25, deadline=None)
@given(st.permutations(range(36)), st.floats(0.1, 10), st.floats(-5, 5))
def test_a_positive_affine_change_of_the_map_changes_no_mask(order: list[int], scale: float, shift: float) -> None:
    maps = torch.tensor(order).float().reshape(1, 6, 6)  # values far apart: rounding swaps none
    plain, changed = (
        masked_confidence(brightness, PICTURE, torch.tensor([0]), x, torch.zeros(3))
        for x in (maps, scale * maps + shift)
    )
    for name in plain:
        assert changed[name].item() == pytest.approx(plain[name].item(), abs=1e-5), name


@settings(max_examples=25, deadline=None)
@given(map_and_increased())
def test_an_increasing_change_of_the_map_changes_no_binary_mask(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    plain, changed = (masked_confidence(brightness, PICTURE, torch.tensor([0]), x, torch.zeros(3)) for x in pair)
    for name in ("binary 50", "binary 15"):
        assert torch.equal(changed[name], plain[name]), name
