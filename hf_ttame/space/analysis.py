"""One picture and one explainer: one pass of the backbone, from which the maps of all classes are read."""

import secrets
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from ..answers import probabilities
from ..baselines.rise import rise_steps
from ..image_processing import load_picture, place_maps, preprocess
from ..masking import apply_mask, keep_top, min_max, resize_maps
from ..metrics.judging import class_probability
from .explainers import Explainer

TOP = 5
METHODS = {"ttame": "T-TAME", "gradcam": "Grad-CAM", "rise": "RISE"}
_RISE_BATCH = 16


class Tested(NamedTuple):
    """The classifier's probability of the class: when only the map's top is kept, and when just that is hidden."""

    kept: float
    hidden: float


class Analysis:
    """What one pass of the backbone tells of a picture.

    Args:
        explainer: its backbone runs once, here.
        picture: RGB.

    Attributes:
        token: a random name by which the page asks for pictures of it.
        scores: (K,) probabilities.
        top: ids of the classes with the highest scores, at most TOP.

    Raises:
        ValueError: the picture does not fit the backbone.
    """

    def __init__(self, explainer: Explainer, picture: Image.Image):
        model = explainer.model
        self.explainer = explainer
        self.picture = picture
        self.token = secrets.token_urlsafe(16)
        prepared = load_picture(picture, len(model.config.pixel_scale))
        self.pixel_values = preprocess(model.image_processor, [prepared]).to(model.device)
        features = torch.no_grad()(model.features)  # its thread knows nothing of this one's settings
        logits, self._features = explainer.alone(lambda: features(self.pixel_values))
        self.placement = model._placement(picture.size)
        self.scores = probabilities(logits, model.config.classifier_outputs)[0].cpu()
        self.top: list[int] = logits[0].topk(min(TOP, logits.shape[1])).indices.tolist()
        self.rise_masks: dict[int, int] = {}
        self._maps: dict[tuple[str, int], torch.Tensor] = {}
        self._tested: dict[tuple[str, int, int], Tested] = {}

    def label(self, class_id: int) -> str:
        """The class's name, short where that is enough to tell it from the others."""
        return self.explainer.labels[class_id]

    def score(self, class_id: int) -> float:
        return float(self.scores[class_id])

    def has_map(self, method: str, class_id: int) -> bool:
        """Whether `map_of` has it without any pass of the backbone."""
        return method == "ttame" or (method, class_id) in self._maps

    @torch.no_grad()
    def map_of(self, method: str, class_id: int) -> torch.Tensor:
        """A map (h, w) in [0, 1] over the backbone's input, on the CPU.

        T-TAME's is read from the features that are there: no pass. Grad-CAM's costs a pass and its backward, once.
        RISE's must have been made by `run_rise`.

        Raises:
            KeyError: RISE has not run for this class.
        """
        key = (method, class_id)
        found = self._maps.get(key)
        if found is None:
            found = self._maps[key] = self._make_map(method, class_id).cpu()
        return found

    def _make_map(self, method: str, class_id: int) -> torch.Tensor:
        model = self.explainer.model
        ids = torch.tensor([class_id], device=model.device)
        if method == "ttame":
            return model.scale_maps(model.head(self._features, ids))[0, 0]
        if method == "gradcam":
            made = self.explainer.alone(lambda: self.explainer.gradcam.explain(self.pixel_values, ids))
            return min_max(made.float())[0]
        raise KeyError(method)

    def placed_map(self, method: str, class_id: int) -> tuple[np.ndarray, np.ndarray]:
        """The map at the picture's own size, (H, W) float32 in [0, 1], and what the classifier saw, (H, W) bool."""
        return self._place(self.map_of(method, class_id))

    def _place(self, mask: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        size = tuple(self.explainer.model.config.image_size)
        placed, seen = place_maps(mask[None], self.placement, size, *self.picture.size)
        return placed[0].clamp(0, 1).numpy(), seen.numpy()

    def kept(self, method: str, class_id: int, percent: int) -> torch.Tensor:
        """Which pixels (H, W) of the backbone's input are the map's top `percent`, 1 or 0: exactly so many."""
        size = (self.pixel_values.shape[-2], self.pixel_values.shape[-1])
        return keep_top(resize_maps(self.map_of(method, class_id)[None], size), percent / 100, binary=True)[0]

    def placed_kept(self, method: str, class_id: int, percent: int) -> tuple[np.ndarray, np.ndarray]:
        """The same at the picture's own size, (H, W) bool, and what the classifier saw."""
        placed, seen = self._place(self.kept(method, class_id, percent))
        return placed >= 0.5, seen

    @torch.no_grad()
    def test(self, method: str, class_id: int, percent: int) -> Tested:
        """Show the classifier only the top `percent` of a map, and only the rest, the remainder black."""
        key = (method, class_id, percent)
        found = self._tested.get(key)
        if found is None:
            model = self.explainer.model
            kept = self.kept(*key).to(self.pixel_values)
            pixels = self.pixel_values.expand(2, -1, -1, -1)
            masked = apply_mask(pixels, torch.stack([kept, 1 - kept]), model.fill("black"))
            classify = torch.no_grad()(model.classify)
            logits = self.explainer.alone(lambda: classify(masked))
            ids = torch.full((2,), class_id, device=logits.device)
            p = class_probability(logits, ids, model.config.classifier_outputs).tolist()
            found = self._tested[key] = Tested(*p)
        return found

    def run_rise(
        self,
        class_id: int,
        masks: int,
        progress: Callable[[int, int], None],
        stopped: Callable[[], bool],
    ) -> int:
        """Make RISE's map of a class.

        Args:
            class_id: what is explained.
            masks: passes of the backbone.
            progress: is told (masks so far, masks).
            stopped: asked after every step; True ends it with the masks so far.

        Returns:
            The masks that the map is made of.
        """
        model = self.explainer.model
        ids = torch.tensor([class_id], device=model.device)
        steps = rise_steps(model, self.pixel_values, ids, masks, _RISE_BATCH)
        done, maps = 0, None
        while done < masks and not stopped():
            done, maps = self.explainer.alone(lambda: next(steps))  # by steps: others get their turn in between
            progress(done, masks)
        if maps is not None:
            self._maps["rise", class_id] = min_max(maps.float())[0].cpu()
            self.rise_masks[class_id] = done
            for key in [key for key in self._tested if key[:2] == ("rise", class_id)]:
                del self._tested[key]
        return done
