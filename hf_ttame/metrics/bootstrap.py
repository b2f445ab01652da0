"""How far a mean may be off: 95 percent bootstrap intervals, paired where two methods saw the same images."""

from typing import NamedTuple

import numpy as np

RESAMPLES = 10_000
_AT_ONCE = 500


class Interval(NamedTuple):
    """A mean, its 95 percent interval and the number of images behind it."""

    mean: float
    low: float
    high: float
    n: int


def mean_interval(values: np.ndarray, *, resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """Percentile bootstrap of the mean of per-image values.

    Args:
        values: (B,), finite; NaN marks images that were not measured and is left out.
        resamples: drawn with replacement.
        seed: of the draw.

    Raises:
        ValueError: no value is left, the array is not (B,), or a value is infinite.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or not (~np.isnan(values)).any():
        raise ValueError(f"values must be (B,) with B at least 1 that are not NaN, got shape {values.shape}")
    values = values[~np.isnan(values)]
    if not np.isfinite(values).all():
        raise ValueError("values must be finite, got infinity")
    generator = np.random.default_rng(seed)
    means = np.concatenate(
        [
            values[generator.integers(len(values), size=(min(_AT_ONCE, resamples - start), len(values)))].mean(axis=1)
            for start in range(0, resamples, _AT_ONCE)
        ]
    )
    low, high = np.percentile(means, [2.5, 97.5])
    return Interval(float(values.mean()), float(low), float(high), len(values))


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
