"""Entropy, area, coherency and ADCC, against values worked out by hand."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_ttame.metrics import adcc, area, coherency, entropy


def test_entropy_by_hand() -> None:
    one = torch.zeros(2, 2)
    one[0, 1] = 3.0
    maps = torch.stack([one, torch.ones(2, 2), torch.tensor([[0.5, 0.5], [0.0, 0.0]]), torch.zeros(2, 2)])
    # One pixel: 0. Uniform: 1. Two of four: log 2 / log 4. A map of zeros claims nothing: uniform.
    assert entropy(maps).tolist() == pytest.approx([0.0, 1.0, 0.5, 1.0])
    with pytest.raises(ValueError, match="non-negative"):
        entropy(-maps)


@given(st.lists(st.floats(0.0, 1.0), min_size=4, max_size=4), st.floats(0.1, 10))
def test_entropy_lies_in_0_1_and_ignores_the_scale(values: list[float], scale: float) -> None:
    maps = torch.tensor(values, dtype=torch.float64).reshape(1, 2, 2)
    found = entropy(maps)
    assert -1e-6 <= found.item() <= 1 + 1e-6
    if maps.sum() > 1e-6:
        assert entropy(maps * scale).item() == pytest.approx(found.item(), abs=1e-5)


def test_a_threshold_in_percent_is_refused() -> None:
    with pytest.raises(ValueError, match="threshold must lie in"):
        area(torch.rand(1, 4, 4), threshold=50)


def test_area_by_hand() -> None:
    maps = torch.tensor([[[0.0, 2.0], [4.0, 3.0]], [[1.0, 1.0], [1.0, 1.0]]])
    # Scaled: 0, 0.5, 1, 0.75: two of four are above a half. All ones: everything.
    assert area(maps).tolist() == [0.5, 1.0]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.floats(0, 1))
def test_area_lies_in_0_1_and_ignores_flips(seed: int, threshold: float) -> None:
    maps = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(seed))
    found = area(maps, threshold)
    assert ((found >= 0) & (found <= 1)).all()
    for flipped in (maps.flip(-1), maps.flip(-2)):
        assert torch.allclose(area(flipped, threshold), found)


def test_coherency_by_hand() -> None:
    a = torch.tensor([[[0.0, 1.0], [2.0, 3.0]]])
    assert coherency(a, 5 * a + 1).item() == pytest.approx(1.0)
    assert coherency(a, -a).item() == pytest.approx(0.0)
    assert coherency(a, torch.ones_like(a)).item() == pytest.approx(0.5)
    # r of (0, 1, 2, 3) with (1, 0, 3, 2): centred products 3 of 5.
    assert coherency(a, torch.tensor([[[1.0, 0.0], [3.0, 2.0]]])).item() == pytest.approx((1 + 3 / 5) / 2)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.1, 5), st.floats(-5, 5))
def test_coherency_of_a_map_with_itself_is_1_both_ways_the_same_and_ignores_positive_affine_changes(
    seed: int, scale: float, shift: float
) -> None:
    a, b = torch.rand(2, 3, 6, 6, generator=torch.Generator().manual_seed(seed))
    assert torch.allclose(coherency(a, a), torch.ones(3))
    found = coherency(a, b)
    assert torch.allclose(coherency(b, a), found)
    assert torch.allclose(coherency(scale * a + shift, b), found, atol=1e-5)
    assert torch.allclose(coherency(a, scale * b + shift), found, atol=1e-5)


def test_adcc_by_hand() -> None:
    # 3 / (1/0.5 + 1/0.5 + 1/0.5) = 0.5; 3 / (1 + 1/0.75 + 1/0.5) = 3 / 4.3333; a complete drop makes it 0.
    found = adcc(torch.tensor([0.5, 1.0, 1.0]), torch.tensor([0.5, 0.25, 0.2]), torch.tensor([0.5, 0.5, 1.0]))
    assert found.tolist() == pytest.approx([0.5, 3 / (1 + 4 / 3 + 2), 0.0])
    with pytest.raises(ValueError, match="no percent"):
        adcc(torch.tensor([0.5]), torch.tensor([0.5]), torch.tensor([50.0]))


shares = st.floats(0.01, 0.99)


@given(shares, shares, shares, st.floats(0.0, 0.5))
def test_adcc_lies_between_its_parts_and_rewards_each(c: float, k: float, d: float, better: float) -> None:
    def value(*parts: float) -> float:
        return adcc(*(torch.tensor([part]) for part in parts)).item()

    found = value(c, k, d)
    assert min(c, 1 - k, 1 - d) - 1e-6 <= found <= max(c, 1 - k, 1 - d) + 1e-6
    assert value(min(1.0, c + better), k, d) >= found - 1e-6
    assert value(c, k * (1 - better), d) >= found - 1e-6
    assert value(c, k, d * (1 - better)) >= found - 1e-6
    assert not math.isnan(found)
