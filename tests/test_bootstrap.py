"""Bootstrap intervals and the rows they are taken of."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_ttame.metrics import Accumulator, mean_interval, paired_interval


def test_interval_covers_the_mean_has_the_right_width_and_repeats() -> None:
    values = np.arange(100.0)
    found = mean_interval(values)
    assert found.mean == 49.5
    assert found.n == 100
    assert found.low < 49.5 < found.high
    # The standard error of the mean is 28.9 / 10; 1.96 of them are 5.7.
    assert found.high - found.low == pytest.approx(2 * 5.66, rel=0.1)
    assert mean_interval(values) == found


def test_interval_of_one_value_and_of_equal_values_is_that_value() -> None:
    assert mean_interval(np.array([3.0])) == (3.0, 3.0, 3.0, 1)
    assert mean_interval(np.full(7, 2.5))[:3] == (2.5, 2.5, 2.5)


def test_unmeasured_images_are_left_out_and_nonsense_is_refused() -> None:
    assert mean_interval(np.array([1.0, np.nan, 3.0])).n == 2
    for bad in (np.array([]), np.array([np.nan]), np.ones((2, 2))):
        with pytest.raises(ValueError, match="at least 1"):
            mean_interval(bad)
    with pytest.raises(ValueError, match="infinity"):
        mean_interval(np.array([1.0, np.inf]))


def test_a_paired_interval_sees_what_two_separate_ones_cannot() -> None:
    theirs = np.random.default_rng(0).normal(size=200) * 10
    ours = theirs - 0.5 + 0.01 * np.random.default_rng(1).normal(size=200)
    a, b = mean_interval(ours), mean_interval(theirs)
    assert a.low < b.high  # separately they overlap
    assert b.low < a.high
    paired = paired_interval(ours, theirs)
    assert paired is not None
    assert paired.low > -0.51
    assert paired.high < -0.49


def test_pairs_need_both_images() -> None:
    nan = np.nan
    paired = paired_interval(np.array([1.0, nan, 5.0]), np.array([0.0, 2.0, nan]))
    assert paired is not None
    assert paired == (1.0, 1.0, 1.0, 1)
    assert paired_interval(np.array([1.0, nan]), np.array([nan, 1.0])) is None
    with pytest.raises(ValueError, match="same images"):
        paired_interval(np.ones(2), np.ones(3))


@given(st.lists(st.floats(-100, 100), min_size=1, max_size=12), st.floats(-10, 10))
def test_an_interval_lies_among_the_values_and_shifts_with_them(values: list[float], shift: float) -> None:
    plain = mean_interval(np.array(values), resamples=500)
    moved = mean_interval(np.array(values) + shift, resamples=500)
    assert np.allclose(np.array(moved[:3]) - np.array(plain[:3]), shift, atol=1e-9)
    # Every resample's mean lies among the values; that the sample's own lies in the interval is not promised.
    assert min(values) - 1e-9 <= plain.low <= plain.high + 1e-9
    assert plain.high <= max(values) + 1e-9


def test_accumulator_replaces_repeated_keys_and_keeps_their_order() -> None:
    seen = Accumulator()
    seen.add([2, 0], {"drop": torch.tensor([20.0, 0.0])})
    seen.add([1, 2], {"drop": torch.tensor([10.0, 21.0]), "curve": torch.ones(2, 3)})
    seen.add([3], {"other": torch.tensor([1.0])})
    assert len(seen) == 4
    assert np.allclose(seen.column("drop"), [0.0, 10.0, 21.0, np.nan], equal_nan=True)
    assert seen.rows[2]["curve"] == [1.0, 1.0, 1.0]
    assert seen.gather().rows == seen.rows
    with pytest.raises(ValueError, match="one per key"):
        seen.add([0], {"drop": torch.ones(2)})
