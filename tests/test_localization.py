"""Pointing game, energy, mosaics, against values worked out by hand."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from map_pairs import map_and_increased

from hf_ttame.metrics import energy_inside, grid_pointing, pointing_game
from hf_ttame.metrics.localization import box_region, fit, half_size, mosaic, quadrants

REGION = torch.tensor([[[True, True], [False, False]]])


def test_pointing_game_by_hand() -> None:
    assert pointing_game(torch.tensor([[[0.1, 0.9], [0.3, 0.2]]]), REGION).item() == 1
    assert pointing_game(torch.tensor([[[0.1, 0.2], [0.3, 0.9]]]), REGION).item() == 0
    # Three pixels share the maximum, one of them inside; a constant map scores the region's area.
    assert pointing_game(torch.tensor([[[0.1, 0.9], [0.9, 0.9]]]), REGION).item() == pytest.approx(1 / 3)
    assert pointing_game(torch.ones(1, 2, 2), REGION).item() == 0.5


def test_energy_by_hand() -> None:
    assert energy_inside(torch.tensor([[[1.0, 2.0], [3.0, 4.0]]]), REGION).item() == pytest.approx(0.3)
    assert energy_inside(torch.zeros(1, 2, 2), REGION).item() == 0.5
    with pytest.raises(ValueError, match="min_max"):
        energy_inside(-torch.ones(1, 2, 2), REGION)


@pytest.mark.parametrize("measure", [pointing_game, energy_inside])
def test_regions_must_fit_and_hold_something(measure) -> None:
    with pytest.raises(ValueError, match="at least one pixel"):
        measure(torch.rand(1, 2, 2), torch.zeros(1, 2, 2, dtype=torch.bool))
    for bad in (torch.ones(1, 2, 2), torch.ones(1, 2, 3, dtype=torch.bool)):
        with pytest.raises(ValueError, match="must fit"):
            measure(torch.rand(1, 2, 2), bad)


@settings(max_examples=30)
@given(st.integers(0, 10_000), st.floats(0.1, 5))
def test_a_region_and_its_complement_share_the_map(seed: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    maps = torch.rand(2, 5, 6, generator=generator)
    region = torch.rand(2, 5, 6, generator=generator) < 0.5
    region[:, 0, 0], region[:, -1, -1] = True, False
    for measure in (pointing_game, energy_inside):
        inside, outside = measure(maps, region), measure(maps, ~region)
        assert torch.allclose(inside + outside, torch.ones(2), atol=1e-5)
        assert torch.allclose(measure(maps * scale, region), inside, atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(map_and_increased())
def test_an_increasing_change_of_the_map_keeps_the_pointing_game(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    maps, risen = pair
    region = quadrants((6, 6))[:1]
    assert torch.equal(pointing_game(risen, region), pointing_game(maps, region))


def test_box_region_takes_pixels_by_their_centres() -> None:
    region = box_region((1, 0, 3, 1.5), (3, 4))
    assert region.int().tolist() == [[0, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0]]
    with pytest.raises(ValueError, match="right > left"):
        box_region((3, 0, 1, 1), (3, 4))


def test_mosaic_lays_tiles_where_quadrants_say() -> None:
    tiles = torch.arange(1.0, 5.0)[:, None, None, None].expand(4, 3, 4, 6)
    image = mosaic(half_size(tiles, (4, 6)))
    assert image.shape == (3, 4, 6)
    for index, region in enumerate(quadrants((4, 6))):
        assert torch.allclose(image[:, region], torch.tensor(index + 1.0))
    assert quadrants((5, 7)).sum(dim=0).eq(1).all()
    assert fit(image, (5, 7)).shape == (3, 5, 7)
    with pytest.raises(ValueError, match="takes"):
        mosaic(tiles[:3])


def test_a_fifth_tile_is_refused() -> None:
    with pytest.raises(ValueError, match="tiles must be 0 to 3"):
        grid_pointing(torch.rand(1, 4, 4), torch.tensor([4]))


def test_grid_pointing_by_hand() -> None:
    maps = torch.zeros(3, 4, 4)
    maps[0, :2, 2:] = 1.0  # all of it top right
    maps[1] = 1.0  # everywhere
    maps[2, :2, :2] = 1.0
    maps[2, 2:, 2:] = 1.0  # half top left, half bottom right
    assert grid_pointing(maps, torch.tensor([1, 0, 3])).tolist() == pytest.approx([1.0, 0.25, 0.5])
    assert grid_pointing(maps[:1] - 7, torch.tensor([2])).item() == 0


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.1, 5), st.floats(-5, 5))
def test_a_positive_affine_change_of_the_map_keeps_grid_pointing(seed: int, scale: float, shift: float) -> None:
    maps, tiles = torch.rand(4, 6, 6, generator=torch.Generator().manual_seed(seed)), torch.arange(4)
    assert torch.allclose(grid_pointing(scale * maps + shift, tiles), grid_pointing(maps, tiles), atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 7), st.integers(2, 7))
def test_the_four_tiles_share_one_map(seed: int, height: int, width: int) -> None:
    one = torch.rand(1, height, width, generator=torch.Generator().manual_seed(seed))
    shares = grid_pointing(one.expand(4, -1, -1), torch.arange(4))
    assert shares.sum().item() == pytest.approx(1.0, abs=1e-5)
