"""Measures of explanations. They take maps and probabilities, never explainers."""

from .confidence import average_drop, increase_in_confidence

__all__ = ["average_drop", "increase_in_confidence"]
