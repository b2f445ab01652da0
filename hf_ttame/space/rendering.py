"""Pictures of an analysis: the photograph, coloured layers to lay over it, what is kept, and what is downloaded."""

import io

import numpy as np
from PIL import Image, ImageOps

from ..visualization import colour_map, overlay
from .analysis import Analysis

LAYER_SIDE = 512  # maps are smooth: the browser enlarges the layer as well as we could
_CHANGE = "blue-red"


def photograph(analysis: Analysis) -> bytes:
    """The picture, JPEG."""
    return _encode(analysis.picture, "JPEG")


def ground(analysis: Analysis) -> bytes:
    """What lies under a layer: the picture, grey where the classifier saw nothing, JPEG."""
    return _encode(_ground(analysis), "JPEG")


def layer(analysis: Analysis, method: str, class_id: int, colours: str) -> bytes:
    """A map in colours, clear where the classifier saw nothing; PNG, at most LAYER_SIDE large."""
    placed, seen = analysis.placed_map(method, class_id)
    return _layer(placed, seen, colours)


def change_layer(analysis: Analysis, first: int, second: int) -> bytes:
    """Where the first class's T-TAME map is higher (red) or lower (blue) than the second's; PNG."""
    placed, seen = analysis.placed_map("ttame", first)
    other, _ = analysis.placed_map("ttame", second)
    return _layer((placed - other + 1) / 2, seen, _CHANGE)


def masked(analysis: Analysis, method: str, class_id: int, percent: int, hidden: bool) -> bytes:
    """The picture with only the map's top `percent` (or, `hidden`, without them), JPEG.

    What is taken away is black, as for the classifier; what it never saw is grey, as everywhere.
    """
    kept, seen = analysis.placed_kept(method, class_id, percent)
    shown = (kept != hidden) | ~seen
    return _encode(Image.fromarray(np.asarray(_ground(analysis)) * shown[..., None].astype(np.uint8)), "JPEG")


def overlay_png(analysis: Analysis, method: str, class_id: int, strength: float, colours: str) -> bytes:
    """The map over the picture, for a download."""
    placed, seen = analysis.placed_map(method, class_id)
    return _encode(overlay(analysis.picture, placed, seen, strength, colours), "PNG")


def map_npy(analysis: Analysis, method: str, class_id: int) -> bytes:
    """The map itself, (H, W) float32 in [0, 1] at the picture's size, as a NumPy file."""
    buffer = io.BytesIO()
    np.save(buffer, analysis.placed_map(method, class_id)[0], allow_pickle=False)
    return buffer.getvalue()


def thumbnail(picture: Image.Image, size: tuple[int, int] = (160, 112)) -> bytes:
    """The middle of a picture, small, JPEG."""
    return _encode(ImageOps.fit(picture, size), "JPEG")


def _ground(analysis: Analysis) -> Image.Image:
    placed, seen = analysis.placed_map("ttame", analysis.top[0])
    return overlay(analysis.picture, placed, seen, 0.0)


def _layer(values: np.ndarray, seen: np.ndarray, colours: str) -> bytes:
    step = max(1, -(-max(values.shape) // LAYER_SIDE))
    values, seen = values[step // 2 :: step, step // 2 :: step], seen[step // 2 :: step, step // 2 :: step]
    alpha = np.where(seen, 255, 0).astype(np.uint8)
    return _encode(Image.fromarray(np.dstack([colour_map(values, colours), alpha])), "PNG")


def _encode(picture: Image.Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    settings = {"quality": 90} if kind == "JPEG" else {"compress_level": 3}
    picture.save(buffer, kind, **settings)
    return buffer.getvalue()
