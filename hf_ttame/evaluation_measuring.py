"""All measures of one method on a batch of images, or on a mosaic."""

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F

from .baselines import Cost, Method
from .evaluation_images import Batch, Scan, channels_last
from .evaluation_plan import Plan
from .masking import apply_mask, min_max, resize_maps
from .metrics import (
    adcc,
    area,
    coherency,
    confidence_curves,
    energy_inside,
    entropy,
    grid_pointing,
    judge_by,
    masked_confidence,
    pointing_game,
    road_curves,
)
from .metrics.confidence import drops, increases
from .metrics.insertion_deletion import STARTS, empty_image
from .metrics.localization import TILES, fit, mosaic
from .modeling_ttame import TTameModel
from .regions import boxes_of, read_mask, region_of_boxes, region_of_mask

SHEET_SIDE = 56  # pixels of the map that is kept for the contact sheet


def measure_batch(
    model: TTameModel, method: Method, batch: Batch, targets: torch.Tensor, groups: Iterable[str], plan: Plan
) -> dict[str, torch.Tensor]:
    """All measures of one method on one batch, per image: (B,), or (B, n) for curves."""
    judge = judge_by(model.classify, max(plan.batch_size, 32), model.config.classifier_outputs)
    x, black, size = batch.pixel_values, model.fill(), batch.pixel_values.shape[-2:]
    explain = method.at(batch.indices)
    with Cost(model.backbone) as cost:
        maps = explain(x, targets).detach().float()
    count = len(targets)
    if not bool(maps.isfinite().all()):
        bad = batch.indices[~maps.isfinite().flatten(1).all(dim=1).cpu()].tolist()
        raise ValueError(
            f"{method.name} gives a map that is not finite for image {bad[0]}; measure in another --precision, or "
            "leave the method out"
        )
    shown = min_max(resize_maps(maps, (size[0], size[1])))
    found = {
        "forward": torch.full((count,), cost.forward / count),
        "backward": torch.full((count,), cost.backward / count),
        "target": targets.cpu(),
    }
    p = judge(x, targets).confidence
    with torch.no_grad():
        if "confidence" in groups:
            found["p"] = p
            masked = masked_confidence(judge, x, targets, maps, black, seed=plan.seed)
            found["mean mask"] = masked.pop("mean")
            for name, confidence in masked.items():
                found[f"AD {name}"] = drops(p, confidence)
                found[f"IC {name}"] = increases(p, confidence)
            found["entropy"], found["area"] = entropy(shown), area(shown)
            if plan.box_column or plan.mask_column:
                found |= _inside_regions(model, batch, shown, plan)
            coarse = F.interpolate(shown[:, None], size=(SHEET_SIDE, SHEET_SIDE), mode="area")[:, 0]
            found["_sheet"] = (255 * coarse).round().to(torch.uint8).flatten(1)
        if "adcc" in groups:
            masked_images = channels_last(apply_mask(x, shown, black))
            again = explain(masked_images, targets).detach().float()
            again = min_max(resize_maps(again, (size[0], size[1])))
            drop = drops(p, judge(masked_images, targets).confidence) / 100
            found["coherency"] = coherency(shown, again)
            found["ADCC"] = adcc(found["coherency"].to(shown), shown.mean(dim=(-2, -1)), drop)
        if "road" in groups:
            for name, curve in road_curves(judge, x, targets, maps, seed=plan.seed).items():
                found[f"ROAD {name.replace('morf', 'MoRF').replace('lerf', 'LeRF')}"] = curve
        if "insertion-deletion" in groups:
            for start in STARTS:
                curves = confidence_curves(judge, x, targets, maps, empty_image(x, start, black), seed=plan.seed)
                found |= {f"{name} {start}": curve for name, curve in curves.items()}
    return found


def _inside_regions(model: TTameModel, batch: Batch, shown: torch.Tensor, plan: Plan) -> dict[str, torch.Tensor]:
    """Pointing game and energy in the dataset's boxes or masks, moved into the classifier's input; NaN where nothing
    of them is in it. "bad marks": boxes that are none and masks that cannot be read, per image."""
    count, size = len(shown), (shown.shape[-2], shown.shape[-1])
    found = {name: torch.full((count,), math.nan) for name in ("pointing game", "energy in box")}
    found["bad marks"] = torch.zeros(count)
    for row, (cell, picture) in enumerate(zip(batch.marks, batch.sizes, strict=True)):
        if cell is None:
            continue
        placement = model._placement(picture)
        if plan.box_column:
            boxes, bad = boxes_of(cell)
            region, found["bad marks"][row] = region_of_boxes(boxes, placement, size), bad
        else:
            try:
                region = region_of_mask(read_mask(cell), placement, picture, size)
            except ValueError:
                region, found["bad marks"][row] = None, 1
        if region is not None:
            inside = region[None].to(shown.device)
            found["pointing game"][row] = 100 * pointing_game(shown[row : row + 1], inside).item()
            found["energy in box"][row] = 100 * energy_inside(shown[row : row + 1], inside).item()
    return found


def measure_mosaic(model: TTameModel, method: Method, number: int, group: list[int], scanned: Scan) -> dict[str, Any]:
    """Grid pointing of one mosaic: the share of energy in the right tile in percent, the mean of its four classes."""
    size = (model.config.image_size[0], model.config.image_size[1])
    image = fit(mosaic(scanned.tiles[group].to(model.device)), size)
    targets = scanned.targets[scanned.tile_rows[group]].to(model.device)
    explain = method.at(-(torch.arange(TILES) + 1 + TILES * number))  # no image of the dataset
    maps = explain(channels_last(image.expand(TILES, -1, -1, -1)), targets).detach().float()
    shares = grid_pointing(resize_maps(maps, size), torch.arange(TILES, device=maps.device))
    return {"grid pointing": 100 * shares.mean()[None].cpu()}
