"""A dataset of maps on disk: parquet files that are complete once they have their names, a report, a card.

    DIR/data/maps-SHARD-BLOCK.parquet     one unit of work each; "-end" marks the last one of a shard
    DIR/settings.json                     what must not change when a run is resumed
    DIR/report.json, README.md            once every unit is there

The files themselves say what is done, so that processes need not talk to each other. What is unreadable stands in the
footer of its unit's file.
"""

import json
import os
import re
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import yaml

from . import __version__
from .cards import TAGS, code, escape
from .dataset_input import Input, Unit, Unreadable
from .saving import lock_settings, write_whole

_NAME = re.compile(r"maps-(\d+)-(\d+)(-end)?\.parquet")
_FACTS = b"ttame"  # key in a file's footer
_LISTED = 10_000  # unreadable pictures that report.json lists
_OWN = ("id", "predicted", "class_id", "label", "score", "map", "overlay")
_FOLLOWS = {  # settings that nobody chooses: what they follow from
    "files": ("dataset", "split"),
    "rows": ("dataset", "split"),
    "shards": ("dataset", "split", "rows_per_file"),
    "head_fingerprint": ("dtype",),
    "backbone_fingerprint": ("dtype",),
}


@dataclass
class Output:
    """The folder of a dataset of maps.

    Args:
        folder: created where it does not exist.
        map_size: (h, w).
        overlays: whether there is a column of them.
        kept: features of the columns that are carried over.
    """

    folder: Path
    map_size: tuple[int, int]
    overlays: bool
    kept: dict[str, Any]

    def __post_init__(self) -> None:
        value = datasets.Value
        own = {"id": value("int64"), "predicted": value("int32"), "class_id": value("int32"), "label": value("string")}
        own |= {"score": value("float32"), "map": datasets.Array2D(self.map_size, "uint8")}
        own |= {"overlay": datasets.Image()} if self.overlays else {}
        names = [kept_name(name) for name in self.kept]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(
                f"two of the columns {', '.join(self.kept)} would be named {', '.join(twice)} (a name that is taken "
                "gets the prefix input_); keep one of them, or rename it in the dataset"
            )
        self.features = datasets.Features({**own, **{kept_name(name): kind for name, kind in self.kept.items()}})
        self.schema = self.features.arrow_schema
        try:
            (self.folder / "data").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(f"{str(self.folder)!r} cannot be written: {error.strerror}; choose another --out") from error

    def lock(self, settings: dict[str, Any]) -> None:
        """See `saving.lock_settings`; every process does it, for folders that they do not share."""
        try:
            lock_settings(self.folder, settings, main=True, follows=_FOLLOWS)
        except OSError as error:
            if error.errno is None:  # in words already
                raise
            raise OSError(f"{str(self.folder)!r} cannot be written: {error.strerror}; choose another --out") from error

    def finished(self) -> tuple[dict[Unit, Path], dict[int, int]]:
        """The file of every unit that is done, and the last block of every shard where it is known."""
        files, ends = {}, {}
        for file in sorted((self.folder / "data").iterdir()):
            if found := _NAME.fullmatch(file.name):
                unit = Unit(int(found[1]), int(found[2]))
                files[unit] = file
                if found[3]:
                    ends[unit.shard] = unit.block
        return files, ends

    def table(self, columns: dict[str, Any]) -> pa.Table:
        """Columns of M rows as Arrow: `map` (M, h, w) uint8, `overlay` encoded pictures, the rest lists or arrays."""
        arrays = []
        for field in self.schema:
            values = columns[field.name]
            if field.name == "map":
                values = _nested(np.asarray(values))
            elif field.name == "overlay":
                values = [{"bytes": value, "path": None} for value in values]
            if isinstance(field.type, pa.ExtensionType):  # what `datasets` makes of its arrays
                values = values if isinstance(values, pa.Array) else pa.array(values, type=field.type.storage_type)
                arrays.append(pa.ExtensionArray.from_storage(field.type, values))
            else:
                arrays.append(pa.array(values, type=field.type))
        return pa.Table.from_arrays(arrays, schema=self.schema)

    def write(
        self, unit: Unit, ends_shard: bool, tables: list[pa.Table], read: int, unreadable: list[Unreadable]
    ) -> None:
        """Write a unit. Its file has its name only when it is complete, and is on the disk."""
        name = f"maps-{unit.shard:05d}-{unit.block:05d}{'-end' if ends_shard else ''}.parquet"
        part = self.folder / "data" / f".{name}.{socket.gethostname()}-{os.getpid()}.part"
        facts = {"read": read, "unreadable": unreadable}
        try:
            with open(part, "wb") as file:
                with pyarrow.parquet.ParquetWriter(file, self.schema, compression="zstd") as writer:
                    if tables:  # `datasets` cannot read an empty row group, but a file without one
                        writer.write_table(pa.concat_tables(tables), row_group_size=128)
                    writer.add_key_value_metadata({_FACTS: json.dumps(facts, default=str)})
                os.fsync(file.fileno())
            os.replace(part, part.with_name(name))
        except OSError as error:
            raise OSError(
                f"a file of maps cannot be written to {str(self.folder)!r}: {error.strerror or error}; "
                f"{len(self.finished()[0])} files are complete: make room and run the same command again"
            ) from error
        finally:
            part.unlink(missing_ok=True)

    def finish(self, source: Input, settings: dict[str, Any], facts: dict[str, Any]) -> dict[str, Any] | None:
        """Write the report and the card, if every unit is there; None where others are still to come.

        Raises:
            ValueError: not a single picture was readable, or a file is damaged or has too few rows.
        """
        files, ends = self.finished()
        if len(ends) < source.shards or any(
            Unit(shard, block) not in files for shard, end in ends.items() for block in range(end + 1)
        ):
            return None
        rows = read = 0
        unreadable: list[Unreadable] = []
        broken = 0
        for unit, file in files.items():
            file_rows, found = _footer(file)
            wanted = source.rows_in(unit, ends.get(unit.shard) == unit.block)
            if wanted is not None and found["read"] != wanted:
                raise ValueError(
                    f"{str(file)!r} is not complete: {found['read']} of {wanted} rows of the dataset were read; "
                    "delete it and run the same command again"
                )
            rows, read, broken = rows + file_rows, read + found["read"], broken + len(found["unreadable"])
            unreadable += [Unreadable(*entry) for entry in found["unreadable"][: _LISTED - len(unreadable)]]
        if read == broken:
            raise ValueError(
                f"none of the {read} pictures could be read"
                + (f"; the first: {unreadable[0].reason}" if unreadable else "")
                + f"; is {settings['image_column']!r} the column of the pictures? {str(self.folder)!r} can be deleted"
            )
        report = {
            "pictures": read - broken,
            "rows": rows,
            "unreadable": broken,
            "announced": source.rows,
            "unreadable_pictures": [entry._asdict() for entry in unreadable],
            "files": len(files),
            "bytes": sum(file.stat().st_size for file in files.values()),
            **facts,
            "settings": settings,
        }
        for stale in (self.folder / "data").glob(".maps-*.part"):
            stale.unlink(missing_ok=True)  # of killed processes: their units were done again
        write_whole(self.folder / "report.json", json.dumps(report, indent=2, default=str) + "\n")
        card = self.folder / "README.md"
        if not card.exists() or _GENERATED in card.read_text():
            write_whole(card, dataset_card(report, self.features))
        return report


def _footer(file: Path) -> tuple[int, dict[str, Any]]:
    """The rows of a finished file, and what its footer says of those that were read; ValueError: it is damaged."""
    try:
        footer = pyarrow.parquet.read_metadata(file)
        return footer.num_rows, json.loads(footer.metadata[_FACTS])
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{str(file)!r} is damaged ({error}); delete it and run the same command again: only its pictures are "
            "explained anew"
        ) from error


def kept_name(name: str) -> str:
    """The name under which a column is carried over: a name of our own columns gets a prefix."""
    return f"input_{name}" if name in _OWN else name


def _nested(maps: np.ndarray) -> pa.Array:
    """(M, h, w) uint8 as M lists of h lists of w, without a copy."""
    count, height, width = maps.shape
    values = pa.array(np.ascontiguousarray(maps).reshape(-1))
    lines = pa.ListArray.from_arrays(pa.array(np.arange(count * height + 1, dtype=np.int32) * width), values)
    return pa.ListArray.from_arrays(pa.array(np.arange(count + 1, dtype=np.int32) * height), lines)


# ---- the card -------------------------------------------------------------------------------------------------------

_GENERATED = "Written by `ttame explain-dataset`. Remove this line to keep your own changes."
_ABOUT = {
    "id": "position of the picture in its dataset",
    "predicted": "class id with the highest logit",
    "class_id": "class id that the map explains",
    "label": "its name",
    "score": "the classifier's probability of it, in [0, 1]",
    "map": "{h} x {w}, 0 to 255: the map, min-max scaled, over the classifier's input (what its preprocessing left)",
    "overlay": "the map in colours over the classifier's input",
}
_READING = """```python
from datasets import load_dataset

maps = load_dataset("path/or/id/of/this/dataset", split="train").with_format("numpy")
maps[0]["map"] / 255  # ({h}, {w}), in [0, 1]
```"""


def dataset_card(report: dict[str, Any], features: datasets.Features) -> str:
    """README.md of a dataset of maps."""
    settings = report["settings"]
    height, width = report["map_size"]
    header = {
        "pretty_name": f"Maps of {settings['dataset']}",
        "tags": list(TAGS),
        "configs": [{"config_name": "default", "data_files": "data/*.parquet"}],
    }
    ids = "" if settings["rows"] is not None else f": shard * {settings['id_step']} + row"
    lines = []
    for name in features:
        about = _ABOUT.get(name, "carried over from the dataset").format(h=height, w=width)
        kind = features[name]
        kind_name = kind.dtype if isinstance(kind, datasets.Value) else type(kind).__name__
        lines.append(f"| {code(name)} | {kind_name} | {about}{ids if name == 'id' else ''} |")
    chosen = f"the classes {settings['class_ids']}" if settings["class_ids"] else "the predicted class"
    chosen = f"the {settings['top_k']} classes with the highest scores" if settings["top_k"] else chosen
    return "\n".join(
        [
            "---",
            yaml.safe_dump(header, sort_keys=False).strip(),
            "---",
            f"# Maps of {escape(settings['dataset'])}",
            "",
            f"What a classifier used, for {report['pictures']:,} pictures of {escape(settings['dataset'])}, split "
            f"{escape(settings['split'])}: explained is {chosen}, in one forward pass per picture (T-TAME, "
            "[arXiv 2403.04523](https://arxiv.org/abs/2403.04523)).",
            "",
            "| column | type | |",
            "|---|---|---|",
            *lines,
            "",
            _READING.replace("{h}", str(height)).replace("{w}", str(width)),
            "",
            f"- Explainer: {escape(report['model'])}, head {code(settings['head_fingerprint'])}, classifier "
            f"{code(settings['backbone_fingerprint'])}, {settings['dtype']}.",
            f"- {report['rows']:,} rows in {report['files']:,} files; {report['unreadable']:,} unreadable pictures "
            "have no row (`report.json`).",
            f"- Made with hf-ttame {__version__}, `ttame explain-dataset`.",
            "",
            "A map shows what this classifier used, not what is true. A class that never occurred in the explainer's "
            "training has a map that was never checked against anything.",
            "",
            _GENERATED,
            "",
        ]
    )
