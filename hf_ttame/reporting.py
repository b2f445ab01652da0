"""From rows per image to a report: means with intervals, paired differences, costs; and all its files."""

import json
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from .baselines import Method
from .evaluation_rows import Rows
from .measures import FAITHFULNESS, MEASURES, Measure, verdict
from .metrics import area_under
from .metrics.bootstrap import FEWEST, Interval, mean_intervals
from .metrics.sanity import NOTES
from .report_page import to_markdown
from .report_plots import draw_plots, draw_sheet
from .saving import write_whole


def per_image(row: dict[str, Any], measure: Measure) -> float:
    """One measure of one row; NaN where it was not taken. Curves become their mean (ROAD, percent) or area."""
    value = row.get(measure.name)
    if value is None:
        return float("nan")
    if measure.name.startswith("ROAD"):
        return 100 * float(np.mean(value))
    if measure.name.split()[0] in ("insertion", "deletion"):
        return area_under(torch.tensor([value])).item()
    return 100 * float(value) if measure.name == "ADCC" else float(value)


def columns_of(rows: Rows, methods: Sequence[str], measure: Measure) -> np.ndarray:
    """(images, methods) of one measure; NaN where it was not taken."""
    indices = sorted({key[1] for key in rows if key[0] == measure.table})
    return np.array(
        [[per_image(rows.get((measure.table, index, name), {}), measure) for name in methods] for index in indices]
    ).reshape(len(indices), len(methods))


def _rounded(interval: Interval | None) -> dict[str, float] | None:
    if interval is None:
        return None
    return {
        "mean": round(interval.mean, 4),
        "low": round(interval.low, 4),
        "high": round(interval.high, 4),
        "n": interval.n,
    }


def summarise(rows: Rows, methods: Sequence[str], measures: Sequence[Measure] = MEASURES) -> dict[str, Any]:
    """Means with intervals; paired differences of the first method to each other; the means on the common images.

    Returns:
        {"means": {method: {measure: interval}}, "differences": ..., "common": ..., intervals as dictionaries.
    """
    means: dict[str, dict[str, Any]] = {name: {} for name in methods}
    differences: dict[str, dict[str, Any]] = {name: {} for name in methods[1:]}
    common: dict[str, dict[str, Any]] = {name: {} for name in methods}
    for measure in measures:
        values = columns_of(rows, methods, measure)
        if not values.size or np.isnan(values).all():
            continue
        measured = ~np.isnan(values).all(axis=0)
        shared = ~np.isnan(values[:, measured]).any(axis=1)
        for index, interval in enumerate(mean_intervals(values)):
            if interval is not None:
                means[methods[index]][measure.name] = _rounded(interval)
        if shared.any():
            for index, interval in enumerate(mean_intervals(values[shared])):
                if interval is not None:
                    common[methods[index]][measure.name] = _rounded(interval)
        for index, interval in enumerate(mean_intervals(values[:, :1] - values[:, 1:])):
            if interval is not None:
                differences[methods[1 + index]][measure.name] = _rounded(interval)
    return {"means": means, "differences": differences, "common": common}


def by_confidence(rows: Rows, methods: Sequence[str]) -> dict[str, Any]:
    """Faithfulness for the images that the classifier is least sure of, and for the others: a mean hides the first.

    Returns:
        Of the third of all images whose predicted class has the lowest confidence, and of the rest, {"least sure
        third": ..., "the others": ...}, each with "images", "confidence" [least, most], "measures",
        "measures_common", "differences" and "verdicts" as in the report; {} where a third is fewer than `FEWEST`
        images, too few for any verdict.
    """
    confidence: dict[int, float] = {}
    for method in reversed(methods):  # the first has the say: rows of another machine differ by rounding
        confidence |= {
            index: row["p"]
            for (table, index, name), row in rows.items()
            if table == "image" and name == method and np.isfinite(row.get("p", np.nan))
        }
    ordered = sorted(confidence, key=lambda index: (confidence[index], index))
    third = len(ordered) // 3
    if third < FEWEST:
        return {}
    found = {}
    for name, chosen in (("least sure third", ordered[:third]), ("the others", ordered[third:])):
        images = set(chosen)
        summary = summarise(
            {key: row for key, row in rows.items() if key[0] == "image" and key[1] in images}, methods, FAITHFULNESS
        )
        found[name] = {
            "images": len(chosen),
            "confidence": [round(confidence[index], 4) for index in (chosen[0], chosen[-1])],
            "measures": summary["means"],
            "measures_common": summary["common"],
            "differences": summary["differences"],
            "verdicts": verdicts(summary["differences"]),
        }
    return found


def verdicts(differences: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, str]]:
    """{method: {measure: "better", "worse" or "open"}} of the measures for which a direction is better."""
    return {
        name: {m.name: verdict(table[m.name], m.better) for m in MEASURES if m.better and m.name in table}
        for name, table in differences.items()
    }


def costs(rows: Rows, methods: Sequence[str]) -> dict[str, dict[str, float]]:
    """Passes of the classifier per map, their mean over the images, of every method."""
    found = {}
    for name in methods:
        own = [row for key, row in rows.items() if key[0] == "image" and key[2] == name and "forward" in row]
        if own:
            found[name] = {
                "forward_passes": round(float(np.mean([row["forward"] for row in own])), 2),
                "backward_passes": round(float(np.mean([row["backward"] for row in own])), 2),
            }
    return found


def _processor_name() -> str:
    """The model of the CPU, where the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def environment(device: torch.device, precision: str) -> dict[str, Any]:
    """What latency depends on, and the versions."""
    names = ("torch", "timm", "transformers", "grad-cam", "captum", "hf-ttame")
    versions = {"python": platform.python_version()}
    for name in names:
        try:
            versions[name] = version(name)
        except ModuleNotFoundError:
            continue
    accelerator = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {
        "device": accelerator,
        "processor": _processor_name(),
        "threads": torch.get_num_threads(),
        "precision": precision,
        "versions": versions,
    }


def write_report(
    output: Path,
    rows: Rows,
    methods: Sequence[Method],
    facts: dict[str, Any],
    pictures: dict[int, tuple[Image.Image, str]],
    sanity: dict[str, Any] | None = None,
    latency: dict[str, dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Write report.json, report.md, the plots and the contact sheet into `output`; returns the report.

    Args:
        output: an existing folder.
        rows: per (table, index, method), of `evaluation.compare`.
        methods: in the order of the tables, the explainer first.
        facts: what the report says about the run (model, data, images, settings, environment).
        pictures: of the contact sheet, by index, with a caption.
        sanity: results of the checks.
        latency: of `latency.measure_latency`.
    """
    names = [method.name for method in methods if any(key[2] == method.name for key in rows)]
    summary = summarise(rows, names)
    cost = costs(rows, names)
    report: dict[str, Any] = {
        **facts,
        "methods": {
            method.name: {
                "kind": method.kind,
                "layer": method.layer,
                "about": method.about,
                **cost.get(method.name, {}),
                **(latency or {}).get(method.name, {}),
                "measures": summary["means"][method.name],
                "measures_common": summary["common"][method.name],
            }
            for method in methods
            if method.name in names
        },
        "differences": summary["differences"],
        "verdicts": verdicts(summary["differences"]),
    }
    if parts := by_confidence(rows, names):
        report["by_confidence"] = parts
    # A claim against a method holds where every judged measure of both tables, soft and binary, shows it.
    report["better_in_every_judged_measure"] = {
        name: all(table.get(m.name) == "better" for m in FAITHFULNESS if m.judged)
        for name, table in report["verdicts"].items()
    }
    if sanity:
        report["sanity"] = {
            name: {**check, "note": NOTES[name[0]]} if name[0] in NOTES else check for name, check in sanity.items()
        }
    report["pictures"] = draw_plots(output, rows, methods, report)
    if draw_sheet(output, rows, names, pictures):
        report["pictures"]["Maps of the methods"] = "contact_sheet.jpg"
    for file, text in (
        ("report.json", json.dumps(report, indent=2) + "\n"),
        ("report.md", to_markdown(report)),
    ):
        write_whole(output / file, text)
    return report
