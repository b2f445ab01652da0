"""The images of an evaluation: a stream of batches, shared among processes, and the scan that looks at each once."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import PureWindowsPath
from typing import Any

import datasets
import numpy as np
import torch

from .baselines import MapBank
from .evaluation_plan import Plan
from .image_processing import preprocess
from .metrics import Accumulator, class_probability
from .metrics.localization import TILES, half_size
from .modeling_ttame import TTameModel
from .pictures import decode, image_column, open_stream, path_of, rows


@dataclass
class Batch:
    """Images at positions `indices` (B,) of the selected rows; `marks`: their cells of the column of boxes or masks;
    `sizes`: (width, height) of the pictures."""

    indices: torch.Tensor
    pixel_values: torch.Tensor
    marks: list[Any]
    sizes: list[tuple[int, int]]


class Images:
    """Batches of the plan's images. Every process reads the stream and decodes only the batches that are its own."""

    def __init__(self, plan: Plan, model: TTameModel, rank: int = 0, world: int = 1):
        self.plan, self.model, self.rank, self.world = plan, model, rank, world
        self.dataset = open_stream(plan.dataset, plan.split, plan.revision)
        self.column = image_column(self.dataset, plan.image_column)
        self.mark = plan.box_column or plan.mask_column
        columns = self.dataset.features
        if self.mark and columns and self.mark not in columns:
            raise ValueError(f"the dataset has no column {self.mark!r}; its columns: {', '.join(columns)}")
        if self.mark and columns and isinstance(columns[self.mark], datasets.Image):
            self.dataset = self.dataset.cast_column(self.mark, datasets.Image(decode=False))  # one may be damaged
        self.unreadable: dict[int, str] = {}  # of this process: position and, where it has one, the file's name

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
            cells.append((index, row))
            if len(cells) == size:
                yield from self._own(number, cells, wanted)
                cells, number = [], number + 1
        if cells:
            yield from self._own(number, cells, wanted)

    def _own(self, number: int, cells: list[tuple[int, dict[str, Any]]], wanted: set[int] | None) -> Iterator[Batch]:
        if number % self.world != self.rank or (wanted is not None and not wanted & {index for index, _ in cells}):
            return
        indices, pictures, marks = [], [], []
        for index, row in cells:
            try:
                pictures.append(decode(row[self.column]))
            except ValueError:
                # The file's name alone, of either kind of path: reports are published.
                self.unreadable[index] = PureWindowsPath(path_of(row[self.column]) or "").name
                continue
            indices.append(index)
            marks.append(row[self.mark] if self.mark else None)
        if pictures:
            pixel_values = preprocess(self.model.image_processor, pictures).to(self.model.device)
            sizes = [picture.size for picture in pictures]
            yield Batch(torch.tensor(indices), channels_last(pixel_values), marks, sizes)


def channels_last(pixel_values: torch.Tensor) -> torch.Tensor:
    return pixel_values.contiguous(memory_format=torch.channels_last)


@dataclass
class Scan:
    """Of n readable images: `indices` (n,) in the dataset, `targets` (n,) predicted classes, `p` (n,) their
    probability, `maps` (n, h, w) of the explainer; `tiles` (m, C, H // 2, W // 2) of the confident images `tile_rows`
    (m,). `unreadable`: position and file name of those that could not be read."""

    indices: torch.Tensor
    targets: torch.Tensor
    p: torch.Tensor
    maps: torch.Tensor
    tiles: torch.Tensor
    tile_rows: torch.Tensor
    unreadable: dict[int, str] = field(default_factory=dict)

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
    broken = Accumulator()
    broken.rows = {index: {"name": name} for index, name in images.unreadable.items()}
    everywhere = found
    if images.world > 1:  # the sanity checks scan on one process of several
        everywhere, broken = found.gather(), broken.gather()
    if len(everywhere) < 2:
        raise ValueError(
            f"at least 2 readable images are needed, got {len(everywhere)} of {plan.dataset!r}; "
            f"{len(broken)} could not be read"
        )
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
        unreadable={index: row["name"] for index, row in sorted(broken.rows.items())},
    )
