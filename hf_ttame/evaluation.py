"""Measure an explainer and the methods beside it: same images, same preprocessing, same class for all.

A run has two parts. The scan classifies every image once and keeps what others need: the predicted classes, the
explainer's small maps (trivial methods borrow them) and half-size tiles of confidently classified images, for mosaics.
Then each method explains batch after batch, image after image where one takes long; every result is a row under
(table, index, method) and is written to a parquet part within a minute, so that a killed run continues where it was.
Processes take turns with the batches.
"""

import hashlib
import json
import math
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from .baselines import TRIVIAL, Cost, MapBank, Method, MethodSettings, expand_names, make_method
from .dataset_input import dataset_commit, local_digest
from .evaluation_rows import Key, Store
from .image_processing import preprocess
from .latency import measure_latency
from .masking import apply_mask, min_max, resize_maps
from .metrics import (
    Accumulator,
    adcc,
    area,
    class_probability,
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
from .metrics.localization import MOSAIC_CONFIDENCE, TILES, box_region, fit, half_size, mosaic
from .modeling_ttame import TTameModel
from .passes import PassBar, passes_of
from .paths import check_outside, check_path
from .pictures import decode, image_column, open_stream, parse_where, rows
from .precision import PRECISIONS, passes_in
from .records import head_fingerprint
from .reporting import environment, write_report
from .saving import lock_settings

METRICS = ("confidence", "adcc", "road", "insertion-deletion", "mosaic")
SHEET_IMAGES = 6
SHEET_SIDE = 56
_PART_SECONDS = 15  # of images that are measured, and then kept, together


@dataclass(frozen=True)
class Plan:
    """What to measure on what.

    Args:
        dataset, split, revision, image_column: see `pictures.open_stream`.
        where: "column%N==R", only those rows.
        box_column: column of a box [left, top, right, bottom] in pixels of the picture, for pointing game and energy.
        methods: names, see `baselines.ALL`; "all" is allowed. The explainer and the trivial maps are always there.
        metrics: of METRICS; entropy, area and the mean mask value come with "confidence".
        limit: images; None: all. Of a growing run the first ones stay the same.
        slow_limit: the first so many images for methods with many passes per map (perturbation, integrated gradients).
        curve_limit: the first so many images for ROAD, insertion and deletion.
        mosaics: at most so many 2 x 2 mosaics, four maps each; None: as many as images, 100 at most.
        slow_mosaics: the same for methods with many passes per map, which also are not asked for ADCC.
        mosaic_confidence: images below are not used in mosaics.
        batch_size: images per batch.
        precision: of the passes, "float32", "bfloat16" or "float16", see `precision.passes_in`.
        seed: of everything random.
        settings: numbers of the methods.
    """

    dataset: str
    split: str = "validation"
    revision: str | None = None
    image_column: str | None = None
    where: str | None = None
    box_column: str | None = None
    methods: tuple[str, ...] = ("all",)
    metrics: tuple[str, ...] = METRICS
    limit: int | None = None
    slow_limit: int = 100
    curve_limit: int = 100
    mosaics: int | None = None
    slow_mosaics: int = 0
    mosaic_confidence: float = MOSAIC_CONFIDENCE
    batch_size: int = 16
    precision: str = "float32"
    seed: int = 0
    settings: MethodSettings = field(default_factory=MethodSettings)

    def __post_init__(self) -> None:
        unknown = set(self.metrics) - set(METRICS)
        if unknown or not self.metrics:
            raise ValueError(f"metrics must be of {', '.join(METRICS)}, got {', '.join(self.metrics) or 'none'}")
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit must be at least 1, got {self.limit}")
        for name in ("slow_limit", "curve_limit", "mosaics", "slow_mosaics"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {self.precision!r}")
        parse_where(self.where)
        check_path(self.dataset, "dataset", "dataset")

    @property
    def most_mosaics(self) -> int:
        """`mosaics`, or what stands in for None."""
        return min(100, self.limit or 100) if self.mosaics is None else self.mosaics

    def fixed(self) -> dict[str, Any]:
        """What must not change between the parts of one resumed run; methods, metrics and limits may grow."""
        record = asdict(self)
        for name in (
            "revision",
            "methods",
            "metrics",
            "limit",
            "slow_limit",
            "curve_limit",
            "mosaics",
            "slow_mosaics",
            "batch_size",
        ):
            record.pop(name)
        record["settings"] = self.settings.to_dict()
        record["dataset"] = Path(self.dataset).name if os.path.exists(self.dataset) else self.dataset
        return record


def is_slow(method: Method) -> bool:
    """Whether a map costs dozens of passes or more."""
    return method.kind == "perturbation" or method.name == "integrated-gradients"


# ---- the stream ---------------------------------------------------------------------------------------------------


@dataclass
class Batch:
    """Images at positions `indices` (B,) of the selected rows; `boxes` as in the dataset, with the pictures' sizes."""

    indices: torch.Tensor
    pixel_values: torch.Tensor
    boxes: list[Any]
    sizes: list[tuple[int, int]]


class Images:
    """Batches of the plan's images. Every process reads the stream and decodes only the batches that are its own."""

    def __init__(self, plan: Plan, model: TTameModel, rank: int = 0, world: int = 1):
        self.plan, self.model, self.rank, self.world = plan, model, rank, world
        self.dataset = open_stream(plan.dataset, plan.split, plan.revision)
        self.column = image_column(self.dataset, plan.image_column)
        self.rows = 0  # that the last reading went over, readable or not, of all processes

    def batches(self, limit: int | None, wanted: set[int] | None = None, size: int | None = None) -> Iterator[Batch]:
        """Batches of this process among the first `limit` images; a batch without a wanted index is not decoded.

        size: of a batch; None: the plan's.
        """
        size = size or self.plan.batch_size
        cells: list[tuple[int, dict[str, Any]]] = []
        number = 0
        for index, row in enumerate(rows(self.dataset, self.column, self.plan.where)):
            if limit is not None and index >= limit:
                break
            self.rows = index + 1
            cells.append((index, row))
            if len(cells) == size:
                yield from self._own(number, cells, wanted)
                cells, number = [], number + 1
        if cells:
            yield from self._own(number, cells, wanted)

    def _own(self, number: int, cells: list[tuple[int, dict[str, Any]]], wanted: set[int] | None) -> Iterator[Batch]:
        if number % self.world != self.rank or (wanted is not None and not wanted & {index for index, _ in cells}):
            return
        indices, pictures, boxes = [], [], []
        for index, row in cells:
            try:
                pictures.append(decode(row[self.column]))
            except ValueError:
                continue  # it has no row in the report, which says how many there were
            indices.append(index)
            boxes.append(row[self.plan.box_column] if self.plan.box_column else None)
        if pictures:
            pixel_values = preprocess(self.model.image_processor, pictures).to(self.model.device)
            sizes = [picture.size for picture in pictures]
            yield Batch(torch.tensor(indices), _fast(pixel_values), boxes, sizes)


def _fast(pixel_values: torch.Tensor) -> torch.Tensor:
    return pixel_values.contiguous(memory_format=torch.channels_last)


# ---- the scan -----------------------------------------------------------------------------------------------------


@dataclass
class Scan:
    """Of n readable images: `indices` (n,) in the dataset, `targets` (n,) predicted classes, `p` (n,) their
    probability, `maps` (n, h, w) of the explainer; `tiles` (m, C, H // 2, W // 2) of the confident images `tile_rows`
    (m,). `unreadable`: how many more there were."""

    indices: torch.Tensor
    targets: torch.Tensor
    p: torch.Tensor
    maps: torch.Tensor
    tiles: torch.Tensor
    tile_rows: torch.Tensor
    unreadable: int = 0

    def bank(self) -> MapBank:
        """The maps by position in the dataset; unreadable pictures leave class -1, of which no map is lent."""
        size = int(self.indices.max()) + 1
        maps, targets = torch.zeros(size, *self.maps.shape[1:]), torch.full((size,), -1)
        maps[self.indices], targets[self.indices] = self.maps.float(), self.targets
        return MapBank(maps, targets)

    def mosaics(self, count: int) -> list[list[int]]:
        """Up to `count` groups of four rows of `tiles` with four different classes, each row used once."""
        return group_by_four(self.targets[self.tile_rows].tolist(), count)


def group_by_four(classes: Sequence[int], count: int) -> list[list[int]]:
    """Up to `count` groups of four positions in `classes` with four different ones, each position used once.

    A group takes the first that fit: it stays the same, whatever comes later and however many are asked for.
    """
    left = list(range(len(classes)))
    groups: list[list[int]] = []
    while len(groups) < count:
        group: list[int] = []
        seen: set[int] = set()
        for row in left:
            if classes[row] not in seen:
                group.append(row)
                seen.add(classes[row])
            if len(group) == TILES:
                break
        if len(group) < TILES:
            return groups
        groups.append(group)
        left = [row for row in left if row not in group]
    return groups


@torch.no_grad()
def scan(model: TTameModel, images: Images, plan: Plan, bar: Any = None) -> Scan:
    """Classify and explain every image once; the same result on every process among which `images` are shared."""
    size = (model.config.image_size[0], model.config.image_size[1])
    found = Accumulator()
    # Twice what the mosaics need, for four different classes each.
    room = 8 * max(plan.most_mosaics, plan.slow_mosaics)
    tiles = 0
    for batch in images.batches(plan.limit):
        output = model(batch.pixel_values)
        targets = output.class_ids[:, 0]
        p = class_probability(output.logits, targets, model.config.classifier_outputs)
        maps = model.scale_maps(output.map_logits[:, 0].float())
        found.add(batch.indices.tolist(), {"target": targets, "p": p})
        for row, index in enumerate(batch.indices.tolist()):
            found.rows[index]["map"] = maps[row].half().cpu().numpy()
            if p[row] >= plan.mosaic_confidence and tiles < room:
                tile = half_size(batch.pixel_values[row : row + 1].float().contiguous(), size)[0]
                found.rows[index]["tile"] = tile.half().cpu().numpy()
                tiles += 1
        if bar is not None:
            bar.update(len(targets))
    everywhere = found.gather() if images.world > 1 else found  # the sanity checks scan on one process of several
    if len(everywhere) < 2:
        raise ValueError(f"at least 2 readable images are needed, got {len(everywhere)} of {plan.dataset!r}")
    keys = sorted(everywhere.rows)
    entries = [everywhere.rows[key] for key in keys]
    confident = [row for row, entry in enumerate(entries) if "tile" in entry][:room]  # of all processes, the first
    return Scan(
        indices=torch.tensor(keys),
        targets=torch.tensor([entry["target"] for entry in entries]),
        p=torch.tensor([entry["p"] for entry in entries]),
        maps=torch.from_numpy(np.stack([entry["map"] for entry in entries])),
        tiles=torch.from_numpy(np.stack([entries[row]["tile"] for row in confident]).astype(np.float32))
        if confident
        else torch.zeros(0, 1, 1, 1),
        tile_rows=torch.tensor(confident, dtype=torch.long),
        unreadable=images.rows - len(keys),
    )


# ---- measuring ----------------------------------------------------------------------------------------------------


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
            if plan.box_column:
                found |= _inside_boxes(model, batch, shown)
            coarse = F.interpolate(shown[:, None], size=(SHEET_SIDE, SHEET_SIDE), mode="area")[:, 0]
            found["_sheet"] = (255 * coarse).round().to(torch.uint8).flatten(1)
        if "adcc" in groups:
            masked_images = _fast(apply_mask(x, shown, black))
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


def _inside_boxes(model: TTameModel, batch: Batch, shown: torch.Tensor) -> dict[str, torch.Tensor]:
    """Pointing game and energy in the dataset's boxes, moved into the classifier's input; NaN where none is in it."""
    found = {
        "pointing game": torch.full((len(shown),), math.nan),
        "energy in box": torch.full((len(shown),), math.nan),
    }
    for row, (box, size) in enumerate(zip(batch.boxes, batch.sizes, strict=True)):
        if box is None or len(box) != 4:
            continue
        place = model._placement(size)
        # Pixel i of the input is centred at step * i + start in the picture, counted from the centre of its first.
        left, right = (((edge - 0.5) - place.x_start) / place.x_step + 0.5 for edge in (box[0], box[2]))
        top, bottom = (((edge - 0.5) - place.y_start) / place.y_step + 0.5 for edge in (box[1], box[3]))
        region = box_region((left, top, right, bottom), (shown.shape[-2], shown.shape[-1]))[None].to(shown.device)
        if region.any():
            found["pointing game"][row] = 100 * pointing_game(shown[row : row + 1], region).item()
            found["energy in box"][row] = 100 * energy_inside(shown[row : row + 1], region).item()
    return found


def measure_mosaic(model: TTameModel, method: Method, number: int, group: list[int], scanned: Scan) -> dict[str, Any]:
    """Grid pointing of one mosaic: the share of energy in the right tile in percent, the mean of its four classes."""
    size = (model.config.image_size[0], model.config.image_size[1])
    image = fit(mosaic(scanned.tiles[group].to(model.device)), size)
    targets = scanned.targets[scanned.tile_rows[group]].to(model.device)
    explain = method.at(-(torch.arange(TILES) + 1 + TILES * number))  # no image of the dataset
    maps = explain(_fast(image.expand(TILES, -1, -1, -1)), targets).detach().float()
    shares = grid_pointing(resize_maps(maps, size), torch.arange(TILES, device=maps.device))
    return {"grid pointing": 100 * shares.mean()[None].cpu()}


def compare(
    model: TTameModel,
    plan: Plan,
    output: Path,
    *,
    accelerator: Any = None,
    progress: bool = True,
    sanity: dict[str, Any] | None = None,
    contact_sheet: bool = True,
) -> dict[str, Any]:
    """Measure every method of the plan and write the report into `output`; an interrupted run continues.

    Args:
        model: the explainer, in eval mode.
        plan: see `Plan`.
        output: folder for per_image.parquet, report.json, report.md, plots and the contact sheet.
        accelerator: of Accelerate, where several processes share the work.
        progress: draw a bar with the time left.
        sanity: results of `sanity_checks.run_checks`, for the report.
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
    methods = [make_method(name, model, plan.settings, bank) for name in names]
    head = head_fingerprint(model.head.state_dict())
    store = Store(output, f"{head[:12]}-{model.config.map_scaling}", rank, len(scanned.indices))
    if accelerator:
        accelerator.wait_for_everyone()
    sheet = sheet_images(scanned, plan)
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
            if is_slow(method):
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
        "unreadable": scanned.unreadable,
        "mosaics": len(groups_of_four),
        "settings": {**record, "dataset": data, "methods": list(plan.methods), "metrics": list(plan.metrics)},
        "limits": {"slow": plan.slow_limit, "curves": plan.curve_limit, "slow mosaics": plan.slow_mosaics},
        "environment": environment(model.device, plan.precision),
    }
    kept = {key: row for key, row in everything.items() if key[2] in names}
    measured = {name for _, _, name in kept}
    with passes_in(model, plan.precision), tqdm(desc="latency", unit="method", disable=hidden) as latency_bar:
        latency = measure_latency(
            model,
            [method for method in methods if method.name in measured],
            _first_pictures(Images(plan, model), targets),
            output,
            {**facts["environment"], "copies per pass": plan.settings.batch_size},
            store.head,
            lambda name: latency_bar.set_postfix_str(name) or latency_bar.update(),
        )
    shown = sheet_pictures(model, plan, sheet) if contact_sheet else {}
    return write_report(output, kept, methods, facts, shown, sanity, latency)


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
            (index, _fast(batch.pixel_values[row : row + 1]), targets[index])
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
            _fast(batch.pixel_values[found_rows]),
            [batch.boxes[row] for row in found_rows],
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


def sheet_images(scanned: Scan, plan: Plan) -> dict[int, int]:
    """Positions of the images of the contact sheet, with their classes: the first of each class, up to six, among
    those that every method explains."""
    within = [index for index in scanned.indices.tolist() if index < max(plan.slow_limit, 1)]
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
