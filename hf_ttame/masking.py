"""What happens to a map before it meets the image: scaling, resizing, keeping the top, multiplying."""

import torch
import torch.nn.functional as F


def min_max(maps: torch.Tensor) -> torch.Tensor:
    """Scale each map to [0, 1] by its own minimum and maximum.

    Args:
        maps: (..., h, w), any range, finite.

    Returns:
        (..., h, w) in [0, 1], at least float32. A map that is constant up to rounding has nothing to scale: it is
        returned clipped to [0, 1], so that an all-ones map stays all ones and an all-zeros map all zeros.
    """
    maps = maps.to(torch.promote_types(maps.dtype, torch.float32))  # half precision would round real maps away
    low = maps.amin(dim=(-2, -1), keepdim=True)
    high = maps.amax(dim=(-2, -1), keepdim=True)
    span = high - low
    varies = span > 8 * torch.finfo(maps.dtype).eps * torch.maximum(low.abs(), high.abs())
    scaled = (maps - low) / torch.where(varies, span, torch.ones_like(span))
    return torch.where(varies, scaled, maps.clamp(0, 1))


def resize_maps(maps: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Resize maps bilinearly (align_corners=False).

    Args:
        maps: (B, h, w) or (B, N, h, w).
        size: (H, W) in pixels.

    Returns:
        (B, H, W) or (B, N, H, W).
    """
    if maps.ndim not in (3, 4):
        raise ValueError(f"maps must be (B, h, w) or (B, N, h, w), got shape {tuple(maps.shape)}")
    if tuple(maps.shape[-2:]) == tuple(size):
        return maps
    batched = maps if maps.ndim == 4 else maps.unsqueeze(1)
    resized = F.interpolate(batched, size=tuple(size), mode="bilinear", align_corners=False)
    return resized if maps.ndim == 4 else resized.squeeze(1)


def keep_top(maps: torch.Tensor, fraction: float, *, binary: bool = False, seed: int = 0) -> torch.Tensor:
    """Keep exactly round(fraction * h * w) pixels of each map, the highest ones, and set the rest to 0.

    Ties are broken in a seeded random order, so a constant map keeps a random set and never everything.

    Args:
        maps: (..., h, w).
        fraction: share of pixels to keep, in [0, 1].
        binary: return 1 where a pixel is kept instead of its value.
        seed: seed of the order among ties.

    Returns:
        (..., h, w), zero outside the kept pixels.

    Raises:
        ValueError: fraction outside [0, 1].
    """
    if not 0.0 <= fraction <= 1.0:
        raise ValueError(f"fraction must lie in [0, 1], got {fraction}; 15 percent is written 0.15")
    h, w = maps.shape[-2:]
    flat = maps.reshape(-1, h * w)
    shuffle = torch.randperm(h * w, generator=torch.Generator().manual_seed(seed)).to(maps.device)
    order = flat[:, shuffle].argsort(dim=-1, descending=True, stable=True)
    kept = shuffle[order[:, : round(fraction * h * w)]]
    mask = torch.zeros_like(flat).scatter_(1, kept, 1.0)
    return (mask if binary else mask * flat).reshape(maps.shape)


def apply_mask(pixel_values: torch.Tensor, masks: torch.Tensor, fill: torch.Tensor | float = 0.0) -> torch.Tensor:
    """Blend an image towards a fill colour: `fill + mask * (x - fill)`.

    With pixels in [0, 1] and fill 0 this is mask * x. Normalised pixels give the same picture when `fill` is the
    normalised value of black (`TTameModel.fill("black")`); fill 0 on normalised pixels is the "mean" fill.

    Args:
        pixel_values: (B, C, H, W).
        masks: (B, H, W) or (B, 1, H, W), in [0, 1].
        fill: a number, or one value per channel (C,), in the space of `pixel_values`.

    Returns:
        (B, C, H, W).
    """
    if masks.ndim == 3:
        masks = masks.unsqueeze(1)
    if masks.shape != (pixel_values.shape[0], 1, *pixel_values.shape[-2:]):
        raise ValueError(
            f"masks {tuple(masks.shape)} do not fit images {tuple(pixel_values.shape)}; resize them with resize_maps"
        )
    if isinstance(fill, torch.Tensor):
        fill = fill.to(pixel_values).reshape(1, -1, 1, 1)
    return fill + masks * (pixel_values - fill)
