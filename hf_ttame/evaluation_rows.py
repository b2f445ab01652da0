"""What an evaluation has measured, as rows under (table, index, method), on disk while it runs.

    FOLDER/part-*.parquet             written every half minute, gone at the end
    FOLDER/per_image.parquet          all rows
    FOLDER/per_image-HEAD.parquet     rows of other heads that were measured in this folder before

Rows of methods that show the classifier alone hold for any head: who trains a new one measures only its own rows. Each
names the versions of the packages and the device that it was measured with, and its layer where the method reads one:
"gradcam" of another layer is another method.
"""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from .baselines import FROM_THE_HEAD
from .disk import whole
from .metrics import Accumulator

Key = tuple[str, int, str]
"""(table "image" or "mosaic", index, method)."""
Rows = dict[Key, dict[str, Any]]

_FLUSH_SECONDS = 30
_ALL_ROWS = "per_image.parquet"
BORROWED = ("class-mean", "other-image")  # their maps come from the run's other images
# Which column says that a group of measures was taken.
_MARKERS = {
    "confidence": "AD soft 100",
    "adcc": "ADCC",
    "road": "ROAD MoRF confidence",
    "insertion-deletion": "insertion black",
    "mosaic": "grid pointing",
}


class Store:
    """Rows of all processes and runs in one folder.

    Args:
        folder: of the run.
        head: fingerprint of the explainer's head; its rows carry it, those of other heads are kept and not used.
        rank: of this process.
        images: how many the run has: maps borrowed from other images are others where there are more.
        layers: of the methods that read one, their layer; rows of another are measured anew.
        versions: of the packages that measure, and the device, one line.
    """

    def __init__(
        self,
        folder: Path,
        head: str,
        rank: int = 0,
        images: int = 0,
        layers: Mapping[str, str] = MappingProxyType({}),
        versions: str = "",
    ):
        self.folder, self.head, self.rank, self.images = folder, head, rank, images
        self.layers, self.versions = layers, versions
        self.earlier: Rows = {}
        self._others: dict[str, Rows] = {}
        for file in sorted([*folder.glob("per_image*.parquet"), *folder.glob("part-*.parquet")]):
            for key, row in read_rows(file).items():
                if row.get("images", images) != images:
                    continue  # borrowed from fewer or more
                if "layer" in row and row["layer"] != layers.get(key[2], row["layer"]):
                    continue
                other = row.get("head", head)
                rows = self.earlier if other == head else self._others.setdefault(other, {})
                _join(rows.setdefault(key, {}), row)
        self.new = Accumulator()
        self._unwritten: Rows = {}
        self._written_at = time.monotonic()

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, *_: object) -> None:
        self.flush()  # what is measured is kept, whatever ends the block

    def done(self, key: Key, group: str) -> bool:
        return self.earlier.get(key, {}).get(_MARKERS[group]) is not None

    def add(self, keys: Sequence[Key], values: dict[str, torch.Tensor]) -> None:
        self.new.add(keys, values)
        for key in keys:
            if key[2] in FROM_THE_HEAD:
                self.new.rows[key]["head"] = self.head
            if key[2] in BORROWED:
                self.new.rows[key]["images"] = self.images
            if key[2] in self.layers:
                self.new.rows[key]["layer"] = self.layers[key[2]]
            self.new.rows[key]["versions"] = self.versions
            self._unwritten[key] = self.new.rows[key]
        if time.monotonic() - self._written_at > _FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        if self._unwritten:
            write_rows(self.folder / f"part-{self.rank:04d}-{time.time_ns()}.parquet", self._unwritten)
        self._unwritten, self._written_at = {}, time.monotonic()

    def finish(self, main: bool) -> Rows:
        """All rows of this head, earlier and new, of all processes; the main one writes them to per_image.parquet."""
        self.flush()
        everything = {key: dict(row) for key, row in self.earlier.items()}
        for key, row in self.new.gather().rows.items():
            _join(everything.setdefault(key, {}), row)
        if main:
            written = {self.folder / f"per_image-{head}.parquet": rows for head, rows in self._others.items()}
            written[self.folder / _ALL_ROWS] = everything
            for path, rows in written.items():
                write_rows(path, rows)
            for file in [*self.folder.glob("per_image*.parquet"), *self.folder.glob("part-*.parquet")]:
                if file not in written:
                    file.unlink()
        return everything


def versions_of(row: Mapping[str, Any]) -> list[str]:
    """The sets of versions that the measures of a row were taken with, one line each."""
    return str(row.get("versions", "not recorded")).split("; ")


def _join(row: dict[str, Any], further: Mapping[str, Any]) -> None:
    """Add to a row what was measured later; its versions are those of both."""
    if row and "versions" in {*row, *further}:
        further = {**further, "versions": "; ".join(sorted({*versions_of(row), *versions_of(further)}))}
    row.update(further)


def write_rows(path: Path, rows: Rows) -> None:
    """Rows as a parquet file of columns table, index, method and one per measure; never half a file."""
    import pyarrow
    import pyarrow.parquet

    keys = sorted(rows)
    names = sorted({name for row in rows.values() for name in row})
    table = {"table": [k[0] for k in keys], "index": [k[1] for k in keys], "method": [k[2] for k in keys]}
    table |= {name: [rows[key].get(name) for key in keys] for name in names}
    with whole(path) as part:
        pyarrow.parquet.write_table(pyarrow.table(table), part)


def read_rows(path: Path) -> Rows:
    """What `write_rows` wrote, without empty cells."""
    import pyarrow
    import pyarrow.parquet

    try:
        listed = pyarrow.parquet.read_table(path).to_pylist()
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path} is damaged ({error}); delete it, its images will be measured again") from error
    return {
        (row.pop("table"), row.pop("index"), row.pop("method")): {k: v for k, v in row.items() if v is not None}
        for row in listed
    }
