"""The report, the training record and the card's facts that lie beside a head, and whether they are about that head.

A record names its head by `head_fingerprint`. One that names another head, or none, is never shown or published: the
figures of one head beside the weights of another would be a lie that nobody notices. The same holds for another
backbone and for other settings that make the maps.
"""

import hashlib
import json
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from huggingface_hub.errors import RemoteEntryNotFoundError
from safetensors import SafetensorError, safe_open

from .configuration_ttame import TTameConfig
from .saving import HUB_ERRORS, patiently, without_tokens

REPORT, TRAINING, CARD = "report.json", "training.json", "card.json"
FURTHER_REPORT = re.compile(r"report_\w+\.json")
_UNREADABLE: tuple[type[Exception], ...] = (*HUB_ERRORS, ValueError)
_MAP_FACTS = (  # of the config: with another value the same head gives other maps
    *("backbone_fingerprint", "feature_layers", "image_size", "pixel_scale", "pixel_shift", "processor_backend"),
    *("map_size", "skip_connection", "batch_norm", "branch_activation", "last_layer_relu", "class_token"),
    *("classifier_outputs", "map_scaling"),
)
_OF_THE_FOLDER = ("report", "further_reports", "repo_id")  # of card.json: they do not follow the head
_MAX_BYTES = 32 << 20  # a larger record of a repository is not read


def head_fingerprint(weights: Mapping[str, torch.Tensor]) -> str:
    """Short hash of a head's weights, the same whether they are stored in float32 or float16.

    Args:
        weights: tensors by name; those that are no numbers of the map (counts) do not matter.
    """
    digest = hashlib.sha256()
    for name in sorted(weights):
        tensor = weights[name].detach()
        if tensor.is_floating_point():
            flat = tensor.flatten()
            sample = flat[:: max(1, flat.numel() // 4096)].to("cpu", torch.float16).contiguous()
            digest.update(f"{name.removeprefix('head.')} {tuple(tensor.shape)}".encode())
            digest.update(sample.numpy().tobytes())
    return digest.hexdigest()[:32]


def fingerprint_of_folder(folder: Path) -> str | None:
    """Fingerprint of the head whose weights lie in the folder; where none do, the one that its config names."""
    weights: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("model*.safetensors")):
        try:
            with safe_open(file, framework="pt") as stored:
                weights |= {key: stored.get_tensor(key) for key in stored.keys() if key.startswith("head.")}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{str(file)!r} is damaged ({error}); save the explainer again") from error
    if weights:
        return head_fingerprint(weights)
    config = read_json(folder / "config.json")
    return config.get("head_fingerprint") if isinstance(config, dict) else None


def map_facts(config: TTameConfig) -> str:
    """The values of a config that make the maps, in a form that can be compared."""
    return json.dumps({name: getattr(config, name) for name in _MAP_FACTS})


def check_head(name: str, record: Any, head: str | None, config: Any = None) -> None:
    """Raise ValueError where the record `name` is not about the head with this fingerprint.

    Args:
        name: the record's file name.
        record: its content.
        head: the head's fingerprint.
        config: content of the explainer's config.json; a backbone and a map scaling that the record names must be its.
    """
    named = record.get("head_fingerprint") if isinstance(record, dict) else None
    remedy = {REPORT: "measure this one with `ttame evaluate` or `ttame compare`"}.get(name, "save it with its run")
    if named is None:
        raise ValueError(
            f"{name} does not say which head it is about (head_fingerprint); {remedy}, or remove the file"
        )
    if named != head:
        raise ValueError(
            f"{name} is about another head (fingerprint {str(named)[:32]!r}, the one here has {head!r}); {remedy}, or "
            "remove the file"
        )
    settings = record.get("settings")
    for key in ("backbone_fingerprint", *(("map_scaling",) if name != TRAINING else ())):
        values = [facts.get(key) if isinstance(facts, dict) else None for facts in (record, settings)]
        measured, here = next((value for value in values if value is not None), None), (config or {}).get(key)
        if None not in (measured, here) and measured != here:
            raise ValueError(
                f"{name} is about maps with {key} {str(measured)[:48]!r}, the config here says {str(here)[:48]!r}; "
                f"{remedy}, or remove the file"
            )


def check_folder(folder: Path) -> None:
    """Raise ValueError where a report or training record in the folder is about another head."""
    head = None
    for name in sorted({report_name(folder), REPORT, TRAINING, *further_reports(folder)}):
        if (record := read_json(folder / name)) is not None:
            head = head or fingerprint_of_folder(folder)
            check_head(name, record, head, read_json(folder / "config.json"))


def report_name(folder: Path) -> str:
    """The file of the report: as card.json says, else report.json."""
    own = read_json(folder / CARD)
    name = own.get("report", REPORT) if isinstance(own, dict) else REPORT
    if not isinstance(name, str) or Path(name).name != name or not name.endswith(".json"):
        raise ValueError(f"the report of card.json must be a .json file beside it, got {name!r}")
    return name


def further_reports(folder: Path) -> dict[str, str]:
    """Files beside the report that card.json names, measured on other pictures: {file name: its pictures in words}."""
    own = read_json(folder / CARD)
    found = own.get("further_reports", {}) if isinstance(own, dict) else {}
    if not isinstance(found, dict) or not all(
        FURTHER_REPORT.fullmatch(name) and isinstance(words, str) and (folder / name).is_file()
        for name, words in found.items()
    ):
        raise ValueError(f"further_reports of card.json must be {{'report_NAME.json': words}}, got {found!r}")
    return found


def read_json(file: Path) -> Any:
    """What a JSON file holds; None where there is none.

    Raises:
        ValueError: it cannot be read.
    """
    if not file.is_file():
        return None
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file.name!r} in {str(file.parent)!r} cannot be read as JSON: {error}") from error


@dataclass(frozen=True)
class Records:
    """What lay beside a head when it was loaded: read at once from a folder, from the Hub only when it is needed.

    Args:
        head: the head's fingerprint.
        maps: the stored config's `map_facts`; None where they cannot be read.
        found: the records by file name, of a folder.
        where: repo_id, revision and cache_dir, of a Hub id. No token is kept: models get pickled.
    """

    head: str
    maps: str | None = None
    found: tuple[tuple[str, Any], ...] = ()
    where: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def beside(cls, source: str, weights: Mapping[str, torch.Tensor], **where: Any) -> "Records":
        """Those of the explainer that was loaded from `source`, a folder or a Hub id."""
        head, maps = head_fingerprint(weights), _stored_map_facts(source, **where)
        if not Path(source).is_dir():
            return cls(head, maps, where=(("repo_id", source), *where.items()))
        found: dict[str, Any] = {}
        for name in (REPORT, TRAINING, CARD):
            try:
                found[name] = read_json(Path(source, report_name(Path(source)) if name == REPORT else name))
            except ValueError:  # not worth the explainer; the card's and the push's own reading says what is wrong
                continue
        return cls(head, maps, tuple(found.items()))

    def of(self, head: str, config: TTameConfig, token: Any = None) -> Iterator[tuple[str, dict[str, Any]]]:
        """The records, by file name, that are about the head with this fingerprint and the maps of this config."""
        if head != self.head or map_facts(config) != self.maps:
            return
        for name, record in (dict(self.found) or self._fetched(token)).items():
            if not isinstance(record, dict):
                continue
            if name == CARD:
                yield name, {key: value for key, value in record.items() if key not in _OF_THE_FOLDER}
            elif record.get("head_fingerprint") == head:
                yield name, record

    def _fetched(self, token: Any) -> dict[str, Any]:
        found: dict[str, Any] = {}
        where = dict(self.where)
        for name in (REPORT, TRAINING, CARD) if where else ():
            try:
                file = Path(patiently(lambda: huggingface_hub.hf_hub_download(filename=name, token=token, **where)))  # noqa: B023
                found[name] = read_json(file) if file.stat().st_size <= _MAX_BYTES else None
            except RemoteEntryNotFoundError:
                continue
            except _UNREADABLE as error:
                warnings.warn(
                    f"whether {where['repo_id']!r} has a report and a training record cannot be found out "
                    f"({without_tokens(str(error))}); the copy is saved without them",
                    stacklevel=4,
                )
                break
        return found


def _stored_map_facts(source: str, cache_dir: Any = None, revision: str | None = None) -> str | None:
    """`map_facts` of the config as it lies in a folder or the cache: the one in memory may have been overridden."""
    file: Any = Path(source, "config.json")
    if not Path(source).is_dir():
        file = huggingface_hub.try_to_load_from_cache(source, "config.json", cache_dir=cache_dir, revision=revision)
    try:
        facts = read_json(Path(file)) if isinstance(file, (str, Path)) else None
        return map_facts(TTameConfig.from_dict(facts)) if isinstance(facts, dict) else None
    except ValueError:
        return None
