"""Measures of explanations. They take maps and probabilities, never explainers."""

from .accumulator import Accumulator
from .bootstrap import Interval, mean_interval, paired_interval
from .complexity import adcc, area, coherency, entropy
from .confidence import average_drop, increase_in_confidence, masked_confidence
from .insertion_deletion import area_under, confidence_curves
from .judging import Judge, Judgement, class_probability, judge_by
from .localization import energy_inside, grid_pointing, pointing_game
from .road import impute, road_curves

__all__ = [
    "Accumulator",
    "Interval",
    "Judge",
    "Judgement",
    "adcc",
    "area",
    "area_under",
    "average_drop",
    "class_probability",
    "coherency",
    "confidence_curves",
    "energy_inside",
    "entropy",
    "grid_pointing",
    "impute",
    "increase_in_confidence",
    "judge_by",
    "masked_confidence",
    "mean_interval",
    "paired_interval",
    "pointing_game",
    "road_curves",
]
