"""A report's pictures: curves, time against average drop, a contact sheet of maps."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .baselines import Method
from .disk import whole
from .evaluation_rows import Rows
from .metrics.insertion_deletion import STARTS
from .metrics.road import FRACTIONS
from .visualization import contact_sheet, overlay


def _curves(rows: Rows, methods: Sequence[str], name: str) -> tuple[dict[str, np.ndarray], set[int]]:
    """The mean curve of every method that has it, over the images that all of these saw, and those images."""
    found: dict[str, dict[int, Any]] = {}
    for (table, index, method), row in rows.items():
        if table == "image" and method in methods and row.get(name):
            found.setdefault(method, {})[index] = row[name]
    shared = set.intersection(*map(set, found.values())) if found else set()
    ordered = [method for method in methods if method in found] if shared else []
    return {method: np.mean([found[method][index] for index in shared], axis=0) for method in ordered}, shared


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
        if number >= len(colours):  # its colour is taken
            own["linestyle"] = "-."
        styles[name] = own
    return styles


def _save(figure: Any, path: Path) -> None:
    import matplotlib.pyplot as plt

    try:
        with whole(path) as part:
            figure.savefig(part, dpi=130, bbox_inches="tight")
    finally:
        plt.close(figure)


def _log_milliseconds(axis: Any) -> None:
    """A logarithmic axis of at least one decade, in plain numbers: where all times are close, matplotlib's own marks
    nothing, or prints 6 x 10^1 upon 7 x 10^1."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.margins(x=0.15)
    axis.set_xscale("log")
    low, high = axis.get_xlim()
    if high < 10 * low:
        middle = (low * high) ** 0.5
        low, high = middle / 10**0.5, middle * 10**0.5
        axis.set_xlim(low, high)
    axis.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high < 1000 * low else (1.0,)))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 1 else f"{value:g}"))
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.set_xlabel("milliseconds per map")


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
    if _curves(rows, names, panels[0])[0]:
        figure, axes = plt.subplots(2, 2, figsize=(11, 8), sharex=True)
        for axis, panel in zip(axes.flat, panels, strict=True):
            curves, shared = _curves(rows, names, panel)
            for name, curve in curves.items():
                # At 0 percent: nothing removed. Accuracy is 1 there, as the class explained is the predicted one.
                p = [row["p"] for index in shared if "p" in (row := rows["image", index, name])]
                start = [1.0 if panel.endswith("accuracy") else float(np.mean(p))] if p else [np.nan]
                axis.plot(shares, [*start, *curve], label=name, **styles[name])
            axis.set_title(f"{panel} ({'lower' if 'MoRF' in panel else 'higher'} is better)", fontsize=10)
            axis.grid(alpha=0.3)
        for axis in axes[1]:
            axis.set_xlabel("pixels removed, percent")
        axes[0, 1].legend(fontsize=8, bbox_to_anchor=(1.02, 1), loc="upper left", title=f"{len(shared)} images")
        _save(figure, output / "road.png")
        drawn["ROAD curves"] = "road.png"
    if _curves(rows, names, "insertion black")[0]:
        figure, axes = plt.subplots(2, 3, figsize=(14, 8), sharex=True, sharey=True)
        for line, mode in zip(axes, ("insertion", "deletion"), strict=True):
            for axis, start_name in zip(line, STARTS, strict=True):
                curves, shared = _curves(rows, names, f"{mode} {start_name}")
                for name, curve in curves.items():
                    axis.plot(np.linspace(0, 100, len(curve)), curve, label=name, **styles[name])
                better = "higher" if mode == "insertion" else "lower"
                axis.set_title(f"{mode}, {start_name} ({better} is better)", fontsize=10)
                axis.grid(alpha=0.3)
        for axis in axes[1]:
            axis.set_xlabel("pixels inserted or deleted, percent")
        axes[0, 0].set_ylabel("confidence")
        axes[0, 2].legend(fontsize=8, bbox_to_anchor=(1.02, 1), loc="upper left", title=f"{len(shared)} images")
        _save(figure, output / "insertion_deletion.png")
        drawn["Insertion and deletion curves"] = "insertion_deletion.png"
    points = {  # on the same images
        name: (entry["ms_per_map"], entry["measures_common"]["AD soft 100"], entry["measures_common"]["AD binary 50"])
        for name, entry in report["methods"].items()
        if entry["kind"] != "trivial" and "ms_per_map" in entry and "AD binary 50" in entry["measures_common"]
    }
    if points:
        figure, axes = plt.subplots(1, 2, figsize=(12, 5))
        for axis, place, title in zip(axes, (1, 2), ("AD soft 100", "AD binary 50"), strict=True):
            for number, (name, point) in enumerate(points.items()):
                entry = point[place]
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
            _log_milliseconds(axis)
            axis.set_ylabel(f"{title}, percent (lower is better)")
            axis.grid(alpha=0.3, which="both")
        n = next(iter(points.values()))[1]["n"]
        axes[1].legend(fontsize=8, bbox_to_anchor=(1.02, 1), loc="upper left", title=f"{n} images")
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
