"""A dataset as units of work: which rows belong to which unit, and their pictures, prepared in worker processes.

A unit is a block of at most `rows_per_file` consecutive rows of one shard of the dataset (a file; of what knows its
rows, an even share). Units depend on the dataset and `rows_per_file` alone, batches never cross their borders: whoever
explains a unit, in whatever run, gets the same.
"""

import hashlib
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import datasets
import pyarrow.parquet
import torch
from huggingface_hub import HfApi

from .paths import check_path
from .pictures import contents, image_column, load_files, load_from_hub
from .saving import HUB_ERRORS

UNKNOWN_ROWS = 10**9  # distance of the first ids of two shards whose rows are not known beforehand
FILE_NAME = "file_name"  # column of a folder of pictures: the path inside the folder
_MAX_SHARDS = 1024  # of a dataset that knows its rows
_CHUNK = 32  # rows read at once
_Item = TypeVar("_Item")


class Unit(NamedTuple):
    """Rows block * rows_per_file and following of a shard."""

    shard: int
    block: int


FIRST = Unit(0, 0)


class Unreadable(NamedTuple):
    """A picture that could not be explained. key: its value in the id column, if there is one."""

    id: int
    key: Any
    reason: str


@dataclass
class Batch:
    """Rows of one unit: undecoded `cells`, or, once prepared, `pixel_values` (B, C, H, W) of those that are readable.

    ids: B positions. columns: the kept columns, B values each. rows: how many there were, readable or not. closes: the
    unit ends with this batch; ends_shard: so does the shard.
    """

    ids: list[int]
    columns: dict[str, list[Any]]
    cells: list[Any]
    rows: int
    unit: Unit = FIRST
    closes: bool = False
    ends_shard: bool = False
    pixel_values: torch.Tensor | None = None
    unreadable: list[Unreadable] = field(default_factory=list)

    def pin_memory(self) -> "Batch":
        if self.pixel_values is not None:
            self.pixel_values = self.pixel_values.pin_memory()
        return self


@dataclass
class Input:
    """An opened dataset.

    Args:
        dataset: its pictures undecoded; `num_shards` of it never changes.
        column: of the pictures.
        id_column: names the pictures for people, None where there is none.
        kept: columns that are carried over, the id column first.
        features: of the kept columns.
        starts: the id of the first row of each shard.
        shard_rows: how many rows each shard has; None where only reading tells.
        rows_per_file: at most so many rows are a unit.
        revision: commit of a Hub id.
        rows: how many there are, where that is known or announced.
        digest: of the names and sizes of local files; another one means another dataset.
    """

    dataset: datasets.IterableDataset
    column: str
    id_column: str | None
    kept: tuple[str, ...]
    features: dict[str, Any]
    starts: list[int]
    shard_rows: list[int] | None
    rows_per_file: int
    revision: str | None = None
    rows: int | None = None
    digest: str | None = None

    @property
    def shards(self) -> int:
        return len(self.starts)

    def rows_of(self, rank: int, world: int, done: Iterable[Unit] = ()) -> int | None:
        """How many rows process `rank` of `world` has before it, those of the units in `done` left out; about so many
        where the dataset only announces its size, None where it does not."""
        if self.shard_rows is None:
            return None if self.rows is None else max(0, self.rows - len(set(done)) * self.rows_per_file) // world
        finished, total = set(done), 0
        for shard, rows in enumerate(self.shard_rows):
            for block, start in enumerate(range(0, rows, self.rows_per_file)):
                if Unit(shard, block) not in finished and self.is_dealt(Unit(shard, block), rank, world):
                    total += min(self.rows_per_file, rows - start)
        return total

    def rows_in(self, unit: Unit, ends_shard: bool) -> int | None:
        """How many rows a unit has, all that are left of a shard that ends with it; None where only reading tells."""
        if self.shard_rows is None:
            return None
        left = self.shard_rows[unit.shard] - unit.block * self.rows_per_file
        return left if ends_shard else min(self.rows_per_file, left)

    def is_dealt(self, unit: Unit, rank: int, world: int) -> bool:
        """Whether a unit belongs to process `rank` of `world`.

        Shards are dealt evenly. The blocks of those that are left over, all where there are fewer shards than
        processes, are dealt one by one.
        """
        dealt = self.shards // world * world
        return (unit.shard if unit.shard < dealt else unit.shard + unit.block) % world == rank

    def batches(
        self, batch_size: int, rank: int, world: int, done: set[Unit], ends: dict[int, int]
    ) -> Iterator[Batch]:
        """Undecoded batches of the units of a process that are not done, unit by unit.

        Args:
            batch_size: rows per batch.
            rank, world: see `is_dealt`.
            done: units that are passed over.
            ends: the last block of a shard, where it is known: what need not be read is not.
        """
        for shard in range(self.shards):
            needed = None
            if shard in ends:
                units = (Unit(shard, block) for block in range(ends[shard] + 1))
                needed = [unit for unit in units if unit not in done and self.is_dealt(unit, rank, world)]
                if not needed:
                    continue
            if shard < self.shards // world * world and shard % world != rank:
                continue
            rows = enumerate(self._rows(shard))
            ahead = next(rows, None)
            for block in range(sys.maxsize):
                unit = Unit(shard, block)
                wanted = unit not in done and self.is_dealt(unit, rank, world)
                part: list[tuple[int, dict[str, Any]]] = []
                for _ in range(self.rows_per_file):
                    if ahead is None:
                        break
                    if len(part) == batch_size:
                        yield self._batch(unit, part, False, False)
                        part = []
                    if wanted:
                        part.append(ahead)
                    ahead = next(rows, None)
                if wanted:
                    yield self._batch(unit, part, True, ahead is None)
                if ahead is None or (needed and unit == needed[-1]):
                    break

    def _rows(self, shard: int) -> Iterator[dict[str, Any]]:
        for chunk in self.dataset.shard(self.shards, shard).iter(batch_size=_CHUNK):
            columns = {name: chunk[name] for name in dict.fromkeys((self.column, *self.kept))}
            for values in zip(*columns.values(), strict=True):
                yield dict(zip(columns, values, strict=True))

    def _batch(self, unit: Unit, part: list[tuple[int, dict[str, Any]]], closes: bool, ends_shard: bool) -> Batch:
        return Batch(
            [self.starts[unit.shard] + row for row, _ in part],
            {name: [cells[name] for _, cells in part] for name in self.kept},
            [cells[self.column] for _, cells in part],
            len(part),
            unit,
            closes,
            ends_shard,
        )


def open_input(
    name: str,
    split: str = "train",
    revision: str | None = None,
    *,
    column: str | None = None,
    id_column: str | None = None,
    keep_columns: Sequence[str] = (),
    rows_per_file: int = 512,
) -> Input:
    """Open any dataset to be read in its own order.

    Args:
        name: Hub id (streamed), folder of parquet or tar files or pictures, such a file, or a `save_to_disk` folder.
        split, revision: as `pictures.open_stream`.
        column: of the pictures; None: found.
        id_column: a column that names the pictures; of a folder of pictures their paths, "" for none.
        keep_columns: more columns to carry over.
        rows_per_file: see `Input`.

    Raises:
        ValueError: there is no such dataset, split or column, or it is empty.
    """
    path = Path(name)
    commit, shard_rows, digest = None, None, None
    check_path(name, "dataset", "dataset")
    if not path.exists():
        commit = dataset_commit(name, revision)
        dataset = load_from_hub(name, split, commit or revision)
    else:
        found = contents(path, split)
        digest = dataset_digest(path, found)
        if isinstance(found, list) and found[0].suffix in (".parquet", ".tar"):
            dataset = load_files(found)
            if found[0].suffix == ".parquet":
                shard_rows = [pyarrow.parquet.read_metadata(file).num_rows for file in found]
        else:
            if isinstance(found, list):
                id_column = FILE_NAME if id_column is None else id_column
                root = path / split if (path / split) in found[0].parents else path
                names = [file.relative_to(root).as_posix() for file in found]
                found = datasets.Dataset.from_dict({"image": [str(file) for file in found], FILE_NAME: names})
            shards = min(max(1, -(-len(found) // rows_per_file)), _MAX_SHARDS)
            shard_rows = [len(found) // shards + (shard < len(found) % shards) for shard in range(shards)]
            dataset = found.to_iterable_dataset(num_shards=shards) if len(found) else found
    if shard_rows is not None and not sum(shard_rows):
        raise ValueError(f"{name!r} is empty; give a dataset with pictures")
    announced = (dataset.info.splits or {}).get(split)
    column = image_column(dataset, column)
    kept = tuple(dict.fromkeys([*([id_column] if id_column else []), *keep_columns]))
    features = _features(dataset, kept)
    lengths = shard_rows or [UNKNOWN_ROWS] * dataset.num_shards
    starts = list(accumulate(lengths[:-1], initial=0))
    return Input(
        dataset.decode(False) if dataset.features else dataset,
        column,
        id_column or None,
        kept,
        features,
        starts,
        shard_rows,
        rows_per_file,
        revision=commit,
        rows=sum(shard_rows) if shard_rows else getattr(announced, "num_examples", None) or None,
        digest=digest,
    )


def dataset_digest(path: Path, found: datasets.Dataset | list[Path]) -> str:
    """Hash of the names and sizes of the files that `contents` found under `path`."""
    if not isinstance(found, list):
        return str(found._fingerprint)
    digest = hashlib.sha256()
    for file in found:
        name = file.relative_to(path).as_posix() if path.is_dir() else file.name
        try:
            size = file.stat().st_size  # not the time too: a copied dataset is the same one
        except OSError:
            size = -1  # a link that leads nowhere is one unreadable picture
        digest.update(f"{name}\n{size}\n".encode())
    return digest.hexdigest()[:32]


def local_digest(name: str | None, split: str) -> str | None:
    """`dataset_digest` of a dataset that lies here; None of another."""
    return dataset_digest(Path(name), contents(Path(name), split)) if name and Path(name).exists() else None


def dataset_commit(name: str, revision: str | None) -> str | None:
    """The commit of a dataset on the Hub, so that every process and every run reads the same; None where not known."""
    try:
        return HfApi().dataset_info(name, revision=revision).sha
    except ValueError:  # no repository's name
        return None
    except HUB_ERRORS:
        return None


def _features(dataset: datasets.IterableDataset, kept: Sequence[str]) -> dict[str, Any]:
    if dataset.features is None:
        if kept:
            raise ValueError(
                f"the types of the columns are not known, so that {', '.join(kept)} cannot be kept; leave "
                "--keep-columns and --id-column out"
            )
        return {}
    if missing := [name for name in kept if name not in dataset.features]:
        raise ValueError(f"no column {', '.join(missing)} in the dataset; its columns: {', '.join(dataset.features)}")
    return {name: dataset.features[name] for name in kept}
