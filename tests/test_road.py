"""ROAD: imputation against equations solved by hand and against the grad-cam package."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from map_pairs import map_and_increased

from hf_ttame.metrics import Judgement, impute, road, road_curves
from hf_ttame.metrics.ordering import pixel_ranks
from hf_ttame.metrics.road import _by_sums, _neighbours


def test_one_removed_pixel_becomes_the_weighted_mean_of_its_neighbours() -> None:
    image = torch.arange(9.0).reshape(1, 1, 3, 3)
    removed = torch.zeros(1, 3, 3, dtype=torch.bool)
    removed[0, 1, 1] = True
    image[0, 0, 1, 1] = 1000.0
    filled = impute(image, removed, noise=0)[0, 0]
    # Beside it 1, 3, 5, 7 at 1/6; diagonal 0, 2, 6, 8 at 1/12.
    assert filled[1, 1].item() == pytest.approx((1 + 3 + 5 + 7) / 6 + (0 + 2 + 6 + 8) / 12, abs=1e-3)
    assert torch.equal(filled[0], image[0, 0, 0])


def test_a_removed_corner_weighs_only_the_neighbours_it_has() -> None:
    image = torch.tensor([[9.0, 2.0], [4.0, 6.0]]).reshape(1, 1, 2, 2)
    removed = torch.tensor([[[True, False], [False, False]]])
    filled = impute(image, removed, noise=0)[0, 0, 0, 0].item()
    assert filled == pytest.approx((2 / 6 + 4 / 6 + 6 / 12) / (1 / 6 + 1 / 6 + 1 / 12), abs=1e-3)


def test_two_removed_neighbours_solve_their_common_equations() -> None:
    # One row a, x, y, b: x = (a + y) / 2 and y = (x + b) / 2, so x = (2a + b) / 3.
    image = torch.tensor([0.0, 50.0, 50.0, 3.0]).reshape(1, 1, 1, 4)
    removed = torch.tensor([[[False, True, True, False]]])
    filled = impute(image, removed, noise=0, tolerance=1e-6)[0, 0, 0]
    assert filled.tolist() == pytest.approx([0.0, 1.0, 2.0, 3.0], abs=1e-4)


def test_noise_touches_only_what_is_imputed_and_is_seeded() -> None:
    image = torch.rand(2, 3, 20, 20)
    removed = torch.rand(2, 20, 20) < 0.4
    plain, noisy = impute(image, removed, noise=0), impute(image, removed, noise=0.1, seed=3)
    assert torch.equal(noisy, impute(image, removed, noise=0.1, seed=3))
    assert not torch.equal(noisy, impute(image, removed, noise=0.1, seed=4))
    given_pixels = ~removed[:, None].expand_as(image)
    assert torch.equal(noisy[given_pixels], image[given_pixels])
    assert (noisy - plain)[~given_pixels].std().item() == pytest.approx(0.1, rel=0.15)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.05, 0.95), st.integers(5, 30), st.integers(5, 30))
def test_imputed_values_stay_within_the_given_ones(seed: int, share: float, height: int, width: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    image = torch.rand(1, 2, height, width, generator=generator)
    removed = torch.rand(1, height, width, generator=generator) < share
    removed[0, 0, 0] = False
    filled = impute(image, removed, noise=0)
    for channel in range(2):
        values = image[0, channel][~removed[0]]
        inside = filled[0, channel]
        assert inside.min() >= values.min() - 0.01
        assert inside.max() <= values.max() + 0.01
    # A brighter picture is filled brighter by as much: the fill is a mean.
    assert torch.allclose(impute(image + 1, removed, noise=0), filled + 1, atol=0.01)


def test_an_imputation_that_stops_short_of_its_tolerance_says_so(monkeypatch) -> None:
    image = torch.rand(1, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    removed = torch.ones(1, 24, 24, dtype=torch.bool)
    removed[0, 0, 0] = removed[0, -1, -1] = False
    monkeypatch.setattr(road, "_MAX_ITERATIONS", 2)
    with pytest.warns(
        RuntimeWarning, match=r"after 2 iterations with a residual of \d.*above the tolerance of 1.0e-06"
    ):
        impute(image, removed, tolerance=1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        impute(image, removed, tolerance=1.0)
        # The last step counts: what it brings within the tolerance has converged.
        removed[:] = False
        removed[0, 3, 3] = True
        monkeypatch.setattr(road, "_MAX_ITERATIONS", 1)
        impute(image, removed)


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 3, 5, 4), (1, 2, 16, 17)])
def test_sums_of_neighbours_are_those_of_the_convolution(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(_by_sums(x), _neighbours(x))


def test_degenerate_masks() -> None:
    image = torch.rand(2, 3, 9, 7)
    assert torch.equal(impute(image, torch.zeros(2, 9, 7, dtype=torch.bool)), image)
    assert torch.isfinite(impute(image, torch.ones(2, 9, 7, dtype=torch.bool))).all()
    with pytest.raises(ValueError, match="removed"):
        impute(image, torch.zeros(2, 7, 9, dtype=torch.bool))


@pytest.mark.parametrize("kind", ["blob", "scattered"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_imputation_agrees_with_the_grad_cam_package(share: float, kind: str) -> None:
    road = pytest.importorskip("pytorch_grad_cam.metrics.road")
    generator = torch.Generator().manual_seed(1)
    image = F.interpolate(torch.randn(2, 3, 9, 9, generator=generator), size=(57, 60), mode="bicubic")
    coarse = (6, 6) if kind == "blob" else (57, 60)
    maps = F.interpolate(torch.rand(2, 1, *coarse, generator=generator), size=(57, 60), mode="bilinear")[:, 0]
    removed = pixel_ranks(maps) < round(share * 57 * 60)
    ours = impute(image, removed, noise=0)
    reference = road.NoisyLinearImputer(noise=0.0)
    for index in range(2):
        theirs = reference(image[index], (~removed[index]).float())
        assert (ours[index] - theirs).abs().max() < 5e-3  # half of the noise that is added


def brightness(pixel_values: torch.Tensor, class_ids: torch.Tensor) -> Judgement:
    mean = pixel_values.mean(dim=(1, 2, 3))
    return Judgement(mean, mean > 0.3)


def test_curves_rank_a_map_of_the_bright_blob_above_its_opposite() -> None:
    image = torch.zeros(1, 3, 24, 24)
    image[..., 6:14, 6:18] = 1.0  # a sixth is bright
    blob, targets = image[:, 0], torch.zeros(1, dtype=torch.long)
    good = road_curves(brightness, image, targets, blob, noise=0)
    bad = road_curves(brightness, image, targets, -blob, noise=0)
    assert good.keys() == {"morf confidence", "morf accuracy", "lerf confidence", "lerf accuracy"}
    assert good["morf confidence"].shape == (1, 7)
    assert good["morf confidence"].mean() < bad["morf confidence"].mean()
    assert good["lerf confidence"].mean() > bad["lerf confidence"].mean()
    # With the whole blob gone, at 20 percent and more, nothing bright is left to spread.
    assert good["morf confidence"][0, 1:].max() < 0.01


@settings(max_examples=20, deadline=None)
@given(map_and_increased())
def test_an_increasing_change_of_the_map_changes_no_curve(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    image = torch.rand(1, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    plain, changed = (road_curves(brightness, image, torch.tensor([0]), x, fractions=(0.2, 0.5)) for x in pair)
    for name in plain:
        assert torch.equal(changed[name], plain[name]), name


def test_curves_agree_with_the_grad_cam_package() -> None:
    """The same map, the same share: the package's confidence after removal, most and least relevant first."""
    road = pytest.importorskip("pytorch_grad_cam.metrics.road")
    perturbation = pytest.importorskip("pytorch_grad_cam.metrics.perturbation_confidence")
    generator = torch.Generator().manual_seed(2)
    image = F.interpolate(torch.randn(1, 3, 8, 8, generator=generator), size=(40, 40), mode="bicubic")
    maps = torch.rand(1, 40, 40, generator=generator)  # no ties, so that percentiles cut where ranks do
    ours = road_curves(brightness, image, torch.zeros(1, dtype=torch.long), maps, fractions=[0.2], noise=0)
    imputer = road.NoisyLinearImputer(noise=0.0)
    for name, remover in (
        ("morf", perturbation.RemoveMostRelevantFirst(80, imputer)),
        ("lerf", perturbation.RemoveLeastRelevantFirst(80, imputer)),
    ):
        theirs = remover(image[0], maps[0]).mean().item()
        assert ours[f"{name} confidence"].item() == pytest.approx(theirs, abs=2e-3)


def test_shares_are_checked() -> None:
    image = torch.zeros(1, 3, 4, 4)
    for fractions in ([], [10], [0.5, 1.0]):
        with pytest.raises(ValueError, match="fractions"):
            road_curves(brightness, image, torch.tensor([0]), torch.zeros(1, 4, 4), fractions=fractions)
    flat = road_curves(brightness, image, torch.tensor([0]), torch.zeros(1, 4, 4))
    assert flat["morf confidence"].isfinite().all()
