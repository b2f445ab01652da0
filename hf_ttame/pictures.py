"""Pictures of any `datasets` source, as a stream: folders, parquet files, Hub ids."""

import io
import random
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from .image_processing import load_image

if TYPE_CHECKING:
    import datasets

_SPLITS = {"train", "training", "validation", "valid", "val", "test"}
_PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")


def open_stream(name: str, split: str = "train", revision: str | None = None) -> "datasets.IterableDataset":
    """A streamed dataset from a folder of parquet files, a folder of pictures, one parquet file, or a Hub id.

    In a folder of parquet files, the files named after the split are read ("train-*.parquet"), or all where none is.

    Raises:
        ValueError: the folder holds no pictures, or there is no such dataset.
    """
    import datasets

    path = Path(name)
    if path.is_file() and path.suffix == ".parquet":
        return datasets.load_dataset("parquet", data_files=[str(path)], split="train", streaming=True)
    if path.is_dir():
        parquet = sorted(path.rglob("*.parquet"))
        if parquet:
            files = [f for f in parquet if split in (f.name.split("-")[0].split(".")[0], f.parent.name)]
            named = [f for f in parquet if {f.name.split("-")[0].split(".")[0], f.parent.name} & _SPLITS]
            if not files and named:
                raise ValueError(f"{name!r} has no split {split!r}; its files: {', '.join(f.name for f in named[:5])}")
            files = files or parquet
            return datasets.load_dataset("parquet", data_files=[str(f) for f in files], split="train", streaming=True)
        pictures = sorted(str(file) for file in path.rglob("*") if file.suffix.lower() in _PICTURES)
        if pictures:
            random.Random(0).shuffle(pictures)  # folders of one class each would give batches of one class
            return datasets.Dataset.from_dict({"image": pictures}).to_iterable_dataset()
        raise ValueError(f"the folder {name!r} holds neither .parquet files nor pictures ({', '.join(_PICTURES)})")
    try:
        return datasets.load_dataset(name, split=split, revision=revision, streaming=True)
    except (FileNotFoundError, ValueError, ConnectionError) as error:
        raise ValueError(f"{name!r} is neither a folder nor a dataset on the Hub: {error}") from error


def image_column(dataset: "datasets.IterableDataset", wanted: str | None = None) -> str:
    """The column that holds the pictures: `wanted`, or the only image column, or one called image, img or jpg.

    Raises:
        ValueError: there is no such column; the message names those there are.
    """
    import datasets

    features = dataset.features
    columns = list(features) if features else list(next(iter(dataset)))
    if wanted is not None:
        if wanted not in columns:
            raise ValueError(f"image column {wanted!r} is not in the dataset; its columns: {', '.join(columns)}")
        return wanted
    typed = [name for name in columns if features and isinstance(features[name], datasets.Image)]
    named = [name for name in ("image", "img", "jpg", "jpeg", "png", "webp", "pixel_values") if name in columns]
    if len(typed) == 1 or named:
        return typed[0] if len(typed) == 1 else named[0]
    raise ValueError(f"no image column found; name it with --image-column; the columns: {', '.join(columns)}")


def decode(value: Any) -> Image.Image:
    """RGB picture of an undecoded cell: a path, bytes, or {"bytes", "path"}. ValueError where it is unreadable."""
    if isinstance(value, dict):
        value = value["bytes"] if value.get("bytes") is not None else value["path"]
    if isinstance(value, bytes):
        try:
            with Image.open(io.BytesIO(value)) as image:
                return load_image(image)
        except (OSError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
            raise ValueError(f"picture of {len(value)} bytes cannot be read: {error}") from error
    return load_image(value)


def parse_where(rule: str | None) -> tuple[str, int, int] | None:
    """("column", n, r) of "column%n==r": only rows whose column is r modulo n.

    Raises:
        ValueError: the rule has another form.
    """
    if rule is None:
        return None
    column, percent, rest = rule.partition("%")
    modulus, equals, remainder = rest.partition("==")
    if not (column and percent and equals and modulus.strip().isdigit() and remainder.strip().isdigit()):
        raise ValueError(f"--where must have the form 'column%N==R', got {rule!r}")
    if int(modulus) < 1:
        raise ValueError(f"--where: the number after % must be at least 1, got {rule!r}")
    return column.strip(), int(modulus), int(remainder)


def rows(dataset: "datasets.IterableDataset", column: str, where: str | None = None) -> Iterator[dict[str, Any]]:
    """The rows of a stream, pictures undecoded, those that `where` leaves."""
    import datasets

    features = dataset.features
    if features and isinstance(features[column], datasets.Image):
        dataset = dataset.cast_column(column, datasets.Image(decode=False))
    rule = parse_where(where)
    for row in dataset:
        if rule is None:
            yield row
            continue
        if rule[0] not in row:
            raise ValueError(f"--where names the column {rule[0]!r}; the columns: {', '.join(row)}")
        if row[rule[0]] % rule[1] == rule[2]:
            yield row
