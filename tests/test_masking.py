"""Scaling, resizing, keeping the top and multiplying, against values worked by hand."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from hf_ttame.masking import apply_mask, keep_top, min_max, resize_maps

MAPS = arrays(
    np.float32, array_shapes(min_dims=3, max_dims=3, max_side=5), elements=st.floats(-1e6, 1e6, width=32)
).map(torch.from_numpy)


@given(MAPS)
@settings(deadline=None)
def test_min_max_spans_0_to_1_and_keeps_the_order(maps: torch.Tensor) -> None:
    scaled = min_max(maps)
    assert scaled.shape == maps.shape
    for before, after in zip(maps.flatten(1), scaled.flatten(1), strict=True):
        span, peak = before.max() - before.min(), before.abs().max()
        if span > 1e-5 * peak:
            assert (after.min(), after.max()) == (0, 1)
        elif span == 0:
            assert torch.equal(after, before.clamp(0, 1))
        assert (after[before.argsort()].diff() >= 0).all()


@given(MAPS)
@settings(deadline=None)
def test_min_max_looks_at_one_map_at_a_time(maps: torch.Tensor) -> None:
    assert torch.equal(min_max(maps), torch.stack([min_max(each) for each in maps]))


def test_min_max_worked_by_hand() -> None:
    maps = torch.tensor([[[-2.0, 0.0], [1.0, 2.0]], [[5.0, 5.0], [5.0, 6.0]]])
    assert min_max(maps).tolist() == [[[0.0, 0.5], [0.75, 1.0]], [[0.0, 0.0], [0.0, 1.0]]]


@pytest.mark.parametrize(("value", "expected"), [(0.0, 0.0), (0.3, 0.3), (1.0, 1.0), (-4.0, 0.0), (9.0, 1.0)])
def test_min_max_clips_a_constant_map(value: float, expected: float) -> None:
    assert torch.equal(min_max(torch.full((2, 3, 3), value)), torch.full((2, 3, 3), expected))


@pytest.mark.parametrize("value", [0.3, 1.0, -4.0, 1e5])
def test_min_max_does_not_blow_up_rounding(value: float) -> None:
    constant = torch.full((1, 3, 3), value)
    noisy = constant.clone()
    noisy[0, 1, 1] = torch.nextafter(noisy[0, 1, 1], torch.tensor(torch.inf))
    assert torch.equal(min_max(noisy), noisy.clamp(0, 1))


def test_resize_worked_by_hand() -> None:
    # Pixel centres of 4 lie at -0.25, 0.25, 0.75, 1.25 of 2, clipped to 0 and 1: value 8 r + 4 c.
    maps = torch.tensor([[[0.0, 4.0], [8.0, 12.0]]])
    expected = [[0, 1, 3, 4], [2, 3, 5, 6], [6, 7, 9, 10], [8, 9, 11, 12]]
    assert resize_maps(maps, (4, 4))[0].tolist() == expected
    assert resize_maps(maps, (4, 2))[0].tolist() == [[0, 4], [2, 6], [6, 10], [8, 12]]


@pytest.mark.parametrize("shape", [(2, 3, 4), (2, 5, 3, 4), (1, 1, 1)])
def test_resize_keeps_the_leading_dimensions(shape: tuple[int, ...]) -> None:
    maps = torch.rand(shape)
    resized = resize_maps(maps, (7, 6))
    assert resized.shape == (*shape[:-2], 7, 6)
    assert torch.equal(resized[-1], resize_maps(maps[-1:], (7, 6))[0])
    assert torch.equal(resize_maps(maps, shape[-2:]), maps)


@pytest.mark.parametrize("shape", [(4, 4), (1, 1, 1, 4, 4)])
def test_resize_of_other_shapes_raises(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="maps must be"):
        resize_maps(torch.zeros(shape), (8, 8))


@pytest.mark.parametrize("fraction", [1.0, 0.5, 0.15, 0.0])
@pytest.mark.parametrize("size", [(5, 5), (7, 3), (20, 20)])
def test_keep_top_keeps_exactly_the_highest(fraction: float, size: tuple[int, int]) -> None:
    maps = torch.rand(3, *size, generator=torch.Generator().manual_seed(1)) + 0.1
    count = round(fraction * size[0] * size[1])
    soft, binary = keep_top(maps, fraction), keep_top(maps, fraction, binary=True)
    assert (binary.sum(dim=(1, 2)) == count).all()
    assert set(binary.unique().tolist()) <= {0.0, 1.0}
    assert torch.equal(soft, maps * binary)
    for each, kept in zip(maps.flatten(1), binary.flatten(1).bool(), strict=True):
        assert each[kept].sort().values.equal(each.sort().values[len(each) - count :])


def test_keep_top_worked_by_hand() -> None:
    maps = torch.tensor([[0.1, 0.9, 0.3], [0.8, 0.2, 0.7]])
    assert torch.equal(keep_top(maps, 0.5), torch.tensor([[0.0, 0.9, 0.0], [0.8, 0.0, 0.7]]))
    assert torch.equal(keep_top(maps, 0.5, binary=True), torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 1.0]]))


@pytest.mark.parametrize("fraction", [0.5, 0.15])
def test_an_all_ones_map_keeps_a_seeded_random_share(fraction: float) -> None:
    maps = torch.ones(2, 40, 40)
    kept = keep_top(maps, fraction)
    assert kept.sum(dim=(1, 2)).tolist() == [fraction * 1600] * 2
    share = [q.mean().item() for half in kept[0].chunk(2) for q in half.chunk(2, dim=1)]
    assert all(0.5 * fraction < quarter < 1.5 * fraction for quarter in share), share
    assert torch.equal(kept, keep_top(maps, fraction, seed=0))
    assert not torch.equal(kept, keep_top(maps, fraction, seed=1))


def test_ties_at_the_threshold_are_drawn_and_higher_values_always_kept() -> None:
    maps = torch.full((1, 10, 10), 0.5)
    maps[0, 3, :] = 1.0
    drawn = [keep_top(maps, 0.3, binary=True, seed=seed) for seed in range(5)]
    assert all(kept[0, 3].all() and kept.sum() == 30 for kept in drawn)
    assert len({tuple(kept.flatten().tolist()) for kept in drawn}) == 5


def test_keep_top_leaves_the_global_random_state_alone() -> None:
    state = torch.get_rng_state()
    keep_top(torch.ones(1, 4, 4), 0.5)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("fraction", [-0.01, 1.01, 15, float("nan")])
def test_fraction_outside_0_to_1_raises(fraction: float) -> None:
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\]"):
        keep_top(torch.ones(1, 4, 4), fraction)


SCALE = torch.tensor([1 / 0.229, 1 / 0.224, 1 / 0.225], dtype=torch.float64)[:, None, None]
SHIFT = torch.tensor([-0.485 / 0.229, -0.456 / 0.224, -0.406 / 0.225], dtype=torch.float64)[:, None, None]


def random_images() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    pixels = torch.rand(2, 3, 4, 5, generator=generator, dtype=torch.float64)
    return pixels, torch.rand(2, 4, 5, generator=generator, dtype=torch.float64)


def test_black_fill_of_normalised_pixels_is_masking_in_pixel_space() -> None:
    pixels, masks = random_images()
    found = apply_mask(SCALE * pixels + SHIFT, masks, SHIFT.flatten())
    torch.testing.assert_close(found, SCALE * (masks[:, None] * pixels) + SHIFT, rtol=0, atol=1e-12)
    torch.testing.assert_close(apply_mask(pixels, masks), masks[:, None] * pixels, rtol=0, atol=0)


def test_mean_fill_multiplies_the_normalised_pixels() -> None:
    pixels, masks = random_images()
    normalised = SCALE * pixels + SHIFT
    assert torch.equal(apply_mask(normalised, masks), masks[:, None] * normalised)
    # What is masked away becomes the mean colour, not black.
    gone = apply_mask(normalised, torch.zeros_like(masks))
    mean = torch.tensor([0.485, 0.456, 0.406], dtype=torch.float64)[:, None, None]
    torch.testing.assert_close((gone - SHIFT) / SCALE, mean.expand(2, 3, 4, 5), rtol=0, atol=1e-12)


def test_apply_mask_worked_by_hand() -> None:
    image = torch.tensor([[[[4.0, 8.0]], [[0.0, -2.0]]]])
    masks = torch.tensor([[[1.0, 0.25]]])
    fill = torch.tensor([4.0, 2.0])
    expected = [[[[4.0, 5.0]], [[0.0, 1.0]]]]
    assert apply_mask(image, masks, fill).tolist() == expected
    assert apply_mask(image, masks.unsqueeze(1), fill).tolist() == expected
    assert apply_mask(image, masks, 4.0).tolist() == [[[[4.0, 5.0]], [[0.0, 2.5]]]]


@pytest.mark.parametrize("shape", [(2, 4, 4), (2, 1, 5, 4), (1, 4, 5), (3, 4, 5)])
def test_masks_that_do_not_fit_raise(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="do not fit images"):
        apply_mask(torch.zeros(2, 3, 4, 5), torch.ones(shape))
