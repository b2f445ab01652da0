"""The one contract of every explainer, ours and the baselines: (pixel_values, class_ids) -> maps."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

Explain = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(pixel_values (B, C, H, W), class_ids (B,)) -> maps (B, h, w), any range, higher is more important."""

KINDS = ("one pass", "gradient", "perturbation", "trivial")


@dataclass(frozen=True)
class Method:
    """A named explainer.

    kind: what it needs, one of KINDS: one forward pass, gradients, many perturbed copies, or nothing of the image.
    layer: the feature layer it reads, where it reads one.
    about: its settings, one line for the report.
    bind: for the trivial maps that are drawn from other images: given the positions of the batch's images in the
        dataset, (B,), the `explain` for just this batch.
    passes: about how many forward passes a map costs, to foretell how long it takes.
    """

    name: str
    kind: str
    explain: Explain
    layer: str | None = None
    about: str = ""
    bind: Callable[[torch.Tensor], Explain] | None = None
    passes: int = 1

    def at(self, indices: torch.Tensor) -> Explain:
        """`explain` for the images at these positions of the dataset."""
        return self.explain if self.bind is None else self.bind(indices)
