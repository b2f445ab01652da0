"""Publishing: what of a folder is sent, what never is, and how it arrives in one commit.

Explainers, datasets of maps and Space folders go the same way: the folder is complete on disk first, every file is
listed, then one commit is made. A failed push leaves the folder and the repository as they were.
"""

import os
import re
import shlex
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, RepoCard
from huggingface_hub.utils import HfHubHTTPError, RepositoryNotFoundError, validate_repo_id

from .cards import is_ours, write_card
from .records import CARD, FURTHER_REPORT, REPORT, TRAINING, check_folder, further_reports, read_json, report_name
from .saving import (
    HUB_ERRORS,
    LABELS,
    PATH_IN_CODE,
    PATH_IN_TEXT,
    REMOTE_MODULE,
    TOKEN,
    checked_token,
    is_hub_id,
    is_local_path,
    patiently,
    without_tokens,
)

PICTURES = (
    *(".png", ".jpg", ".jpeg", ".jfif", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".heic", ".heif", ".avif"),
    *(".dcm", ".nii.gz", ".nii", ".npy", ".npz"),
)
KINDS = ("model", "dataset", "space")
_MODEL_FILES = re.compile(
    r"(backbone/)?(config\.json|model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json|"
    r"preprocessor_config\.json)|README\.md|LICENSE(\.\w+)?|(report|training|card)\.json|report\.md|"
    + re.escape(REMOTE_MODULE)
)
_RECORDS = (REPORT, "report.md", TRAINING, CARD)
_WEIGHT_FILES = re.compile(r"backbone/.+|model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json")
_DATASET_FILES = re.compile(r"(.+/)?[^/]+\.parquet|README\.md|LICENSE(\.\w+)?|[^/]+\.json")
_SPACE_FILES = re.compile(r"(.+/)?([^/]+\.(py|md|txt|ya?ml|css|html|m?js|json|toml|onnx|wasm)|LICENSE)")
# The invented home of WebAssembly programs: it stands in their loaders.
_NOBODYS_HOME = "/".join(("", "home", "web_user"))
_CODE = (".py", ".js", ".mjs", ".html", ".css", ".toml", ".txt", ".yml", ".yaml")
_BINARY = (".safetensors", ".parquet", ".onnx", ".wasm", *PICTURES)
_HIDDEN = ("__pycache__", "node_modules")
_PICTURE_NAME = re.compile(rf"[\w%-][\w%.+-]*(?:{'|'.join(map(re.escape, PICTURES))})(?!\w)", re.IGNORECASE)
# What our own cards and reports call their files: no user's names.
_OWN_PICTURES: tuple[str, ...] = (
    "photo.jpg",
    "photo_explained.png",
    "road.png",
    "insertion_deletion.png",
    "latency.png",
    "contact_sheet.jpg",
)
_EXAMPLE_COLUMNS: tuple[str, ...] = (
    "image",
    "img",
    "jpg",
    "jpeg",
    "png",
    "webp",
    "photo",
    "picture",
    "overlay",
    "thumbnail",
    "file_name",
    "filename",
    "file",
    "path",
    "url",
)
_SOURCES = ("data", "dataset", "validation", "backbone", "model")  # of a report or a training: Hub ids, or folders
_MAP_COLUMNS = ("map", "maps", "seen")  # ours: pictures of maps, without the photograph
# How pictures begin: PNG, JPEG, GIF, BMP, TIFF, WebP, HEIF and AVIF, DICOM, NumPy.
_MAGIC = re.compile(
    rb"\x89PNG|\xff\xd8\xff|GIF8|BM|II\*\0|MM\0\*|RIFF.{4}WEBP|.{4}ftyp|.{128}DICM|\x93NUMPY", re.DOTALL
)


def push_model(
    model: Any,
    repo_id: str,
    *,
    include_backbone: bool | None = None,
    head_dtype: Any = None,
    commit_message: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    token: str | bool | None = None,
    say: Callable[[str], None] = print,
) -> CommitInfo:
    """Save an explainer with its card and publish both in one commit.

    The files are written to a folder of their own first. Where the Hub refuses or cannot be reached it stays, and
    the error names it together with the command that repeats the push; else it is removed.

    Args:
        model: a TTameModel.
        repo_id: "name" or "organisation/name".
        include_backbone, head_dtype: as `TTameModel.save_pretrained`.
        commit_message, private, revision, create_pr, token, say: as `push_folder`.

    Raises:
        ValueError, ConnectionError: as `push_folder`.
    """
    _check_repo_id(repo_id)
    token = checked_token(token)
    folder = Path(tempfile.mkdtemp(prefix="ttame-push-"), repo_id.rpartition("/")[2])
    try:
        model.save_pretrained(folder, include_backbone=include_backbone, head_dtype=head_dtype, token=token)
        write_card(folder, repo_id)
    except BaseException:
        shutil.rmtree(folder.parent)
        raise
    try:
        info = push_folder(
            folder,
            repo_id,
            commit_message=commit_message,
            private=private,
            revision=revision,
            create_pr=create_pr,
            token=token,
            say=say,
        )
    except ConnectionError:  # it names the folder
        raise
    except BaseException:
        shutil.rmtree(folder.parent)
        raise
    shutil.rmtree(folder.parent)
    return info


def push_folder(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    kind: str | None = None,
    include_examples: bool = False,
    commit_message: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    token: str | bool | None = None,
    say: Callable[[str], None] = print,
) -> CommitInfo:
    """Publish a folder in one commit; every file is listed before the first byte is sent.

    Args:
        folder: an explainer (`save_pretrained`), a dataset of maps (parquet files), or a Space.
        repo_id: "name" or "organisation/name"; created where it does not exist.
        kind: "model", "dataset" or "space"; None: what the folder holds.
        include_examples: also send pictures and the names of picture files. Without it they never leave this machine:
            they may be patients'.
        commit_message: of the one commit.
        private: of a repository that is created; None: the account's default.
        revision: branch, created where it does not exist; None: main.
        create_pr: open a pull request instead of writing to the branch.
        token: of the account; None: the one that `hf auth login` stored.
        say: receives each line of text.

    Raises:
        ValueError: the folder is not complete, or holds what must not be published; or the repository is public, but
            `private` was asked for.
        ConnectionError: the Hub refused or could not be reached; the message says how to repeat.
    """
    folder = Path(folder)
    _check_repo_id(repo_id)
    if not folder.is_dir():
        raise ValueError(f"{str(folder)!r} is not a folder; give the one that save_pretrained wrote")
    kind = kind or detect_kind(folder)
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {KINDS}, got {kind!r}")
    if kind == "model":
        check_folder(folder)
        if is_ours(folder / "README.md"):
            write_card(folder, repo_id)
    sent, left_out = files_to_push(folder, kind, include_examples)
    check_contents(folder, sent, include_examples)

    total = sum(file.stat().st_size for file in sent)
    say(f"{kind} {repo_id}: {len(sent)} files, {total / 1e6:.1f} MB, in one commit")
    for file in sent:
        say(f"  {file.stat().st_size:>12,d}  {file.relative_to(folder).as_posix()}")
    if left_out:
        say(
            f"  {len(left_out)} other files stay here" + (" (pictures: --include-examples)" if kind == "model" else "")
        )
    api = HfApi(token=checked_token(token))
    try:
        sdk = RepoCard.load(folder / "README.md").data.to_dict().get("sdk") if kind == "space" else None
        repo_id = patiently(lambda: _create(api, repo_id, kind, private, sdk))
        if private and not patiently(lambda: api.repo_info(repo_id, repo_type=kind)).private:
            raise ValueError(
                f"{repo_id!r} exists already and is public, so nothing was sent; make it private in its settings, "
                "or push to another name"
            )
        if revision is not None and not create_pr:
            patiently(lambda: api.create_branch(repo_id, repo_type=kind, branch=revision, exist_ok=True))
        stale: list[str] = []
        if kind == "model":
            there = patiently(lambda: api.list_repo_files(repo_id, repo_type=kind, revision=revision))
            records = {*_RECORDS, *filter(FURTHER_REPORT.fullmatch, there)}
            records |= set(_report_there(api, repo_id, revision, there))
            stale = _stale(there, {file.relative_to(folder).as_posix() for file in sent}, records)
            if "README.md" in there and is_ours(folder / "README.md") and not _is_ours_there(api, repo_id, revision):
                sent = [file for file in sent if file != folder / "README.md"]
                say(f"  {'kept':>12s}  README.md of the repository: somebody wrote it")
        for path in stale:
            say(f"  {'deleted':>12s}  {path} (of an earlier push)")

        def commit() -> CommitInfo:
            return api.create_commit(
                repo_id,
                [
                    *(CommitOperationAdd(file.relative_to(folder).as_posix(), str(file)) for file in sent),
                    *(CommitOperationDelete(path) for path in stale),
                ],
                commit_message=commit_message or f"Upload {kind} with hf-ttame",
                repo_type=kind,
                revision=revision,
                create_pr=create_pr,
            )

        return commit() if create_pr else patiently(commit)  # a second try could open a second pull request
    except HUB_ERRORS as error:
        cause = str(error.__cause__ or "")
        reason = str(error) if cause in str(error) else f"{error} {cause}"
        raise ConnectionError(
            f"{repo_id!r} was not pushed: {without_tokens(reason)}\nThe folder is complete; repeat with: "
            + _command(folder, repo_id, kind, include_examples, private, revision, create_pr, commit_message)
        ) from None  # the chain could carry request headers


def _stale(there: Iterable[str], sent: set[str], records: set[str]) -> list[str]:
    """What an earlier push left: weights under other names, which would be loaded instead, and records of its head."""
    ours = (path for path in there if _WEIGHT_FILES.fullmatch(path) or path in records)
    return sorted(path for path in ours if path not in sent)


def _report_there(api: HfApi, repo_id: str, revision: str | None, there: Iterable[str]) -> list[str]:
    """The name of the report in the repository, where its card.json gives one."""
    if CARD not in there:
        return []
    file = Path(patiently(lambda: api.hf_hub_download(repo_id, CARD, revision=revision)))
    try:
        return [report_name(file.parent)]
    except ValueError:
        return []


def _is_ours_there(api: HfApi, repo_id: str, revision: str | None) -> bool:
    """Whether the card in the repository is one of ours, which may be replaced."""
    return is_ours(Path(patiently(lambda: api.hf_hub_download(repo_id, "README.md", revision=revision))))


def _create(api: HfApi, repo_id: str, kind: str, private: bool | None, sdk: str | None) -> str:
    """The full id of the repository, created if need be. A token may write to a repository without creating any."""
    try:
        return api.create_repo(repo_id, repo_type=kind, private=private, exist_ok=True, space_sdk=sdk).repo_id
    except HfHubHTTPError as error:
        if error.response.status_code not in (401, 403) or "/" not in repo_id:
            raise
        try:
            api.repo_info(repo_id, repo_type=kind)
        except RepositoryNotFoundError:
            raise error from None
        return repo_id


def _check_repo_id(repo_id: str) -> None:
    validate_repo_id(repo_id)
    if repo_id.count("/") > 1:
        raise ValueError(f"a repository id has the form 'organisation/name', got {repo_id!r}")


def detect_kind(folder: Path) -> str:
    """ "model", "dataset" or "space", by the files.

    Raises:
        ValueError: the folder is none of them.
    """
    config = folder / "config.json"
    if config.is_file() and read_json(config).get("model_type") == "ttame":
        return "model"
    readme = folder / "README.md"
    if readme.is_file() and RepoCard.load(readme, ignore_metadata_errors=True).data.to_dict().get("sdk"):
        return "space"
    if any(folder.rglob("*.parquet")):
        return "dataset"
    raise ValueError(
        f"{str(folder)!r} is neither an explainer (config.json of model_type ttame), nor a Space (README.md with "
        "sdk:), nor a dataset of maps (parquet files)"
    )


def files_to_push(folder: Path, kind: str, include_examples: bool = False) -> tuple[list[Path], list[Path]]:
    """The files that are sent, and those that stay.

    Raises:
        ValueError: a link, or a file that the kind cannot do without is missing.
    """
    sent: list[Path] = []
    left_out: list[Path] = []
    report = report_name(folder) if kind == "model" else None
    # Those that are known to be about this head.
    reports = {report, *further_reports(folder)} if kind == "model" else set()
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder)
        if file.is_symlink():
            raise ValueError(f"{str(name)!r} is a link; copy what it points to into the folder, or remove it")
        if not file.is_file():
            continue
        hidden = any(part.startswith(".") or part in _HIDDEN for part in name.parts)
        picture = file.name.lower().endswith(PICTURES)
        pattern = {"model": _MODEL_FILES, "dataset": _DATASET_FILES, "space": _SPACE_FILES}[kind]
        wanted = pattern.fullmatch(name.as_posix()) is not None or name.as_posix() in reports
        chosen = not hidden and (include_examples if picture else wanted)
        (sent if chosen else left_out).append(file)
    names = {file.relative_to(folder).as_posix() for file in sent}
    if kind == "model" and report not in names and "report.md" in names:  # nothing says which head it is about
        sent.remove(folder / "report.md")
        left_out.append(folder / "report.md")
    needed = {"model": ["config.json", "preprocessor_config.json", "README.md"], "space": ["README.md", "app.py"]}
    missing = [name for name in needed.get(kind, []) if name not in names]
    if kind == "space" and "app.py" in missing and "index.html" in names:
        missing.remove("app.py")  # a static Space
    if kind == "model":
        missing += _missing_weights(folder, names)
    if kind == "dataset" and not any(name.endswith(".parquet") for name in names):
        missing.append("*.parquet")
    if missing:
        raise ValueError(f"the {kind} in {str(folder)!r} is not complete: {', '.join(missing)} missing; save it again")
    return sent, left_out


def _missing_weights(folder: Path, names: set[str]) -> list[str]:
    missing = []
    for prefix in ("", "backbone/") if read_json(folder / "config.json").get("backbone_included") else ("",):
        if f"{prefix}model.safetensors.index.json" in names:
            index = read_json(folder / f"{prefix}model.safetensors.index.json")
            missing += [prefix + shard for shard in set(index["weight_map"].values()) if prefix + shard not in names]
        elif f"{prefix}model.safetensors" not in names:
            missing.append(f"{prefix}model.safetensors")
    return missing


def check_contents(folder: Path, files: list[Path], include_examples: bool = False) -> None:
    """Raise ValueError where a file holds a token, a local path, or (without `include_examples`) users' file names."""
    report = report_name(folder)
    for file in files:
        name = file.relative_to(folder).as_posix()
        if file.suffix == ".parquet" and not include_examples:
            _check_columns(file, name)
        if file.name.lower().endswith(_BINARY):
            continue
        text = file.read_text(errors="replace")
        if TOKEN.search(text):
            raise ValueError(f"{name!r} holds an access token; remove it, and revoke it on the Hub's settings page")
        # In JSON the names of classes may look like anything; everywhere else the whole text is read.
        entries = list(_strings(read_json(file))) if file.suffix == ".json" else [("", text)]
        places = [value for _, value in entries if file.suffix == ".json" and is_local_path(value)]
        pattern = PATH_IN_CODE if file.suffix in _CODE else PATH_IN_TEXT
        found = [place for _, value in entries for place in pattern.findall(value)]
        places += [place for place in found if place != _NOBODYS_HOME]
        # "data/patients test": a folder's name in front of what was read of it
        if name in (report, REPORT, TRAINING) or FURTHER_REPORT.fullmatch(name):
            sources = [value for key, value in entries if key in _SOURCES]
            places += [s for s in sources if re.search(r"[/\\]", s.split(" ")[0]) and not is_hub_id(s.split(" ")[0])]
        if places:
            raise ValueError(
                f"{name!r} holds the local path {places[0]!r}, which is nobody else's business; remove it"
            )
        if include_examples:
            continue
        for key, value in entries:
            if shown := _picture_names(value):
                raise ValueError(
                    f"{name!r} names picture files ({': '.join(filter(None, (key, shown[0])))!r}), which may identify "
                    "somebody; remove them, or publish them with --include-examples"
                )
        links = _local_pictures(text) if file.suffix == ".md" else []
        if shown := [link for link in links if name == "README.md" or link not in _OWN_PICTURES]:
            raise ValueError(f"{name} shows {shown[0]!r}, which is not sent; remove it, or add --include-examples")


def _picture_names(text: str) -> list[str]:
    """Names of picture files anywhere in a text, except on web pages and those of our own cards and reports."""
    found = _PICTURE_NAME.findall(re.sub(r"https?://[^\s)\"'>]+", "", text))
    return [name for name in found if name not in _OWN_PICTURES]


def _local_pictures(text: str) -> list[str]:
    links = re.findall(r"!\[[^\]]*\]\(([^)\s]+)", text) + re.findall(r"<img[^>]+src=[\"']([^\"']+)", text)
    return [link for link in links if not link.startswith(("https://", "http://"))]


def _check_columns(file: Path, name: str) -> None:
    """Raise ValueError where a parquet file of maps has columns that hold pictures or their names."""
    import pyarrow.parquet

    table = pyarrow.parquet.ParquetFile(file)
    columns = []
    for field in table.schema_arrow:
        ours = field.name.lower() in _MAP_COLUMNS
        names, leaves = _nested(field.type)
        named = field.name.lower() in _EXAMPLE_COLUMNS or (not ours and names & {"bytes", *_EXAMPLE_COLUMNS})
        if named or (
            any("string" in leaf or "binary" in leaf for leaf in leaves)
            and any(
                _is_example(value, ours)
                for batch in table.iter_batches(columns=[field.name], batch_size=1024)
                for value in batch.column(0).to_pylist()
            )
        ):
            columns.append(field.name)
    if columns:
        raise ValueError(
            f"{name!r} has the columns {columns} with pictures or their names, which may identify somebody; remove "
            "them, or publish them with --include-examples"
        )


def _nested(kind: Any) -> tuple[set[str], set[str]]:
    """Lower-case names of the fields inside an Arrow type, and its kinds of values."""
    kind = getattr(kind, "storage_type", kind)  # of the arrays of `datasets`
    if hasattr(kind, "value_type") and not hasattr(kind, "item_type"):  # a list or a dictionary
        return _nested(kind.value_type)
    names: set[str] = set()
    leaves: set[str] = set() if kind.num_fields else {str(kind)}
    for child in (kind.field(i) for i in range(kind.num_fields)):
        inner_names, inner_leaves = _nested(child.type)
        names |= {child.name.lower()} | inner_names
        leaves |= inner_leaves
    return names, leaves


def _is_example(value: Any, ours: bool) -> bool:
    """Whether a value of a column holds a picture (other than a map of ours), or a picture's name."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return any(_is_example(entry, ours) for entry in value)
    if isinstance(value, bytes):
        return not ours and _MAGIC.match(value) is not None
    return isinstance(value, str) and (is_local_path(value) or bool(_picture_names(value)))


def _strings(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Every text in a JSON value with the key it stands under, names of classes left out."""
    if isinstance(value, dict):
        for name, entry in value.items():
            if name not in LABELS:
                yield key, str(name)
                yield from _strings(entry, str(name))
    elif isinstance(value, list):
        for entry in value:
            yield from _strings(entry, key)
    elif isinstance(value, str):
        yield key, value


def _command(
    folder: Path,
    repo_id: str,
    kind: str,
    include_examples: bool,
    private: bool | None,
    revision: str | None,
    create_pr: bool,
    message: str | None,
) -> str:
    words = ["ttame", "push", str(folder), repo_id]
    words += ["--kind", kind] if kind != "model" else []
    words += ["--private"] if private else []
    words += ["--revision", revision] if revision else []
    words += ["--create-pr"] if create_pr else []
    words += ["--include-examples"] if include_examples else []
    words += ["--message", message] if message else []
    return shlex.join(words)
