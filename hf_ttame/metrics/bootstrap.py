"""How far a mean may be off: 95 percent bootstrap intervals, paired where two methods saw the same images."""

from typing import NamedTuple

import numpy as np

RESAMPLES = 10_000
FEWEST = 20
"""Pairs below which a bootstrap interval is too narrow to say anything: of two equal methods it calls one better in a
tenth of the cases at 10 pairs, in half of them at 2."""
_AT_ONCE = 500


class Interval(NamedTuple):
    """A mean, its 95 percent interval and the number of images behind it."""

    mean: float
    low: float
    high: float
    n: int


def mean_intervals(columns: np.ndarray, *, resamples: int = RESAMPLES, seed: int = 0) -> list[Interval | None]:
    """Percentile bootstrap of the mean of every column; columns of the same images share their resamples.

    Args:
        columns: (B, m), finite; NaN marks images that were not measured and is left out of its column.
        resamples: drawn with replacement.
        seed: of the draw.

    Returns:
        One interval per column; None where a column holds nothing but NaN.

    Raises:
        ValueError: the array is not (B, m), or a value is infinite.
    """
    columns = np.asarray(columns, dtype=np.float64)
    if columns.ndim != 2:
        raise ValueError(f"columns must be (B, m), got shape {columns.shape}")
    if np.isinf(columns).any():
        raise ValueError("values must be finite, got infinity")
    found: list[Interval | None] = [None] * columns.shape[1]
    measured = ~np.isnan(columns)
    groups: dict[bytes, list[int]] = {}
    for index in range(columns.shape[1]):
        if measured[:, index].any():
            groups.setdefault(measured[:, index].tobytes(), []).append(index)
    for indices in groups.values():
        values = columns[measured[:, indices[0]]][:, indices]
        n = len(values)
        generator = np.random.default_rng(seed)
        means = np.concatenate(
            [
                generator.multinomial(n, np.full(n, 1 / n), size=min(_AT_ONCE, resamples - start)) @ values / n
                for start in range(0, resamples, _AT_ONCE)
            ]
        )
        low, high = np.percentile(means, [2.5, 97.5], axis=0)
        for place, index in enumerate(indices):
            found[index] = Interval(float(values[:, place].mean()), float(low[place]), float(high[place]), n)
    return found


def mean_interval(values: np.ndarray, *, resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """`mean_intervals` of one column (B,).

    Raises:
        ValueError: no value is left, the array is not (B,), or a value is infinite.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or not (~np.isnan(values)).any():
        raise ValueError(f"values must be (B,) with B at least 1 that are not NaN, got shape {values.shape}")
    (found,) = mean_intervals(values[:, None], resamples=resamples, seed=seed)
    assert found is not None
    return found


def paired_interval(
    ours: np.ndarray, theirs: np.ndarray, *, resamples: int = RESAMPLES, seed: int = 0
) -> Interval | None:
    """Interval of the mean of `ours - theirs` over the images that both measured; None where there are none.

    Args:
        ours, theirs: (B,), row i of both is image i; NaN marks images that were not measured.

    Raises:
        ValueError: the lengths differ.
    """
    ours, theirs = np.asarray(ours, dtype=np.float64), np.asarray(theirs, dtype=np.float64)
    if ours.shape != theirs.shape or ours.ndim != 1:
        raise ValueError(f"paired values must be (B,) of the same images, got {ours.shape} and {theirs.shape}")
    difference = ours - theirs
    if np.isnan(difference).all():
        return None
    return mean_interval(difference, resamples=resamples, seed=seed)
