"""Maps that know nothing of the image or of the class. Whatever they score, a method has to beat."""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from ..masking import min_max, resize_maps
from ..metrics.insertion_deletion import blur
from .contract import Explain


def ones(pixel_values: torch.Tensor, class_ids: torch.Tensor) -> torch.Tensor:
    """All ones: keeps the image as it is. It has no order, so what is left of it below 100 percent is random."""
    return torch.ones(len(pixel_values), *pixel_values.shape[-2:], device=pixel_values.device)


def centre_gaussian(pixel_values: torch.Tensor, class_ids: torch.Tensor) -> torch.Tensor:
    """A Gaussian in the middle, its standard deviation a quarter of the side."""
    axes = [torch.linspace(-1, 1, side, device=pixel_values.device) for side in pixel_values.shape[-2:]]
    square = axes[0][:, None].square() + axes[1][None, :].square()
    return torch.exp(-square / (2 * 0.5**2)).expand(len(pixel_values), -1, -1)


def random_blob(reference: Explain, seed: int = 0) -> Callable[[torch.Tensor], Explain]:
    """Smooth noise with exactly the values of the reference's map in another place: equal mean, area and contrast.

    Args:
        reference: whose map lends the values.
        seed: together with an image's position it decides the noise.
    """

    def bind(indices: torch.Tensor) -> Explain:
        def explain(pixel_values: torch.Tensor, class_ids: torch.Tensor) -> torch.Tensor:
            maps = reference(pixel_values, class_ids).float()
            coarse = torch.stack(
                [
                    torch.rand(1, 7, 7, generator=torch.Generator().manual_seed(seed + 7919 * int(index)))
                    for index in indices
                ]
            ).to(maps.device)
            noise = F.interpolate(coarse, size=maps.shape[-2:], mode="bicubic", align_corners=False)[:, 0]
            values = maps.flatten(1).sort(dim=1).values
            places = noise.flatten(1).argsort(dim=1)
            return torch.empty_like(values).scatter_(1, places, values).reshape(maps.shape)

        return explain

    return bind


class MapBank:
    """Maps of the images of a dataset, for maps that are borrowed from other images.

    Args:
        maps: (n, h, w), in [0, 1], of the predicted class of image i.
        targets: (n,), that class; -1 where the picture could not be read: its map is never lent.

    Raises:
        ValueError: fewer than 2 maps to lend, or not one class per map.
    """

    def __init__(self, maps: torch.Tensor, targets: torch.Tensor):
        readable = targets >= 0
        if len(maps) != len(targets) or int(readable.sum()) < 2:
            raise ValueError(
                f"a bank needs the maps of at least 2 images, each with its class, got {len(maps)} maps, "
                f"{len(targets)} classes, {int(readable.sum())} of them of readable images"
            )
        self.maps = maps.float()
        self.targets = targets
        self.readable = readable

    def class_mean(self, indices: torch.Tensor) -> Explain:
        """The mean map of the other images of the class; of all other images where the class has none."""

        def explain(pixel_values: torch.Tensor, class_ids: torch.Tensor) -> torch.Tensor:
            found = []
            for index, class_id in zip(indices.tolist(), class_ids.tolist(), strict=True):
                others = self.readable.clone()
                if 0 <= index < len(others):
                    others[index] = False
                same = others & (self.targets == class_id)
                found.append(self.maps[same if bool(same.any()) else others].mean(dim=0))
            return torch.stack(found).to(pixel_values.device)

        return explain

    def another_image(self, indices: torch.Tensor) -> Explain:
        """The map of the image half the dataset further on, or of the next one after it that could be read."""
        count = len(self.maps)

        def explain(pixel_values: torch.Tensor, class_ids: torch.Tensor) -> torch.Tensor:
            found = []
            for index in indices.tolist():
                half = index + max(1, count // 2)
                places = ((half + step) % count for step in range(count))
                found.append(next(place for place in places if self.readable[place] and place != index))
            return self.maps[found].to(pixel_values.device)

        return explain


def blurred(method: Explain, grid: tuple[int, int]) -> Explain:
    """A method's map averaged to a grid and blurred by one cell: does a smoother, finer grid alone make the score?"""

    def explain(pixel_values: torch.Tensor, class_ids: torch.Tensor) -> torch.Tensor:
        maps = resize_maps(method(pixel_values, class_ids).float(), (pixel_values.shape[-2], pixel_values.shape[-1]))
        coarse = F.adaptive_avg_pool2d(min_max(maps)[:, None], grid)
        return blur(coarse, 1.0)[:, 0] if min(grid) > 1 else coarse[:, 0]

    return explain
