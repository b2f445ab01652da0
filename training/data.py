"""Training views of pictures: cropped, flipped, normalised."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image

from hf_ttame.image_processing import Normalisation

_RESIZE = 256 / 224  # the paper resizes the short side to 256 and crops 224


def augment(
    image: Image.Image,
    size: tuple[int, int],
    generator: np.random.Generator,
    min_scale: float = 1.0,
    resample: Image.Resampling = Image.Resampling.BICUBIC,
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
        image = image.resize((width, height), resample, (left, top, left + w, top + h))
    else:
        scale = _RESIZE * max(width / image.width, height / image.height)
        w, h = max(width, round(image.width * scale)), max(height, round(image.height * scale))
        left, top = int(generator.integers(w - width + 1)), int(generator.integers(h - height + 1))
        x, y = image.width / w, image.height / h
        box = (left * x, top * y, (left + width) * x, (top + height) * y)
        image = image.resize((width, height), resample, box)
    if generator.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return torch.from_numpy(np.array(image))


def filter_of(processor: Any) -> Image.Resampling:
    """The filter with which an image processor resizes; bicubic where it does not say."""
    try:
        return Image.Resampling(processor.resample)
    except (AttributeError, ValueError):
        return Image.Resampling.BICUBIC


def normaliser(normalisation: Normalisation, device: torch.device | str) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function from views (B, H, W, 3) of uint8 to pixel values (B, C, H, W) on the device, channels last.

    For a backbone of one channel the views become grey, with the weights of Pillow's conversion.
    """
    grey = torch.tensor([0.299, 0.587, 0.114], device=device)
    scale = torch.tensor(normalisation.scale, device=device)[:, None, None] / 255
    shift = torch.tensor(normalisation.shift, device=device)[:, None, None]

    def normalise(pixels: torch.Tensor) -> torch.Tensor:
        values = pixels.to(device, non_blocking=True).float()
        if len(normalisation.scale) == 1:
            values = (values @ grey)[..., None]
        return values.permute(0, 3, 1, 2).mul_(scale).add_(shift)

    return normalise
