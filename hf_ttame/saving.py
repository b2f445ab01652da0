"""What a saved explainer holds of its backbone, how its files get their names, and whether they arrived whole."""

import hashlib
import json
import os
import re
import shutil
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import huggingface_hub
import torch
from huggingface_hub.utils import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError
from torch import nn

from .disk import whole

# The one module that a repository holds: it names the installed package, so nobody's copy of the code can go stale.
REMOTE_MODULE = "hf_ttame_remote.py"
_REMOTE_CODE = "from hf_ttame import TTameConfig, TTameModel  # pip install hf-ttame\n"
_AUTO_MAP = {"AutoConfig": "TTameConfig", "AutoModel": "TTameModel", "AutoModelForImageClassification": "TTameModel"}
# What the Hub's client raises; its HTTP library, whose errors it lets through, is not the same in all its versions.
HTTP_ERRORS: tuple[type[Exception], ...] = (HfHubHTTPError, *HfHubHTTPError.__bases__)
HUB_ERRORS: tuple[type[Exception], ...] = (*HTTP_ERRORS, OSError, RuntimeError)
_CONVERSION = "DISABLE_SAFETENSORS_CONVERSION"
_ALIGNMENT = 64  # bytes, of torch's own CPU memory
_TRIES, _WAIT, _LONGEST_WAIT = 4, 0.5, 60.0  # seconds; the wait is doubled after every try
_TRANSIENT = (408, 429, 500, 502, 503, 504)
_Result = TypeVar("_Result")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_LOCAL_PATH = re.compile(r"(/|~|file:|[A-Za-z]:[\\/]|\\\\|\.{1,2}[\\/])")
# Any absolute path of two or more components, to its end; not inside an address, a relative path, a link of a page, a
# closing tag or "and/or".
PATH_IN_TEXT = re.compile(
    r"(?:(?<![\w/.~<*})\]-])(?<!\]\()/[^\W\d][\w.+@-]*/[\w.+@-]|(?<!\w)~/[\w.]|\b[A-Za-z]:\\\\?\w"
    r"|\bfile:///?\w)[^\s\"'<>|)`]*"
)
# The same in code, which is full of routes and patterns between slashes: places that look like somebody's machine.
PATH_IN_CODE = re.compile(
    r"(?<![\w:/.~<-])(?:/(?:home|Users|root|mnt|media|Volumes|nfs|tmp|var|opt|srv|data|scratch|private|work|"
    r"workspace)/[\w.-]+"
    r"|[A-Za-z]:\\\\?[\w.-]+\\|file:///?[\w.-]+)"
)
TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{20,}|\b(?:hf_oauth|hf_jwt|api_org)_[\w.-]{16,}")
LABELS = ("id2label", "label2id", "label_names")  # names of classes, which may look like anything


def fingerprint(backbone: nn.Module) -> str:
    """ "dtype:hash" of names, shapes and some 4,096 evenly spaced values of every weight and buffer."""
    return _fingerprint(backbone, (b"".join(weight) for weight in sorted(_weights(backbone))))


def values_fingerprint(backbone: nn.Module) -> str:
    """The same in the order of the state dict and without the names, which transformers changes between versions."""
    return _fingerprint(backbone, (shape + values for _, shape, values in _weights(backbone)))


def _weights(backbone: nn.Module) -> Iterator[tuple[bytes, bytes, bytes]]:
    """Name, shape and some values of every weight and buffer."""
    for name, tensor in backbone.state_dict().items():
        flat = tensor.detach().flatten()
        sample = flat[:: max(1, flat.numel() // 4096)].to("cpu", torch.float64).contiguous()
        yield f"{name} ".encode(), str(tuple(tensor.shape)).encode(), sample.numpy().tobytes()


def _fingerprint(backbone: nn.Module, parts: Iterable[bytes]) -> str:
    dtype = str(next(backbone.parameters()).dtype).removeprefix("torch.")
    return f"{dtype}:{hashlib.sha256(b''.join(parts)).hexdigest()[:32]}"


def align(module: nn.Module) -> None:
    """Give weights that lie in a memory-mapped file memory of their own, aligned as torch aligns it.

    safetensors maps a file, so a weight may begin at any byte; CPU kernels round differently there. Without this a
    reloaded explainer differs from the saved one in the last bits, on some processors.
    """
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.device.type == "cpu" and tensor.data_ptr() % _ALIGNMENT:
            tensor.data = tensor.data.clone()


def portable_config(backbone: nn.Module) -> dict[str, Any]:
    """The backbone's config without its labels, which stand at the top, and without any local path."""
    left_out = ("_name_or_path", "transformers_version", "auto_map", *LABELS)
    config: Any = backbone.config
    return without_paths({key: value for key, value in config.to_diff_dict().items() if key not in left_out})


def is_local_path(text: Any) -> bool:
    """Whether a value names a place on somebody's machine: absolute, on a drive, "~/x", "./x", "file:..."."""
    return isinstance(text, str) and len(text) > 1 and _LOCAL_PATH.match(text) is not None


def is_hub_id(name: Any) -> bool:
    """Whether a name can be shown to anybody: "organisation/name", and no place on this machine."""
    parts = name.split("/") if isinstance(name, str) else []
    return (
        len(parts) == 2 and all(re.fullmatch(r"[\w.-]*\w[\w.-]*", part) for part in parts) and not is_local_path(name)
    )


def holds_local_path(text: Any) -> bool:
    """Whether a value is a local path, or a text with one in it."""
    return is_local_path(text) or (isinstance(text, str) and PATH_IN_TEXT.search(text) is not None)


def without_paths(value: Any) -> Any:
    """The same dicts and lists without the entries that hold local paths; names of classes stay as they are."""
    if isinstance(value, dict):
        return {
            key: entry if key in LABELS else without_paths(entry)
            for key, entry in value.items()
            if not holds_local_path(entry) and not holds_local_path(key)
        }
    if isinstance(value, (list, tuple)):
        return [without_paths(entry) for entry in value if not holds_local_path(entry)]
    return value


def clean_configs(folder: Path) -> None:
    """Remove local paths from every config in a folder before it gets its name: they are nobody else's business."""
    for file in (*folder.rglob("config.json"), *folder.rglob("preprocessor_config.json")):
        config = without_paths(json.loads(file.read_text()))
        config.pop("_name_or_path", None)  # a folder's relative name does not look like a path
        file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def checked_token(token: Any) -> Any:
    """The token without white space around it.

    Raises:
        ValueError: it holds characters that no token has. The HTTP client would name the whole token in its error.
    """
    if not isinstance(token, str):
        return token
    if not re.fullmatch(r"[!-~]*", token.strip()):
        raise ValueError("token holds characters that no access token has; copy it again from the Hub's settings page")
    return token.strip()


def without_tokens(text: str) -> str:
    """The text with every access token of the Hub made unreadable."""
    return TOKEN.sub("hf_***", text)


def resolve_commit(repo_id: str, revision: str | None, **hub_kwargs: Any) -> str | None:
    """The commit behind a branch or tag of a model repository, from the cache or the Hub; None where neither knows."""
    if revision and _COMMIT.fullmatch(revision):
        return revision
    cached = huggingface_hub.try_to_load_from_cache(
        repo_id, "config.json", cache_dir=hub_kwargs.get("cache_dir"), revision=revision
    )
    if isinstance(cached, str):
        return Path(cached).parent.name
    if hub_kwargs.get("local_files_only"):
        return None
    try:
        return huggingface_hub.HfApi(token=hub_kwargs.get("token")).model_info(repo_id, revision=revision).sha
    except HUB_ERRORS:  # not there, or no connection
        return None


def patiently(action: Callable[[], _Result]) -> _Result:
    """Do it again where the server was at fault (429, 5xx): the client retries most requests itself, but not all.

    A wait that the server asks for (Retry-After, in seconds) is kept, up to a minute.
    """
    for attempt in range(_TRIES):
        try:
            return action()
        except (OSError, RuntimeError) as error:
            response: Any = None
            cause: BaseException | None = error
            while cause is not None and response is None:
                response = getattr(cause, "response", None)
                cause = cause.__cause__ or cause.__context__
            if getattr(response, "status_code", None) not in _TRANSIENT or attempt + 1 == _TRIES:
                raise
            asked = str(response.headers.get("Retry-After", ""))
            time.sleep(max(_WAIT * 2**attempt, min(float(asked), _LONGEST_WAIT) if asked.isdecimal() else 0.0))
    raise AssertionError("the last try returns or raises")


def add_remote_code(part: Path) -> None:
    """Let `trust_remote_code=True` find the installed package where nothing imported it."""
    for copied in part.glob("*.py"):
        copied.unlink()  # transformers copies our own modules, torn apart, where a model came by remote code
    config = json.loads((part / "config.json").read_text())
    module = REMOTE_MODULE.removesuffix(".py")
    config["auto_map"] = {auto: f"{module}.{name}" for auto, name in _AUTO_MAP.items()}
    (part / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    (part / REMOTE_MODULE).write_text(_REMOTE_CODE)


def fetch_weights(repo_id: str, **where: Any) -> None:
    """Fetch the head's weights into the cache, as safetensors.

    Without this, transformers would ask a service to convert a repository that has only pickles.

    Raises:
        FileNotFoundError: the repository has no safetensors.
    """
    for name in ("model.safetensors", "model.safetensors.index.json"):
        try:
            huggingface_hub.hf_hub_download(repo_id, name, **where)
            return
        except LocalEntryNotFoundError:  # no connection, and not in the cache under this name
            index = {key: where.get(key) for key in ("cache_dir", "revision")}
            if isinstance(huggingface_hub.try_to_load_from_cache(repo_id, f"{name}.index.json", **index), str):
                return
            raise
        except EntryNotFoundError:
            continue
    raise FileNotFoundError("it has no model.safetensors, and nothing else is opened; publish it with `ttame push`")


@contextmanager
def without_conversion() -> Iterator[None]:
    """Keep transformers from posting the name of a repository of pickles, and the token, to a conversion service."""
    before = os.environ.get(_CONVERSION)
    os.environ[_CONVERSION] = "1"  # read at every load
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(_CONVERSION, None)
        else:
            os.environ[_CONVERSION] = before


def is_pickled(repo_id: str, revision: str | None, cache_dir: Any = None) -> bool:
    """Whether what lies in the cache of a repository that was just loaded has no safetensors."""
    cached = huggingface_hub.try_to_load_from_cache(repo_id, "config.json", cache_dir=cache_dir, revision=revision)
    return isinstance(cached, str) and not any(Path(cached).parent.rglob("*.safetensors"))


class DamagedDownload(ValueError):
    """A file in the cache is not what the Hub announced."""


def check_download(repo_id: str, revision: str | None, cache_dir: Any = None) -> None:
    """Compare the cached files of a repository with the checksums that are their names in the cache.

    Raises:
        DamagedDownload: a file is not what the Hub announced; it is removed from the cache, load again to fetch it.
    """
    cached = huggingface_hub.try_to_load_from_cache(repo_id, "config.json", cache_dir=cache_dir, revision=revision)
    if not isinstance(cached, str):
        return
    for file in sorted(Path(cached).parent.rglob("*")):
        blob = file.resolve()
        if not file.is_symlink() or not blob.is_file() or not re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", blob.name):
            continue  # a cache without links does not keep the checksums
        # Git names a blob by a SHA-1 of its size and content, LFS by the SHA-256 of its content.
        digest = hashlib.sha256() if len(blob.name) == 64 else hashlib.sha1(b"blob %d\0" % blob.stat().st_size)
        with open(blob, "rb") as stream:
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
        if digest.hexdigest() != blob.name:
            file.unlink()
            blob.unlink()
            raise DamagedDownload(
                f"{file.name!r} of {repo_id!r} was damaged on its way: its checksum is {digest.hexdigest()[:12]}, the "
                f"Hub announced {blob.name[:12]}; it was removed from the cache, load again to fetch it anew"
            )


def write_whole(path: Path, text: str) -> None:
    """Write a file that has its name only when it is complete, also where several processes write it at once."""
    with whole(path, path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}.part")) as part:
        part.write_text(text, encoding="utf-8")


def lock_settings(
    folder: Path, record: dict[str, Any], main: bool, follows: Mapping[str, tuple[str, ...]] | None = None
) -> None:
    """Write settings.json, or check that an earlier run in the folder was made with the same ones.

    Args:
        folder: of the run.
        record: the settings.
        main: whether this process writes them.
        follows: settings that change with others, which nobody chose: where one of those differs, it alone is named.

    Raises:
        ValueError: it was not; the message names the differences.
    """
    file = folder / "settings.json"
    if file.exists():
        earlier, new = json.loads(file.read_text()), json.loads(json.dumps(record))
        differ = {key for key in {*earlier, *new} if earlier.get(key) != new.get(key)}
        changed = [key for key in differ if not differ & {*(follows or {}).get(key, ())}]
        if changed:
            raise ValueError(
                f"{folder} holds results of another run; different: "
                + ", ".join(f"{key} ({earlier.get(key)!r} there, {new.get(key)!r} here)" for key in sorted(changed))
                + "; choose another folder, or delete that one"
            )
    elif main:
        write_whole(file, json.dumps(record, indent=2) + "\n")


def move_into(part: Path, target: Path) -> None:
    """Move complete files from `part` into `target`: an earlier config goes first, the new one comes last.

    Without a config nothing loads, so a run that is killed on the way never leaves one beside another's weights.
    """
    had_backbone = False
    if (target / "config.json").is_file():
        earlier = json.loads((target / "config.json").read_text())
        had_backbone = earlier.get("model_type") == "ttame" and bool(earlier.get("backbone_included"))
    files = [file for file in part.rglob("*") if file.is_file()]
    target.mkdir(exist_ok=True)
    (target / "config.json").unlink(missing_ok=True)
    umask = os.umask(0)
    os.umask(umask)
    # Weights of an earlier save under other names (more shards, an included backbone) would be loaded instead.
    written = {target / file.relative_to(part) for file in files}
    # Only what an explainer's own save wrote is removed: the folder may hold other things.
    for folder in (target, target / "backbone") if had_backbone else (target,):
        for stale in {*folder.glob("model*.safetensors"), *folder.glob("model.safetensors.index.json")} - written:
            stale.unlink()
    if had_backbone and not (part / "backbone").is_dir():
        shutil.rmtree(target / "backbone", ignore_errors=True)
    for file in sorted(files, key=lambda file: file == part / "config.json"):
        file.chmod(0o666 & ~umask)  # safetensors writes files that only their owner can read
        final = target / file.relative_to(part)
        final.parent.mkdir(parents=True, exist_ok=True)
        os.replace(file, final)
