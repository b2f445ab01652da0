"""The endless training stream of one process: shuffled, sharded, and resumable to the picture.

What is exact, and how:

- The shards of the dataset are dealt evenly to slots, one slot per process and worker. Shards that are left over, all
  of them where there are fewer shards than slots, are cut into as many parts as there are slots, every `slots`-th
  picture a part, and the parts are dealt in order: a slot reads one or two of these shards and passes over what is not
  its own. So every picture belongs to exactly one slot, whatever the number of shards, and slots have equal shares.
- A slot reads its shards in an order shuffled anew at every epoch, fills a window with undecoded pictures and hands
  them out in a shuffled order. Its state is {epoch, position, row, offset}: the epoch, where in it the window began
  (shard and row), and how far into the window it is. To continue, the window is read again and its first pictures are
  passed over.
- A picture's crop depends on the seed, the epoch and the picture alone, not on the slot that reads it.
- An unreadable picture is passed over like any other, so it shifts nothing.
- An error in a worker reaches the process as the last thing that the worker hands out, and is raised there.

Slots do not wait for each other: each begins its next epoch when its own pictures are used up.
"""

import heapq
import os
import signal
import sys
from collections.abc import Iterator
from itertools import islice
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image
from torch.utils.data import IterableDataset, get_worker_info
from torchdata.stateful_dataloader import StatefulDataLoader

from hf_ttame.disk import full_disk
from hf_ttame.pictures import DATA_ERRORS, decode, path_of, undecoded

from .data import augment

STREAM_FORMAT = 2
"""Another number means another order of the pictures, other views or another choice of the held-out ones."""
_CHUNK = 32  # rows read at once
_OPENED = 16  # shards that the held-out pictures come from, unless they are too few
_ENOUGH = 100  # pictures after which a slot that could decode none gives up
_ORDER, _WINDOW, _VIEW, _HOLDOUT, _CHOICE = range(5)  # what a random generator is for


class TrainingStream(IterableDataset):
    """Endless views of the pictures of one process, with the state of the slot that reads them.

    Yields {"pixels": (H, W, 3) uint8, "picture": (epoch, shard, row), "unreadable": what was passed over before}; in a
    worker, where something goes wrong, {"error": its words} at the end.

    Args:
        dataset: from `open_stream`.
        column: holds the pictures.
        size: (H, W) of a view.
        seed: of the order and the crops.
        window: pictures that are shuffled together; they are held undecoded, about 0.1 MB each.
        min_scale: see `augment`.
        rank, ranks: this process and their number.
        holdout: share of the pictures that is never yielded; `held_out` reads them.
        resample: filter that resizes the views.
    """

    def __init__(
        self,
        dataset: datasets.IterableDataset,
        column: str,
        size: tuple[int, int],
        *,
        seed: int = 0,
        window: int = 2048,
        min_scale: float = 1.0,
        rank: int = 0,
        ranks: int = 1,
        holdout: float = 0.0,
        resample: Image.Resampling = Image.Resampling.BICUBIC,
    ):
        self.dataset = undecoded(dataset, column)
        self.column = column
        self.size = size
        self.seed = seed
        self.window = window
        self.min_scale = min_scale
        self.rank = rank
        self.ranks = ranks
        self.holdout = holdout
        self.resample = resample
        self.state = {"epoch": 0, "position": 0, "row": 0, "offset": 0, "read": 0, "unreadable": 0}

    def state_dict(self) -> dict[str, int]:
        return dict(self.state)

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.state = dict(state)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        try:
            yield from self._views(worker, workers)
        except DATA_ERRORS as error:
            if info is None or os.environ.get("TTAME_DEBUG"):
                raise
            # torch would make a traceback of its words
            yield {"error": str(full_disk(error) or error) or type(error).__name__}

    def _views(self, worker: int, workers: int) -> Iterator[dict[str, Any]]:
        """What `__iter__` yields, but for the error."""
        slot, slots = self.rank * workers + worker, self.ranks * workers
        state = self.state
        skipped: list[str] = []
        while True:
            epoch, start = state["epoch"], (state["position"], state["row"])
            rows = self._rows(epoch, slot, slots, start)
            while cells := list(islice(rows, self.window)):
                order = np.random.default_rng((self.seed, _WINDOW, epoch, slot, *start)).permutation(len(cells))
                for offset in range(state["offset"], len(cells)):
                    _, shard, row, cell = cells[order[offset]]
                    state["offset"] = offset + 1
                    state["read"] += 1
                    generator = np.random.default_rng((self.seed, _VIEW, epoch, shard, row))
                    try:
                        side = round(2 * max(self.size) / self.min_scale**0.5)
                        pixels = augment(decode(cell, side), self.size, generator, self.min_scale, self.resample)
                    except ValueError as error:
                        state["unreadable"] += 1
                        skipped.append(f"{_name(cell, shard, row)}: {error}")
                        if state["read"] >= _ENOUGH:
                            self._check_any(skipped)
                        continue
                    yield {"pixels": pixels, "picture": (epoch, shard, row), "unreadable": skipped}
                    skipped = []
                start = cells[-1][0]
                state.update(position=start[0], row=start[1], offset=0)
            if start == (0, 0):
                if slots == 1:
                    raise ValueError("the dataset is empty")
                return  # fewer pictures than slots
            self._check_any(skipped)
            state.update(epoch=epoch + 1, position=0, row=0, offset=0)

    def _rows(
        self, epoch: int, slot: int, slots: int, start: tuple[int, int]
    ) -> Iterator[tuple[tuple[int, int], int, int, Any]]:
        """(where to continue after it, shard, row, cell) of every picture of one slot and epoch, from `start` on."""
        shards = self.dataset.num_shards
        dealt = shards // slots * slots
        left = shards - dealt
        mine: list[tuple[int, range | None]] = [(shard, None) for shard in range(slot, dealt, slots)]
        # Part p of the left-over shards, counted through all of them, belongs to slot p // left.
        for number in range(left):
            parts = range(max(slot * left, number * slots), min((slot + 1) * left, (number + 1) * slots))
            if parts:
                mine.append((dealt + number, range(parts.start - number * slots, parts.stop - number * slots)))
        order = np.random.default_rng((self.seed, _ORDER, epoch, slot)).permutation(len(mine))
        for position in range(start[0], len(mine)):
            shard, parts_of_it = mine[order[position]]
            first = start[1] if position == start[0] else 0
            for row, cell in enumerate(self._cells(shard)):
                ours = parts_of_it is None or (row + shard) % slots in parts_of_it
                if row >= first and ours and not (self.holdout and self._is_held_out(shard, row)):
                    yield (position, row + 1), shard, row, cell

    def _cells(self, shard: int) -> Iterator[Any]:
        # Not `for ... in dataset`: inside a worker that would split the shard among the workers once more.
        for rows in self.dataset.shard(self.dataset.num_shards, shard).iter(batch_size=_CHUNK):
            yield from rows[self.column]

    def _is_held_out(self, shard: int, row: int) -> bool:
        """Whether a picture is kept for validation; the same for every seed, process and worker."""
        return np.random.default_rng((_HOLDOUT, shard, row)).random() < self.holdout

    def held_out(self, count: int, whole: bool = False) -> list[Any]:
        """Up to `count` undecoded cells of the share that is kept for validation, from shards in a shuffled order.

        whole: choose at random among all that are kept, which reads the dataset to its end; else the first ones of
            sixteen shards, evenly many of each: enough of a dataset that is not sorted by class.
        """
        shards = np.random.default_rng(_HOLDOUT).permutation(self.dataset.num_shards).tolist()
        if whole:
            drawn = (
                (np.random.default_rng((_CHOICE, shard, row)).random(), shard, row, cell)
                for shard in shards
                for row, cell in enumerate(self._cells(shard))
                if self._is_held_out(shard, row)
            )
            return [cell for *_, cell in heapq.nsmallest(count, drawn, key=lambda entry: entry[:3])]
        found: list[Any] = []
        for number, shard in enumerate(shards):
            share = -(-(count - len(found)) // max(1, min(_OPENED, len(shards)) - number))
            kept = (cell for row, cell in enumerate(self._cells(shard)) if self._is_held_out(shard, row))
            found += islice(kept, share)
        return found

    def _check_any(self, skipped: list[str]) -> None:
        """The run judges the share of unreadable pictures of all slots; a slot without any other hands out nothing."""
        if self.state["read"] and self.state["unreadable"] == self.state["read"]:
            raise ValueError(
                f"none of the {self.state['read']} pictures read so far can be decoded; the last: {skipped[-1]}"
            )


def _name(cell: Any, shard: int, row: int) -> str:
    return f"{path_of(cell) or 'picture'} (shard {shard}, row {row})"


def collate(views: list[dict[str, Any]]) -> dict[str, Any]:
    """{"pixels": (B, H, W, 3) uint8, "pictures": B of (epoch, shard, row), "unreadable": names}, or {"error"}."""
    for view in views:
        if "error" in view:
            return view
    return {
        "pixels": torch.stack([view["pixels"] for view in views]),
        "pictures": [view["picture"] for view in views],
        "unreadable": [name for view in views for name in view["unreadable"]],
    }


def _start_worker(_: int) -> None:
    """A worker ends with its process: Ctrl-C and SIGTERM are the training's to handle.

    Sent to a whole process group (Slurm, `timeout`), SIGTERM comes here too: the first is passed over, as the training
    saves a checkpoint and ends its workers; a second one, the loader's own, acts.
    """
    import fsspec.asyn

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, _: signal.signal(number, signal.SIG_DFL))
    fsspec.asyn.reset_lock()  # a lock that is held while forking would never be released


def _raise_error(batch: dict[str, Any]) -> dict[str, Any]:
    if "error" in batch:
        raise ValueError(batch["error"])
    return batch


class _Loader(StatefulDataLoader[dict[str, Any]]):
    """Raises here, with its own words alone, what went wrong in a worker."""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return map(_raise_error, super().__iter__())


def make_loader(
    stream: TrainingStream, batch_size: int, workers: int, pin_memory: bool = False
) -> "StatefulDataLoader[dict[str, Any]]":
    """Batches of the stream; `state_dict()` of the loader says exactly which batches were handed out."""
    return _Loader(
        stream,
        batch_size=batch_size,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=pin_memory,
        worker_init_fn=_start_worker,
        generator=torch.Generator().manual_seed(0),  # the global one is left alone
        prefetch_factor=4 if workers else None,
        # Forked workers see that their process was killed and end; those of a fork server (Python 3.14) would stay.
        multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
    )
