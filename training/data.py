"""Pictures of any `datasets` source, found, decoded, cropped and flipped."""

import io
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from hf_ttame.image_processing import Normalisation, load_image

_SPLITS = {"train", "training", "validation", "valid", "val", "test"}
_RESIZE = 256 / 224  # the paper resizes the short side to 256 and crops 224
_PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")
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
    if path.is_file() and path.suffix in (".parquet", ".tar"):
        return _from_files([path], streaming)
    if path.is_file():
        raise ValueError(f"{name!r} is neither a .parquet nor a .tar file; give one of these or a folder")
    if path.is_dir():
        return _from_folder(path, split, streaming)
    try:
        dataset = datasets.load_dataset(name, split=split, revision=revision, streaming=streaming)
    except (FileNotFoundError, ValueError, ConnectionError) as error:
        raise ValueError(f"{name!r} is neither a folder nor a dataset on the Hub: {error}") from error
    return dataset if streaming else _in_shards(dataset)


def _from_folder(path: Path, split: str, streaming: bool) -> datasets.IterableDataset:
    if (path / "dataset_dict.json").exists():
        saved = datasets.load_from_disk(str(path))
        if split not in saved:
            raise ValueError(f"{str(path)!r} has no split {split!r}; it has: {', '.join(saved)}")
        return _in_shards(saved[split])
    if (path / "state.json").exists():
        return _in_shards(datasets.load_from_disk(str(path)))
    for suffix in (".parquet", ".tar"):
        if found := sorted(path.rglob(f"*{suffix}")):
            named = {file: {file.name.split("-")[0].split(".")[0], file.parent.name} & _SPLITS for file in found}
            files = [file for file in found if split in named[file]]
            if not files and any(named.values()):
                raise ValueError(
                    f"{str(path)!r} has no split {split!r}; its files: {', '.join(f.name for f in found[:5])}"
                )
            return _from_files(files or found, streaming)
    parts = sorted(part.name for part in path.iterdir() if part.is_dir() and part.name in _SPLITS)
    if parts and split not in parts and split != "train":
        raise ValueError(f"{str(path)!r} has no folder {split!r}; it has: {', '.join(parts)}")
    path = path / split if split in parts else path
    pictures = sorted(str(file) for file in path.rglob("*") if file.suffix.lower() in _PICTURES)
    if not pictures:
        raise ValueError(
            f"the folder {str(path)!r} holds neither .parquet or .tar files nor pictures ({', '.join(_PICTURES)})"
        )
    random.Random(0).shuffle(pictures)  # folders of one class each would give batches of one class
    return _in_shards(datasets.Dataset.from_dict({"image": pictures}))


def _from_files(files: list[Path], streaming: bool) -> datasets.IterableDataset:
    builder = "parquet" if files[0].suffix == ".parquet" else "webdataset"
    try:
        dataset = datasets.load_dataset(
            builder, data_files=[str(file) for file in files], split="train", streaming=streaming
        )
    except (ValueError, OSError) as error:
        raise ValueError(f"{files[0].name!r} and its like cannot be read as {builder}: {error}") from error
    if not streaming:
        return _in_shards(dataset)
    # Row groups are smaller than files: more parts to deal and to shuffle.
    return dataset.reshard() if builder == "parquet" and hasattr(dataset, "reshard") else dataset


def _in_shards(dataset: datasets.Dataset) -> datasets.IterableDataset:
    if not len(dataset):
        raise ValueError("the dataset is empty; give one with pictures")
    return dataset.to_iterable_dataset(num_shards=min(_SHARDS, len(dataset)))


def image_column(dataset: datasets.IterableDataset, wanted: str | None = None) -> str:
    """The column that holds the pictures: `wanted`, or the only image column, or one called image, img or jpg.

    Raises:
        ValueError: there is no such column (the message names those there are), or the dataset is empty.
    """
    features = dataset.features
    columns = list(features) if features else list(next(iter(dataset), {}))
    if not columns:
        raise ValueError("the dataset is empty: it has neither rows nor columns")
    if wanted is not None:
        if wanted not in columns:
            raise ValueError(f"image column {wanted!r} is not in the dataset; its columns: {', '.join(columns)}")
        return wanted
    typed = [name for name in columns if features and isinstance(features[name], datasets.Image)]
    named = [name for name in ("image", "img", "jpg", "jpeg", "png", "webp", "pixel_values") if name in columns]
    if len(typed) == 1 or named:
        return typed[0] if len(typed) == 1 else named[0]
    raise ValueError(f"no image column found; name it with --image_column; the columns: {', '.join(columns)}")


def undecoded(dataset: datasets.IterableDataset, column: str) -> datasets.IterableDataset:
    """The column alone, its pictures as bytes or paths: rows are cheap to read, and to pass over."""
    features = dataset.features
    if features and isinstance(features[column], datasets.Image):
        dataset = dataset.cast_column(column, datasets.Image(decode=False))
    return dataset.select_columns([column])


def decode(value: Any, side: int | None = None) -> Image.Image:
    """RGB picture of an undecoded cell: a path, bytes, {"bytes", "path"} or a picture.

    Args:
        value: the cell.
        side: a JPEG may be decoded at a half, a quarter or an eighth of its size, but no smaller than this.

    Raises:
        ValueError: it is unreadable.
    """
    if isinstance(value, dict):
        value = value["bytes"] if value.get("bytes") is not None else value["path"]
    if value is None:
        raise ValueError("the cell is empty")
    if not isinstance(value, (bytes, str)):
        return load_image(value)
    try:
        with Image.open(io.BytesIO(value) if isinstance(value, bytes) else value) as image:
            if side is not None:
                image.draft("RGB", (side, side))
            return load_image(image)
    except (OSError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        what = f"picture of {len(value)} bytes" if isinstance(value, bytes) else repr(value)
        reason = "no picture format" if isinstance(error, UnidentifiedImageError) else error
        raise ValueError(f"{what} cannot be read: {reason}") from error


def augment(
    image: Image.Image, size: tuple[int, int], generator: np.random.Generator, min_scale: float = 1.0
) -> torch.Tensor:
    """One training view (H, W, 3), uint8: short side resized to 256/224 of the input, random crop, random flip.

    With min_scale below 1, the crop covers a random share of the picture's area in [min_scale, 1] instead and has
    an aspect ratio between 3/4 and 4/3: more variety for small datasets.
    """
    height, width = size
    if min_scale < 1:
        area = image.width * image.height * generator.uniform(min_scale, 1)
        ratio = math.exp(generator.uniform(math.log(3 / 4), math.log(4 / 3))) * width / height
        w = min(image.width, max(1, round(math.sqrt(area * ratio))))
        h = min(image.height, max(1, round(math.sqrt(area / ratio))))
        left, top = int(generator.integers(image.width - w + 1)), int(generator.integers(image.height - h + 1))
        image = image.resize((width, height), Image.Resampling.BICUBIC, (left, top, left + w, top + h))
    else:
        scale = _RESIZE * max(width / image.width, height / image.height)
        w, h = max(width, round(image.width * scale)), max(height, round(image.height * scale))
        left, top = int(generator.integers(w - width + 1)), int(generator.integers(h - height + 1))
        x, y = image.width / w, image.height / h
        box = (left * x, top * y, (left + width) * x, (top + height) * y)
        image = image.resize((width, height), Image.Resampling.BICUBIC, box)
    if generator.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return torch.from_numpy(np.array(image))


def normaliser(normalisation: Normalisation, device: torch.device | str) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function from views (B, H, W, 3) of uint8 to pixel values (B, 3, H, W) on the device, channels last."""
    scale = torch.tensor(normalisation.scale, device=device)[:, None, None] / 255
    shift = torch.tensor(normalisation.shift, device=device)[:, None, None]

    def normalise(pixels: torch.Tensor) -> torch.Tensor:
        return pixels.to(device, non_blocking=True).permute(0, 3, 1, 2).float().mul_(scale).add_(shift)

    return normalise
