"""Model cards: what an explainer explains, how it was measured, and what it cannot tell.

A card is rendered from facts alone: the config, `report.json`, `training.json`, and `card.json` for what no file can
know (licences, origin). A fact that is not there is "not measured" or "not recorded"; nothing is ever filled in. All
text from those files is escaped: it may come from anybody.
"""

import html
import json
import math
import os
import re
import string
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import EvalResult, ModelCardData
from huggingface_hub.utils import validate_repo_id

from .configuration_ttame import TTameConfig
from .head import TTameHead
from .records import CARD, TRAINING, check_folder, read_json, report_name
from .saving import PATH_IN_TEXT, is_hub_id, without_tokens

GENERATED = "Written by `ttame card`. Change card.json or report.json and run it again, or remove this line."
NOT_MEASURED = "not measured"
NOT_RECORDED = "not recorded"
TAGS = ("explainability", "explainable-ai", "xai", "saliency", "attribution", "t-tame", "image-classification")
_MASKS = ("soft 100", "soft 50", "soft 15", "binary 50", "binary 15")
_CODE = """```python
import hf_ttame  # pip install hf-ttame
from transformers import AutoModel

{load}
for explanation in model.explain("photo.jpg", top_k=3):
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


def escape(value: Any) -> str:
    """Text for Markdown, on one line, without any power: no HTML, links, tables, headings or code."""
    text = html.escape(_plain(value), quote=False)
    text = re.sub(r"([\\`*_{}\[\]#|~$!])", r"\\\1", text)
    return re.sub(r"(?i)(:(?=//)|www(?=\.)|(?<=\w)(?=@\w))", "\\1\u200b", text)  # what would become a link by itself


def code(value: Any) -> str:
    """A code span, on one line, that ends where it should, in a table too."""
    return "`" + _plain(value).replace("`", "'").replace("|", "/") + "`"


def _plain(value: Any) -> str:
    """One line of what can be seen: no control or direction characters, no access token, no local path."""
    text = " ".join(str(value).split())
    return _without_secrets("".join(c for c in text if c.isprintable()))


def _without_secrets(text: str) -> str:
    return PATH_IN_TEXT.sub("(local path)", without_tokens(text))


def is_ours(card: Path) -> bool:
    """Whether a card may be written there: none is there, or an earlier one of ours. One that somebody wrote stays."""
    return not card.exists() or GENERATED in card.read_text(encoding="utf-8", errors="replace")


def write_card(folder: str | os.PathLike, repo_id: str | None = None, output: Path | None = None) -> Path:
    """Render the card of the explainer in `folder` and write it as README.md there, or to `output`."""
    text = render_card(folder, repo_id)
    target = output or Path(folder, "README.md")
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.part")
    try:
        part.write_text(text, encoding="utf-8")
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)
    return target


def render_card(folder: str | os.PathLike, repo_id: str | None = None) -> str:
    """The card of an explainer as Markdown with its metadata.

    Args:
        folder: holds `config.json`; and, each optional, `report.json` (of `ttame compare` or of
            `benchmarks/confidence.py`, see `_normalised`), `training.json` (as `training/train.py` writes it), and
            `card.json` (see `_CARD_FIELDS`).
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
        return _render(folder, config, own, _normalised(report, own.get("measured_on")), _flat(training), repo_id)
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(
            f"a record in {str(folder)!r} does not have the form that `ttame compare` or the training writes: {error}"
        ) from error


def _render(folder: Path, config: TTameConfig, own: dict[str, Any], report: Any, training: Any, repo_id: Any) -> str:
    repo_id = repo_id or own.get("repo_id")
    if repo_id is not None:
        validate_repo_id(repo_id)
    name = own.get("classifier") or config.backbone or _architecture(config)
    fields = {
        "metadata": _metadata(config, own, report, name),
        "generated": GENERATED,
        "title": f"T-TAME explainer of {escape(name)}",
        "summary": _summary(config, own, name),
        "facts": "\n".join(f"| {key} | {value} |" for key, value in _facts(folder, config).items()),
        "usage": _usage(config, own, repo_id),
        "figures": _figures(own, report),
        "pictures": _pictures(own),
        "training": _training(own, training),
        "limits": "\n".join(f"- {limit}" for limit in _limits(config, own, report)),
        "licences": _licences(config, own),
    }
    return string.Template(_template()).substitute(fields)


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
        model_name=f"T-TAME explainer of {_plain(name)}" if report else None,
        eval_results=_results(report) if report else None,
    )
    for key, value in licence.items():
        if value is not None:
            data[key] = _plain(value)
    if base:
        data["base_model_relation"] = "adapter"
    return yaml.safe_dump(data.to_dict(), sort_keys=False, allow_unicode=True).strip()


def _results(report: Mapping[str, Any]) -> list[EvalResult] | None:
    method = _own_method(report)
    if method is None:
        return None
    return [
        EvalResult(
            task_type="image-classification",
            task_name="explanation of the predicted class",
            dataset_type=re.sub(r"[^a-z0-9]+", "-", str(report["dataset"]).lower()).strip("-"),
            dataset_name=_plain(report["dataset"]),
            metric_type=re.sub(r"[^a-z0-9]+", "_", measure.lower()),
            metric_name=measure,
            metric_value=value,
        )
        for measure, value in report["methods"][method].items()
        if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    ]


def _normalised(report: Any, measured_on: str | None = None) -> dict[str, Any] | None:
    """The two forms of report as one; its data in words, as a Hub id, or as "a local folder".

    `methods` is {method: {measure: value}}, or {method: {"measures": {measure: {"mean", "low", "high"}}, and the
    cost}}; `difference_to_ttame_95` is {method: {measure: [low, high]}}, `differences` {method: {measure: {"low",
    "high"}}}.
    """
    if not isinstance(report, dict) or not isinstance(report.get("methods"), dict):
        return None
    methods: dict[str, dict[str, Any]] = {}
    intervals: dict[str, dict[str, Any]] = {}
    for name, entry in report["methods"].items():
        measures = entry.get("measures", entry) or {}
        methods[name] = {m: v.get("mean") if isinstance(v, dict) else v for m, v in measures.items()}
        intervals[name] = {m: v for m, v in measures.items() if isinstance(v, dict) and "low" in v and "high" in v}
    differences = dict(report.get("difference_to_ttame_95") or {})
    for name, table in (report.get("differences") or {}).items():
        differences[name] = {m: [v["low"], v["high"]] for m, v in table.items() if isinstance(v, dict) and "low" in v}
    data = str(report.get("dataset") or report.get("data") or NOT_RECORDED)
    shown = data if data == NOT_RECORDED or is_hub_id(data.partition(" ")[0]) else "a local folder"
    return {
        "images": report.get("images"),
        "dataset": measured_on or shown,
        "map_scaling": report.get("map_scaling"),
        "methods": methods,
        "intervals": intervals,
        "differences": differences,
        "cost": {name: entry for name, entry in report["methods"].items() if "ms_per_map" in entry},
        "environment": report.get("environment") or {},
        "sanity": report.get("sanity") or {},
    }


def _own_method(report: Mapping[str, Any]) -> str | None:
    """The method of the report that is this explainer's map."""
    methods = report["methods"]
    return next((name for name in (f"ttame {report.get('map_scaling')}", "ttame") if name in methods), None)


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
    if config.backbone is not None or config.backbone_included:
        load = f"model = AutoModel.from_pretrained({name})"
        return _CODE.format(load=load) + "\n\n" + _PIPELINE.format(name=name)
    lines = own.get("classifier_python") or ['backbone = "path/to/the/classifier"']
    # They stay inside their block.
    lines = [_without_secrets(" ".join(str(line).replace("`", "").splitlines())) for line in lines]
    load = "\n".join([*lines, f"model = AutoModel.from_pretrained({name}, backbone=backbone)"])
    return _CODE.format(load=load)


def _number(value: Any, digits: int = 1) -> str:
    known = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return f"{value:.{digits}f}" if known else NOT_MEASURED


def _figures(own: Mapping[str, Any], report: Any) -> str:
    if not report or not report["methods"]:
        names = "average drop and increase in confidence, ROAD, insertion and deletion, pointing game, latency"
        return f"{names[0].upper()}{names[1:]}: **{NOT_MEASURED}**."
    lines = [
        f"{_count(report['images'])} photographs of {escape(report['dataset'])}, the predicted "
        "class. Average drop / increase in confidence in percent (lower / higher is better) when only the top 100, 50 "
        "or 15 % of a map's pixels are kept. Soft masks keep the map's values and favour bright maps: the mean mask "
        "stands beside them, and binary masks have equal area.",
        "",
        "| map | mean mask | " + " | ".join(_MASKS) + " |",
        "|---|" + "---|" * (len(_MASKS) + 1),
    ]
    mine = _own_method(report)
    for method, values in report["methods"].items():
        cells = [
            f"{_number(values.get(f'AD {mask}'))} / {_number(values.get(f'IC {mask}'))}"
            if f"AD {mask}" in values or f"IC {mask}" in values
            else NOT_MEASURED
            for mask in _MASKS
        ]
        shown = f"**{escape(method)} (this explainer)**" if method == mine else escape(method)
        lines.append(f"| {shown} | {_number(values.get('mean mask'), 2)} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "Paired 95 % intervals of this explainer's value minus the other's, bootstrap over the photographs:",
        "",
    ]
    differences = report["differences"]
    shared = {"mean mask", *(f"{kind} {mask}" for kind in ("AD", "IC") for mask in _MASKS)}
    for method, values in differences.items():
        known = [(name, pair) for name, pair in values.items() if name in shared and len(pair) == 2]
        digits = {"mean mask": 2}
        text = "; ".join(
            f"{escape(name)} {_number(low, digits.get(name, 1))} to {_number(high, digits.get(name, 1))}"
            for name, (low, high) in known
        )
        lines.append(f"- {escape(method)}: {text}")
    if not differences:
        lines.append(f"- {NOT_MEASURED}")
    if mine and report["intervals"].get(mine):
        lines += ["", "Every measure of this explainer, with its 95 % interval:", ""]
        for name, entry in report["intervals"][mine].items():
            values = [_number(entry.get(key), 3) for key in ("mean", "low", "high")]
            lines.append(f"- {escape(name)}: {values[0]} ({values[1]} to {values[2]})")
    if report["cost"]:
        device = report["environment"].get("device", NOT_RECORDED)
        lines += [
            "",
            f"Cost of a map on {escape(device)}:",
            "",
            "| map | forward | backward | ms |",
            "|---|---|---|---|",
        ]
        for method, entry in report["cost"].items():
            values = [_number(entry.get(key)) for key in ("forward_passes", "backward_passes", "ms_per_map")]
            lines.append(f"| {escape(method)} | " + " | ".join(values) + " |")
    if report["sanity"]:
        lines += ["", "Sanity checks:", ""]
        for name, check in report["sanity"].items():
            passed = "passed" if check.get("passed") is True else "**not passed**"
            must, value = escape(check.get("must", NOT_RECORDED)), escape(check.get("value", NOT_MEASURED))
            lines.append(f"- {escape(name)}: {value}, must be {must}: {passed}")
    if "measured_with" in own:
        lines += ["", "Measured with:", "", *_indented(own["measured_with"])]
    return "\n".join(lines)


def _indented(text: str) -> list[str]:
    return [f"    {_without_secrets(line)}" for line in text.splitlines()]


def _count(value: Any) -> str:
    return f"{value:,d}" if isinstance(value, int) else f"A number ({NOT_RECORDED}) of"


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
    if not isinstance(seconds, (int, float)) or _number(seconds) == NOT_MEASURED:
        return NOT_MEASURED
    where = (
        ", ".join(f"{key} {value}" for key, value in machine.items()) if isinstance(machine, dict) else NOT_RECORDED
    )
    return f"{seconds / 60:.0f} minutes (machine: {where})"


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
