"""A card's figures: what a report measured, as tables and as the Hub's metadata. Nothing is ever filled in."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from huggingface_hub import EvalResult

from .card_text import NOT_MEASURED, NOT_RECORDED, escape, number, plain, visible, without_secrets
from .measures import MEASURES, verdict_table
from .metrics.sanity import size_text
from .saving import is_hub_id

_GROUPS = {  # what can be measured: how the names of its measures begin
    "average drop and increase in confidence": ("AD ", "IC "),
    "ROAD": ("ROAD ",),
    "insertion and deletion": ("insertion ", "deletion "),
    "pointing game": ("pointing game",),
    "grid pointing": ("grid pointing",),
}
OWN = "ttame"  # the method of a report that is the explainer itself
_FURTHER = [
    m
    for m in MEASURES
    if m.better and not m.name.startswith(("AD ", "IC ")) and not m.name.endswith((" mean", " blur", " accuracy"))
]
_MASKS = ("soft 100", "soft 50", "soft 15", "binary 50", "binary 15")


def normalised(report: Any, measured_on: str | None = None) -> dict[str, Any] | None:
    """What a card needs of a report: its data in words, as a Hub id, or as "a local folder"; per method the means, the
    intervals {measure: {"mean", "low", "high"}} and the cost."""
    if not isinstance(report, dict) or not isinstance(report.get("methods"), dict):
        return None
    entries = report["methods"].items()
    intervals = {
        name: {m: v for m, v in (entry.get("measures") or {}).items() if "low" in v and "high" in v}
        for name, entry in entries
    }
    data = str(report.get("data") or NOT_RECORDED)
    shown = data if data == NOT_RECORDED or is_hub_id(data.partition(" ")[0]) else "a local folder"
    return {
        "images": report.get("images"),
        "dataset": measured_on or shown,
        **_means_and_counts(report["methods"], "measures"),
        "intervals": intervals,
        "common": _means_and_counts(report["methods"], "measures_common"),
        "differences": report.get("differences") or {},
        "cost": {name: entry for name, entry in report["methods"].items() if "ms_per_map" in entry},
        "environment": report.get("environment") or {},
        "sanity": report.get("sanity") or {},
    }


def _means_and_counts(methods: Mapping[str, Any], key: str) -> dict[str, dict[str, dict[str, Any]]]:
    tables = {name: entry.get(key) or {} for name, entry in methods.items()}
    return {
        "methods": {name: {m: v.get("mean") for m, v in table.items()} for name, table in tables.items()},
        "counts": {
            name: {m: v["n"] for m, v in table.items() if isinstance(v.get("n"), int)}
            for name, table in tables.items()
        },
    }


def results(report: Mapping[str, Any]) -> list[EvalResult] | None:
    if OWN not in report["methods"]:
        return None
    return [
        EvalResult(
            task_type="image-classification",
            task_name="explanation of the predicted class",
            dataset_type=re.sub(r"[^a-z0-9]+", "-", plain(report["dataset"]).lower()).strip("-"),
            dataset_name=plain(report["dataset"]),
            metric_type=re.sub(r"[^a-z0-9]+", "_", plain(measure).lower()),
            metric_name=plain(measure),
            metric_value=value,
        )
        for measure, value in report["methods"][OWN].items()
        if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    ]


def figures(own: Mapping[str, Any], report: Any, further: Sequence[Any] = ()) -> str:
    """All figures: of the report, and of further ones on other pictures."""
    if not report or not report["methods"]:
        return _not_measured([*_GROUPS, "latency", "sanity checks"])
    lines = [
        *_confidence(report),
        "",
        "AD / IC: average drop / increase in confidence in percent (lower / higher is better) when only the top 100, "
        "50 or 15 % of a map's pixels are kept. Soft masks keep the map's values and favour bright maps: the mean "
        "mask stands beside them, and binary masks have equal area.",
        *_further(report),
        *_beside_others(report),
    ]
    if report["intervals"].get(OWN):
        lines += ["", "Every measure of this explainer, with its 95 % interval:", ""]
        for name, entry in report["intervals"][OWN].items():
            values = [number(entry.get(key), 3) for key in ("mean", "low", "high")]
            lines.append(f"- {escape(name)}: {values[0]} ({values[1]} to {values[2]})")
    if report["sanity"]:
        lines += ["", "Sanity checks:", ""]
        for name, check in report["sanity"].items():
            must, value = escape(check.get("must", NOT_RECORDED)), escape(check.get("value", NOT_MEASURED))
            made_with = check.get("with")
            size = escape(size_text(made_with)) if isinstance(made_with, Mapping) else ""
            value += f" ({size})" if size else ""
            if "passed" in check and check["passed"] is None:  # the value says why
                lines.append(f"- {escape(name)}: {value}")
                continue
            passed = "passed" if check.get("passed") is True else "**not passed**"
            note = f" ({escape(check['note'])})" if check.get("note") else ""
            lines.append(f"- {escape(name)}: {value}, must be {must}: {passed}{note}")
    if missing := _missing(report):
        lines += ["", _not_measured(missing)]
    for other in further:
        lines += ["", *_confidence(other), *_further(other), *_beside_others(other)]
    if "measured_with" in own:
        lines += ["", "Measured with:", "", *_indented(own["measured_with"])]
    return "\n".join(lines)


def _confidence(report: Mapping[str, Any]) -> list[str]:
    """The table of average drop and increase in confidence; where methods saw different images, a second one of those
    that all of them saw."""
    lines = [
        f"{_count(report['images'])} photographs of {escape(report['dataset'])}, the predicted class, AD / IC; "
        "rows with a smaller n were measured on the first ones alone:",
        "",
        *_confidence_table(report),
    ]
    counts = {table["AD soft 100"] for table in report["counts"].values() if "AD soft 100" in table}
    if len(counts) > 1 and report["common"]["counts"].get(OWN):
        lines += ["", "The same, on the photographs that every method explained:", ""]
        lines += _confidence_table({**report, **report["common"]})
    return lines


def _confidence_table(report: Mapping[str, Any]) -> list[str]:
    lines = [
        "| map | n | mean mask | " + " | ".join(_MASKS) + " |",
        "|---|---|" + "---|" * (len(_MASKS) + 1),
    ]
    for method, values in report["methods"].items():
        cells = [
            f"{number(values.get(f'AD {mask}'))} / {number(values.get(f'IC {mask}'))}"
            if f"AD {mask}" in values or f"IC {mask}" in values
            else NOT_MEASURED
            for mask in _MASKS
        ]
        found = _images(report, method, [f"{kind} {mask}" for mask in _MASKS for kind in ("AD", "IC")])
        mean_mask = number(values.get("mean mask"), 2)
        lines.append(f"| {_shown(method)} | {found} | {mean_mask} | " + " | ".join(cells) + " |")
    return lines


def _images(report: Mapping[str, Any], method: str, measures: Sequence[str]) -> str:
    """On how many images, or mosaics, these measures of a method stand, in their order: "1,000", or "100 / 1,000"."""
    counts = dict.fromkeys(n for measure in measures if (n := report["counts"][method].get(measure)) is not None)
    return " / ".join(map(_count, counts)) or NOT_RECORDED


def _shown(method: str) -> str:
    return f"**{escape(method)} (this explainer)**" if method == OWN else escape(method)


def _further(report: Mapping[str, Any]) -> list[str]:
    """The table of what is no average drop, and of the cost; of the measures that were taken."""
    means, cost = report["methods"], report["cost"]
    measured = [m for m in _FURTHER if any(number(values.get(m.name)) != NOT_MEASURED for values in means.values())]
    if not measured and not cost:
        return []
    arrows = {"lower": " ↓", "higher": " ↑"}
    titles = ["n", *(m.name + arrows[m.better] for m in measured)] if measured else []
    titles += ["forward", "backward", "ms", "times T-TAME"] * bool(cost)
    where = report["environment"]
    device = where.get("device", NOT_RECORDED)
    device = escape((device == "cpu" and where.get("processor")) or device)
    copies = where.get("copies per pass")  # which earlier reports do not name
    device += f", up to {copies} perturbed copies per pass" if isinstance(copies, int) else ""
    lines = [
        "",
        "Lower (↓) or higher (↑) is better"
        + ("; n: images, of grid pointing mosaics, in the order of the columns" if measured else "")
        + (f"; passes of the classifier and median milliseconds for one map, alone, on {device}" if cost else "")
        + ("; the median ratio to T-TAME's time, which was taken in turn" if cost else "")
        + ":",
        "",
        "| map | " + " | ".join(titles) + " |",
        "|---|" + "---|" * len(titles),
    ]
    for method, values in means.items():
        cells = [_images(report, method, [m.name for m in measured])] if measured else []
        cells += [number(values.get(m.name), m.digits) for m in measured]
        if cost:
            keys = ("forward_passes", "backward_passes", "ms_per_map", "times_ttame")
            cells += [number(cost.get(method, {}).get(key)) for key in keys]
        lines.append(f"| {_shown(method)} | " + " | ".join(cells) + " |")
    return lines


def _beside_others(report: Mapping[str, Any]) -> list[str]:
    """By measure, the other methods by what the paired intervals of the difference say."""
    lines = [
        "",
        "This explainer beside the other maps: better or worse where the paired 95 % interval of the difference "
        "excludes 0 (bootstrap over the photographs; the intervals stand in the report):",
        "",
    ]
    if not any(report["differences"].values()):
        return [*lines, f"- {NOT_MEASURED}"]
    return [*lines, *verdict_table(report["differences"], escape)]


def _missing(report: Mapping[str, Any]) -> list[str]:
    """The groups of measures of which the report has no number, of any method."""
    measured = {
        name
        for values in report["methods"].values()
        for name, value in values.items()
        if number(value) != NOT_MEASURED
    }
    missing = [group for group, starts in _GROUPS.items() if not any(name.startswith(starts) for name in measured)]
    latency = any(number(entry.get("ms_per_map")) != NOT_MEASURED for entry in report["cost"].values())
    return missing + ([] if latency else ["latency"]) + ([] if report["sanity"] else ["sanity checks"])


def _not_measured(groups: list[str]) -> str:
    names = ", ".join(groups)
    return f"{names[0].upper()}{names[1:]}: **{NOT_MEASURED}**."


def _indented(text: str) -> list[str]:
    return [f"    {without_secrets(visible(line))}" for line in text.splitlines()]


def _count(value: Any) -> str:
    return f"{value:,d}" if isinstance(value, int) else f"A number ({NOT_RECORDED}) of"
