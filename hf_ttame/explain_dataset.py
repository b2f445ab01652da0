"""Explain every picture of a dataset: parquet files of maps, by several processes, resumable by file.

    accelerate launch -m hf_ttame.explain_dataset DATASET --model EXPLAINER --out DIR

One process reads the stream in a thread, worker processes decode and prepare pictures, the model computes. Processes
of a launch share the units of work by a fixed rule (`dataset_input`) and never wait for each other; what is done
stands in the folder (`dataset_output`).
"""

import io
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from . import __version__
from .answers import probabilities
from .dataset_input import UNKNOWN_ROWS, Batch, Input, Unreadable, open_input
from .dataset_loader import Prepare, make_loader
from .dataset_output import Output, kept_name
from .image_processing import ImageInput, shown
from .modeling_ttame import TTameModel
from .saving import fingerprint, is_local_path
from .visualization import colour_map

_STRENGTH = 0.55  # share of colour in an overlay
_PALETTE = colour_map(np.arange(256) / 255).tobytes()


@dataclass(frozen=True)
class MapPlan:
    """What to explain of which dataset.

    Args:
        dataset, split, revision, image_column, id_column, keep_columns, rows_per_file: see `dataset_input.open_input`.
        class_ids: class ids or label names, the same for every picture; None: the predicted class, of a multi-label
            classifier every class with a probability over 0.5 (the highest if there is none).
        top_k: instead of class_ids, the k classes with the highest scores.
        overlays: also write a JPEG of each map over the classifier's input.
        batch_size: pictures per pass.
        workers: processes that decode and prepare pictures, per process of the launch; None: by the cores.
    """

    dataset: str
    split: str = "train"
    revision: str | None = None
    image_column: str | None = None
    id_column: str | None = None
    keep_columns: tuple[str, ...] = ()
    class_ids: tuple[int | str, ...] | None = None
    top_k: int | None = None
    overlays: bool = False
    rows_per_file: int = 512
    batch_size: int = 32
    workers: int | None = None

    def __post_init__(self) -> None:
        if self.class_ids is not None and self.top_k is not None:
            raise ValueError("give class_ids (--class) or top_k (--top-k), not both")
        for name in ("rows_per_file", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.workers is not None and self.workers < 0:
            raise ValueError(f"workers must not be negative, got {self.workers}")


# ---- one batch ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def explain_batch(
    model: TTameModel,
    images: Sequence[ImageInput | bytes | dict[str, Any]],
    class_ids: int | str | Sequence[int | str] | None = None,
    top_k: int | None = None,
    *,
    ids: Sequence[Any] | None = None,
    overlays: bool = False,
) -> tuple[dict[str, Any], list[Unreadable]]:
    """The columns of a batch of pictures: what a run writes, for an engine of your own (Ray Data, Spark).

    Args:
        model: the explainer, in eval mode.
        images: bytes of picture files, {"bytes", "path"} cells of `datasets`, PIL images, paths or arrays.
        class_ids, top_k: as `TTameModel.explain`.
        ids: of the pictures; None: their positions in `images`.
        overlays: also the column `overlay`.

    Returns:
        columns of M rows, one per readable picture and class: `id` (list), `predicted` and `class_id` (M,) int32,
        `label` (list of str), `score` (M,) float32, `map` (M, h, w) uint8, and `overlay` (list of JPEG bytes); and
        the pictures that were unreadable.

    Raises:
        ValueError: an unknown class, both selections, or scores that are not finite.
    """
    names = list(range(len(images))) if ids is None else list(ids)
    if len(names) != len(images):
        raise ValueError(f"there must be one id per image, got {len(names)} for {len(images)}")
    wanted = _wanted(model, class_ids, top_k)
    prepare = Prepare(model.image_processor, len(model.config.pixel_scale))
    batch = prepare[Batch(list(range(len(images))), {}, list(images), len(images))]
    columns = _collect(model, batch, _launch(model, batch, wanted, top_k), overlays)
    columns["id"] = [names[row] for row in columns["id"]]
    return columns, [entry._replace(id=names[entry.id]) for entry in batch.unreadable]


def _wanted(model: TTameModel, class_ids: Any, top_k: int | None) -> torch.Tensor | None:
    """The asked classes (N,); ValueError where model or selection do not fit."""
    if model.training:
        raise ValueError("explaining needs eval mode; call model.eval() first")
    if class_ids is not None and top_k is not None:
        raise ValueError("give class_ids (--class) or top_k (--top-k), not both")
    if top_k is not None and not 1 <= top_k <= model.config.num_labels:
        raise ValueError(f"top_k must lie in 1..{model.config.num_labels}, got {top_k}")
    return None if class_ids is None else torch.tensor(model.resolve_classes(class_ids))


@dataclass
class _Launched:
    """Of B pictures, on the device: predicted (B,), ids (B, N), scores (B, N), maps (B, N, h, w) uint8; `counts` says
    how many of the N classes count in each row."""

    predicted: torch.Tensor
    ids: torch.Tensor
    scores: torch.Tensor
    maps: torch.Tensor
    counts: list[int]


@torch.no_grad()
def _launch(model: TTameModel, batch: Batch, wanted: torch.Tensor | None, top_k: int | None) -> _Launched | None:
    """Start the pass of a batch; a GPU is not waited for."""
    if batch.pixel_values is None:
        return None
    pixel_values = batch.pixel_values.to(model.device, non_blocking=True, memory_format=torch.channels_last)
    logits, features = model.features(pixel_values)
    ids, counts = model._select(logits, wanted, top_k)
    scores = probabilities(logits, model.config.classifier_outputs).gather(1, ids)
    maps = model.scale_maps(model.head(features, ids)).mul(255).round().to(torch.uint8)
    return _Launched(logits.argmax(dim=1), ids, scores, maps, counts)


def _collect(model: TTameModel, batch: Batch, launched: _Launched | None, overlays: bool) -> dict[str, Any]:
    """The columns of a batch, a row per picture and class."""
    if launched is None:
        h, w = model.config.map_size
        empty = np.zeros(0, dtype=np.int32)
        columns: dict[str, Any] = {"id": [], "predicted": empty, "class_id": empty, "label": []}
        columns |= {"score": np.zeros(0, dtype=np.float32), "map": np.zeros((0, h, w), dtype=np.uint8)}
        return columns | ({"overlay": []} if overlays else {}) | {name: [] for name in batch.columns}
    counts = np.array(launched.counts)
    chosen = np.arange(launched.ids.shape[1]) < counts[:, None]
    rows = np.repeat(np.arange(len(counts)), counts)
    ids = launched.ids.cpu()
    model._warn_unseen(ids[torch.from_numpy(chosen)])
    scores = launched.scores.float().cpu().numpy()[chosen]
    if not np.isfinite(scores).all():
        raise ValueError(f"the classifier's scores are not finite in {model.dtype}; use --dtype float32 or bfloat16")
    class_ids = ids.numpy()[chosen].astype(np.int32)
    maps = launched.maps.cpu().numpy()[chosen]
    columns = {
        "id": [batch.ids[row] for row in rows],
        "predicted": launched.predicted.cpu().numpy()[rows].astype(np.int32),
        "class_id": class_ids,
        "label": [model.config.id2label[class_id] for class_id in class_ids.tolist()],
        "score": scores,
        "map": maps,
    }
    if overlays:
        assert batch.pixel_values is not None
        seen = [_as_seen(model, pixel_values) for pixel_values in batch.pixel_values]
        columns["overlay"] = [_overlay(seen[row], explanation) for row, explanation in zip(rows, maps, strict=True)]
    for name, values in batch.columns.items():
        columns[kept_name(name)] = [values[row] for row in rows]
    return columns


def _as_seen(model: TTameModel, pixel_values: torch.Tensor) -> Image.Image:
    """The classifier's input (C, H, W) as a picture."""
    scale, shift = (torch.tensor(v)[:, None, None] for v in (model.config.pixel_scale, model.config.pixel_shift))
    levels = ((pixel_values - shift) / scale).clamp(0, 1).mul(255).round().permute(1, 2, 0).numpy()
    return Image.fromarray(levels.astype(np.uint8)) if levels.shape[2] == 3 else shown(levels)


def _overlay(picture: Image.Image, explanation: np.ndarray) -> bytes:
    """JPEG of a map (h, w) uint8 over a picture: all in Pillow, which is quick."""
    coloured = Image.fromarray(explanation).resize(picture.size, Image.Resampling.BILINEAR)
    coloured.putpalette(_PALETTE)
    file = io.BytesIO()
    Image.blend(picture, coloured.convert("RGB"), _STRENGTH).save(file, "JPEG", quality=88)
    return file.getvalue()


# ---- a dataset ------------------------------------------------------------------------------------------------------


def explain_dataset(
    model: TTameModel,
    plan: MapPlan,
    out: str | os.PathLike,
    *,
    accelerator: Any = None,
    progress: bool = True,
    say: Any = print,
) -> dict[str, Any] | None:
    """Explain every picture of a dataset into the folder `out`; an interrupted run continues.

    Args:
        model: the explainer.
        plan: see `MapPlan`.
        out: folder for data/*.parquet, settings.json, report.json, README.md.
        accelerator: of Accelerate: its device, and its processes share the work.
        progress: draw a bar with the time left, for the share of the first process.
        say: receives a line of text.

    Returns:
        The report, from the process that finishes last; None from the others.

    Raises:
        ValueError: the folder holds results of another run, or dataset, column or class do not fit.
        OSError: the folder cannot be written, or the dataset cannot be read on; what is complete stays.
    """
    from tqdm.auto import tqdm

    rank, world = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    model.eval().to(memory_format=torch.channels_last)
    if accelerator:
        model.to(accelerator.device)
    wanted = _wanted(model, plan.class_ids, plan.top_k)
    source = open_input(
        plan.dataset,
        plan.split,
        plan.revision,
        column=plan.image_column,
        id_column=plan.id_column,
        keep_columns=plan.keep_columns,
        rows_per_file=plan.rows_per_file,
    )
    map_size = (model.config.map_size[0], model.config.map_size[1])
    output = Output(Path(out), map_size, plan.overlays, source.features)
    settings = _settings(model, plan, source, wanted)
    output.lock(settings)
    files, ends = output.finished()
    if files and rank == 0:
        say(f"{len(files)} files are complete already; going on")

    def batches() -> Iterator[Batch]:
        return source.batches(plan.batch_size, rank, world, set(files), ends)

    prepare = Prepare(model.image_processor, len(model.config.pixel_scale), source.id_column)
    workers = _workers(accelerator) if plan.workers is None else plan.workers
    loader = make_loader(batches, prepare, workers, pin=model.device.type == "cuda")
    tables: list[Any] = []
    unreadable: list[Unreadable] = []
    read = 0
    total = source.rows_of(rank, world, files)
    with tqdm(total=total, unit="image", smoothing=0.05, disable=rank != 0 or not progress) as bar:
        for batch, launched in _one_behind(_patient(loader, output), model, wanted, plan.top_k):
            columns = _collect(model, batch, launched, plan.overlays)
            if len(columns["id"]):
                tables.append(output.table(columns))
            unreadable += batch.unreadable
            read += batch.rows
            bar.update(batch.rows)
            if batch.closes:
                output.write(batch.unit, batch.ends_shard, tables, read, unreadable)
                tables, unreadable, read = [], [], 0
    facts = {"model": _public(model.name_or_path), "map_size": list(map_size), **_about(model)}
    return output.finish(source.shards, settings, facts)


def _one_behind(
    batches: Iterable[Batch], model: TTameModel, wanted: torch.Tensor | None, top_k: int | None
) -> Iterator[tuple[Batch, _Launched | None]]:
    """Every batch with what the model makes of it, handed out when the next one is launched: so that a GPU computes
    while the results of the batch before it are packed."""
    waiting = None
    for batch in batches:
        launched = _launch(model, batch, wanted, top_k)
        if waiting:
            yield waiting
        waiting = batch, launched
    if waiting:
        yield waiting


def _patient(loader: Iterable[Batch], output: Output) -> Iterator[Batch]:
    """The loader's batches; what stops it is said in words, with what to do."""
    batches = iter(loader)
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except Exception as error:
            hint = "fewer --workers or a smaller --batch-size need less memory; " if "worker" in str(error) else ""
            raise OSError(
                f"the dataset cannot be read on: {error}; {len(output.finished()[0])} files are complete; {hint}run "
                "the same command again to continue"
            ) from error
        yield batch


def _settings(model: TTameModel, plan: MapPlan, source: Input, wanted: torch.Tensor | None) -> dict[str, Any]:
    """What must not change when a run is resumed; the number of processes, the batch size and the workers may."""
    return {
        "dataset": _public(plan.dataset),
        "split": plan.split,
        "revision": source.revision,
        "files": source.digest,
        "rows": source.rows if source.shard_rows is not None else None,
        "shards": source.shards,
        "id_step": 1 if source.shard_rows is not None else UNKNOWN_ROWS,
        "image_column": source.column,
        "id_column": source.id_column,
        "keep_columns": list(plan.keep_columns),
        "class_ids": None if wanted is None else wanted.tolist(),
        "top_k": plan.top_k,
        "overlays": plan.overlays,
        "rows_per_file": plan.rows_per_file,
        "head_fingerprint": fingerprint(model.head),
        "backbone_fingerprint": model.config.backbone_fingerprint,
        "map_size": list(model.config.map_size),
        "map_scaling": model.config.map_scaling,
        "dtype": str(model.dtype).removeprefix("torch."),
    }


def _public(name: str) -> str:
    """A Hub id, or the last part of a path: where it lies here is nobody else's business."""
    return Path(name).resolve().name if os.path.exists(name) or is_local_path(name) else name


def _about(model: TTameModel) -> dict[str, Any]:
    device = model.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {"device": name, "versions": {"torch": torch.__version__, "hf-ttame": __version__}}


def _workers(accelerator: Any) -> int:
    """Every process of this machine gets its share of the cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    here = int(os.environ.get("LOCAL_WORLD_SIZE", accelerator.num_processes if accelerator else 1))
    return max(1, min(16, cores // here))


if __name__ == "__main__":
    from .cli import main

    sys.argv.insert(1, "explain-dataset")
    main()
