"""Insertion and deletion: confidence while pixels come in or go in the order of the map (RISE, arXiv 1806.07421)."""

import math

import torch
import torch.nn.functional as F

from ..masking import resize_maps
from .judging import Judge
from .ordering import pixel_ranks

STARTS = ("black", "mean", "blur")
STEPS = 12


def blur(images: torch.Tensor, sigma: float) -> torch.Tensor:
    """Gaussian blur of images (B, C, H, W), `sigma` in pixels, borders mirrored."""
    radius = max(1, math.ceil(3 * sigma))
    radius = min(radius, images.shape[-1] - 1, images.shape[-2] - 1)  # mirroring reaches no further
    offsets = torch.arange(-radius, radius + 1, dtype=images.dtype, device=images.device)
    kernel = torch.exp(-offsets.square() / (2 * sigma**2))
    kernel = (kernel / kernel.sum()).expand(images.shape[1], 1, 1, -1)
    across = F.conv2d(F.pad(images, (radius, radius, 0, 0), mode="reflect"), kernel, groups=images.shape[1])
    upright = kernel.transpose(2, 3)
    return F.conv2d(F.pad(across, (0, 0, radius, radius), mode="reflect"), upright, groups=images.shape[1])


def empty_image(pixel_values: torch.Tensor, start: str, black: torch.Tensor) -> torch.Tensor:
    """What stands in place of removed pixels, (B, C, H, W), normalised.

    Args:
        pixel_values: (B, C, H, W), normalised.
        start: "black"; "mean", the mean colour of the training data (0 when normalised); "blur", the image itself,
            blurred with a standard deviation of a twentieth of its shorter side.
        black: (C,), black in normalised space.

    Raises:
        ValueError: an unknown start.
    """
    if start == "black":
        return black.to(pixel_values).reshape(1, -1, 1, 1).expand_as(pixel_values)
    if start == "mean":
        return torch.zeros_like(pixel_values)
    if start == "blur":
        return blur(pixel_values, min(pixel_values.shape[-2:]) / 20)
    raise ValueError(f"start must be one of {', '.join(STARTS)}, got {start!r}")


def confidence_curves(
    judge: Judge,
    pixel_values: torch.Tensor,
    targets: torch.Tensor,
    maps: torch.Tensor,
    empty: torch.Tensor,
    *,
    steps: int = STEPS,
    seed: int = 0,
) -> dict[str, torch.Tensor]:
    """Confidence in `targets` while the highest pixels are inserted into, or deleted towards, an empty image.

    Args:
        judge: see `judging.judge_by`.
        pixel_values: (B, C, H, W).
        targets: (B,).
        maps: (B, h, w), any range, resized to the image.
        empty: (B, C, H, W), from `empty_image`.
        steps: the curve has steps + 1 points, after round(k / steps * H * W) pixels.
        seed: order among ties.

    Returns:
        {"insertion": (B, steps + 1), "deletion": (B, steps + 1)}; the area under them is `area_under`.

    Raises:
        ValueError: less than one step, or maps that are not (B, h, w) of these images.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if len(maps) != len(pixel_values):
        raise ValueError(f"one map per image is needed, got {len(maps)} maps of {len(pixel_values)} images")
    height, width = pixel_values.shape[-2:]
    ranks = pixel_ranks(resize_maps(maps, (height, width)), seed)[:, None]
    whole = judge(pixel_values, targets).confidence
    none = judge(empty.expand_as(pixel_values), targets).confidence
    inserted, deleted = [none], [whole]
    for step in range(1, steps):
        chosen = ranks < round(step / steps * height * width)
        inserted.append(judge(torch.where(chosen, pixel_values, empty), targets).confidence)
        deleted.append(judge(torch.where(chosen, empty, pixel_values), targets).confidence)
    return {
        "insertion": torch.stack([*inserted, whole], dim=1),
        "deletion": torch.stack([*deleted, none], dim=1),
    }


def area_under(curves: torch.Tensor) -> torch.Tensor:
    """Area under curves (B, n) of evenly spaced points over [0, 1], by trapezoids, (B,).

    Raises:
        ValueError: the curves are not (B, n), or have less than two points.
    """
    if curves.ndim != 2 or curves.shape[1] < 2:
        raise ValueError(f"curves must be (B, n) with n at least 2, got {tuple(curves.shape)}")
    return torch.trapezoid(curves, dx=1 / (curves.shape[1] - 1), dim=1)
