"""What a run reads, and with which versions: a resumed run that found other data would not be the same run."""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from hf_ttame.backbones import load_backbone
from hf_ttame.dataset_input import dataset_commit, local_digest
from hf_ttame.pictures import contents
from hf_ttame.saving import fingerprint

from .arguments import Arguments
from .checkpoints import check_same, checkpoints

_SMALL = 10 << 30  # bytes


def pinned(name: str, revision: str | None) -> str | None:
    """The commit of a dataset on the Hub, `revision` where it is not known; None of a local one."""
    return None if Path(name).exists() else dataset_commit(name, revision) or revision


def agreed(accelerator: Accelerator, find: Callable[[], str | None]) -> str | None:
    """What the main process finds, in every process: asked one by one, they might find two commits of one dataset."""
    found = [find() if accelerator.is_main_process else None]
    broadcast_object_list(found)
    return found[0]


def is_small(name: str, split: str) -> bool:
    """Whether a dataset lies here and can be read to its end in a moment."""
    if not Path(name).exists():
        return False
    found = contents(Path(name), split)
    if isinstance(found, datasets.Dataset):
        return found.data.nbytes < _SMALL
    # A link that leads nowhere is one unreadable picture.
    return sum(file.stat().st_size for file in found if file.exists()) < _SMALL


def versions() -> dict[str, str]:
    """What the last bits depend on: the packages that decode, order and compute, and the threads that share a sum."""
    return {
        **{name: version(name) for name in ("hf-ttame", "torch", "numpy", "pillow")},
        "threads": str(torch.get_num_threads()),
    }


def check_complete(output: Path, arguments: Arguments, processes: int) -> None:
    """Raise ValueError where the run that is complete in `output` was not the one that the arguments ask for."""
    if not (found := checkpoints(output)):
        return  # removed to save space
    recorded = json.loads((found[-1] / "progress.json").read_text())
    check_same(recorded["arguments"], {**asdict(arguments), "processes": processes}, recorded["identity"])
    splits = {"dataset": arguments.split, "validation": arguments.validation_split}
    now = {name: local_digest(getattr(arguments, name), split) for name, split in splits.items()}
    if arguments.pretrained and Path(arguments.backbone).exists():
        now["backbone"] = fingerprint(load_backbone(arguments.backbone).model)
    check_identity({name: recorded["identity"].get(name) for name in now}, now)


def check_identity(recorded: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """Raise ValueError, with their names, where the classifier or the data are not those that the run began with."""
    changed = [
        f"{name}: {then} then, {found.get(name)} now"
        for name, then in recorded.items()
        if then is not None and then != found.get(name)
    ]
    if changed:
        raise ValueError(
            "a resumed run must equal the uninterrupted one, but what it reads has changed: "
            + "; ".join(changed)
            + "; bring the earlier back, or start anew in another --output"
        )


def version_advice(recorded: Mapping[str, str], found: Mapping[str, str]) -> str | None:
    """A sentence where versions are not those that the run began with; None where they are."""
    changed = [
        f"{name} {then} then, {found.get(name)} now" for name, then in recorded.items() if then != found.get(name)
    ]
    if not changed:
        return None
    return f"since the run began this has changed: {'; '.join(changed)}; the head may differ in its last bits"
