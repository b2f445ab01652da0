"""Average drop and increase in confidence: what the classifier still says when only the map's top is left.

Chattopadhay et al., Grad-CAM++ (arXiv 1710.11063), at the shares of arXiv 2403.04523: 100, 50 and 15 percent.
"""

import torch

from ..masking import apply_mask, keep_top, min_max, resize_maps
from .judging import Judge

FRACTIONS = (1.0, 0.5, 0.15)


def drops(p: torch.Tensor, p_masked: torch.Tensor) -> torch.Tensor:
    """Per image, the lost share of the confidence in percent: 100 * max(0, p - p_masked) / p, (B,) in [0, 100].

    Args:
        p: (B,) softmax probability, in (0, 1], of the class predicted on the whole image.
        p_masked: (B,) in [0, 1], probability of the same class on the masked image.

    Raises:
        ValueError: shapes differ, the batch is empty, or a value is no probability.
    """
    _check(p, p_masked)
    return 100 * (p - p_masked).clamp(min=0) / p


def increases(p: torch.Tensor, p_masked: torch.Tensor) -> torch.Tensor:
    """Per image, 100 where the masked image is classified with more confidence than the whole one, else 0, (B,).

    Arguments and errors as `drops`.
    """
    _check(p, p_masked)
    return 100.0 * (p_masked > p).to(p.dtype)


def average_drop(p: torch.Tensor, p_masked: torch.Tensor) -> float:
    """AD = 100 * mean(max(0, p - p_masked) / p), percent, lower is better. Arguments and errors as `drops`."""
    return float(drops(p, p_masked).mean())


def increase_in_confidence(p: torch.Tensor, p_masked: torch.Tensor) -> float:
    """IC = 100 * mean(p_masked > p), percent, higher is better. Arguments and errors as `drops`."""
    return float(increases(p, p_masked).mean())


def _check(p: torch.Tensor, p_masked: torch.Tensor) -> None:
    if p.shape != p_masked.shape or p.ndim != 1 or p.numel() == 0:
        raise ValueError(
            f"p and p_masked must be (B,) of the same B >= 1, got {tuple(p.shape)} and {tuple(p_masked.shape)}"
        )
    if not (p > 0).all() or not (p <= 1).all() or not (p_masked >= 0).all() or not (p_masked <= 1).all():
        raise ValueError("p must lie in (0, 1] and p_masked in [0, 1]; give softmax probabilities, not logits")


def masked_confidence(
    judge: Judge,
    pixel_values: torch.Tensor,
    targets: torch.Tensor,
    maps: torch.Tensor,
    black: torch.Tensor,
    *,
    seed: int = 0,
) -> dict[str, torch.Tensor]:
    """Confidence in `targets` after masking with each map, soft and binary, at 100, 50 and 15 percent.

    Every map is resized to the image and min-max scaled; exactly round(v * H * W) pixels are kept, the rest becomes
    black. Soft masks keep the map's values, binary ones are 1 on the kept pixels.

    Args:
        judge: see `judging.judge_by`.
        pixel_values: (B, C, H, W), normalised.
        targets: (B,), classes predicted on `pixel_values`.
        maps: (B, h, w), any range.
        black: (C,), black in normalised space (`TTameModel.fill()`).
        seed: order among ties.

    Returns:
        {"soft 100": (B,), "soft 50", "soft 15", "binary 50", "binary 15"} and "mean", the mean soft mask value (B,).

    Raises:
        ValueError: the number of maps is not that of the images.
    """
    height, width = pixel_values.shape[-2:]
    scaled = min_max(resize_maps(maps, (height, width)))
    found = {"mean": scaled.mean(dim=(-2, -1))}
    masks = {"soft 100": scaled}
    for fraction in FRACTIONS[1:]:
        kept = keep_top(scaled, fraction, binary=True, seed=seed)
        masks[f"soft {100 * fraction:.0f}"] = kept * scaled
        masks[f"binary {100 * fraction:.0f}"] = kept
    for name, mask in masks.items():
        # Where a mask is 1 the pixel itself stands: rounding must not make an all-ones map an increase in confidence.
        masked = torch.where(mask[:, None] == 1, pixel_values, apply_mask(pixel_values, mask, black))
        found[name] = judge(masked, targets).confidence
    return found
