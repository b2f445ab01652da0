"""Where a dataset says the object is: boxes or a mask of the picture, moved into the classifier's input."""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from .image_processing import DECODER_ERRORS, Placement
from .metrics.localization import box_region
from .pictures import bytes_or_path


def boxes_of(cell: Any) -> tuple[list[tuple[float, float, float, float]], int]:
    """The boxes of a cell, and how many of it are none.

    Args:
        cell: one box [left, top, right, bottom] in pixels of the picture, or a list of such boxes, or None.
    """
    if cell is None:
        return [], 0
    if not isinstance(cell, Sequence | np.ndarray) or isinstance(cell, str):
        return [], 1
    listed = list(cell)
    if listed and not any(isinstance(entry, Sequence | np.ndarray) for entry in listed):
        listed = [listed]
    good = []
    for box in listed:
        try:
            left, top, right, bottom = (float(edge) for edge in box)
        except (TypeError, ValueError):
            continue
        if right > left and bottom > top:
            good.append((left, top, right, bottom))
    return good, len(listed) - len(good)


def region_of_boxes(
    boxes: Sequence[Sequence[float]], placement: Placement, size: tuple[int, int]
) -> torch.Tensor | None:
    """Pixels of the input whose centre lies in one of the boxes, (H, W) bool; None where none does.

    Args:
        boxes: [left, top, right, bottom] each, in pixels of the picture.
        placement: where the input's pixels lie in the picture.
        size: (H, W) of the input.
    """
    region = torch.zeros(size, dtype=torch.bool)
    for box in boxes:
        # Pixel i of the input is centred at step * i + start in the picture, counted from the centre of its first.
        left, right = (((edge - 0.5) - placement.x_start) / placement.x_step + 0.5 for edge in (box[0], box[2]))
        top, bottom = (((edge - 0.5) - placement.y_start) / placement.y_step + 0.5 for edge in (box[1], box[3]))
        region |= box_region((left, top, right, bottom), size)
    return region if region.any() else None


def read_mask(cell: Any) -> np.ndarray:
    """An undecoded picture of a mask as (h, w) bool, upright after its EXIF rotation, True where a pixel is not 0; its
    transparency does not count.

    Raises:
        ValueError: it cannot be read.
    """
    cell = bytes_or_path(cell)
    if not isinstance(cell, (bytes, str)):
        raise ValueError(f"a cell of type {type(cell).__name__} holds no mask")
    try:
        with Image.open(io.BytesIO(cell) if isinstance(cell, bytes) else cell) as image:
            upright = ImageOps.exif_transpose(image)
            colours = [place for place, band in enumerate(upright.getbands()) if band != "A"]
            values = np.asarray(upright) != 0
    except DECODER_ERRORS as error:
        raise ValueError(f"the mask cannot be read: {error}") from error
    return values if values.ndim == 2 else values[..., colours].any(axis=-1)


def region_of_mask(
    mask: np.ndarray, placement: Placement, picture: tuple[int, int], size: tuple[int, int]
) -> torch.Tensor | None:
    """Pixels of the input that lie on the mask, by the nearest pixel, (H, W) bool; None where none does.

    Args:
        mask: (h, w) bool, of the whole picture, at its size or another.
        placement: where the input's pixels lie in the picture.
        picture: (width, height) of the picture in pixels.
        size: (H, W) of the input.

    Raises:
        ValueError: the mask has another aspect ratio than the picture.
    """
    height, width = mask.shape
    if abs(width * picture[1] - height * picture[0]) > max(height * picture[1], width * picture[0]) / 10:
        raise ValueError(f"a mask of {width} x {height} pixels does not fit a picture of {picture[0]} x {picture[1]}")
    lines = []
    for count, step, start, length, cells in (
        (size[0], placement.y_step, placement.y_start, picture[1], mask.shape[0]),
        (size[1], placement.x_step, placement.x_start, picture[0], mask.shape[1]),
    ):
        centre = (step * np.arange(count) + start + 0.5) * cells / length
        lines.append(np.clip(np.floor(centre).astype(int), 0, cells - 1))
    region = torch.from_numpy(mask[np.ix_(*lines)])
    return region if region.any() else None
