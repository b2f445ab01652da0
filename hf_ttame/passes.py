"""How far an evaluation is, and how long it will take: foretold and counted in passes of the backbone."""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from tqdm.auto import tqdm

from .baselines import Method
from .features import logits_of
from .metrics.insertion_deletion import STARTS
from .metrics.insertion_deletion import STEPS as CURVE_STEPS
from .metrics.road import FRACTIONS

# Images that are judged per map, by group of measures.
_JUDGED = {
    "confidence": 5,  # soft and binary masks
    "adcc": 1,
    "road": 2 * len(FRACTIONS),
    "insertion-deletion": 2 * len(STARTS) * CURVE_STEPS,
}


def passes_of(method: Method, groups: Iterable[str]) -> int:
    """About how many images go through the backbone for the measures `groups` of one map, backward passes aside."""
    groups = set(groups)
    maps = 2 if "adcc" in groups else 1  # coherency asks for a map of the masked image
    return maps * method.passes + 1 + sum(_JUDGED[group] for group in groups)


class PassBar:
    """A bar of the images that go through the backbone, with the time left; it moves within a map of many passes too.

    Args:
        backbone: its passes are counted by a hook, while the block runs.
        total: what `passes_of` foretells; put right after every `step`.
        seconds: of a pass, the first guess.
        disable: show nothing.
    """

    def __init__(self, backbone: nn.Module, total: int, seconds: float, disable: bool = False):
        self._backbone, self._seconds = backbone, seconds
        self.count = 0
        self._last = (0, 1.0)  # passes and seconds of the last step
        # Every pass costs about the same, so the mean over the run tells the time left.
        self.bar = tqdm(total=total, unit="pass", smoothing=0, miniters=1, mininterval=0.5, disable=disable)

    def __enter__(self) -> "PassBar":
        self._began = time.monotonic()
        self._handle = self._backbone.register_forward_hook(self._count)
        return self

    def __exit__(self, *_: object) -> None:
        self._handle.remove()
        self.bar.close()

    def _count(self, _module: nn.Module, _args: Any, output: Any) -> None:
        images = len(logits_of(output))
        self.count += images
        self.bar.update(images)

    @contextmanager
    def step(self, name: str, foretold: int) -> Iterator[None]:
        """A part of the work, named in the bar; afterwards its true passes replace the foretold ones."""
        before, began = self.count, time.monotonic()
        self.bar.set_description(name)
        yield
        self._last = (self.count - before, time.monotonic() - began)
        self.bar.total += self.count - before - foretold

    def images_in(self, seconds: float, passes: int) -> int:
        """How many images, at least 1, can be measured in so many seconds, of `passes` passes each.

        As many as the pace so far allows, or up to twice as many passes as the last step had, where it took less than
        `seconds`: a GPU takes hardly longer for more at once, so the pace of few foretells nothing.
        """
        pace = (time.monotonic() - self._began + self._seconds) / (self.count + 1)
        count, took = self._last
        most = max(seconds / pace, count * min(2.0, seconds / max(took, 1e-9)))
        return max(1, int(most / passes))
