"""One explanation: a map at the picture's own size, what it explains, and how to look at it."""

import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from .disk import whole
from .visualization import overlay


@dataclass(frozen=True, eq=False)
class Explanation:
    """One class of one picture.

    map: (H, W) float32 in [0, 1] at the picture's own size, upright; 0 where not seen.
    seen: (H, W) bool, False where the preprocessing crop cut the pixel away.
    image_index: position of the picture among those given. score: the classifier's probability of the class.
    """

    map: np.ndarray
    seen: np.ndarray
    image_index: int
    class_id: int
    label: str
    score: float
    image: Image.Image = field(repr=False, compare=False)

    def overlay(self, strength: float = 0.55) -> Image.Image:
        """The map in colours over the picture (RGB, the picture's size); unseen pixels are grey."""
        return overlay(self.image, self.map, self.seen, strength)

    def save(self, path: str | os.PathLike) -> None:
        """Write the overlay as a picture, or the raw map (H, W) where the name ends in .npy; never half a file."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        with whole(target) as part:
            if target.suffix == ".npy":
                np.save(part, self.map)
            else:
                self.overlay().save(part)
