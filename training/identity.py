"""What a run reads, and with which versions: a resumed run that found other data would not be the same run."""

from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from hf_ttame.dataset_input import dataset_commit, dataset_digest
from hf_ttame.pictures import contents


def pinned(name: str, revision: str | None) -> str | None:
    """The commit of a dataset on the Hub, `revision` where it is not known; None of a local one."""
    return None if Path(name).exists() else dataset_commit(name, revision) or revision


def dataset_identity(name: str | None, split: str) -> str | None:
    """Hash of the names and sizes of a local dataset's files; None of one on the Hub, whose commit says it."""
    return dataset_digest(Path(name), contents(Path(name), split)) if name and Path(name).exists() else None


def versions() -> dict[str, str]:
    """Of the packages whose arithmetic makes the head."""
    return {name: version(name) for name in ("hf-ttame", "torch")}


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
    return f"versions have changed since the run began ({'; '.join(changed)}): the head may differ in its last bits"
