"""Pictures of any `datasets` source, found and decoded: folders, parquet and tar files, Hub ids."""

import io
import random
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
from PIL import Image, UnidentifiedImageError

from .image_processing import DECODER_ERRORS, check_picture, load_image
from .paths import check_path, nearest_path
from .saving import HTTP_ERRORS

_SPLITS = {"train", "training", "validation", "valid", "val", "test"}
_PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")
DATA_ERRORS: tuple[type[Exception], ...] = (
    ValueError, OSError, EOFError, zlib.error, tarfile.TarError, *HTTP_ERRORS, datasets.exceptions.DatasetsError
)  # fmt: skip
"""What reading a dataset raises: a damaged file or archive, a connection that is lost, a wrong column."""
_SHARDS = 256  # of a dataset that knows its rows: the order of the shards is shuffled at every epoch


def open_stream(
    name: str, split: str = "train", revision: str | None = None, streaming: bool = True
) -> datasets.IterableDataset:
    """A dataset to read from beginning to end, from a folder, a file or a Hub id.

    Folders and files: parquet, webdataset tar, pictures, `Dataset.save_to_disk`. Of a folder of parquet or tar files,
    those named after the split are read ("train-*.parquet"), or all where none is; a folder of pictures may have one
    sub-folder per split.

    Args:
        name: what to open.
        split: "train" or another.
        revision: of a Hub id.
        streaming: False downloads a Hub dataset (or converts local files) once and maps it into memory.

    Raises:
        ValueError: the folder holds no pictures, or there is no such dataset or split.
    """
    path = Path(name)
    check_path(name, "dataset", "dataset")
    if not path.exists():
        dataset = load_from_hub(name, split, revision, streaming)
        return dataset if streaming else _in_shards(dataset)
    found = contents(path, split)
    if isinstance(found, datasets.Dataset):
        return _in_shards(found)
    if found[0].suffix in (".parquet", ".tar"):
        return _from_files(found, streaming)
    pictures = [str(file) for file in found]
    random.Random(0).shuffle(pictures)  # folders of one class each would give batches of one class
    return _in_shards(datasets.Dataset.from_dict({"image": pictures}))


def load_from_hub(name: str, split: str, revision: str | None = None, streaming: bool = True) -> Any:
    """`datasets.load_dataset`; ValueError where there is no such dataset."""
    try:
        return datasets.load_dataset(name, split=split, revision=revision, streaming=streaming)
    except (FileNotFoundError, ValueError, ConnectionError) as error:
        near = nearest_path(name)
        raise ValueError(
            f"{name!r} is neither a folder{f' (nearest: {near!r})' if near else ''} nor a dataset on the Hub: {error}"
        ) from error


def contents(path: Path, split: str) -> datasets.Dataset | list[Path]:
    """What a file or folder holds: a saved dataset, or the files of one kind, .parquet, .tar or pictures, by name.

    Raises:
        ValueError: neither, or no such split.
    """
    if path.is_file():
        if path.suffix not in (".parquet", ".tar"):
            raise ValueError(f"{str(path)!r} is neither a .parquet nor a .tar file; give one of these or a folder")
        return [path]
    if (path / "dataset_dict.json").exists():
        saved = datasets.load_from_disk(str(path))
        if split not in saved:
            raise ValueError(f"{str(path)!r} has no split {split!r}; it has: {', '.join(saved)}")
        return saved[split]
    if (path / "state.json").exists():
        return datasets.load_from_disk(str(path))
    for suffix in (".parquet", ".tar"):
        if found := sorted(path.rglob(f"*{suffix}")):
            named = {file: {file.name.split("-")[0].split(".")[0], file.parent.name} & _SPLITS for file in found}
            files = [file for file in found if split in named[file]]
            if not files and any(named.values()):
                raise ValueError(
                    f"{str(path)!r} has no split {split!r}; its files: {', '.join(f.name for f in found[:5])}"
                )
            return files or found
    parts = sorted(part.name for part in path.iterdir() if part.is_dir() and part.name in _SPLITS)
    if parts and split not in parts:
        raise ValueError(
            f"{str(path)!r} has no folder {split!r}; it has: {', '.join(parts)}; name one as the split, or put "
            f"the pictures that are to be read into {split!r}"
        )
    path = path / split if split in parts else path
    pictures = sorted((file for file in path.rglob("*") if file.suffix.lower() in _PICTURES), key=str)
    if not pictures:
        raise ValueError(
            f"the folder {str(path)!r} holds neither .parquet or .tar files nor pictures ({', '.join(_PICTURES)})"
        )
    return pictures


def _from_files(files: list[Path], streaming: bool) -> datasets.IterableDataset:
    dataset = load_files(files, streaming)
    if not streaming:
        return _in_shards(dataset)
    # Row groups are smaller than files: more parts to deal and to shuffle.
    return dataset.reshard() if files[0].suffix == ".parquet" and hasattr(dataset, "reshard") else dataset


def load_files(files: list[Path], streaming: bool = True) -> Any:
    """The dataset of .parquet or .tar files, each a shard; ValueError where they cannot be read."""
    builder = "parquet" if files[0].suffix == ".parquet" else "webdataset"
    try:
        return datasets.load_dataset(
            builder, data_files=[str(file) for file in files], split="train", streaming=streaming
        )
    except (ValueError, OSError) as error:
        raise ValueError(f"{files[0].name!r} and its like cannot be read as {builder}: {error}") from error


def _in_shards(dataset: datasets.Dataset) -> datasets.IterableDataset:
    if not len(dataset):
        raise ValueError("the dataset is empty; give one with pictures")
    return dataset.to_iterable_dataset(num_shards=min(_SHARDS, len(dataset)))


def image_column(dataset: datasets.IterableDataset, wanted: str | None = None) -> str:
    """The column that holds the pictures: `wanted`, or the only image column, or one called image, img or jpg.

    Raises:
        ValueError: there is no such column (the message names those there are), it can hold no pictures, or the
            dataset is empty.
    """
    features = dataset.features
    columns = list(features) if features else list(next(iter(dataset), {}))
    if not columns:
        raise ValueError("the dataset is empty: it has neither rows nor columns")
    if wanted is not None:
        if wanted not in columns:
            raise ValueError(f"image column {wanted!r} is not in the dataset; its columns: {', '.join(columns)}")
        return _holding_pictures(dataset, wanted)
    typed = [name for name in columns if features and isinstance(features[name], datasets.Image)]
    named = [name for name in ("image", "img", "jpg", "jpeg", "png", "webp", "pixel_values") if name in columns]
    if len(typed) == 1 or named:
        return _holding_pictures(dataset, typed[0] if len(typed) == 1 else named[0])
    raise ValueError(
        "no image column found; name it with --image-column (training: --image_column); the columns: "
        + ", ".join(columns)
    )


def _holding_pictures(dataset: datasets.IterableDataset, column: str) -> str:
    kind = dataset.features[column] if dataset.features else None
    if isinstance(kind, datasets.ClassLabel) or (
        isinstance(kind, datasets.Value) and not any(word in kind.dtype for word in ("string", "binary"))
    ):
        raise ValueError(
            f"the column {column!r} holds {getattr(kind, 'dtype', kind)}, not pictures; the columns: "
            + ", ".join(dataset.features)
        )
    return column


def undecoded(dataset: datasets.IterableDataset, column: str) -> datasets.IterableDataset:
    """The column alone, its pictures as bytes or paths: rows are cheap to read, and to pass over."""
    features = dataset.features
    if features and isinstance(features[column], datasets.Image):
        dataset = dataset.cast_column(column, datasets.Image(decode=False))
    return dataset.select_columns([column])


def bytes_or_path(cell: Any) -> Any:
    """The bytes or the path of an undecoded cell {"bytes", "path"}; any other cell as it is."""
    if isinstance(cell, dict):
        return cell["bytes"] if cell.get("bytes") is not None else cell.get("path")
    return cell


def path_of(cell: Any) -> str | None:
    """The path in an undecoded cell, a path or {"bytes", "path"}; None where it has none."""
    path = cell.get("path") if isinstance(cell, dict) else cell
    return path if isinstance(path, str) else None


def decode(value: Any, side: int | None = None) -> Image.Image:
    """RGB picture of an undecoded cell: a path, bytes, {"bytes", "path"} or a picture.

    Args:
        value: the cell.
        side: a JPEG may be decoded at a half, a quarter or an eighth of its size, but no smaller than this.

    Raises:
        ValueError: it is unreadable.
    """
    value = bytes_or_path(value)
    if value is None:
        raise ValueError("the cell is empty")
    if not isinstance(value, (bytes, str)):
        try:
            return load_image(value)
        except TypeError as error:
            raise ValueError(f"a cell of type {type(value).__name__} holds no picture") from error
    try:
        with Image.open(io.BytesIO(value) if isinstance(value, bytes) else value) as image:
            if side is not None:
                check_picture(image, "given")  # a progressive JPEG takes the memory of its full size all the same
                image.draft("RGB", (side, side))
            return load_image(image)
    except DECODER_ERRORS as error:
        what = f"picture of {len(value)} bytes" if isinstance(value, bytes) else repr(value)
        reason = "no picture format" if isinstance(error, UnidentifiedImageError) else error
        raise ValueError(f"{what} cannot be read: {reason}") from error


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


def rows(dataset: datasets.IterableDataset, column: str, where: str | None = None) -> Iterator[dict[str, Any]]:
    """The rows of a stream, pictures undecoded, those that `where` leaves."""
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
