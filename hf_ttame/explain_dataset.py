"""Explain every picture of a dataset: parquet files of maps, by several processes, resumable by file.

    accelerate launch -m hf_ttame.explain_dataset DATASET --model EXPLAINER --out DIR

One process reads the stream in a thread, worker processes decode and prepare pictures, the model computes. Processes
of a launch share the units of work by a fixed rule (`dataset_input`) and never wait for each other; what is done
stands in the folder (`dataset_output`).
"""

import hashlib
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from . import __version__
from .dataset_columns import Launched, collect, launch, wanted_classes
from .dataset_input import UNKNOWN_ROWS, Batch, Input, Unreadable, open_input
from .dataset_loader import Prepare, make_loader
from .dataset_output import Output
from .image_processing import ImageInput
from .modeling_ttame import TTameModel
from .paths import check_path
from .saving import fingerprint, is_local_path


@dataclass(frozen=True)
class MapPlan:
    """What to explain of which dataset.

    Args:
        dataset, split, revision, image_column, id_column, keep_columns, rows_per_file: see `dataset_input.open_input`.
        class_ids: class ids or label names, the same for every picture, each once however often it is named; None: the
            predicted class, of a multi-label classifier every class with a probability over 0.5 (the highest if there
            is none).
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
        check_path(self.dataset, "dataset", "dataset")


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
        class_ids, top_k: as `TTameModel.explain`; a class that is named twice counts once.
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
    wanted = wanted_classes(model, class_ids, top_k)
    prepare = Prepare(model.image_processor, len(model.config.pixel_scale))
    batch = prepare[Batch(list(range(len(images))), {}, list(images), len(images))]
    columns = collect(model, batch, launch(model, batch, wanted, top_k), overlays)
    columns["id"] = [names[row] for row in columns["id"]]
    return columns, [entry._replace(id=names[entry.id]) for entry in batch.unreadable]


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
        ValueError: the folder holds results of another run or a damaged file, it overlaps with the dataset, or
            dataset, column or class do not fit.
        OSError: the folder cannot be written, or the dataset cannot be read on; what is complete stays.
    """
    from tqdm.auto import tqdm

    rank, world = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    model.eval().to(memory_format=torch.channels_last)
    if accelerator:
        model.to(accelerator.device)
    wanted = wanted_classes(model, plan.class_ids, plan.top_k)
    _check_apart(plan.dataset, Path(out))
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
            columns = collect(model, batch, launched, plan.overlays)
            if len(columns["id"]):
                tables.append(output.table(columns))
            unreadable += batch.unreadable
            read += batch.rows
            bar.update(batch.rows)
            if batch.closes:
                output.write(batch.unit, batch.ends_shard, tables, read, unreadable)
                tables, unreadable, read = [], [], 0
    facts = {"model": _public(model.name_or_path), "map_size": list(map_size), **_about(model)}
    report = output.finish(source, settings, facts)
    if report and report["announced"] not in (None, report["pictures"] + report["unreadable"]):
        read_rows = report["pictures"] + report["unreadable"]
        say(f"the dataset announces {report['announced']} pictures and gave {read_rows}: check that it is complete")
    return report


def _one_behind(
    batches: Iterable[Batch], model: TTameModel, wanted: torch.Tensor | None, top_k: int | None
) -> Iterator[tuple[Batch, Launched | None]]:
    """Every batch with what the model makes of it, handed out when the next one is launched: so that a GPU computes
    while the results of the batch before it are packed."""
    waiting = None
    for batch in batches:
        try:
            launched = launch(model, batch, wanted, top_k)
        except torch.OutOfMemoryError as error:
            raise OSError(f"{error}; run the same command again with a smaller --batch-size to continue") from error
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
            reason = (str(error).strip() or type(error).__name__).splitlines()[
                -1
            ]  # a worker's begins with its traceback
            hint = "fewer --workers or a smaller --batch-size need less memory; " if "worker" in reason else ""
            raise OSError(
                f"the dataset cannot be read on: {reason}; {len(output.finished()[0])} files are complete; {hint}run "
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
        "backbone_fingerprint": fingerprint(model.backbone),  # as it is: not what the config was told
        "preprocessing": _hash(model.image_processor.to_dict()),
        "labels": _hash({str(class_id): label for class_id, label in model.config.id2label.items()}),
        "map_size": list(model.config.map_size),
        "map_scaling": model.config.map_scaling,
        "dtype": str(model.dtype).removeprefix("torch."),
    }


def _hash(facts: dict[str, Any]) -> str:
    text = json.dumps(facts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _check_apart(dataset: str, out: Path) -> None:
    """Raise ValueError where the maps would be read as pictures, or the pictures be published with the maps."""
    source, target = Path(dataset), out.resolve()
    if not source.exists():
        return  # on the Hub
    source = source.resolve()
    if source == target or source in target.parents or target in source.parents:
        raise ValueError(
            f"--out {str(out)!r} and the dataset {dataset!r} overlap: maps would be taken for pictures, or pictures "
            "published with the maps; choose a folder for --out that neither lies in the dataset nor holds it"
        )


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
