"""Pictures of a dataset, decoded and prepared by worker processes while the model computes."""

import os
import queue
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, TypeVar

import fsspec.asyn
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from .dataset_input import Batch, Unreadable
from .image_processing import load_picture, preprocess
from .pictures import decode
from .saving import patiently

_Item = TypeVar("_Item")


def fetched(cell: Any) -> Any:
    """The cell with the bytes of a picture that lies elsewhere (a folder of pictures on the Hub)."""
    if isinstance(cell, dict) and cell.get("bytes") is None and "://" in str(cell.get("path")):

        def fetch() -> bytes:
            with fsspec.open(cell["path"], "rb") as file:
                return file.read()

        return {**cell, "bytes": patiently(fetch)}
    return cell


def picture_of(cell: Any, channels: int = 3) -> Any:
    """The picture in a cell: a path, bytes, {"bytes", "path"}, a PIL image or an array (H, W[, C]).

    Raises:
        ValueError: it is unreadable; the reason names no path.
    """
    place = cell.get("path") if isinstance(cell, dict) else cell
    try:
        if isinstance(cell, list):  # an array, as `datasets` hands it out
            array = np.asarray(cell)
            levels = array.dtype.kind in "iu" and 0 <= array.min() <= array.max() < 256
            cell = array.astype(np.uint8) if levels else array
        if channels in (1, 3):
            picture = decode(cell)
            return picture if channels == 3 else load_picture(picture, 1)
        return load_picture(cell, channels)
    except Exception as error:  # a damaged file makes Pillow's decoders raise almost anything
        reason = str(error).replace(repr(place), "the file") if isinstance(place, (str, os.PathLike)) else str(error)
        raise ValueError(" ".join(reason.split())[:300] or type(error).__name__) from error


class Prepare(Dataset):
    """Batches of undecoded cells to pixel values: what a worker process does.

    Args:
        processor: of the explainer.
        channels: of its input.
        id_column: see `Input`.
    """

    def __init__(self, processor: Any, channels: int, id_column: str | None = None):
        self.processor, self.channels, self.id_column = processor, channels, id_column

    def __getitem__(self, batch: Batch) -> Batch:
        pictures: list[torch.Tensor] = []
        good: list[int] = []
        unreadable: list[Unreadable] = []
        for row, cell in enumerate(batch.cells):
            reason = None
            try:
                # A connection that is lost is no fault of the picture: it ends the run.
                cell = fetched(cell)
            except FileNotFoundError:
                reason = "there is no such file"
            if reason is None:
                try:
                    pictures.append(preprocess(self.processor, [picture_of(cell, self.channels)]))
                    good.append(row)
                except Exception as error:  # one picture never stops the job, whatever is wrong with it
                    reason = str(error)
            if reason is not None:
                key = batch.columns[self.id_column][row] if self.id_column else None
                unreadable.append(Unreadable(batch.ids[row], key, reason))
        return replace(
            batch,
            ids=[batch.ids[row] for row in good],
            columns={name: [values[row] for row in good] for name, values in batch.columns.items()},
            cells=[],
            pixel_values=torch.cat(pictures) if pictures else None,
            unreadable=unreadable,
        )


def make_loader(
    make_batches: Callable[[], Iterator[Batch]], prepare: "Prepare", workers: int, pin: bool
) -> DataLoader:
    """The same batches in the same order, prepared by worker processes a few batches ahead.

    Args:
        make_batches: called once, in a thread, and read two batches ahead.
        prepare: done in the workers.
        workers: processes; 0: none.
        pin: copy pixel values to pinned memory, for a GPU.
    """
    return DataLoader(
        prepare,
        # One process reads; what the sampler yields, undecoded batches instead of indices, goes to the workers.
        sampler=_Background(make_batches),
        batch_size=None,
        num_workers=workers,
        collate_fn=_as_it_is,
        pin_memory=pin,
        worker_init_fn=_start_worker,
        prefetch_factor=2 if workers else None,
        # Forked workers see that their process was killed and end; those of a fork server would stay.
        multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
    )


class _Background:
    """An iterable that a thread reads two items ahead: reading goes on while the model computes."""

    def __init__(self, make: Callable[[], Iterator[Any]]):
        self.make = make

    def __iter__(self) -> Iterator[Any]:
        ready: queue.Queue[tuple[str, Any]] = queue.Queue(2)
        stopped = threading.Event()

        def put(kind: str, item: Any) -> None:
            while not stopped.is_set():
                try:
                    return ready.put((kind, item), timeout=0.2)
                except queue.Full:
                    continue

        def read() -> None:
            try:
                for item in self.make():
                    put("item", item)
                    if stopped.is_set():
                        return
                put("end", None)
            except BaseException as error:
                put("error", error)

        thread = threading.Thread(target=read, name="reader", daemon=True)
        thread.start()
        try:
            while True:
                kind, item = ready.get()
                if kind == "end":
                    return
                if kind == "error":
                    raise item
                yield item
        finally:
            stopped.set()
            thread.join(timeout=2)


def _as_it_is(batch: _Item) -> _Item:
    return batch


def _start_worker(_: int) -> None:
    """Ctrl-C is the main process's to handle; a worker ends with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    fsspec.asyn.reset_lock()  # a lock that is held while forking would never be released
