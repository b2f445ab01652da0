"""What a classifier says of a class: the one place that turns logits into the p of every measure."""

from collections.abc import Callable
from typing import NamedTuple

import torch

from ..answers import answered, probabilities


class Judgement(NamedTuple):
    """Of one class per image: `confidence` (B,) in [0, 1], and `kept` (B,) bool, whether it is still predicted."""

    confidence: torch.Tensor
    kept: torch.Tensor


Judge = Callable[[torch.Tensor, torch.Tensor], Judgement]
"""(pixel_values (B, C, H, W), class_ids (B,)) -> Judgement."""


def class_probability(logits: torch.Tensor, class_ids: torch.Tensor, outputs: str = "softmax") -> torch.Tensor:
    """p of every measure: the probability (B,) of the explained class.

    Args:
        logits: (B, K).
        class_ids: (B,) in 0..K-1.
        outputs: what the logits mean, see `hf_ttame.answers`.

    Raises:
        ValueError: the shapes do not fit.
    """
    if logits.ndim != 2 or class_ids.shape != logits.shape[:1]:
        raise ValueError(
            f"logits must be (B, K) and class_ids (B,), got {tuple(logits.shape)} and {tuple(class_ids.shape)}"
        )
    return probabilities(logits, outputs).gather(1, class_ids[:, None].long())[:, 0]


def still_predicted(logits: torch.Tensor, class_ids: torch.Tensor, outputs: str = "softmax") -> torch.Tensor:
    """Whether the explained class is predicted, (B,) bool. Arguments as `class_probability`."""
    return answered(logits, outputs).gather(1, class_ids[:, None].long())[:, 0]


def judge_by(
    classify: Callable[[torch.Tensor], torch.Tensor], batch_size: int = 64, outputs: str = "softmax"
) -> Judge:
    """A judge from a function of pixel values to logits.

    Args:
        classify: (B, C, H, W) -> logits (B, K).
        batch_size: larger batches are split.
        outputs: what the logits mean, see `hf_ttame.answers`.
    """

    @torch.no_grad()
    def judge(pixel_values: torch.Tensor, class_ids: torch.Tensor) -> Judgement:
        parts = []
        for pixels, ids in zip(pixel_values.split(batch_size), class_ids.split(batch_size), strict=True):
            logits = classify(pixels)
            parts.append((class_probability(logits, ids, outputs), still_predicted(logits, ids, outputs)))
        return Judgement(torch.cat([p for p, _ in parts]), torch.cat([k for _, k in parts]))

    return judge
