"""What a map costs: passes of the backbone, counted by hooks, and time."""

import time
from typing import Any

import torch
from torch import nn

from ..features import logits_of


class Cost:
    """Counts the images that go through a backbone, forward and backward, and the time, while the block runs.

    A batch of 16 counts as 16. `seconds` includes everything in the block; work queued on a GPU is waited for.

    Example:
        >>> with Cost(model.backbone) as cost:
        ...     maps = explain(pixel_values, class_ids)
        >>> cost.forward / len(maps)
        1.0
    """

    def __init__(self, backbone: nn.Module):
        self.backbone = backbone
        self.forward = 0
        self.backward = 0
        self.seconds = 0.0
        self._handle: Any = None
        self._began = 0.0

    def _count(self, _module: nn.Module, _args: Any, output: Any) -> None:
        logits = logits_of(output)
        self.forward += logits.shape[0]
        if logits.requires_grad:
            logits.register_hook(self._count_gradient)

    def _count_gradient(self, gradient: torch.Tensor) -> None:
        self.backward += gradient.shape[0]

    def __enter__(self) -> "Cost":
        self._handle = self.backbone.register_forward_hook(self._count)
        _wait()
        self._began = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        _wait()
        self.seconds += time.perf_counter() - self._began
        self._handle.remove()


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
