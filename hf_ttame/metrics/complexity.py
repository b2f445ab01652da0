"""How much of the picture a map claims, and how scattered."""

import math

import torch

from ..masking import min_max


def entropy(maps: torch.Tensor) -> torch.Tensor:
    """Entropy of each map as a distribution over pixels, over its maximum log(h w): 0 one pixel, 1 uniform, (B,).

    Args:
        maps: (B, h, w), non-negative; a map of zeros claims nothing in particular and counts as uniform.

    Raises:
        ValueError: the maps are not (B, h, w), or a value is negative.
    """
    if maps.ndim != 3 or bool((maps < 0).any()):
        raise ValueError(f"maps must be (B, h, w) and non-negative, got {tuple(maps.shape)}, minimum {maps.min():g}")
    flat = maps.flatten(1).double()
    total = flat.sum(dim=1, keepdim=True)
    share = torch.where(total > 0, flat / total.clamp(min=1e-300), torch.full_like(flat, 1 / flat.shape[1]))
    nats = -torch.xlogy(share, share).sum(dim=1)
    return (nats / math.log(flat.shape[1]) if flat.shape[1] > 1 else nats).float()


def area(maps: torch.Tensor, threshold: float = 0.5) -> torch.Tensor:
    """Share of the pixels whose min-max scaled value is above `threshold`, (B,) in [0, 1].

    Args:
        maps: (B, h, w), any range.
        threshold: in [0, 1], of the scaled values.

    Raises:
        ValueError: the threshold lies outside [0, 1].
    """
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold must lie in [0, 1], of the map's scaled values, got {threshold}")
    return (min_max(maps) > threshold).float().mean(dim=(-2, -1))


def coherency(maps: torch.Tensor, maps_of_masked: torch.Tensor) -> torch.Tensor:
    """Correlation of a map with the map of what it leaves of the picture, as (1 + r) / 2 in [0, 1], (B,).

    Poppi et al., arXiv 2104.10252. A constant map correlates with nothing: r = 0.

    Args:
        maps: (B, h, w), any range.
        maps_of_masked: (B, h, w), any range: of the same classes, on the images masked with `maps`.

    Raises:
        ValueError: the shapes differ, or are not (B, h, w).
    """
    if maps.shape != maps_of_masked.shape or maps.ndim != 3:
        raise ValueError(f"both maps must be (B, h, w), got {tuple(maps.shape)} and {tuple(maps_of_masked.shape)}")
    a, b = maps.flatten(1).double(), maps_of_masked.flatten(1).double()
    a, b = a - a.mean(dim=1, keepdim=True), b - b.mean(dim=1, keepdim=True)
    norm = a.norm(dim=1) * b.norm(dim=1)
    r = torch.where(norm > 1e-9, (a * b).sum(dim=1) / norm.clamp(min=1e-300), torch.zeros_like(norm))
    return ((1 + r.clamp(-1, 1)) / 2).float()


def adcc(coherency: torch.Tensor, complexity: torch.Tensor, drop: torch.Tensor) -> torch.Tensor:
    """ADCC = 3 / (1 / coherency + 1 / (1 - complexity) + 1 / (1 - drop)), (B,), higher is better.

    Poppi et al., arXiv 2104.10252: the harmonic mean of three shares; one that is 0 makes it 0.

    Args:
        coherency: (B,) in [0, 1].
        complexity: (B,) in [0, 1], the mean of the map scaled to [0, 1].
        drop: (B,) in [0, 1], max(0, p - p_masked) / p of the softly masked picture (no percent).

    Raises:
        ValueError: a value lies outside [0, 1].
    """
    for name, values in (("coherency", coherency), ("complexity", complexity), ("drop", drop)):
        if not bool(((values >= 0) & (values <= 1)).all()):
            raise ValueError(f"{name} must lie in [0, 1] (a share, no percent), got {values.tolist()[:4]}")
    good = torch.stack([coherency.double(), 1 - complexity.double(), 1 - drop.double()])
    mean = 3 / (1 / good.clamp(min=1e-12)).sum(dim=0)
    return torch.where((good > 0).all(dim=0), mean, torch.zeros_like(mean)).float()
