"""What a run leaves behind for people: report.json, curves.png, samples.png, and the words on the console."""

import json
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw

from hf_ttame.cards import is_ours, write_card
from hf_ttame.disk import full_disk, whole
from hf_ttame.records import TRAINING, fingerprint_of_folder
from hf_ttame.visualization import plot_curves

_SMOOTH = 200  # points of a curve; the log holds every step
_COLUMNS = 12  # validations in samples.png


def write(path: Path, content: str | Image.Image) -> None:
    """A file that has its name only when it is complete."""
    with whole(path) as part:
        if isinstance(content, str):
            part.write_text(content)
        else:
            content.save(part)


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """The training record of the explainer that was saved in `folder`, naming its head; and the card that shows it."""
    named = {**record, "head_fingerprint": fingerprint_of_folder(folder)}
    write(folder / TRAINING, json.dumps(named, indent=2) + "\n")
    if is_ours(folder / "README.md"):
        attempt("README.md", lambda: write_card(folder))


def attempt(what: str, action: Callable[[], Any]) -> bool:
    """Write something that the run can do without; whether it worked. A full disk is no reason to stop training."""
    try:
        action()
    except Exception as error:  # whatever it is, the hours of training are worth more
        reason = full_disk(error) or f"{type(error).__name__}: {error}"
        print(f"warning: {what} could not be written: {reason}", file=sys.stderr)
        return False
    return True


def clear(output: Path) -> None:
    """Remove what an earlier run that left no checkpoint, but its log, would mix into the report of a new one."""
    if (output / "log.jsonl").exists():
        for file in (*output.glob("unreadable_*.txt"), *output.glob(f"samples/{'[0-9]' * 8}.png")):
            file.unlink()


class Log:
    """`log.jsonl`: one line per step. After a resume it goes on where the checkpoint was taken."""

    def __init__(self, path: Path, step: int, enabled: bool):
        self.path = path
        self.enabled = enabled
        if enabled:
            kept = [line for line in read_log(path) if line["step"] <= step]
            write(path, "".join(json.dumps(line) + "\n" for line in kept))

    def add(self, lines: Sequence[dict[str, Any]]) -> None:
        if self.enabled:
            append(self.path, [json.dumps(line) for line in lines])


def append(path: Path, lines: Sequence[str]) -> None:
    """Add lines to a file; a warning where that fails."""

    def action() -> None:
        with open(path, "a") as file:
            file.writelines(line.replace("\n", " ") + "\n" for line in lines)

    attempt(path.name, action)


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a log; one that a kill cut short is left out."""
    lines = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return lines


def write_values(path: Path, values: Mapping[str, torch.Tensor]) -> None:
    """What a validation found, picture by picture, for paired comparisons between runs."""
    every = {name: [round(value, 4) for value in column.tolist()] for name, column in values.items()}
    attempt(path.name, lambda: write(path, json.dumps(every)))


def machine(accelerator: Any) -> dict[str, Any]:
    """Where a run took place: hardware and versions."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() and accelerator.device.type == "cuda" else None
    packages = ("hf-ttame", "torch", "timm", "transformers", "accelerate", "datasets", "torchdata")
    return {
        "device": gpu or accelerator.device.type,
        "processes": accelerator.num_processes,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "mixed_precision": accelerator.mixed_precision,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
    }


def coverage(counts: torch.Tensor, id2label: dict[int, str]) -> dict[str, Any]:
    """How many classes the classifier predicted on the stream, and which it never did: their maps are unchecked."""
    never = (counts == 0).nonzero()[:, 0].tolist()
    return {
        "classes": len(counts),
        "explained": len(counts) - len(never),
        "pictures": int(counts.sum()),
        "fewest": int(counts[counts > 0].min()) if counts.any() else 0,
        "never": [id2label[class_id] for class_id in never[:100]],
        "never_more": max(0, len(never) - 100),
    }


def describe(
    progress: Mapping[str, Any],
    pictures: int,
    found: Mapping[str, Any],
    unreadable: Sequence[str],
    not_validated: Sequence[str],
    where: Mapping[str, Any],
) -> tuple[dict[str, Any], dict[str, Any]]:
    """report.json, and the training record that lies beside the explainer.

    The explainer may be published: the record leaves out the names of somebody's files and folders.

    Args:
        progress: of the run, as its checkpoints hold it.
        pictures: how many were trained on, counted again in every epoch.
        found: see `coverage`.
        unreadable, not_validated: what was passed over in training and for validation.
        where: see `machine`.
    """
    given = {**progress["arguments"], "output": None, "resume": None}
    local = [name for name in ("backbone", "dataset", "validation") if given[name] and os.path.exists(given[name])]
    report = {
        "arguments": {**given, **{name: Path(given[name]).name for name in local}},
        "machine": where,
        "steps": progress["step"],
        "pictures": pictures,
        "seconds": round(progress["seconds"], 1),
        "last": progress["last"],
        "coverage": found,
        "unreadable": {"count": len(unreadable), "names": unreadable[:100]},
        "unreadable_validation": {"count": len(not_validated), "names": not_validated[:100]},
        "warnings": progress["warnings"],
        "validations": progress["validations"],
        "best": progress["best"],
        "last_95": progress["last_95"],
    }
    record = {
        **report,
        "arguments": {**given, **dict.fromkeys(local, "a local folder")},
        "unreadable": {"count": len(unreadable)},
        "unreadable_validation": {"count": len(not_validated)},
    }
    return report, record


def draw_curves(output: Path, validations: Sequence[dict[str, Any]]) -> None:
    """curves.png: the loss, its terms and the mask area over the steps, and what the validations found."""
    log = read_log(output / "log.jsonl")
    size = max(1, len(log) // _SMOOTH)
    groups = [log[start : start + size] for start in range(0, len(log), size)]

    def curve(name: str) -> list[tuple[float, float]]:
        return [(group[-1]["step"], sum(line[name] for line in group) / len(group)) for group in groups]

    def found(name: str) -> list[tuple[float, float]]:
        return [(validation["step"], validation[name]) for validation in validations]

    panels = {
        "loss": {"total": curve("total")},
        "cross-entropy and area": {"cross-entropy": curve("cross_entropy"), "area": curve("area")},
        "variation": {"variation": curve("variation")},
        "mean of the mask": {"training": curve("mask_area"), "validation": found("mask area") if validations else []},
    }
    if validations:
        names = ("soft 100", "soft 50", "soft 15", "binary 50", "binary 15")
        panels["average drop, % (lower is better)"] = {name: found(f"AD {name}") for name in names}
        panels["increase in confidence, % (higher)"] = {name: found(f"IC {name}") for name in names}
    write(output / "curves.png", plot_curves(panels))


def add_samples(output: Path, step: int, pictures: Sequence[Image.Image]) -> None:
    """samples.png: one row per fixed validation picture, one column per validation."""
    folder = output / "samples"
    folder.mkdir(exist_ok=True)
    strip = Image.new("RGB", (pictures[0].width, sum(picture.height for picture in pictures)))
    for index, picture in enumerate(pictures):
        strip.paste(picture, (0, index * picture.height))
    write(folder / f"{step:08d}.png", strip)
    strips = sorted(folder.glob("[0-9]*.png"))
    strips = [strip for strip in strips if int(strip.stem) <= step]
    if len(strips) > _COLUMNS:  # evenly spaced, the first and the last among them
        strips = [strips[round(i * (len(strips) - 1) / (_COLUMNS - 1))] for i in range(_COLUMNS)]
    caption, gap = 20, 4
    sheet = Image.new("RGB", (len(strips) * (strip.width + gap), strip.height + caption), "white")
    draw = ImageDraw.Draw(sheet)
    for index, path in enumerate(strips):
        with Image.open(path) as image:
            sheet.paste(image.convert("RGB"), (index * (strip.width + gap), caption))
        draw.text((index * (strip.width + gap) + 2, 3), f"step {int(path.stem)}", fill="black")
    write(output / "samples.png", sheet)


def time_left(began: float, done: int, steps: int) -> str:
    """ "1.43 s/step, 25 min left" after `done` steps since `began`, with `steps` still to do."""
    per_step = (time.perf_counter() - began) / max(done, 1)
    left = per_step * steps
    words = f"{left:.0f} s" if left < 90 else f"{left / 60:.0f} min" if left < 5400 else f"{left / 3600:.1f} h"
    return f"{per_step:.2f} s/step, {words} left"
