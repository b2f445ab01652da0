"""Names that mean a folder of this machine, and are not there: refused before the Hub is asked for them."""

import difflib
import os
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.file_download import repo_folder_name

from .saving import HUB_ERRORS, checked_token, is_local_path

_UNKNOWN: tuple[type[Exception], ...] = (*HUB_ERRORS, ValueError)
_PATIENCE = 5.0  # seconds that the Hub has to say whether it knows a name that resembles a folder's


def check_path(name: str | os.PathLike, what: str, repo_type: str = "model", **hub_kwargs: Any) -> None:
    """Refuse what can only be a path, and is not there.

    Such is "./x", "/x", "~/x" or "a/b/c"; and "a/b" where something like it is here (`nearest_path`) and the Hub knows
    no "a/b", or cannot be asked. Everything else may be a Hub id.

    Args:
        name: a folder, a file or a Hub id.
        what: it is to be, for the message.
        repo_type: "model" or "dataset".
        **hub_kwargs: token, cache_dir, local_files_only.

    Raises:
        ValueError: with the nearest path that is there.
    """
    name = os.fspath(name)
    if os.path.exists(name) or "://" in name:
        return
    near = nearest_path(name)
    if not is_local_path(name) and name.count("/") < 2 and (not near or "/" not in name):
        return
    unknown = ""
    if not is_local_path(name) and name.count("/") == 1:
        known = _on_hub(name, repo_type, **hub_kwargs)
        if known:
            return
        unknown = " here, and the Hub does not know it" if known is False else " here, and the Hub cannot be asked"
    raise ValueError(
        f"the {what} {name!r} does not exist{unknown}; "
        + (f"nearest: {near!r}" if near else "give a path that does, or a Hub id of the form 'organisation/name'")
    )


def check_outside(output: str | os.PathLike, dataset: str | os.PathLike) -> None:
    """Raise ValueError where `output` lies in the folder `dataset`: its pictures would be read as the dataset's."""
    if os.path.isdir(dataset) and Path(output).resolve().is_relative_to(Path(dataset).resolve()):
        raise ValueError(
            f"the output {os.fspath(output)!r} lies among the pictures of {os.fspath(dataset)!r}, where what is "
            "written would be read too; give a folder outside"
        )


def nearest_path(name: str) -> str | None:
    """The path that is there and most like `name`; None where nothing is."""
    path = Path(os.path.expanduser(name))
    if path.exists():
        return str(path)  # a "~" that no shell has replaced
    above = next((parent for parent in path.parents if parent.is_dir()), None)
    if above is None:
        return None
    missing, *rest = path.relative_to(above).parts
    try:
        found = difflib.get_close_matches(missing, os.listdir(above), n=3)
    except OSError:
        return None
    near = [above.joinpath(entry, *rest) for entry in found]
    return next((str(path) for path in near if path.exists()), str(above / found[0]) if found else None)


def _on_hub(
    name: str, repo_type: str, token: Any = None, cache_dir: Any = None, local_files_only: bool = False
) -> bool | None:
    """Whether the cache or the Hub knows a repository; None where it is not cached and the Hub cannot be asked."""
    folder = repo_folder_name(repo_id=name, repo_type=repo_type)
    if Path(cache_dir or huggingface_hub.constants.HF_HUB_CACHE, folder).is_dir():
        return True
    if local_files_only:
        return None
    try:
        huggingface_hub.HfApi(token=checked_token(token)).repo_info(name, repo_type=repo_type, timeout=_PATIENCE)
    except huggingface_hub.errors.GatedRepoError:
        return True  # the client says what to do
    except (huggingface_hub.errors.RepositoryNotFoundError, huggingface_hub.errors.HFValidationError):
        return False
    except _UNKNOWN:
        return None
    return True
