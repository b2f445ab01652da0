"""Insertion, deletion and the order of pixels, on a picture whose confidence is its brightness."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from map_pairs import map_and_increased

from hf_ttame.masking import keep_top
from hf_ttame.metrics import Judgement, area_under, class_probability, confidence_curves, judge_by
from hf_ttame.metrics.insertion_deletion import blur, empty_image
from hf_ttame.metrics.ordering import pixel_ranks


def brightness(pixel_values: torch.Tensor, class_ids: torch.Tensor) -> Judgement:
    mean = pixel_values.mean(dim=(1, 2, 3))
    return Judgement(mean, mean > 0.5)


@settings(max_examples=30)
@given(st.integers(0, 10_000), st.integers(0, 12), st.booleans())
def test_ranks_are_those_of_keep_top(seed: int, kept: int, ties: bool) -> None:
    maps = torch.rand(2, 3, 4, generator=torch.Generator().manual_seed(seed))
    if ties:
        maps = (2 * maps).round()
    ranks = pixel_ranks(maps, seed)
    assert torch.equal(ranks.flatten(1).sort(dim=1).values, torch.arange(12).expand(2, 12))
    assert torch.equal((ranks < kept).float(), keep_top(maps, kept / 12, binary=True, seed=seed))


def test_curves_by_hand() -> None:
    # Four pixels, 1.0, 0.6, 0.4 and 0.0 bright, ranked by their brightness; the whole is 0.5 bright.
    pixels = torch.tensor([[1.0, 0.6], [0.4, 0.0]]).expand(1, 3, 2, 2)
    maps = torch.tensor([[[4.0, 3.0], [2.0, 1.0]]])
    curves = confidence_curves(brightness, pixels, torch.tensor([0]), maps, torch.zeros(1, 3, 2, 2), steps=4)
    assert curves["insertion"][0].tolist() == pytest.approx([0.0, 0.25, 0.4, 0.5, 0.5])
    assert curves["deletion"][0].tolist() == pytest.approx([0.5, 0.25, 0.1, 0.0, 0.0])
    assert area_under(curves["insertion"]).item() == pytest.approx((0 + 0.5) / 8 + (0.25 + 0.4 + 0.5) / 4)
    assert area_under(curves["deletion"]).item() == pytest.approx((0.5 + 0) / 8 + (0.25 + 0.1 + 0) / 4)


def test_the_right_order_beats_the_reverse() -> None:
    pixels = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    best = pixels.mean(dim=1)
    empty, targets = torch.zeros_like(pixels), torch.zeros(2, dtype=torch.long)
    right = confidence_curves(brightness, pixels, targets, best, empty)
    wrong = confidence_curves(brightness, pixels, targets, -best, empty)
    assert (area_under(right["insertion"]) > area_under(wrong["insertion"])).all()
    assert (area_under(right["deletion"]) < area_under(wrong["deletion"])).all()
    # Adding bright pixels never lowers the brightness.
    assert (right["insertion"].diff(dim=1) >= -1e-6).all()


@settings(max_examples=25, deadline=None)
@given(map_and_increased())
def test_an_increasing_change_of_the_map_changes_no_curve(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    pixels = torch.rand(1, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    plain, changed = (
        confidence_curves(brightness, pixels, torch.tensor([0]), x, torch.zeros_like(pixels), steps=6) for x in pair
    )
    for name in ("insertion", "deletion"):
        assert torch.equal(changed[name], plain[name]), name


def test_empty_images() -> None:
    pixels = torch.randn(1, 3, 24, 20)
    black = torch.tensor([-2.0, -1.5, -1.0])
    assert torch.equal(empty_image(pixels, "black", black)[0, :, 3, 4], black)
    assert not empty_image(pixels, "mean", black).any()
    soft = empty_image(pixels, "blur", black)
    assert soft.shape == pixels.shape
    assert soft.std() < 0.6 * pixels.std()
    with pytest.raises(ValueError, match="black, mean, blur"):
        empty_image(pixels, "white", black)


def test_blur_keeps_flat_pictures_and_the_mass_of_a_point() -> None:
    flat = torch.full((1, 3, 16, 16), 0.7)
    assert torch.allclose(blur(flat, 2.0), flat, atol=1e-6)
    point = torch.zeros(1, 1, 31, 31)
    point[..., 15, 15] = 1
    spread = blur(point, 2.0)
    assert spread.sum().item() == pytest.approx(1.0, abs=1e-5)
    # The peak of a discrete Gaussian of standard deviation 2 in two dimensions: 1 / (2 pi 4).
    assert spread.max().item() == pytest.approx(1 / (8 * torch.pi), rel=0.01)


def test_judge_by_splits_batches_and_gives_the_softmax() -> None:
    sizes = []

    def classify(x: torch.Tensor) -> torch.Tensor:
        sizes.append(len(x))
        return torch.stack([x.mean(dim=(1, 2, 3)), torch.zeros(len(x))], dim=1)

    x = torch.tensor([2.0, -1.0, 0.5])[:, None, None, None].expand(3, 1, 2, 2)
    judgement = judge_by(classify, batch_size=2)(x, torch.tensor([0, 0, 1]))
    assert sizes == [2, 1]
    sigmoid = torch.tensor([2.0, -1.0, -0.5]).sigmoid()
    assert torch.allclose(judgement.confidence, sigmoid)
    assert judgement.kept.tolist() == [True, False, False]
    with pytest.raises(ValueError, match="logits must be"):
        class_probability(torch.ones(3), torch.zeros(3))


def test_one_map_for_two_images_is_refused() -> None:
    images, ids = torch.rand(2, 3, 8, 8), torch.tensor([0, 1])
    with pytest.raises(ValueError, match="got 1 maps of 2 images"):
        confidence_curves(brightness, images, ids, torch.rand(1, 8, 8), torch.zeros(1, 3, 8, 8))


@pytest.mark.parametrize("steps", [0, -1])
def test_no_steps_are_refused(steps: int) -> None:
    x = torch.zeros(1, 3, 2, 2)
    with pytest.raises(ValueError, match="steps"):
        confidence_curves(brightness, x, torch.tensor([0]), torch.zeros(1, 2, 2), x, steps=steps)
