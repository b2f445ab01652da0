"""Measure an explainer and the methods beside it: same images, same preprocessing, same class for all.

A run has two parts. The scan classifies every image once and keeps what others need: the predicted classes, the
explainer's small maps (trivial methods borrow them) and half-size tiles of confidently classified images, for mosaics.
Then each method explains batch after batch, image after image where one takes long; every result is a row under
(table, index, method) and is written to a parquet part within a minute, so that a killed run continues where it was.
Processes take turns with the batches.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from .baselines import TRIVIAL, Method, expand_names, make_method
from .dataset_input import dataset_commit, local_digest
from .evaluation_images import Batch, Images, Scan, channels_last, scan
from .evaluation_measuring import measure_batch, measure_mosaic
from .evaluation_plan import Plan
from .evaluation_rows import BORROWED, Key, Store, versions_of
from .latency import measure_latency
from .metrics.localization import TILES
from .modeling_ttame import TTameModel
from .passes import PassBar, passes_of
from .paths import check_outside
from .precision import passes_in
from .records import head_fingerprint, map_facts
from .reporting import environment, write_report
from .saving import lock_settings

SHEET_IMAGES = 6
_NAMED = 100  # unreadable images that the report names
_PART_SECONDS = 15  # of images that are measured, and then kept, together


def is_slow(method: Method) -> bool:
    """Whether a map costs dozens of passes or more."""
    return method.kind == "perturbation" or method.name == "integrated-gradients"


def compare(
    model: TTameModel,
    plan: Plan,
    output: Path,
    *,
    accelerator: Any = None,
    progress: bool = True,
    sanity: Callable[[Plan], dict[str, Any]] | None = None,
    contact_sheet: bool = True,
) -> dict[str, Any]:
    """Measure every method of the plan and write the report into `output`; an interrupted run continues.

    Args:
        model: the explainer, in eval mode.
        plan: see `Plan`.
        output: folder for per_image.parquet, report.json, report.md, plots and the contact sheet.
        accelerator: of Accelerate, where several processes share the work.
        progress: draw a bar with the time left.
        sanity: given the plan, the sanity checks for the report (`sanity_checks.run_checks` or `kept_checks`); called
            by the main process, once the folder is known to belong to this run.
        contact_sheet: draw it; it shows six of the photographs.

    Returns:
        The report, see `reporting.write_report`.

    Raises:
        ValueError: the folder holds results of another run, or the dataset or a method does not fit.
    """
    from tqdm.auto import tqdm

    rank, world = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    main = rank == 0
    if accelerator:
        model.to(accelerator.device)
    model.eval().to(memory_format=torch.channels_last)
    names = list(dict.fromkeys([*expand_names(plan.methods, model), *TRIVIAL]))
    # A wrong layer or a missing package is told before hours of work.
    ready = {name: make_method(name, model, plan.settings) for name in names if name not in BORROWED}
    check_outside(output, plan.dataset)
    identity = _identity(plan, output)
    if identity is not None and not os.path.exists(plan.dataset):
        plan = replace(plan, revision=identity)  # what is read is what was named
    images = Images(plan, model, rank, world)  # a wrong dataset is told before anything is written
    output.mkdir(parents=True, exist_ok=True)
    record = {**plan.fixed(), "identity": identity, **_inputs(model)}
    if accelerator:
        accelerator.wait_for_everyone()
    lock_settings(output, record, main)
    checks = sanity(plan) if sanity is not None and main else None

    hidden = not (main and progress)
    began = time.monotonic()
    own = -(-plan.limit // world) if plan.limit else None  # images of this process
    with (
        passes_in(model, plan.precision),
        tqdm(desc="scan", total=own, unit="image", disable=hidden) as scan_bar,
    ):
        scanned = scan(model, images, plan, scan_bar)
    pace = world * (time.monotonic() - began) / len(scanned.indices)
    bank = scanned.bank()
    methods = [ready.get(name) or make_method(name, model, plan.settings, bank) for name in names]
    head = head_fingerprint(model.head.state_dict())
    of_the_maps = hashlib.sha256(map_facts(model.config).encode()).hexdigest()[:8]
    surroundings = environment(model.device, plan.precision)
    store = Store(
        output,
        f"{head[:12]}-{of_the_maps}",
        rank,
        len(scanned.indices),
        {method.name: method.layer for method in methods if method.layer and method.name != "ttame"},
        ", ".join(
            [*(f"{name} {number}" for name, number in surroundings["versions"].items()), surroundings["device"]]
        ),
    )
    if accelerator:
        accelerator.wait_for_everyone()
    sheet = sheet_images(scanned, plan.slow_limit or None)
    targets = dict(zip(scanned.indices.tolist(), scanned.targets.tolist(), strict=True))

    # Every (image, method) with the groups of measures that are still to be taken.
    todo: dict[tuple[int, str], list[str]] = {}
    for method in methods:
        for index in targets:
            if is_slow(method) and index >= plan.slow_limit:
                continue
            groups = [group for group in plan.metrics if group != "mosaic"]
            if index >= plan.curve_limit:
                groups = [group for group in groups if group not in ("road", "insertion-deletion")]
            if is_slow(method) and index >= plan.slow_adcc:
                groups = [group for group in groups if group != "adcc"]
            groups = [group for group in groups if not store.done(("image", index, method.name), group)]
            if groups:
                todo[index, method.name] = groups
    groups_of_four = scanned.mosaics(max(plan.most_mosaics, plan.slow_mosaics))
    mosaic_jobs = [
        (number, method)
        for method in methods
        for number in range(min(len(groups_of_four), plan.slow_mosaics if is_slow(method) else plan.most_mosaics))
        if "mosaic" in plan.metrics and not store.done(("mosaic", number, method.name), "mosaic")
    ]

    by_name = {method.name: method for method in methods}
    total = sum(passes_of(by_name[name], groups) for (_, name), groups in todo.items())
    total += sum(TILES * method.passes for _, method in mosaic_jobs)
    bar = PassBar(model.backbone, -(-total // world), pace, hidden)
    with store, passes_in(model, plan.precision), bar:
        for slow in (False, True):  # what is quick stands in the table first
            chosen = [method for method in methods if is_slow(method) == slow]
            wanted = {index for index, name in todo if name in {method.name for method in chosen}}
            if wanted:
                # An image may take minutes there: smaller batches give every process its share.
                size = min(plan.batch_size, max(1, len(wanted) // (4 * world))) if slow else plan.batch_size
                for batch in images.batches(max(wanted) + 1, wanted, size):
                    for method in chosen:
                        _measure_into(store, model, method, batch, targets, todo, plan, sheet, bar)
            for place, (number, method) in enumerate(mosaic_jobs):
                if is_slow(method) == slow and place % world == rank:
                    with bar.step(f"{method.name}, mosaics", TILES * method.passes):
                        values = measure_mosaic(model, method, number, groups_of_four[number], scanned)
                    store.add([("mosaic", number, method.name)], values)

    everything = store.finish(main)
    if accelerator:
        accelerator.wait_for_everyone()
    if not main:
        return {}
    # The report may be published: it names what is on the Hub, and no folder of this machine.
    name, data = model.name_or_path, plan.dataset
    classifier = model.config.backbone or model.config.backbone_config.get("architecture")
    data = "a local folder" if os.path.exists(data) else data
    facts = {
        "model": name if name and not os.path.exists(name) else classifier or type(model.backbone).__name__,
        "head_fingerprint": head,
        "backbone_fingerprint": model.config.backbone_fingerprint,
        "map_scaling": model.config.map_scaling,
        "data": " ".join(text for text in (data, plan.split, plan.where) if text),
        "images": len(targets),
        "unreadable": len(scanned.unreadable),
        "unreadable_images": [{"row": row, "file": name} for row, name in scanned.unreadable.items()][:_NAMED],
        "mosaics": len(groups_of_four),
        "settings": {**record, "dataset": data, "methods": list(plan.methods), "metrics": list(plan.metrics)},
        "limits": {
            "slow": plan.slow_limit,
            "curves": plan.curve_limit,
            "slow mosaics": plan.slow_mosaics,
            "slow ADCC": plan.slow_adcc,
        },
        "environment": {**surroundings, "copies per pass": plan.settings.batch_size},
    }
    kept = {key: row for key, row in everything.items() if key[2] in names}
    facts["measured_with"] = sorted({versions for row in kept.values() for versions in versions_of(row)})
    if plan.box_column or plan.mask_column:
        facts["bad_marks"] = int(sum(row.get("bad marks", 0) for key, row in kept.items() if key[2] == "ttame"))
    measured = {name for _, _, name in kept}
    with passes_in(model, plan.precision), tqdm(desc="latency", unit="method", disable=hidden) as latency_bar:
        latency = measure_latency(
            model,
            [method for method in methods if method.name in measured],
            _first_pictures(Images(plan, model), targets),
            output,
            facts["environment"],
            store.head,
            lambda name: latency_bar.set_postfix_str(name) or latency_bar.update(),
        )
    shown = sheet_pictures(model, plan, sheet) if contact_sheet else {}
    return write_report(output, kept, methods, facts, shown, checks, latency)


def _identity(plan: Plan, output: Path) -> str | None:
    """What tells this dataset from another: names and sizes of local files; of one on the Hub the commit that the run
    began with."""
    if os.path.exists(plan.dataset):
        return local_digest(plan.dataset, plan.split)
    settings = output / "settings.json"
    if settings.exists():
        return json.loads(settings.read_text()).get("identity")
    return dataset_commit(plan.dataset, plan.revision)


def _inputs(model: TTameModel) -> dict[str, Any]:
    """What makes the classifier's answer to a picture: another of these, and rows measured before say nothing."""
    processor = json.dumps(model.image_processor.to_dict(), sort_keys=True, default=str)
    return {
        "backbone_fingerprint": model.config.backbone_fingerprint,
        "processor": hashlib.sha256(processor.encode()).hexdigest()[:16],
        **{
            name: [float(value) for value in getattr(model.config, name)]
            for name in ("image_size", "pixel_scale", "pixel_shift")
        },
    }


def _first_pictures(images: Images, targets: dict[int, int]) -> list[tuple[int, torch.Tensor, int]]:
    """The first pictures, one by one, with their place and class: what is timed."""
    for batch in images.batches(max(targets) + 1):
        return [
            (index, channels_last(batch.pixel_values[row : row + 1]), targets[index])
            for row, index in enumerate(batch.indices.tolist())
        ]
    return []


def sheet_pictures(model: TTameModel, plan: Plan, sheet: dict[int, int]) -> dict[int, tuple[Image.Image, str]]:
    """The contact sheet's images as the classifier sees them, with their label."""
    found = {}
    scale, shift = (
        torch.tensor(values)[:, None, None] for values in (model.config.pixel_scale, model.config.pixel_shift)
    )
    for batch in Images(plan, model).batches(max(sheet, default=-1) + 1, set(sheet)):
        for index, pixel_values in zip(batch.indices.tolist(), batch.pixel_values.cpu(), strict=True):
            if index in sheet:
                pixels = ((pixel_values - shift) / scale).clamp(0, 1).permute(1, 2, 0).mul(255).round()
                picture = Image.fromarray(pixels.to(torch.uint8).numpy())
                found[index] = (picture, str(model.config.id2label[sheet[index]]).split(",")[0])
    return found


def _measure_into(
    store: Store,
    model: TTameModel,
    method: Method,
    batch: Batch,
    targets: dict[int, int],
    todo: dict[tuple[int, str], list[str]],
    plan: Plan,
    sheet: dict[int, int],
    bar: PassBar,
) -> None:
    """Measure one method on the images of a batch that still need it; images that need the same measures together, as
    many as take a few seconds."""
    by_groups: dict[tuple[str, ...], list[int]] = {}
    for row, index in enumerate(batch.indices.tolist()):
        if (index, method.name) in todo:
            by_groups.setdefault(tuple(todo[index, method.name]), []).append(row)
    left = list(by_groups.items())
    while left:
        groups, wanted = left.pop()
        passes = passes_of(method, groups)
        room = bar.images_in(_PART_SECONDS, passes)
        found_rows = wanted[:room]
        if wanted[room:]:
            left.append((groups, wanted[room:]))
        part = Batch(
            batch.indices[found_rows],
            channels_last(batch.pixel_values[found_rows]),
            [batch.marks[row] for row in found_rows],
            [batch.sizes[row] for row in found_rows],
        )
        ids = torch.tensor([targets[index] for index in part.indices.tolist()], device=model.device)
        with bar.step(method.name, passes * len(ids)):
            values = measure_batch(model, method, part, ids, groups, plan)
        maps = values.pop("_sheet", None)
        keys: list[Key] = [("image", index, method.name) for index in part.indices.tolist()]
        store.add(keys, values)
        if maps is not None:
            for row, index in enumerate(part.indices.tolist()):
                if index in sheet:
                    store.add([("image", index, method.name)], {"sheet map": maps[row : row + 1]})


def sheet_images(scanned: Scan, limit: int | None) -> dict[int, int]:
    """Positions of the images of the contact sheet, with their classes: the first of each class, up to six, among
    the first `limit` (None: all), those that slow methods explain too, in this run or a later one."""
    within = [index for index in scanned.indices.tolist() if limit is None or index < limit]
    found: dict[int, int] = {}
    by_index = dict(zip(scanned.indices.tolist(), scanned.targets.tolist(), strict=True))
    for new_class in (True, False):
        for index in within:
            if (
                len(found) < SHEET_IMAGES
                and index not in found
                and (not new_class or by_index[index] not in found.values())
            ):
                found[index] = by_index[index]
    return dict(sorted(found.items()))
