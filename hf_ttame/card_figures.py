"""A card's figures: what a report measured, as tables and as the Hub's metadata. Nothing is ever filled in."""

import math
import re
from collections.abc import Mapping
from typing import Any

from huggingface_hub import EvalResult

from .card_text import NOT_MEASURED, NOT_RECORDED, escape, number, plain, visible, without_secrets
from .saving import is_hub_id

_GROUPS = {  # what can be measured: how the names of its measures begin
    "average drop and increase in confidence": ("AD ", "IC "),
    "ROAD": ("ROAD ",),
    "insertion and deletion": ("insertion ", "deletion "),
    "pointing game": ("pointing game",),
    "grid pointing": ("grid pointing",),
}
_MASKS = ("soft 100", "soft 50", "soft 15", "binary 50", "binary 15")


def normalised(report: Any, measured_on: str | None = None, map_scaling: str | None = None) -> dict[str, Any] | None:
    """The two forms of report as one; its data in words, as a Hub id, or as "a local folder".

    `map_scaling` is the config's, for a report that does not name its own.
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
        "map_scaling": report.get("map_scaling") or map_scaling,
        "methods": methods,
        "intervals": intervals,
        "differences": differences,
        "cost": {name: entry for name, entry in report["methods"].items() if "ms_per_map" in entry},
        "environment": report.get("environment") or {},
        "sanity": report.get("sanity") or {},
    }


def results(report: Mapping[str, Any]) -> list[EvalResult] | None:
    method = _own_method(report)
    if method is None:
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
        for measure, value in report["methods"][method].items()
        if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    ]


def _own_method(report: Mapping[str, Any]) -> str | None:
    """The method of the report that is this explainer's map."""
    methods = report["methods"]
    return next((name for name in (f"ttame {report.get('map_scaling')}", "ttame") if name in methods), None)


def figures(own: Mapping[str, Any], report: Any) -> str:
    if not report or not report["methods"]:
        return _not_measured([*_GROUPS, "latency", "sanity checks"])
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
            f"{number(values.get(f'AD {mask}'))} / {number(values.get(f'IC {mask}'))}"
            if f"AD {mask}" in values or f"IC {mask}" in values
            else NOT_MEASURED
            for mask in _MASKS
        ]
        shown = f"**{escape(method)} (this explainer)**" if method == mine else escape(method)
        lines.append(f"| {shown} | {number(values.get('mean mask'), 2)} | " + " | ".join(cells) + " |")
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
            f"{escape(name)} {number(low, digits.get(name, 1))} to {number(high, digits.get(name, 1))}"
            for name, (low, high) in known
        )
        lines.append(f"- {escape(method)}: {text}")
    if not differences:
        lines.append(f"- {NOT_MEASURED}")
    if mine and report["intervals"].get(mine):
        lines += ["", "Every measure of this explainer, with its 95 % interval:", ""]
        for name, entry in report["intervals"][mine].items():
            values = [number(entry.get(key), 3) for key in ("mean", "low", "high")]
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
            values = [number(entry.get(key)) for key in ("forward_passes", "backward_passes", "ms_per_map")]
            lines.append(f"| {escape(method)} | " + " | ".join(values) + " |")
    if report["sanity"]:
        lines += ["", "Sanity checks:", ""]
        for name, check in report["sanity"].items():
            passed = "passed" if check.get("passed") is True else "**not passed**"
            must, value = escape(check.get("must", NOT_RECORDED)), escape(check.get("value", NOT_MEASURED))
            lines.append(f"- {escape(name)}: {value}, must be {must}: {passed}")
    if missing := _missing(report):
        lines += ["", _not_measured(missing)]
    if "measured_with" in own:
        lines += ["", "Measured with:", "", *_indented(own["measured_with"])]
    return "\n".join(lines)


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
