"""Model cards: what an explainer explains, how it was measured, and what it cannot tell.

A card is rendered from facts alone: the config, `report.json`, `training.json`, and `card.json` for what no file can
know (licences, origin). A fact that is not there is "not measured" or "not recorded"; nothing is ever filled in. All
text from those files is escaped: it may come from anybody.
"""

import json
import os
import re
import string
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import ModelCardData
from huggingface_hub.utils import validate_repo_id

from .card_figures import figures, normalised, results
from .card_text import NOT_MEASURED, NOT_RECORDED, code, escape, number, plain, visible, without_secrets
from .configuration_ttame import TTameConfig
from .head import TTameHead
from .records import CARD, TRAINING, check_folder, further_reports, read_json, report_name
from .saving import is_hub_id, write_whole

GENERATED = "Written by `ttame card`. Change card.json or report.json and run it again, or remove this line."
TAGS = ("explainability", "explainable-ai", "xai", "saliency", "attribution", "t-tame", "image-classification")
_CODE = """```python
import hf_ttame  # pip install hf-ttame
from transformers import AutoModel

{load}
for explanation in model.explain("photo.jpg", top_k={top_k}):
    print(f"{{explanation.score:.1%}} {{explanation.label}}")
    explanation.save(f"photo_{{explanation.class_id}}.png")
```"""
_PIPELINE = """As a pipeline:

```python
import hf_ttame
from transformers import pipeline

explain = pipeline("image-explanation", model={name})
best = explain("photo.jpg")[0]
best["overlay"].save("photo_explained.png")
print(best["label"], best["explanation"].map.shape)
```"""


def is_ours(card: Path) -> bool:
    """Whether a card may be written there: none is there, or an earlier one of ours. One that somebody wrote stays."""
    return not card.exists() or GENERATED in card.read_text(encoding="utf-8", errors="replace")


def write_card(folder: str | os.PathLike, repo_id: str | None = None, output: Path | None = None) -> Path:
    """Render the card of the explainer in `folder` and write it as README.md there, or to `output`."""
    text = render_card(folder, repo_id)
    target = output or Path(folder, "README.md")
    target.parent.mkdir(parents=True, exist_ok=True)
    write_whole(target, text)
    return target


def render_card(folder: str | os.PathLike, repo_id: str | None = None) -> str:
    """The card of an explainer as Markdown with its metadata; arguments and errors as of `card_fields`."""
    return string.Template(_template()).substitute(card_fields(folder, repo_id))


def card_fields(folder: str | os.PathLike, repo_id: str | None = None) -> dict[str, str]:
    """The parts of an explainer's card, each as Markdown: the names that stand in `template.md`.

    Args:
        folder: holds `config.json`; and, each optional, `report.json` (of `ttame compare`), `training.json` (as
            `training/train.py` writes it), and `card.json` (see `_CARD_FIELDS`).
        repo_id: where it is published; None: as `card.json` says, else the code loads a folder.

    Raises:
        ValueError: the folder holds no explainer, or a file is damaged.
    """
    folder = Path(folder)
    facts = read_json(folder / "config.json")
    if not isinstance(facts, dict) or facts.get("model_type") != "ttame":
        raise ValueError(f"{str(folder)!r} holds no explainer: config.json of model_type 'ttame' is needed")
    config = TTameConfig.from_dict(facts)
    own = _card_facts(folder)
    check_folder(folder)  # figures of another head are not this one's
    report, training = read_json(folder / report_name(folder)), read_json(folder / TRAINING)
    try:
        measured = normalised(report, own.get("measured_on"))
        further = [normalised(read_json(folder / name), on) for name, on in further_reports(folder).items()]
        return _fields(folder, config, own, measured, further, _flat(training), repo_id)
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(
            f"a record in {str(folder)!r} does not have the form that `ttame compare` or the training writes: {error}"
        ) from error


def _fields(
    folder: Path,
    config: TTameConfig,
    own: dict[str, Any],
    report: Any,
    further: list[Any],
    training: Any,
    repo_id: str | None,
) -> dict[str, str]:
    repo_id = repo_id or own.get("repo_id")
    if repo_id is not None:
        validate_repo_id(repo_id)
    name = own.get("classifier") or config.backbone or _architecture(config)
    return {
        "metadata": _metadata(config, own, report, name),
        "generated": GENERATED,
        "title": f"T-TAME explainer of {escape(name)}",
        "summary": _summary(config, own, name),
        "facts": "\n".join(f"| {key} | {value} |" for key, value in _facts(folder, config).items()),
        "usage": _usage(config, own, repo_id),
        "figures": figures(own, report, further),
        "pictures": _pictures(own),
        "training": _training(own, training),
        "limits": "\n".join(f"- {limit}" for limit in _limits(config, own, report)),
        "licences": _licences(config, own),
    }


def _flat(training: Any) -> Any:
    """A run's record with its arguments, which stand one level down, beside the rest."""
    return {**(training.get("arguments") or {}), **training} if training else training


# What card.json may hold; every field is optional.
_CARD_FIELDS: dict[str, type | tuple[type, ...]] = {
    "repo_id": str,  # where the explainer is, or will be, published
    "status": str,  # for example that no trained head has been released
    "classifier": str,  # its name in words
    "classifier_origin": str,
    "classifier_python": list,  # lines of Python that end by naming `backbone`, where the config has no Hub id
    "explainer_python": str,  # a name that those lines define, in place of a folder or Hub id
    "base_model": str,  # Hub id of the classifier, where the config has none
    "datasets": list,  # Hub ids of the training data
    "report": str,  # file name, report.json if not given
    "further_reports": dict,  # {"report_NAME.json": its photographs in words}, measured on other pictures
    "measured_on": str,  # the photographs of the report in words; a folder's name is never shown
    "measured_with": str,  # the command
    "pictures": list,  # [{"path": ..., "caption": ...}]
    "training_data": str,
    "training_cost": str,
    "training_notes": str,
    "limits": list,
    "license": str,  # of the head, as the Hub names licences
    "license_name": str,
    "license_link": str,
    "licences": dict,  # {"classifier": ..., "data": ..., "head": ...} in words
}


def _card_facts(folder: Path) -> dict[str, Any]:
    own = read_json(folder / CARD) or {}
    if not isinstance(own, dict):
        raise ValueError(f"card.json must hold an object, got {type(own).__name__}")
    for key, value in own.items():
        if key not in _CARD_FIELDS or not isinstance(value, _CARD_FIELDS[key]):
            raise ValueError(f"card.json may hold {sorted(_CARD_FIELDS)}, got {key!r} of type {type(value).__name__}")
    return own


def _template() -> str:
    package = Path(__file__).parent
    places = (package / "model_cards" / "template.md", package.parent / "model_cards" / "template.md")
    return next(place for place in places if place.exists()).read_text(encoding="utf-8")


def _architecture(config: TTameConfig) -> str:
    facts = config.backbone_config
    return facts.get("architecture") or next(iter(facts.get("architectures") or []), None) or "an image classifier"


def _metadata(config: TTameConfig, own: Mapping[str, Any], report: Any, name: str) -> str:
    base = own.get("base_model") or config.backbone
    for hub_id in (base, *own.get("datasets", [])):
        if hub_id is not None:
            validate_repo_id(hub_id)
    licence: dict[str, Any] = {
        "license": "other" if _own_licence(config) else own.get("license"),
        "license_name": _own_licence(config) or own.get("license_name"),
        "license_link": own.get("license_link"),
    }
    data = ModelCardData(
        library_name="hf_ttame",
        pipeline_tag="image-classification",
        base_model=base,
        datasets=own.get("datasets") or None,
        tags=list(TAGS),
        model_name=f"T-TAME explainer of {plain(name)}" if report else None,
        eval_results=results(report) if report else None,
    )
    for key, value in licence.items():
        if value is not None:
            data[key] = plain(value)
    if base:
        data["base_model_relation"] = "adapter"
    return yaml.safe_dump(data.to_dict(), sort_keys=False, allow_unicode=True).strip()


def _summary(config: TTameConfig, own: Mapping[str, Any], name: str) -> str:
    lines = [
        f"It shows, for any of its {config.num_labels:,d} classes, which pixels of a picture the frozen classifier "
        f"{escape(name)} used: "
        "one forward pass gives the classifier's own logits and the maps (T-TAME, arXiv 2403.04523)."
    ]
    if "classifier_origin" in own:
        lines.append(f"The classifier: {escape(own['classifier_origin'])}")
    if "status" in own:
        lines.append(f"**{escape(own['status'])}**")
    return "\n\n".join(lines)


def _facts(folder: Path, config: TTameConfig) -> dict[str, str]:
    if config.backbone is not None:
        commit = config.backbone_revision or ""
        pinned = code(commit) if re.fullmatch(r"[0-9a-f]{40}", commit) else NOT_RECORDED
        where = "included" if config.backbone_included else "loaded from the Hub, only the head lies here"
        backbone = f"{code(config.backbone)}, commit {pinned}; {where}"
    else:
        backbone = code(_architecture(config)) + (", included" if config.backbone_included else ", not included")
    channels = [layer["channels"] for layer in config.feature_layers]
    with torch.device("meta"):
        head = TTameHead(channels, config.num_labels, config.map_size, batch_norm=config.batch_norm)
    parameters = sum(parameter.numel() for parameter in head.parameters())
    layers = [
        f"{code(layer['name'])} ({layer['channels']} channels, {layer['grid'][0]} x {layer['grid'][1]})"
        for layer in config.feature_layers
    ]
    weights = sum(file.stat().st_size for file in folder.glob("model*.safetensors"))
    size = f"{weights / 1e6:.1f} MB" if weights else f"{2 * parameters / 1e6:.1f} MB in float16 (computed)"
    return {
        "classifier": backbone,
        "its fingerprint": code(config.backbone_fingerprint) if config.backbone_fingerprint else NOT_RECORDED,
        "classes": f"{config.num_labels:,d}",
        "input": f"{config.image_size[0]} x {config.image_size[1]} pixels, the classifier's own preprocessing",
        "feature layers": ", ".join(layers),
        "map": f"{config.map_size[0]} x {config.map_size[1]}, min-max of the "
        + ("map logits' sigmoid" if config.map_scaling == "sigmoid" else "map logits"),
        "head": f"{parameters / 1e6:.2f} million parameters, {size}",
    }


def _usage(config: TTameConfig, own: Mapping[str, Any], repo_id: str | None) -> str:
    name = json.dumps(repo_id or "path/to/this/folder")
    if repo_id is None and own.get("explainer_python", "").isidentifier():
        name = own["explainer_python"]
    top_k = min(3, config.num_labels)
    if config.backbone is not None or config.backbone_included:
        load = f"model = AutoModel.from_pretrained({name})"
        return _CODE.format(load=load, top_k=top_k) + "\n\n" + _PIPELINE.format(name=name)
    lines = own.get("classifier_python") or ['backbone = "path/to/the/classifier"']
    # They stay inside their block.
    lines = [without_secrets(visible(" ".join(str(line).replace("`", "").splitlines()))) for line in lines]
    load = "\n".join([*lines, f"model = AutoModel.from_pretrained({name}, backbone=backbone)"])
    return _CODE.format(load=load, top_k=top_k)


def _pictures(own: Mapping[str, Any]) -> str:
    shown = [
        f"![{escape(picture.get('caption', ''))}]({picture['path']})\n\n{escape(picture.get('caption', ''))}"
        for picture in own.get("pictures", [])
        if re.fullmatch(r"(https://|(\.\./)*)\w[\w./-]*", str(picture.get("path", "")))
    ]
    return "\n\n".join(shown) or "None are part of this repository."


def _training(own: Mapping[str, Any], training: Any) -> str:
    lines = [
        f"- Data: {escape(own.get('training_data') or _dataset(training))}",
        f"- Cost: {escape(own.get('training_cost') or _cost(training))}",
    ]
    if training:
        known = {
            "steps": "steps", "batch_size": "pictures per step", "optimizer": "optimiser",
            "learning_rate": "peak learning rate", "head_init": "start of the head", "fill": "fill", "seed": "seed",
        }  # fmt: skip
        settings = [f"{title} {escape(training[key])}" for key, title in known.items() if key in training]
        lines.append(f"- Settings: {', '.join(settings)} (`training.json` holds all)")
        last = training.get("last") or {}
        if last:
            values = ", ".join(
                f"{escape(key)} {escape(value)}" for key, value in last.items() if key != "images_per_second"
            )
            lines.append(f"- The last step's terms: {values}")
    else:
        lines.append(f"- Settings: {NOT_RECORDED}")
    if "training_notes" in own:
        lines.append(f"- {escape(own['training_notes'])}")
    lines.append(
        "- The targets are the classifier's own predictions; no label is used, and the classifier never changes."
    )
    return "\n".join(lines)


def _cost(training: Any) -> str:
    seconds, machine = (training or {}).get("seconds"), (training or {}).get("machine")
    if not isinstance(seconds, (int, float)) or number(seconds) == NOT_MEASURED:
        return NOT_MEASURED
    time = f"{seconds / 60:.0f} minutes" if seconds >= 90 else f"{seconds:.0f} seconds"
    return f"{time} (machine: {_listed(machine) if isinstance(machine, dict) else NOT_RECORDED})"


def _listed(facts: Mapping[str, Any]) -> str:
    """ "device cpu, cores 2, torch 2.9"; of a dictionary in it, such as the versions, the entries."""
    return ", ".join(_listed(value) if isinstance(value, dict) else f"{key} {value}" for key, value in facts.items())


def _dataset(training: Any) -> str:
    name = (training or {}).get("dataset")
    if not name:
        return NOT_RECORDED
    return name if is_hub_id(name) else "a local folder"


def _limits(config: TTameConfig, own: Mapping[str, Any], report: Any) -> list[str]:
    start = " Its rows still start from the classifier's weights." if config.head_init == "classifier" else ""
    limits = [
        "A map shows what this classifier used, not what is true.",
        "A class that never occurred among the predictions in training has a map that was never checked against "
        f"anything.{start}",
        f"It reads {config.image_size[0]} x {config.image_size[1]} pixels: what the crop cuts away is marked as not "
        f"seen, and a map has {config.map_size[0]} x {config.map_size[1]} places, enlarged.",
    ]
    if getattr(config, "converted_from", None):
        limits.append(
            f"It was converted ({escape(config.converted_from)}) from the documented layout of such files. The "
            "conversion was tested on files made in that layout; no real checkpoint was at hand."
        )
    if not report:
        limits.append(f"How faithful these maps are was {NOT_MEASURED}.")
    return limits + [escape(limit) for limit in own.get("limits", [])]


def _own_licence(config: TTameConfig) -> str | None:
    """The licence that a converted checkpoint carries in its config, wherever it is saved and pushed."""
    return getattr(config, "head_license", None)


def _licences(config: TTameConfig, own: Mapping[str, Any]) -> str:
    words = own.get("licences") or {}
    head = _own_licence(config) or words.get("head") or own.get("license_name") or own.get("license", NOT_RECORDED)
    return "\n".join(
        [
            f"- Head: {escape(head)}",
            f"- Classifier: {escape(words.get('classifier', NOT_RECORDED))}",
            f"- Training data: {escape(words.get('data', NOT_RECORDED))}",
        ]
    )
