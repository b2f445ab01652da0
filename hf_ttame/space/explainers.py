"""Explainers by name: the shipped one, a Hub id, or, on one's own machine, a folder."""

import os
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.utils import validate_repo_id
from transformers import PretrainedConfig

from ..baselines import Method, make_method
from ..demo import EXPLAINER, load_explainer
from ..modeling_ttame import TTameModel
from ..paths import check_path
from ..saving import HUB_ERRORS

_Result = TypeVar("_Result")
SHIPPED = "efficientnet-lite0"
_KEPT = 3  # explainers in memory
_WEIGHTS = (".safetensors", ".bin")
_LOADING_ERRORS: tuple[type[Exception], ...] = (ValueError, TypeError, *HUB_ERRORS)
_NOT_THERE = (
    "there is no explainer {!r} on the Hub, it is private or gated, or the Hub cannot be reached; check the name"
)
_MEMORY_WORDS = ("out of memory", "can't allocate memory", "not enough memory", "cannot allocate memory")


class Explainer:
    """An explainer that is loaded: its model, and where its config and figures lie."""

    def __init__(self, name: str, model: TTameModel, folder: Path, remarks: tuple[str, ...] = ()):
        self.name = name
        self.model = model
        self.folder = folder
        self.remarks = remarks
        self.used = time.monotonic()
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="passes")

    def alone(self, work: Callable[[], _Result]) -> _Result:
        """Do some work on the backbone, after all that came before, while nobody else does.

        Passes of one backbone must not overlap: the hooks of one would see the tensors of the other. They are served
        in the order in which they came, so that whoever needs many passes (RISE) asks for them one by one.
        """
        return self._worker.submit(work).result()

    @cached_property
    def gradcam(self) -> Method:
        """Grad-CAM on the same backbone, made once: finding its layer costs passes. For use in `alone`."""
        return make_method("gradcam", self.model)

    @cached_property
    def labels(self) -> dict[int, str]:
        """Class id -> the first of the class's names, or all of them where the first is another class's first, too."""
        whole = {class_id: str(label) for class_id, label in self.model.config.id2label.items()}
        short = {class_id: label.split(",")[0].strip() or label for class_id, label in whole.items()}
        times = Counter(short.values())
        return {class_id: name if times[name] == 1 else whole[class_id] for class_id, name in short.items()}


class Explainers:
    """Loads explainers by name and keeps the last few.

    Args:
        at_home: whether only the owner can type names. Where strangers can, a name that the owner did not give is no
            folder, and is asked of the Hub without the owner's token.
        forgotten: told of every explainer that is let go.
    """

    def __init__(self, at_home: bool, forgotten: Callable[[Explainer], None] = lambda _: None):
        self.at_home = at_home
        self.forgotten = forgotten
        self._trusted: set[str] = set()
        self._loaded: dict[str, Explainer] = {}
        self._loading = threading.Lock()

    def get(self, name: str | None, trusted: bool = False, wait: bool = True) -> Explainer:
        """The explainer of this name, loaded if need be.

        Args:
            name: SHIPPED, "organisation/name" on the Hub, or a folder; None: the field is empty.
            trusted: the name comes from whoever started the Space: it may be a folder or private, and is kept.
            wait: for another that is being loaded; False: say so instead.

        Raises:
            ValueError: there is none, or it does not fit into the memory; the message says what to do.
        """
        name = str(name or "").strip()
        if trusted:
            self._trusted.add(name)
        found = self._loaded.get(name)
        if found is None:  # whoever asks for one that is there does not wait for another to load
            if not self._loading.acquire(blocking=wait):
                raise ValueError("an explainer is being loaded; try again in a moment, or choose one that is there")
            try:
                found = self._loaded.get(name)
                if found is None:
                    found = self._load(name, self.at_home or name in self._trusted)
                    self._make_room()  # now: a name that cannot be loaded costs nobody anything
                    self._loaded[name] = found
            finally:
                self._loading.release()
        found.used = time.monotonic()
        return found

    def _make_room(self) -> None:
        """Before one more: let go of those longest unused, never of the owner's."""
        others = [explainer for explainer in self._loaded.values() if explainer.name not in self._trusted]
        others.sort(key=lambda explainer: explainer.used)
        for oldest in others[: max(0, len(self._loaded) - _KEPT + 1)]:
            del self._loaded[oldest.name]
            self.forgotten(oldest)

    def _load(self, name: str, by_owner: bool) -> Explainer:
        if name == SHIPPED:
            return Explainer(name, _on_device(load_explainer()), _shipped_figures())
        if os.path.isdir(name):
            if not by_owner:
                raise ValueError("folders of this machine are not opened here; give a Hub id, 'organisation/name'")
        else:
            if by_owner:
                check_path(name, "explainer")
            _check_hub_id(name)
        token = None if by_owner else False  # None: the one that is stored on this machine
        if not by_owner:
            _check_public(name)
        facts = _config(name, token)
        if facts.get("model_type") != "ttame":
            raise ValueError(
                f"{name!r} is no explainer, but a model of type {facts.get('model_type') or 'unknown'!r}; make one "
                "for this classifier with `ttame train` and publish it with `ttame push`"
            )
        if not by_owner and facts.get("backbone") and not facts.get("backbone_included"):
            _check_public(str(facts["backbone"]))
        _check_memory(name, facts, token)
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always", UserWarning)
                model = TTameModel.from_pretrained(name, token=token)
        except _LOADING_ERRORS as error:
            if is_memory_error(error):
                raise
            raise ValueError(f"{name!r} cannot be loaded: {error}") from error
        remarks = tuple(str(w.message) for w in caught if "fingerprint" in str(w.message))
        return Explainer(name, _on_device(model), _figures(name, token), remarks)


def is_memory_error(error: BaseException) -> bool:
    """Whether the memory of this machine or of its GPU was not enough."""
    known = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    return known or (isinstance(error, RuntimeError) and any(words in str(error) for words in _MEMORY_WORDS))


def memory_left() -> int | None:
    """Bytes that can still be used, of the machine and of the container; None where neither tells."""
    left = []
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                left.append(1024 * int(line.split()[1]))
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        if limit.isdigit():
            left.append(int(limit) - int(Path("/sys/fs/cgroup/memory.current").read_text()))
    except (OSError, ValueError):
        pass
    return min(left) if left else None


def _on_device(model: TTameModel) -> TTameModel:
    model._warned_unseen = True  # the page says it beside the map
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def _check_hub_id(name: str) -> None:
    if name.count("/") != 1 or os.path.exists(name):
        raise ValueError(f"{name!r} is no Hub id of an explainer; it has the form 'organisation/name'")
    try:
        validate_repo_id(name)
    except ValueError as error:
        raise ValueError(f"{name!r} is no Hub id: {error}") from error


def _check_public(name: str) -> None:
    """Raise ValueError where not everybody may read it: the cache would still give what the owner once fetched."""
    try:
        info = HfApi(token=False).model_info(name)
    except _LOADING_ERRORS as error:
        raise ValueError(_NOT_THERE.format(name)) from error
    if info.private or info.gated:
        raise ValueError(_NOT_THERE.format(name))


def _config(name: str, token: bool | None) -> dict[str, Any]:
    """The config alone: whether it is an explainer must be known before gigabytes are fetched."""
    try:
        facts, _ = PretrainedConfig.get_config_dict(name, token=token)
    except HUB_ERRORS as error:
        if os.path.isdir(name):
            raise ValueError(
                f"the folder {name!r} holds no explainer: it has no config.json that can be read"
            ) from error
        raise ValueError(_NOT_THERE.format(name)) from error
    return facts


def _check_memory(name: str, facts: dict[str, Any], token: bool | None) -> None:
    """Raise ValueError where the weights alone are more than the memory has: loading them would end the process."""
    left = memory_left()
    if left is None:
        return
    places = [name] if facts.get("backbone_included") or not facts.get("backbone") else [name, facts["backbone"]]
    needed = sum(_weight_bytes(place, token) for place in places)
    if needed > left // 2:  # float32 in memory, and what a pass needs
        raise ValueError(
            f"{name!r} needs {needed / 1e9:.1f} GB for its weights and as much again to run, and this machine has "
            f"{left / 1e9:.1f} GB left; choose a smaller one, or run `ttame space` on a larger machine"
        )


def _weight_bytes(place: str, token: bool | None) -> int:
    if os.path.isdir(place):
        files = [(file.name, file.stat().st_size) for file in Path(place).rglob("*") if file.is_file()]
    else:
        try:
            listed = HfApi(token=token).model_info(place, files_metadata=True).siblings or []
        except _LOADING_ERRORS:
            return 0  # offline with a full cache
        files = [(file.rfilename, file.size or 0) for file in listed]
    # A repository often holds the same weights in several formats: one of them is loaded.
    return max(sum(size for name, size in files if name.endswith(kind)) for kind in _WEIGHTS)


def _figures(name: str, token: bool | None) -> Path:
    """The folder with the config and the figures of an explainer; of the Hub's, only these files are fetched."""
    if os.path.isdir(name):
        return Path(name)
    ignored = ["*/*", "*.index.json"]
    return Path(snapshot_download(name, token=token, allow_patterns=["*.json"], ignore_patterns=ignored))


def _shipped_figures() -> Path:
    package = Path(__file__).parents[1]
    places = (package / "model_cards" / "efficientnet_lite0", package.parent / "model_cards" / "efficientnet_lite0")
    return next((place for place in places if place.is_dir()), EXPLAINER)
