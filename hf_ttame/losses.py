"""The T-TAME loss (arXiv 2403.04523, section III): keep the class, with a small and smooth mask."""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from .answers import classification_loss


@dataclass(frozen=True)
class LossWeights:
    """Weights and constants of the loss; the defaults are the authors'.

    `reference_classes`: the variation term sums over the class maps, so its size grows with their number N while the
    other terms stay. Its weight is therefore multiplied by reference_classes / N; 32 is the authors' batch, where
    nothing changes. None leaves the weight as it is, the literal formula for any N.
    """

    cross_entropy: float = 1.5
    area: float = 2.0
    variation: float = 0.01
    area_exponent: float = 0.3
    area_offset: float = 0.0005
    border: float = 0.3
    reference_classes: int | None = 32


class LossTerms(NamedTuple):
    """`total` is the weighted sum to minimise; the three terms stand unweighted. Scalars."""

    total: torch.Tensor
    cross_entropy: torch.Tensor
    area: torch.Tensor
    variation: torch.Tensor


def area_term(masks: torch.Tensor, counts: torch.Tensor, weights: LossWeights) -> torch.Tensor:
    """mean((A + offset) ** exponent) over images, class maps (each `counts` times) and pixels."""
    per_map = ((masks + weights.area_offset) ** weights.area_exponent).mean(dim=(-2, -1))
    return (per_map * counts).sum() / (counts.sum() * masks.shape[0])


def variation_term(masks: torch.Tensor, counts: torch.Tensor, weights: LossWeights) -> torch.Tensor:
    """Squared differences between neighbours plus the squared border, summed, over 2 B. Corners are in two borders."""
    rows = (masks[..., 1:, :] - masks[..., :-1, :]).square().sum(dim=(-2, -1))
    columns = (masks[..., :, 1:] - masks[..., :, :-1]).square().sum(dim=(-2, -1))
    lines = (masks[..., 0, :], masks[..., -1, :], masks[..., :, 0], masks[..., :, -1])
    border = sum((line.square().sum(dim=-1) for line in lines), torch.zeros_like(rows))
    return ((rows + columns + weights.border * border) * counts).sum() / (2 * masks.shape[0])


def ttame_loss(
    masked_logits: torch.Tensor,
    targets: torch.Tensor,
    masks: torch.Tensor,
    weights: LossWeights = LossWeights(),
    counts: torch.Tensor | None = None,
    outputs: str = "softmax",
) -> LossTerms:
    """Loss of one batch: 1.5 cross-entropy + 2 area + 0.01 variation (arXiv 2403.04523, eq. of the training loss).

    Args:
        masked_logits: (B, K), the classifier's logits of the masked images.
        targets: (B,), the classes that the classifier predicted on the unmasked images.
        masks: (B, N, h, w) in [0, 1]: for every image the masks of all N distinct classes of the batch.
        weights: weights and constants.
        counts: (N,), how often each class occurs in the batch; None: once each.
        outputs: what the logits mean, see `classification_loss`.

    Returns:
        The weighted total and the three unweighted terms.
    """
    if masks.ndim != 4:
        raise ValueError(f"masks must be (B, N, h, w), got shape {tuple(masks.shape)}")
    masks = masks.to(torch.promote_types(masks.dtype, torch.float32))  # the sums overflow half precision
    counts = masks.new_ones(masks.shape[1]) if counts is None else counts.to(masks)
    if counts.shape != masks.shape[1:2]:
        raise ValueError(f"counts must be (N,) with N = {masks.shape[1]} class maps, got {tuple(counts.shape)}")
    cross_entropy = classification_loss(masked_logits, targets, outputs)
    area = area_term(masks, counts, weights)
    variation = variation_term(masks, counts, weights)
    scale = 1.0 if weights.reference_classes is None else weights.reference_classes / counts.sum()
    total = weights.cross_entropy * cross_entropy + weights.area * area + weights.variation * scale * variation
    return LossTerms(total, cross_entropy, area, variation)
