"""From a picture to pixel values and back: the backbone's own preprocessing, and where each pixel lands.

What a processor does is measured, not parsed: flat colour images show its normalisation, ramps show its resizing and
cropping. Processors name the same steps in many ways; a measurement is right for all of them.
"""

import math
import os
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from transformers import BaseImageProcessor, CLIPImageProcessor, CLIPImageProcessorPil

ImageInput = Image.Image | str | os.PathLike | np.ndarray
Picture = Image.Image | np.ndarray  # RGB, or (H, W, C) float32 in 0..255 where the backbone takes other channels

MAX_PIXELS = 100_000_000  # a larger picture is refused before it is decoded
MAX_ASPECT = 100  # the shorter side is scaled up to the backbone's input: a thin line would fill the memory
# What Pillow's decoders raise on damaged files; AVIF's, a RuntimeError. Not MemoryError: that file may be sound.
DECODER_ERRORS: tuple[type[Exception], ...] = (
    *(OSError, SyntaxError, EOFError, RuntimeError, TypeError, LookupError, AttributeError, ArithmeticError),
    *(struct.error, zlib.error, Image.DecompressionBombError),
)
_DRAWN_BY_PROGRAMS = ("EPS", "WMF")  # Pillow hands EPS to Ghostscript
_RAMP_SIDE = 64  # pictures smaller than this are measured on an enlarged ramp
_INTERPOLATION = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3}


def load_image(source: ImageInput) -> Image.Image:
    """Open a picture as RGB, upright after its EXIF rotation.

    Args:
        source: a PIL image, a path, or an array (H, W), (H, W, 1), (H, W, 3) or (H, W, 4) of uint8, uint16, or floats
            in [0, 1].

    Raises:
        ValueError: not a readable picture, too large or too thin; the message names the picture.
        TypeError: `source` is of another type.
    """
    if isinstance(source, (str, os.PathLike)):
        name = repr(os.fspath(source))
        try:
            with Image.open(source) as image:
                check_picture(image, name)
                return _to_rgb(image)
        except FileNotFoundError as error:
            raise ValueError(f"image {name} does not exist; check the path") from error
        except DECODER_ERRORS as error:
            raise ValueError(
                f"image {name} cannot be read ({error}); give a picture that opens in a viewer"
            ) from error
    if isinstance(source, Image.Image):
        check_picture(source, "given")
        try:
            return _to_rgb(source)
        except DECODER_ERRORS as error:
            raise ValueError(f"the given image cannot be read ({error}); its file is damaged") from error
    if isinstance(source, np.ndarray):
        return _to_rgb(_from_array(source))
    raise TypeError(f"an image must be a PIL image, a path or a numpy array, got {type(source).__name__}")


def load_picture(source: ImageInput, channels: int) -> Picture:
    """Open a picture for a backbone of `channels` input channels.

    Args:
        source: for 3 channels as `load_image`; for 1 the same, and arrays (H, W) or (H, W, 1); for other C arrays
            (H, W, C) of uint8, uint16, or floats in [0, 1].

    Returns:
        an RGB picture; for other than 3 channels an array (H, W, C), float32 in 0..255.

    Raises:
        ValueError, TypeError: as `load_image`.
    """
    if channels == 3:
        return load_image(source)
    if channels == 1 and not isinstance(source, np.ndarray):
        array = np.asarray(load_image(source).convert("L"))
    elif isinstance(source, (str, os.PathLike)):
        raise ValueError(f"the backbone takes {channels} channels; give an array (H, W, {channels}) instead of a path")
    else:
        array = np.asarray(source)
    array = array[:, :, None] if array.ndim == 2 else array
    if array.ndim != 3 or array.shape[2] != channels or array.size == 0:
        raise ValueError(f"the backbone takes arrays (H, W, {channels}), got shape {array.shape}; channels come last")
    _check_size((array.shape[1], array.shape[0]), "given as an array")
    return _to_255(array)


def shown(picture: Picture) -> Image.Image:
    """The picture as RGB to look at: of other than three channels the first three, or the first in grey."""
    if isinstance(picture, Image.Image):
        return picture
    visible = picture[:, :, :3] if picture.shape[2] >= 3 else picture[:, :, 0]
    return Image.fromarray(np.rint(visible).astype(np.uint8)).convert("RGB")


def width_height(picture: Picture) -> tuple[int, int]:
    return picture.size if isinstance(picture, Image.Image) else (picture.shape[1], picture.shape[0])


def check_picture(image: Image.Image, name: str) -> None:
    """Raise ValueError, before a picture is decoded, where it is too large or too thin, or would start a program."""
    if image.format in _DRAWN_BY_PROGRAMS:
        raise ValueError(
            f"image {name} is of the format {image.format}, which is drawn by running another program; save it as PNG"
        )
    _check_size(image.size, name)


def _check_size(size: tuple[int, int], name: str) -> None:
    width, height = size
    if min(size) < 1 or width * height > MAX_PIXELS:
        raise ValueError(f"image {name} has {width} x {height} pixels; between 1 and {MAX_PIXELS} are accepted")
    if max(size) > MAX_ASPECT * min(size):
        raise ValueError(
            f"image {name} is {width} x {height}: one side is over {MAX_ASPECT} times the other; crop or pad it"
        )


def _from_array(array: np.ndarray) -> Image.Image:
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.size == 0 or array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (3, 4)):
        raise ValueError(
            f"an image array must be (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), got {array.shape}; channels come last"
        )
    _check_size((array.shape[1], array.shape[0]), "given as an array")
    return Image.fromarray(np.rint(_to_255(array)).astype(np.uint8))


def _to_255(array: np.ndarray) -> np.ndarray:
    """Values of any of the accepted types as float32 in 0..255."""
    if np.issubdtype(array.dtype, np.floating):
        if not np.isfinite(array).all() or array.min() < 0 or array.max() > 1:
            raise ValueError("an image array of floats must be finite and in [0, 1]; divide values in 0..255 by 255")
        return (array * 255).astype(np.float32)
    if array.dtype.kind == "u" and array.dtype.itemsize == 2:
        return (array / 257).astype(np.float32)
    if array.dtype == bool:
        return (array * 255).astype(np.float32)
    if array.dtype != np.uint8:
        raise ValueError(f"an image array must be uint8, uint16, bool or float, got {array.dtype}")
    return array.astype(np.float32)


def _to_rgb(image: Image.Image) -> Image.Image:
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":  # 16 bits and more: Pillow's own conversion would clip
        values = np.asarray(image, dtype=np.float64)
        if image.mode == "F" and values.max() <= 1:
            values = values * 65535
        if not np.isfinite(values).all() or values.min() < 0 or values.max() > 65535:
            raise ValueError(
                f"an image of mode {image.mode} must have values in 0..65535, or floats in 0..1; convert it to 8 bits"
            )
        image = Image.fromarray(np.rint(values / 257).astype(np.uint8))
    return image.convert("RGB")


def processor_from_timm(pretrained_cfg: Mapping[str, Any], channels: int = 3) -> BaseImageProcessor:
    """timm's evaluation preprocessing for `channels` input channels, as a processor that can be saved.

    Equal to the bit for centre crops, except that half of an odd remainder is rounded down where timm's transform
    rounds it to even: the crop can then lie one pixel earlier.
    """
    _, height, width = pretrained_cfg["input_size"]
    crop_mode = pretrained_cfg.get("crop_mode", "center")
    crop_pct = pretrained_cfg.get("crop_pct") or 0.875
    if crop_mode == "squash" and height == width:
        size: dict[str, int] = {"height": math.floor(height / crop_pct), "width": math.floor(width / crop_pct)}
    elif crop_mode == "center" and height == width:
        size = {"shortest_edge": math.floor(height / crop_pct)}
    else:
        raise ValueError(
            f"timm preprocessing with crop_mode {crop_mode!r} and input {height} x {width} has no equivalent "
            "processor; pass `processor=`, a transformers image processor"
        )
    for name in ("mean", "std"):
        if len(pretrained_cfg[name]) != channels:
            raise ValueError(
                f"the backbone takes {channels} channels, but its pretrained_cfg has a {name} for "
                f"{len(pretrained_cfg[name])}; make it with pretrained_cfg_overlay=dict(mean=..., std=...), or pass "
                "`processor=`, a transformers image processor"
            )
    # Pillow, as timm uses it, knows no pictures of other than three channels that it could resize.
    kind = CLIPImageProcessorPil if channels == 3 else CLIPImageProcessor
    return kind(
        do_resize=True,
        size=size,
        resample=_INTERPOLATION.get(pretrained_cfg.get("interpolation", "bicubic"), 3),
        do_center_crop=True,
        crop_size={"height": height, "width": width},
        do_rescale=True,
        do_normalize=True,
        image_mean=list(pretrained_cfg["mean"]),
        image_std=list(pretrained_cfg["std"]),
        do_convert_rgb=channels == 3,
    )


def preprocess(processor: BaseImageProcessor, images: Sequence[Picture]) -> torch.Tensor:
    """Pixel values (B, C, H, W) of pictures, one by one, so that pictures of different sizes are welcome."""
    values = []
    for image in images:
        known = {} if isinstance(image, Image.Image) else {"input_data_format": "channels_last"}
        values.append(processor(images=image, return_tensors="pt", **known)["pixel_values"])
    return torch.cat(values)


def _picture(levels: np.ndarray, channels: int) -> Picture:
    """The same levels (H, W), uint8, in every channel."""
    if channels == 3:
        return Image.fromarray(np.ascontiguousarray(levels)).convert("RGB")
    return np.repeat(levels[:, :, None], channels, axis=2).astype(np.float32)


@dataclass(frozen=True)
class Normalisation:
    """normalised = scale * pixel + shift per channel, for a pixel in [0, 1]; `size` is the (H, W) it comes out at."""

    scale: tuple[float, ...]
    shift: tuple[float, ...]
    size: tuple[int, int]


def measure_normalisation(processor: BaseImageProcessor, channels: int = 3) -> Normalisation:
    """What the processor does to black and to white.

    Raises:
        ValueError: it yields no pixel values (B, channels, H, W), or mixes the channels.
    """
    name = type(processor).__name__
    first = np.zeros((256, 256, channels), dtype=np.uint8)
    first[:, :, 0] = 255
    flat = [_picture(np.full((256, 256), level, dtype=np.uint8), channels) for level in (0, 255)]
    flat.append(Image.fromarray(first) if channels == 3 else first.astype(np.float32))
    try:
        values = preprocess(processor, flat)
    except (ValueError, TypeError, RuntimeError, IndexError) as error:
        raise ValueError(f"{name} cannot prepare pictures of {channels} channels: {error}") from error
    if values.ndim != 4 or values.shape[1] != channels:
        raise ValueError(
            f"the processor must yield pixel values (B, {channels}, H, W), got {tuple(values.shape)} from {name}; "
            f"pass a processor of an image classifier of {channels} channels"
        )
    black, white, one = values.double().mean(dim=(-2, -1))
    moved = (one - black).abs() > 1e-3 * (white - black).abs()
    if (white == black).any() or int(moved.sum()) != 1:
        raise ValueError(f"{name} does not treat the colour channels one by one; it cannot be used")
    return Normalisation(
        tuple((white - black).tolist()), tuple(black.tolist()), (int(values.shape[-2]), int(values.shape[-1]))
    )


@dataclass(frozen=True)
class Placement:
    """Where pixel i of the backbone's input lies in the picture: index = step * i + start, along x and along y."""

    x_step: float
    x_start: float
    y_step: float
    y_start: float


def measure_placement(
    processor: BaseImageProcessor, normalisation: Normalisation, width: int, height: int
) -> Placement:
    """Find the resize and crop that the processor applies to a picture of width x height pixels.

    Raises:
        ValueError: the processor does something else than resizing and cropping, such as padding.
    """
    enlarge = math.ceil(_RAMP_SIDE / min(width, height)) if min(width, height) < _RAMP_SIDE else 1
    w, h = width * enlarge, height * enlarge
    x, y = np.linspace(0, 1, w, dtype=np.float32)[None, :], np.linspace(0, 1, h, dtype=np.float32)[:, None]
    # Two slanted ramps; their sum tells x, their difference y. The slant and the dither spread the rounding to 256
    # levels evenly, in the picture and in what the processor makes of it, so that averaging removes it.
    slant = (math.sqrt(5) - 1) / 2
    tile = np.random.default_rng(0).random((61, 67), dtype=np.float32)
    dither = np.tile(tile, (-(-h // 61), -(-w // 67)))[:h, :w]
    levels = []
    for down in (y, 1 - y):
        ramp = 255 * (slant * x + (1 - slant) * down) + dither
        picture = _picture(np.minimum(ramp, 255).astype(np.uint8), len(normalisation.scale))
        values = preprocess(processor, [picture])[0, 0].double().numpy()
        levels.append((values - normalisation.shift[0]) / normalisation.scale[0])
    level = 1 / 255
    across = (levels[0] + levels[1] - (1 - slant)) / (2 * slant)
    downward = ((levels[0] - levels[1]) / (1 - slant) + 1) / 2
    name = type(processor).__name__
    measured = ((across.mean(axis=0) * (w - 1), w), (downward.mean(axis=1) * (h - 1), h))
    fitted = [_fit_line(source, 3 * level * length, name) for source, length in measured]
    lines = []
    for axis, ((step, start), (source, length)) in enumerate(zip(fitted, measured, strict=True)):
        whole = length / len(source)
        if abs(start - (whole / 2 - 0.5)) < 0.3 * whole and abs(step * len(source) - length) < 0.3 * whole:
            step, start = whole, whole / 2 - 0.5  # nothing is cut away: exact rather than measured
        else:
            step, start = _refine(processor, normalisation, (w, h), axis, step, start)
        # From indices of the enlarged ramp to indices of the picture.
        lines.append((float(step / enlarge), float((start + 0.5) / enlarge - 0.5)))
    return Placement(*lines[0], *lines[1])


def _refine(
    processor: BaseImageProcessor,
    normalisation: Normalisation,
    size: tuple[int, int],
    axis: int,
    step: float,
    start: float,
) -> tuple[float, float]:
    """Sharpen a line found by ramps: where do the centres of two white bars on black come out?"""
    length = size[axis]
    line = np.zeros(length, dtype=np.uint8)
    n = normalisation.size[1 - axis]
    wide = max(4, math.ceil(4 * step))
    middles = []
    for part in (0.25, 0.75):
        first = min(max(0, round(start + step * part * n - wide / 2)), length - wide)
        line[first : first + wide] = 255
        middles.append(first + (wide - 1) / 2)
    shape = (size[1], size[0])
    bars = np.broadcast_to(line[None, :] if axis == 0 else line[:, None], shape)
    picture = _picture(bars, len(normalisation.scale))
    values = preprocess(processor, [picture])[0, 0].double().numpy().mean(axis=axis)
    brightness = (values - normalisation.shift[0]) / normalisation.scale[0]
    index = np.arange(n)
    halves = (slice(0, n // 2), slice(n // 2, n))
    centres = [(index[half] * brightness[half]).sum() / brightness[half].sum() for half in halves]
    step = (middles[1] - middles[0]) / (centres[1] - centres[0])
    return step, middles[0] - step * centres[0]


def _fit_line(source: np.ndarray, tolerance: float, name: str) -> tuple[float, float]:
    """(step, start) of the straight line through measured positions.

    Raises:
        ValueError: they do not lie on one.
    """
    n = len(source)
    edge = max(2, n // 16)  # at the picture's border the resampling filter bends the ramp
    inside = np.arange(edge, n - edge)
    step, start = np.polyfit(inside, source[edge : n - edge], 1)
    if step <= 0 or np.abs(step * inside + start - source[edge : n - edge]).max() > tolerance + step:
        raise ValueError(f"{name} does more than resize and crop (padding, warping): its maps cannot be placed")
    return float(step), float(start)


def place_maps(
    maps: torch.Tensor, placement: Placement, input_size: tuple[int, int], width: int, height: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw maps of the backbone's input at the picture's own size, bilinearly.

    Args:
        maps: (N, h, w), covering the backbone's input.
        placement: from `measure_placement` for this picture's size.
        input_size: (H, W) of the backbone's input.
        width, height: the picture's size in pixels.

    Returns:
        maps (N, height, width), 0 where the crop cut the picture away; seen (height, width), bool, False there.
    """
    x = (torch.arange(width, dtype=torch.float64) - placement.x_start) / placement.x_step
    y = (torch.arange(height, dtype=torch.float64) - placement.y_start) / placement.y_step
    input_h, input_w = input_size
    tolerance = 1e-6
    seen_x = (x >= -0.5 - tolerance) & (x <= input_w - 0.5 + tolerance)
    seen_y = (y >= -0.5 - tolerance) & (y <= input_h - 0.5 + tolerance)
    seen = seen_y[:, None] & seen_x[None, :]
    # grid_sample counts -1..1 from border to border (align_corners=False), as the resizing of maps does.
    grid_x = ((x + 0.5) * 2 / input_w - 1).float()
    grid_y = ((y + 0.5) * 2 / input_h - 1).float()
    grid = torch.stack(torch.meshgrid(grid_y, grid_x, indexing="ij")[::-1], dim=-1)
    placed = F.grid_sample(
        maps[None].float().cpu(), grid[None], mode="bilinear", padding_mode="border", align_corners=False
    )[0]
    return placed * seen, seen
