"""RISE: the mean of random masks, each weighted with the confidence that it leaves (arXiv 1806.07421)."""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F

from ..masking import apply_mask
from ..metrics.judging import class_probability
from ..modeling_ttame import TTameModel
from .contract import Explain


def random_masks(
    count: int,
    size: tuple[int, int],
    generator: torch.Generator,
    *,
    grid: int = 7,
    share: float = 0.5,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """Smooth random masks, section 3.3 of the paper.

    A grid of zeros and ones is enlarged bilinearly by one cell more than the image needs and cropped at random.

    Args:
        count: how many.
        size: (H, W) in pixels.
        generator: on the CPU.
        grid: cells along each side.
        share: probability of a one.
        device: where the masks are enlarged; what is drawn is the same on any.

    Returns:
        (count, H, W) in [0, 1], on `device`.
    """
    height, width = size
    cell = (math.ceil(height / grid), math.ceil(width / grid))
    coarse = (torch.rand(count, 1, grid, grid, generator=generator) < share).float().to(device)
    large = F.interpolate(
        coarse, size=((grid + 1) * cell[0], (grid + 1) * cell[1]), mode="bilinear", align_corners=False
    )[:, 0]
    top = torch.randint(cell[0], (count, 1), generator=generator) + torch.arange(height)
    left = torch.randint(cell[1], (count, 1), generator=generator) + torch.arange(width)
    return large[torch.arange(count)[:, None, None], top[:, :, None], left[:, None, :]]


@torch.no_grad()
def rise_steps(
    model: TTameModel,
    pixel_values: torch.Tensor,
    class_ids: torch.Tensor,
    masks: int,
    batch_size: int = 32,
    seed: int = 0,
    fill: str = "black",
) -> Iterator[tuple[int, torch.Tensor]]:
    """RISE in steps: after each, the masks so far and the maps (B, H, W) that they make.

    A step draws 32 masks, or as many times 32 as fit into a pass; whoever wants no more, stops. Arguments as of `rise`
    and of the method that it returns.
    """
    share = 0.5
    generator = torch.Generator().manual_seed(seed)
    size = (pixel_values.shape[-2], pixel_values.shape[-1])
    colour = model.fill(fill)
    total = torch.zeros(len(pixel_values), size[0] * size[1], device=pixel_values.device)
    drawn = 32  # fixed, so that the masks are the same for every batch size
    times = max(1, batch_size // (drawn * len(pixel_values)))
    for start in range(0, masks, times * drawn):
        draws = [random_masks(drawn, size, generator, share=share, device=pixel_values.device) for _ in range(times)]
        batch = torch.cat(draws)[: masks - start].to(pixel_values)
        images = pixel_values.repeat_interleave(len(batch), dim=0)
        covers = batch.repeat(len(pixel_values), 1, 1)
        wanted = class_ids.repeat_interleave(len(batch))
        scores = torch.cat(
            [
                class_probability(model.classify(apply_mask(x, mask, colour)), ids, model.config.classifier_outputs)
                for x, mask, ids in zip(
                    images.split(batch_size), covers.split(batch_size), wanted.split(batch_size), strict=True
                )
            ]
        )
        total += scores.reshape(len(pixel_values), -1) @ batch.flatten(1)
        done = start + len(batch)
        yield done, (total / (done * share)).reshape(-1, *size)


def rise(model: TTameModel, masks: int = 4000, batch_size: int = 32, seed: int = 0, fill: str = "black") -> Explain:
    """RISE with any number of masks; the same masks for every image, drawn anew from the seed in each call.

    Args:
        model: whose backbone is explained.
        masks: forward passes per image.
        batch_size: masked images per pass.
        seed: of the masks. They do not depend on `batch_size` or on how images are batched.
        fill: what masks leave, "black" (that of AD and IC) or "mean".
    """
    if masks < 1:
        raise ValueError(f"RISE needs at least 1 mask, got {masks}")

    def explain(pixel_values: torch.Tensor, class_ids: torch.Tensor) -> torch.Tensor:
        *_, (_, maps) = rise_steps(model, pixel_values, class_ids, masks, batch_size, seed, fill)
        return maps

    return explain
