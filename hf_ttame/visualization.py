"""Pictures of maps: overlays and sheets of them."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

# Dark blue, blue, cyan, green, yellow, red: low to high, readable over photographs.
_ANCHORS = np.array(
    [(36, 23, 99), (43, 99, 227), (38, 190, 214), (108, 226, 106), (240, 216, 58), (239, 107, 36), (158, 22, 16)],
    dtype=np.float64,
)


def colour_map(values: np.ndarray) -> np.ndarray:
    """Colours (..., 3) uint8 of values in [0, 1], by linear interpolation between seven anchors."""
    position = np.clip(values, 0, 1) * (len(_ANCHORS) - 1)
    low = np.minimum(position.astype(int), len(_ANCHORS) - 2)
    part = (position - low)[..., None]
    return np.rint(_ANCHORS[low] * (1 - part) + _ANCHORS[low + 1] * part).astype(np.uint8)


def overlay(image: Image.Image, explanation: np.ndarray, seen: np.ndarray, strength: float = 0.55) -> Image.Image:
    """A map over its picture; pixels that the classifier never saw are greyed.

    Args:
        image: RGB, W x H.
        explanation: (H, W) in [0, 1].
        seen: (H, W) bool.
        strength: share of colour in the blend, 0 to 1.

    Returns:
        RGB, W x H.
    """
    if not 0 <= strength <= 1:
        raise ValueError(f"strength must lie in [0, 1], got {strength}")
    photo = np.asarray(image, dtype=np.float64)
    blend = (1 - strength) * photo + strength * colour_map(explanation)
    grey = photo.mean(axis=-1, keepdims=True) * 0.5 + 64
    return Image.fromarray(np.rint(np.where(seen[..., None], blend, grey)).astype(np.uint8))


def contact_sheet(rows: Sequence[Sequence[tuple[Image.Image, str]]], height: int = 300) -> Image.Image:
    """Pictures with captions, row by row, all at the same height in pixels."""
    font = ImageFont.load_default(size=max(11, height // 18))
    gap, caption = 8, max(16, height // 11)
    scaled = [
        [
            (picture.resize((max(1, round(picture.width * height / picture.height)), height)), text)
            for picture, text in row
        ]
        for row in rows
    ]
    width = max(sum(picture.width + gap for picture, _ in row) + gap for row in scaled)
    sheet = Image.new("RGB", (width, len(scaled) * (height + caption + gap) + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for index, row in enumerate(scaled):
        x, y = gap, gap + index * (height + caption + gap)
        for picture, text in row:
            sheet.paste(picture, (x, y))
            while len(text) > 4 and draw.textlength(text, font=font) > picture.width:
                text = text[:-4] + "..."
            draw.text((x, y + height + 2), text, fill="black", font=font)
            x += picture.width + gap
    return sheet
