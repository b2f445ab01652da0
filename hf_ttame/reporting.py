"""From rows per image to a report: JSON, Markdown tables, plots, a contact sheet."""

import json
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from .baselines import Method
from .disk import whole
from .measures import FAITHFULNESS, MEASURES, ORDERS, PLACES, Measure, verdict, verdict_table
from .metrics import area_under
from .metrics.bootstrap import Interval, mean_intervals
from .metrics.insertion_deletion import STARTS
from .metrics.road import FRACTIONS
from .saving import write_whole
from .visualization import contact_sheet, overlay

Rows = dict[tuple[str, int, str], dict[str, Any]]


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


def summarise(rows: Rows, methods: Sequence[str]) -> dict[str, Any]:
    """Means with intervals; paired differences of the first method to each other; means on the common images.

    Returns:
        {"means": {method: {measure: interval}}, "differences": ..., "common": ..., intervals as dictionaries.
    """
    means: dict[str, dict[str, Any]] = {name: {} for name in methods}
    differences: dict[str, dict[str, Any]] = {name: {} for name in methods[1:]}
    common: dict[str, dict[str, Any]] = {name: {} for name in methods}
    for measure in MEASURES:
        values = columns_of(rows, methods, measure)
        if not values.size or np.isnan(values).all():
            continue
        measured = ~np.isnan(values).all(axis=0)
        shared = ~np.isnan(values[:, measured]).any(axis=1)
        for index, interval in enumerate(mean_intervals(values)):
            if interval is not None:
                means[methods[index]][measure.name] = _rounded(interval)
                if shared.any():
                    common[methods[index]][measure.name] = {
                        "mean": round(float(values[shared, index].mean()), 4),
                        "n": int(shared.sum()),
                    }
        for index, interval in enumerate(mean_intervals(values[:, :1] - values[:, 1:])):
            if interval is not None:
                differences[methods[1 + index]][measure.name] = _rounded(interval)
    return {"means": means, "differences": differences, "common": common}


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


# ---- Markdown -----------------------------------------------------------------------------------------------------


def markdown_table(
    methods: Sequence[str], kinds: dict[str, str], means: dict[str, Any], measures: Sequence[Measure]
) -> str:
    """Methods by measures, intervals in brackets, with n, the number of images or mosaics.

    In each column the best of the methods that are not trivial is bold, and a trivial map that does at least as well
    is marked with a dagger: both among those with the most images, as others cannot be compared across.
    """
    measures = [m for m in measures if any(means[name].get(m.name) for name in methods)]
    if not measures:
        return ""
    arrows = {"lower": " ↓", "higher": " ↑", "": ""}
    lines = ["| method | n | " + " | ".join(m.name + arrows[m.better] for m in measures) + " |"]
    lines.append("|---|---|" + "---|" * len(measures))
    best = {}
    most = {m.name: max(means[name][m.name]["n"] for name in methods if means[name].get(m.name)) for m in measures}
    for measure in measures:
        candidates = [
            means[name][measure.name]["mean"]
            for name in methods
            if kinds[name] != "trivial"
            and means[name].get(measure.name)
            and means[name][measure.name]["n"] == most[measure.name]
        ]
        if measure.better and candidates:
            best[measure.name] = min(candidates) if measure.better == "lower" else max(candidates)
    for name in sorted(methods, key=lambda n: (kinds[n] == "trivial", methods.index(n))):
        cells = []
        for measure in measures:
            entry = means[name].get(measure.name)
            if entry is None:
                cells.append("")
                continue
            text = f"{entry['mean']:.{measure.digits}f}"
            if measure.name in best and entry["n"] == most[measure.name]:
                ahead = entry["mean"] - best[measure.name]
                ahead = -ahead if measure.better == "lower" else ahead
                if kinds[name] == "trivial":
                    text += "†" if ahead >= 0 else ""
                elif ahead == 0:
                    text = f"**{text}**"
            if "low" in entry:
                text += f" ({entry['low']:.{measure.digits}f} to {entry['high']:.{measure.digits}f})"
            cells.append(text)
        label = f"*{name}*" if kinds[name] == "trivial" else name
        counts = sorted({means[name][m.name]["n"] for m in measures if means[name].get(m.name)})
        lines.append(f"| {label} | {' / '.join(f'{n:,d}' for n in counts)} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def to_markdown(report: dict[str, Any]) -> str:
    """The report as a page."""
    methods = list(report["methods"])
    kinds = {name: report["methods"][name]["kind"] for name in methods}
    means = {name: report["methods"][name]["measures"] for name in methods}
    lines = [
        f"# {report['model']}: measured beside {len(methods) - 1} other maps",
        "",
        f"{report['images']} images of {report['data']}, predicted class, the same for all methods"
        + (f"; {report['unreadable']} more could not be read" if report.get("unreadable") else "")
        + ". A row with a smaller n was measured on the first ones alone and is not to be set beside one with more. "
        "Means with 95 % bootstrap intervals. Trivial maps, which know nothing of image or class, are in italics. "
        "Bold: best of the others with the most images; †: a trivial map that does no worse. Settings: `report.json`.",
        "",
    ]
    sections: list[tuple[str, str, Sequence[Measure]]] = [
        (
            "Faithfulness: average drop (AD) and increase in confidence (IC), percent",
            "Soft masks keep the map's values and reward bright maps: the mean mask value stands beside them. Binary "
            "masks have equal area. A claim holds only where both show it.",
            FAITHFULNESS,
        ),
        (
            "Order of pixels",
            "ROAD: percent, mean over the removed shares, most relevant first (MoRF) and least relevant first (LeRF). "
            "Insertion and deletion: area under the curve, by what stands in for missing pixels.",
            ORDERS,
        ),
        (
            "Place, coherence and spread",
            "Grid pointing: percent of the map's energy in the right quarter of a mosaic, chance is 25. Entropy: 1 is "
            "uniform. Area: share of pixels above half of the maximum.",
            PLACES,
        ),
    ]
    for title, text, measures in sections:
        table = markdown_table(methods, kinds, means, measures)
        if table:
            lines += [f"## {title}", "", text, "", table]
    if len({entry["n"] for table in means.values() for name, entry in table.items() if name == "AD soft 100"}) > 1:
        common = {name: report["methods"][name]["measures_common"] for name in methods}
        n = next(e["n"] for table in common.values() for name, e in table.items() if name == "AD soft 100")
        lines += [
            f"## The same, on the {n} images that every method explained",
            "",
            markdown_table(methods, kinds, common, FAITHFULNESS),
        ]
    lines += ["## Cost of a map", "", "| method | kind | layer, settings | forward | backward | ms | times T-TAME |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for name in methods:
        entry = report["methods"][name]
        settings = ", ".join(text for text in (entry["layer"], entry["about"]) if text)
        lines.append(
            f"| {name} | {entry['kind']} | {settings} | {entry.get('forward_passes', '')} | "
            f"{entry.get('backward_passes', '')} | {entry.get('ms_per_map', '')} | {entry.get('times_ttame', '')} |"
        )
    where = report["environment"]
    lines += [
        "",
        f"Passes of the classifier, counted by hooks. Milliseconds of one map, one picture at a time, on "
        f"{where['processor'] if where['device'] == 'cpu' else where['device']} ({where['threads']} threads) in "
        f"{where['precision']}, medians; the last column is the median ratio to T-TAME's, taken in turn.",
        "",
    ]
    if report["differences"]:
        lines += [
            "## T-TAME against each method",
            "",
            "Paired 95 % intervals of the difference; better or worse where 0 lies outside, else open.",
            "",
            *verdict_table(report["differences"]),
            "",
        ]
    if report.get("sanity"):
        lines += ["## Sanity", "", "| check | value | must | passed |", "|---|---|---|---|"]
        for name, check in report["sanity"].items():
            passed = {True: "yes", None: "not made"}.get(check["passed"], "**no**")
            lines.append(f"| {name} | {check['value']} | {check['must']} | {passed} |")
        lines.append("")
    for title, file in report["pictures"].items():
        lines += [f"![{title}]({file})", ""]
    return "\n".join(lines)


# ---- plots --------------------------------------------------------------------------------------------------------


def _curve(rows: Rows, method: str, name: str) -> np.ndarray | None:
    found = [row[name] for key, row in rows.items() if key[0] == "image" and key[2] == method and row.get(name)]
    return np.mean(found, axis=0) if found else None


_MARKERS = "osD^v<>PX*h"  # of methods that cost the same and stand on top of each other


def _styles(methods: Sequence[str], kinds: dict[str, str]) -> dict[str, dict[str, Any]]:
    import matplotlib

    colours = matplotlib.colormaps["tab20"].colors  # type: ignore[attr-defined]
    styles = {}
    for number, name in enumerate(methods):
        own: dict[str, Any] = {"linewidth": 1.2}
        if name == "ttame":
            own = {"color": "black", "linewidth": 2.5, "zorder": 5}
        own.setdefault("color", colours[number % len(colours)])
        own["linestyle"] = {"trivial": ":", "perturbation": "--"}.get(kinds[name], "-")
        styles[name] = own
    return styles


def _save(figure: Any, path: Path) -> None:
    import matplotlib.pyplot as plt

    try:
        with whole(path) as part:
            figure.savefig(part, dpi=130, bbox_inches="tight")
    finally:
        plt.close(figure)


def draw_plots(output: Path, rows: Rows, methods: Sequence[Method], report: dict[str, Any]) -> dict[str, str]:
    """ROAD, insertion and deletion curves, and latency against AD, those that were measured: {title: file}."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    kinds = {method.name: method.kind for method in methods}
    names = [method.name for method in methods]
    styles = _styles(names, kinds)
    drawn = {}
    shares = [0.0, *(100 * fraction for fraction in FRACTIONS)]
    panels = [f"ROAD {order} {what}" for order in ("MoRF", "LeRF") for what in ("confidence", "accuracy")]
    if any(_curve(rows, name, panels[0]) is not None for name in names):
        figure, axes = plt.subplots(2, 2, figsize=(11, 8), sharex=True)
        for axis, panel in zip(axes.flat, panels, strict=True):
            for name in names:
                curve = _curve(rows, name, panel)
                if curve is not None:
                    # At 0 percent: nothing removed. Accuracy is 1 there, as the class explained is the predicted one.
                    measured = [row for key, row in rows.items() if key[2] == name and row.get(panel) and "p" in row]
                    p = [row["p"] for row in measured]
                    start = [1.0 if panel.endswith("accuracy") else float(np.mean(p))] if p else [np.nan]
                    axis.plot(shares, [*start, *curve], label=name, **styles[name])
            axis.set_title(f"{panel} ({'lower' if 'MoRF' in panel else 'higher'} is better)", fontsize=10)
            axis.grid(alpha=0.3)
        for axis in axes[1]:
            axis.set_xlabel("pixels removed, percent")
        axes[0, 1].legend(fontsize=8, bbox_to_anchor=(1.02, 1), loc="upper left")
        _save(figure, output / "road.png")
        drawn["ROAD curves"] = "road.png"
    if any(_curve(rows, name, "insertion black") is not None for name in names):
        figure, axes = plt.subplots(2, 3, figsize=(14, 8), sharex=True, sharey=True)
        for line, mode in zip(axes, ("insertion", "deletion"), strict=True):
            for axis, start_name in zip(line, STARTS, strict=True):
                for name in names:
                    curve = _curve(rows, name, f"{mode} {start_name}")
                    if curve is not None:
                        axis.plot(np.linspace(0, 100, len(curve)), curve, label=name, **styles[name])
                better = "higher" if mode == "insertion" else "lower"
                axis.set_title(f"{mode}, {start_name} ({better} is better)", fontsize=10)
                axis.grid(alpha=0.3)
        for axis in axes[1]:
            axis.set_xlabel("pixels inserted or deleted, percent")
        axes[0, 0].set_ylabel("confidence")
        axes[0, 2].legend(fontsize=8, bbox_to_anchor=(1.02, 1), loc="upper left")
        _save(figure, output / "insertion_deletion.png")
        drawn["Insertion and deletion curves"] = "insertion_deletion.png"
    points = {
        name: (entry["ms_per_map"], entry["measures"]["AD soft 100"], entry["measures"].get("AD binary 50"))
        for name, entry in report["methods"].items()
        if entry["kind"] != "trivial" and "ms_per_map" in entry and "AD soft 100" in entry["measures"]
    }
    if points:
        figure, axes = plt.subplots(1, 2, figsize=(12, 5))
        for axis, place, title in zip(axes, (1, 2), ("AD soft 100", "AD binary 50"), strict=True):
            for number, (name, point) in enumerate(points.items()):
                if (entry := point[place]) is None:
                    continue
                spread = [[entry["mean"] - entry["low"]], [entry["high"] - entry["mean"]]]
                axis.errorbar(
                    max(point[0], 0.01),
                    entry["mean"],
                    yerr=spread,
                    fmt=_MARKERS[number % len(_MARKERS)],
                    color=styles[name]["color"],
                    capsize=2,
                    label=name,
                )
            axis.set_xscale("log")
            axis.set_xlabel("milliseconds per map")
            axis.set_ylabel(f"{title}, percent (lower is better)")
            axis.grid(alpha=0.3, which="both")
            axis.margins(x=0.15)
        axes[1].legend(fontsize=8, bbox_to_anchor=(1.02, 1), loc="upper left")
        _save(figure, output / "latency.png")
        drawn["Time per map against average drop"] = "latency.png"
    return drawn


def draw_sheet(output: Path, rows: Rows, methods: Sequence[str], pictures: dict[int, tuple[Image.Image, str]]) -> bool:
    """A contact sheet, images by methods; False where no map is at hand."""
    sheet = []
    for index, (picture, label) in pictures.items():
        line = [(picture, label)]
        for name in methods:
            stored = rows.get(("image", index, name), {}).get("sheet map")
            if stored is None:
                continue
            side = round(len(stored) ** 0.5)
            small = Image.fromarray(np.array(stored, dtype=np.uint8).reshape(side, side))
            values = np.asarray(small.resize(picture.size, Image.Resampling.BILINEAR), dtype=np.float64) / 255
            line.append((overlay(picture, values, np.ones(values.shape, dtype=bool)), name))
        if len(line) > 1:
            sheet.append(line)
    if not sheet:
        return False
    with whole(output / "contact_sheet.jpg") as part:
        contact_sheet(sheet, height=150).save(part, quality=88)
    return True


# ---- all of it ----------------------------------------------------------------------------------------------------


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
        "verdicts": {
            name: {m.name: verdict(table[m.name], m.better) for m in MEASURES if m.better and m.name in table}
            for name, table in summary["differences"].items()
        },
    }
    # A claim against a method holds where every judged measure of both tables, soft and binary, shows it.
    report["better_in_every_judged_measure"] = {
        name: all(table.get(m.name) == "better" for m in FAITHFULNESS if m.judged)
        for name, table in report["verdicts"].items()
    }
    if sanity:
        report["sanity"] = sanity
    report["pictures"] = draw_plots(output, rows, methods, report)
    if draw_sheet(output, rows, names, pictures):
        report["pictures"]["Maps of the methods"] = "contact_sheet.jpg"
    for file, text in (
        ("report.json", json.dumps(report, indent=2) + "\n"),
        ("report.md", to_markdown(report)),
    ):
        write_whole(output / file, text)
    return report
