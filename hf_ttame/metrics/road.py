"""ROAD: remove pixels in the order of a map and debias by imputing them (Rong et al., arXiv 2202.00449).

A removed pixel becomes the weighted mean of its eight neighbours (1/6 beside, 1/12 diagonal), some of them removed
themselves: one sparse symmetric system per picture. All pictures and channels of a batch are solved at once, by
conjugate gradients whose products with the matrix are 3 x 3 convolutions, preconditioned with a multigrid cycle; a
little noise is added to the solution so that no classifier can tell imputed regions by their smoothness.
"""

import warnings
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from ..masking import resize_maps
from .judging import Judge
from .ordering import pixel_ranks

FRACTIONS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 0.9)
NOISE = 0.01  # standard deviation, of normalised values as in the package grad-cam; the paper's: of [0, 1] pixels
_MAX_ITERATIONS = 200


def _neighbours(x: torch.Tensor) -> torch.Tensor:
    """Weighted sum of the eight neighbours of every pixel, zeros beyond the border, (B, C, H, W)."""
    if x.is_cuda:
        return _by_sums(x)
    channels = x.shape[1]
    kernel = x.new_tensor([[1, 2, 1], [2, 0, 2], [1, 2, 1]]) / 12
    return F.conv2d(x, kernel.expand(channels, 1, 3, 3), padding=1, groups=channels)


def _by_sums(x: torch.Tensor) -> torch.Tensor:
    """The same without a convolution, which a GPU may round to TensorFloat-32."""
    padded = F.pad(x, (1, 1, 1, 1))
    rows = padded[..., :-2, :] + 2 * padded[..., 1:-1, :] + padded[..., 2:, :]
    return (rows[..., :-2] + 2 * rows[..., 1:-1] + rows[..., 2:] - 4 * x) / 12


class _Level(NamedTuple):
    removed: torch.Tensor  # (B, 1, h, w), 1 where a value is wanted
    weight: torch.Tensor  # (1, 1, h, w), sum of the weights of the neighbours inside the picture


def _levels(removed: torch.Tensor) -> list[_Level]:
    levels = []
    while True:
        levels.append(_Level(removed, _neighbours(torch.ones_like(removed[:1]))))
        height, width = removed.shape[-2:]
        if min(height, width) <= 4 or not removed.any():
            return levels
        # A coarse cell is wanted where all of its four pixels are; a cell over the border counts as given.
        padded = F.pad(removed, (0, width % 2, 0, height % 2))
        removed = -F.max_pool2d(-padded, 2)


def _apply(level: _Level, x: torch.Tensor) -> torch.Tensor:
    """The system's matrix times x: own weight minus the wanted neighbours, on the wanted pixels."""
    return (level.weight * x - _neighbours(x)) * level.removed


def _cycle(levels: Sequence[_Level], residual: torch.Tensor) -> torch.Tensor:
    """One symmetric multigrid V-cycle: an approximate solution of A x = residual."""
    level = levels[0]
    damping = 0.8 / level.weight
    x = damping * residual
    if len(levels) == 1:
        for _ in range(8):
            x = x + damping * (residual - _apply(level, x))
        return x
    left = residual - _apply(level, x)
    height, width = left.shape[-2:]
    padded = F.pad(left, (0, width % 2, 0, height % 2))
    coarse = _cycle(levels[1:], 4 * F.avg_pool2d(padded, 2) * levels[1].removed)
    correction = coarse.repeat_interleave(2, dim=-2).repeat_interleave(2, dim=-1)[..., :height, :width]
    x = x + correction * level.removed
    return x + damping * (residual - _apply(level, x))


def impute(
    pixel_values: torch.Tensor,
    removed: torch.Tensor,
    *,
    noise: float = NOISE,
    seed: int = 0,
    tolerance: float = 1e-4,
) -> torch.Tensor:
    """Fill removed pixels with the weighted mean of their neighbours, plus noise.

    Args:
        pixel_values: (B, C, H, W), any space.
        removed: (B, H, W) bool, True where the pixel is unknown. Where all of a picture is, it becomes noise around 0.
        noise: standard deviation of the Gaussian noise added to imputed pixels, in units of `pixel_values`.
        seed: of the noise; the same noise for every picture of the batch.
        tolerance: largest residual of a filled pixel's equation, relative to the largest value; a filled pixel is then
            off by a few times that, far below the noise.

    Returns:
        (B, C, H, W): given pixels unchanged.

    Raises:
        ValueError: the shapes do not fit.

    Warns:
        RuntimeWarning: the tolerance was not reached.
    """
    if pixel_values.ndim != 4 or removed.shape != (pixel_values.shape[0], *pixel_values.shape[-2:]):
        raise ValueError(
            f"pixel_values must be (B, C, H, W) and removed (B, H, W), got {tuple(pixel_values.shape)} and "
            f"{tuple(removed.shape)}"
        )
    wanted = removed[:, None].to(pixel_values.dtype)
    # Channels last: the depth-wise convolutions run five times as fast on a processor.
    known = (pixel_values * (1 - wanted)).contiguous(memory_format=torch.channels_last)
    levels = _levels(wanted)
    right = _neighbours(known) * wanted
    # A good start: means over ever larger squares, the smallest that holds a given pixel.
    x = _pull_push(known, 1 - wanted) * wanted
    residual = right - _apply(levels[0], x)
    scale = known.abs().amax(dim=(1, 2, 3), keepdim=True).clamp(min=1e-12)
    z = _cycle(levels, residual)
    direction = z
    inner = (residual * z).sum(dim=(2, 3), keepdim=True)
    for _ in range(_MAX_ITERATIONS):
        if bool((residual.abs() <= tolerance * scale).all()):
            break
        product = _apply(levels[0], direction)
        curvature = (direction * product).sum(dim=(2, 3), keepdim=True)
        step = torch.where(curvature > 0, inner / curvature.clamp(min=1e-30), torch.zeros_like(inner))
        x = x + step * direction
        residual = residual - step * product
        z = _cycle(levels, residual)
        following = (residual * z).sum(dim=(2, 3), keepdim=True)
        direction = z + torch.where(inner > 0, following / inner.clamp(min=1e-30), torch.zeros_like(inner)) * direction
        inner = following
    else:
        left = float((residual.abs() / scale).amax())
        if not left <= tolerance:  # NaN is not within it either
            warnings.warn(
                f"imputation stopped after {_MAX_ITERATIONS} iterations with a residual of {left:.1e}, above the "
                f"tolerance of {tolerance:.1e}; give finite float32 pixels, or allow a larger tolerance",
                RuntimeWarning,
                stacklevel=2,
            )
    if noise:
        generator = torch.Generator().manual_seed(seed)
        x = x + noise * torch.randn(x.shape[1:], generator=generator).to(x)
    return torch.where(removed[:, None], x, pixel_values)


def _pull_push(known: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
    height, width = known.shape[-2:]
    if min(height, width) <= 1 or bool((given > 0).all()):
        return known / given.clamp(min=1e-12)
    pad = (0, width % 2, 0, height % 2)
    coarse_given = F.avg_pool2d(F.pad(given, pad), 2)
    coarse = _pull_push(F.avg_pool2d(F.pad(known, pad), 2), coarse_given)
    rough = F.interpolate(coarse, size=(height, width), mode="bilinear", align_corners=False)
    return torch.where(given > 0, known / given.clamp(min=1e-12), rough)


def road_curves(
    judge: Judge,
    pixel_values: torch.Tensor,
    targets: torch.Tensor,
    maps: torch.Tensor,
    *,
    fractions: Sequence[float] = FRACTIONS,
    noise: float = NOISE,
    seed: int = 0,
) -> dict[str, torch.Tensor]:
    """Confidence in the class, and whether it is still predicted, after imputing a growing share of pixels.

    Args:
        judge: see `judging.judge_by`.
        pixel_values: (B, C, H, W), normalised.
        targets: (B,).
        maps: (B, h, w), any range, resized to the image.
        fractions: shares of the pixels to remove.
        noise: see `impute`.
        seed: order among ties, and noise.

    Returns:
        "morf confidence", "morf accuracy" (most relevant first, lower is better), "lerf confidence", "lerf accuracy"
        (least relevant first, higher is better), each (B, len(fractions)); accuracy is 0 or 1 per image.

    Raises:
        ValueError: no fractions or one outside (0, 1), or maps that are not (B, h, w) of these images.
    """
    if not fractions or not all(0 < fraction < 1 for fraction in fractions):
        raise ValueError(f"fractions must be shares in (0, 1), got {tuple(fractions)}; 10 percent is written 0.1")
    height, width = pixel_values.shape[-2:]
    ranks = pixel_ranks(resize_maps(maps, (height, width)), seed)
    curves: dict[str, list[torch.Tensor]] = {}
    for fraction in fractions:
        count = round(fraction * height * width)
        for order, removed in (("morf", ranks < count), ("lerf", ranks >= height * width - count)):
            judgement = judge(impute(pixel_values, removed, noise=noise, seed=seed), targets)
            curves.setdefault(f"{order} confidence", []).append(judgement.confidence)
            curves.setdefault(f"{order} accuracy", []).append(judgement.kept.float())
    return {name: torch.stack(values, dim=1) for name, values in curves.items()}
