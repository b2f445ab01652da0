"""Does the map lie where the thing is? Boxes, masks, and mosaics that need no annotation."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from ..masking import min_max

TILES = 4
MOSAIC_CONFIDENCE = 0.7  # only images classified with at least this confidence go into mosaics


def pointing_game(maps: torch.Tensor, regions: torch.Tensor) -> torch.Tensor:
    """1 where the map's highest pixel lies in the region, else 0, (B,); percent is not applied.

    Zhang et al., arXiv 1608.00507, without the tolerance margin. Where several pixels share the maximum, the share of
    them that lies inside counts, so that a constant map scores the region's area and never a full hit.

    Args:
        maps: (B, H, W), any range.
        regions: (B, H, W) bool.

    Raises:
        ValueError: shapes differ, or a region is empty.
    """
    _check(maps, regions)
    highest = maps == maps.amax(dim=(-2, -1), keepdim=True)
    return (highest & regions).sum(dim=(-2, -1)) / highest.sum(dim=(-2, -1))


def energy_inside(maps: torch.Tensor, regions: torch.Tensor) -> torch.Tensor:
    """Share of the map's sum that lies in the region, (B,) in [0, 1]; a map of zeros scores the region's area.

    Args:
        maps: (B, H, W), non-negative.
        regions: (B, H, W) bool.

    Raises:
        ValueError: shapes differ, a region is empty, or a map has a negative value.
    """
    _check(maps, regions)
    if bool((maps < 0).any()):
        raise ValueError(f"maps must be non-negative, got a minimum of {maps.min():g}; scale them with min_max")
    total = maps.sum(dim=(-2, -1))
    inside = (maps * regions).sum(dim=(-2, -1))
    return torch.where(total > 0, inside / total.clamp(min=1e-30), regions.float().mean(dim=(-2, -1)))


def _check(maps: torch.Tensor, regions: torch.Tensor) -> None:
    if maps.ndim != 3 or maps.shape != regions.shape or regions.dtype != torch.bool:
        raise ValueError(
            f"maps (B, H, W) and regions (B, H, W) bool must fit, got {tuple(maps.shape)} and "
            f"{tuple(regions.shape)} {regions.dtype}"
        )
    if not bool(regions.flatten(1).any(dim=1).all()):
        raise ValueError("every region must hold at least one pixel; leave images without a region out")


def box_region(box: Sequence[float], size: tuple[int, int]) -> torch.Tensor:
    """(H, W) bool, True for the pixels whose centre lies in the box (left, top, right, bottom), in pixels.

    Args:
        box: from the image's top left corner; what lies outside the image holds no pixel.
        size: (H, W) in pixels.

    Raises:
        ValueError: the box has no width or no height.
    """
    left, top, right, bottom = box
    if not (right > left and bottom > top):
        raise ValueError(f"a box is (left, top, right, bottom) with right > left and bottom > top, got {tuple(box)}")
    rows, columns = torch.arange(size[0]) + 0.5, torch.arange(size[1]) + 0.5
    return ((rows >= top) & (rows <= bottom))[:, None] & ((columns >= left) & (columns <= right))[None, :]


def mosaic(tiles: torch.Tensor) -> torch.Tensor:
    """One image from four, each at half its side: top left, top right, bottom left, bottom right.

    Args:
        tiles: (4, C, H, W) at full or (4, C, H // 2, W // 2) at half size.

    Returns:
        (C, 2 h, 2 w) of the half size h, w.

    Raises:
        ValueError: the tiles are not (4, C, h, w).
    """
    if tiles.ndim != 4 or tiles.shape[0] != TILES:
        raise ValueError(f"a mosaic takes (4, C, h, w), got {tuple(tiles.shape)}")
    top, bottom = torch.cat([tiles[0], tiles[1]], dim=-1), torch.cat([tiles[2], tiles[3]], dim=-1)
    return torch.cat([top, bottom], dim=-2)


def half_size(images: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Images (B, C, H, W) as tiles of a mosaic of `size` (H, W): (B, C, H // 2, W // 2), antialiased."""
    half = (size[0] // 2, size[1] // 2)
    return F.interpolate(images, size=half, mode="bilinear", antialias=True, align_corners=False)


def fit(mosaic: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """A mosaic (C, h, w) at exactly `size`; an odd last row or column is repeated."""
    pad = (0, size[1] - mosaic.shape[-1], 0, size[0] - mosaic.shape[-2])
    return F.pad(mosaic[None], pad, mode="replicate")[0] if any(pad) else mosaic


def quadrants(size: tuple[int, int]) -> torch.Tensor:
    """(4, H, W) bool: the tiles of a mosaic, in the order of `mosaic`; `size` is (H, W) in pixels."""
    height, width = size
    upper = torch.arange(height)[:, None] < height // 2
    left = torch.arange(width)[None, :] < width // 2
    return torch.stack([upper & left, upper & ~left, ~upper & left, ~upper & ~left])


def grid_pointing(maps: torch.Tensor, tiles: torch.Tensor) -> torch.Tensor:
    """Share of each map's energy in the tile of its class, (B,) in [0, 1]; 0.25 is chance.

    Böhle et al., arXiv 2104.00032, on 2 x 2 mosaics of confidently classified images: a ground truth for free.

    Args:
        maps: (B, H, W) for one class each, any range; min-max scaled here, as every map is before it is shown.
        tiles: (B,) in 0..3, where the image of the explained class lies.

    Raises:
        ValueError: the maps are not (B, H, W), one per tile, or a tile holds no pixel or is none of the four.
    """
    if not bool(((tiles >= 0) & (tiles < TILES)).all()):
        raise ValueError(f"tiles must be 0 to {TILES - 1}, top left to bottom right, got {tiles.tolist()[:8]}")
    regions = quadrants((maps.shape[-2], maps.shape[-1])).to(maps.device)[tiles]
    return energy_inside(min_max(maps), regions)
