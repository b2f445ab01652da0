"""Average drop, increase in confidence and mask area on pictures that training never sees."""

from collections.abc import Iterable
from typing import Any

import torch
from accelerate import Accelerator
from PIL import Image, ImageDraw

from hf_ttame import TTameModel
from hf_ttame.image_processing import load_picture, preprocess, shown
from hf_ttame.masking import resize_maps
from hf_ttame.metrics import class_probability, judge_by, masked_confidence, mean_interval
from hf_ttame.metrics.confidence import drops, increases
from hf_ttame.pictures import decode
from hf_ttame.visualization import overlay

_SAMPLES = 8  # pictures that are drawn at every validation
_THUMBNAIL = 160  # pixels


class HeldOut:
    """Pictures prepared once, the same at every validation; `len` counts those of all processes.

    Only what the classifier takes is kept, of this process's share: photographs take a hundred times the memory.

    Args:
        model: its image processor prepares them.
        cells: undecoded pictures; unreadable ones are left out and listed in `unreadable`.
        rank, ranks: this process and their number.

    Raises:
        ValueError: none can be read.
    """

    def __init__(self, model: TTameModel, cells: Iterable[Any], rank: int = 0, ranks: int = 1):
        self.pixel_values: list[torch.Tensor] = []  # (C, H, W) each, of this process
        self.samples: list[torch.Tensor] = []  # the first of all processes, to be drawn
        self.unreadable: list[str] = []
        self.count = 0
        for index, cell in enumerate(cells):
            try:
                picture = load_picture(decode(cell), len(model.config.pixel_scale))
            except ValueError as error:
                path = cell.get("path") if isinstance(cell, dict) else None
                self.unreadable.append(f"{path or 'picture'} (number {index} for validation): {error}")
                continue
            wanted = self.count % ranks == rank  # every process decodes all, so that they agree on what is readable
            if wanted or self.count < _SAMPLES:
                (pixel_values,) = preprocess(model.image_processor, [picture])
                if wanted:
                    self.pixel_values.append(pixel_values)
                if self.count < _SAMPLES:
                    self.samples.append(pixel_values)
            self.count += 1
        if not self.count:
            raise ValueError(
                f"none of the {len(self.unreadable)} pictures for validation can be read; raise --holdout or give "
                "--validation"
            )

    def __len__(self) -> int:
        return self.count


@torch.no_grad()
def validate(
    model: TTameModel, held_out: HeldOut, accelerator: Accelerator, batch_size: int
) -> dict[str, torch.Tensor]:
    """Per picture: "AD soft 100" ... "IC binary 15" in percent, "mask area" in [0, 1]; in every process the same,
    in the order of the pictures.

    The map is the explainer's own (`scale_maps`); "mask area" is the mean of the sigmoid, which the loss sees.
    """
    mine = held_out.pixel_values
    parts: list[dict[str, torch.Tensor]] = []
    for start in range(0, len(mine), batch_size):
        pixel_values = torch.stack(mine[start : start + batch_size])
        pixel_values = pixel_values.to(accelerator.device).contiguous(memory_format=torch.channels_last)
        output = model(pixel_values)
        targets = output.class_ids[:, 0]
        outputs = model.config.classifier_outputs
        p = class_probability(output.logits, targets, outputs)
        maps = model.scale_maps(output.map_logits[:, 0].float())
        judge = judge_by(model.classify, outputs=outputs)
        found = masked_confidence(judge, pixel_values, targets, maps, model.fill())
        found.pop("mean")
        part = {"mask area": output.map_logits.float().sigmoid().mean(dim=(1, 2, 3))}
        for name, masked in found.items():
            part[f"AD {name}"] = drops(p, masked)
            part[f"IC {name}"] = increases(p, masked)
        parts.append({name: values.cpu() for name, values in part.items()})
    everyone: list[Any] = [parts]
    if accelerator.num_processes > 1:
        everyone = [None] * accelerator.num_processes
        torch.distributed.all_gather_object(everyone, parts)
    joined = [part for process in everyone for part in process]
    found = {name: torch.cat([part[name] for part in joined]) for name in joined[0]}
    if (ranks := accelerator.num_processes) > 1:  # they were dealt in turn
        place = torch.cat([torch.arange(rank, len(held_out), ranks) for rank in range(ranks)]).argsort()
        found = {name: column[place] for name, column in found.items()}
    return found


def summary(values: dict[str, torch.Tensor]) -> dict[str, float]:
    """Means per measure and "score": mean AD less mean IC over soft and binary masks, lower is better.

    Binary masks have equal areas, so that a bright map alone does not score.
    """
    means = {name: round(float(column.mean()), 3) for name, column in values.items()}
    lost = [mean for name, mean in means.items() if name.startswith("AD")]
    gained = [mean for name, mean in means.items() if name.startswith("IC")]
    return {**means, "score": round(sum(lost) / len(lost) - sum(gained) / len(gained), 3)}


def intervals(values: dict[str, torch.Tensor]) -> dict[str, list[float]]:
    """95 percent bootstrap interval of the mean of every measure."""
    found = {name: mean_interval(column.numpy()) for name, column in values.items()}
    return {name: [round(interval.low, 3), round(interval.high, 3)] for name, interval in found.items()}


@torch.no_grad()
def draw_samples(model: TTameModel, held_out: HeldOut, device: torch.device) -> list[Image.Image]:
    """The maps of the first eight pictures over them, as small pictures with the name of the class explained."""
    pixel_values = torch.stack(held_out.samples).to(device)
    output = model(pixel_values)
    height, width = pixel_values.shape[-2:]
    maps = resize_maps(model.scale_maps(output.map_logits[:, 0].float()), (height, width)).cpu().numpy()
    drawn = []
    for picture, values, class_id in zip(
        to_pictures(model, pixel_values), maps, output.class_ids[:, 0].tolist(), strict=True
    ):
        small = overlay(picture, values, values >= 0).resize((_THUMBNAIL, _THUMBNAIL))
        name = model.config.id2label[class_id].split(",")[0]
        ImageDraw.Draw(small).text((4, _THUMBNAIL - 18), name, fill="white", stroke_width=2, stroke_fill="black")
        drawn.append(small)
    return drawn


def to_pictures(model: TTameModel, pixel_values: torch.Tensor) -> list[Image.Image]:
    """Pixel values (B, C, H, W) as the pictures that the classifier sees, in RGB; of one channel in grey."""
    scale, shift = torch.tensor(model.config.pixel_scale), torch.tensor(model.config.pixel_shift)
    pixels = (pixel_values.cpu().permute(0, 2, 3, 1) - shift) / scale
    return [shown(picture) for picture in (pixels.clamp(0, 1) * 255).numpy()]


def collapse(area: float) -> str | None:
    """Advice where the mask has become all ones or all zeros; None where it has not.

    Args:
        area: mean of the masks of the explained classes, in [0, 1], over many steps.
    """
    if area > 0.97:
        return (
            f"the mask has collapsed to all ones (mean {area:.3f}): it hides nothing. Raise --area_weight, "
            "lower --learning_rate, or compare --fill black, mean and blur"
        )
    if area < 0.03:
        return (
            f"the mask has collapsed to all zeros (mean {area:.3f}): it keeps nothing. Lower --area_weight or "
            "--learning_rate, and check that the classifier recognises these pictures at all"
        )
    return None
