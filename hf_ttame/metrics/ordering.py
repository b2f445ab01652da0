"""The order in which a map lets pixels in or takes them away."""

import torch


def pixel_ranks(maps: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """Rank of every pixel, 0 for the highest value, (B, H, W) int64; ties in a seeded random order.

    `pixel_ranks(maps, seed) < k` marks the pixels that `masking.keep_top(maps, k / (H * W), seed=seed)` keeps.

    Args:
        maps: (B, H, W), any range.
        seed: order among ties, the same for every map.

    Raises:
        ValueError: the maps are not (B, H, W).
    """
    if maps.ndim != 3:
        raise ValueError(f"maps must be (B, H, W), got {tuple(maps.shape)}")
    count = maps.shape[-2] * maps.shape[-1]
    shuffle = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).to(maps.device)
    order = shuffle[maps.flatten(1)[:, shuffle].argsort(dim=1, descending=True, stable=True)]
    ranks = torch.empty_like(order)
    ranks.scatter_(1, order, torch.arange(count, device=maps.device).expand_as(order))
    return ranks.reshape(maps.shape)
