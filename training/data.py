"""The training stream: pictures of any `datasets` source, cropped and flipped at random, normalised."""

import io
import math
import random
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image
from torch.utils.data import IterableDataset, get_worker_info

from hf_ttame.image_processing import Normalisation, load_image

_SPLITS = {"train", "training", "validation", "valid", "val", "test"}
_RESIZE = 256 / 224  # the paper resizes the short side to 256 and crops 224
_PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")


def open_stream(name: str, split: str = "train", revision: str | None = None) -> datasets.IterableDataset:
    """A streamed dataset from a folder of parquet files, a folder of pictures, one parquet file, or a Hub id.

    In a folder of parquet files, the files named after the split are read ("train-*.parquet"), or all where none is.

    Raises:
        ValueError: the folder holds no pictures, or there is no such dataset.
    """
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
            return datasets.Dataset.from_dict({"image": pictures}).to_iterable_dataset(
                num_shards=min(64, len(pictures))
            )
        raise ValueError(f"the folder {name!r} holds neither .parquet files nor pictures ({', '.join(_PICTURES)})")
    try:
        return datasets.load_dataset(name, split=split, revision=revision, streaming=True)
    except (FileNotFoundError, ValueError, ConnectionError) as error:
        raise ValueError(f"{name!r} is neither a folder nor a dataset on the Hub: {error}") from error


def image_column(dataset: datasets.IterableDataset, wanted: str | None = None) -> str:
    """The column that holds the pictures: `wanted`, or the only image column, or one called image, img or jpg.

    Raises:
        ValueError: there is no such column; the message names those there are.
    """
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


def augment(
    image: Image.Image, normalisation: Normalisation, generator: np.random.Generator, min_scale: float = 1.0
) -> torch.Tensor:
    """One training view (C, H, W): short side resized to 256/224 of the input, random crop, random flip, normalised.

    With min_scale below 1, the crop covers a random share of the picture's area in [min_scale, 1] instead and has
    an aspect ratio between 3/4 and 4/3: more variety for small datasets.
    """
    height, width = normalisation.size
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
    pixels = torch.from_numpy(np.asarray(image, dtype=np.float32) / 255).permute(2, 0, 1)
    scale_, shift = torch.tensor(normalisation.scale), torch.tensor(normalisation.shift)
    return pixels * scale_[:, None, None] + shift[:, None, None]


class TrainingStream(IterableDataset):
    """Endless stream of training views, shuffled in windows that are read undecoded.

    The order and the random crops depend only on the seed, the epoch, the worker and the position. Unreadable pictures
    are skipped; each view carries how many were skipped before it.
    """

    def __init__(
        self,
        dataset: datasets.IterableDataset,
        column: str,
        normalisation: Normalisation,
        *,
        seed: int = 0,
        window: int = 2048,
        min_scale: float = 1.0,
        skip_batches: int = 0,
        batch_size: int = 1,
    ):
        features = dataset.features
        if features and isinstance(features[column], datasets.Image):
            dataset = dataset.cast_column(column, datasets.Image(decode=False))
        self.dataset = dataset
        self.column = column
        self.normalisation = normalisation
        self.seed = seed
        self.window = window
        self.min_scale = min_scale
        self.skip_batches = skip_batches  # batches of all workers to pass over undecoded, after a resume
        self.batch_size = batch_size

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        # Workers hand out whole batches in turn: worker w has given batches w, w + workers, ...
        skip = (self.skip_batches - worker + workers - 1) // workers * self.batch_size
        unreadable = epoch = 0
        while True:
            read = decoded = 0
            for window_index, cells in enumerate(self._windows()):
                order = np.random.default_rng((self.seed, epoch, worker, window_index)).permutation(len(cells))
                for position in order:
                    read += 1
                    if skip > 0:
                        skip, decoded = skip - 1, decoded + 1
                        continue
                    generator = np.random.default_rng((self.seed, epoch, worker, window_index, int(position)))
                    try:
                        view = augment(decode(cells[position]), self.normalisation, generator, self.min_scale)
                    except ValueError as error:
                        unreadable += 1
                        warnings.warn(f"skipped an unreadable picture: {error}", stacklevel=1)
                        continue
                    decoded += 1
                    yield {"pixel_values": view, "unreadable": unreadable}
                    unreadable = 0
            if decoded == 0:
                if read:
                    raise ValueError(f"none of the {read} pictures in the dataset can be read")
                if workers == 1:
                    raise ValueError("the dataset is empty")
                return  # a worker without a shard of its own
            epoch += 1

    def _windows(self) -> Iterator[list[Any]]:
        cells: list[Any] = []
        for example in self.dataset:
            cells.append(example[self.column])
            if len(cells) == self.window:
                yield cells
                cells = []
        if cells:
            yield cells
