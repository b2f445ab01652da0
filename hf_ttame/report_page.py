"""A report as a page: Markdown tables with the best of each column marked."""

from collections.abc import Sequence
from typing import Any

from .measures import FAITHFULNESS, FEWEST, ORDERS, PLACES, Measure, verdict_table
from .metrics.sanity import size_text


def markdown_table(
    methods: Sequence[str], kinds: dict[str, str], means: dict[str, Any], measures: Sequence[Measure]
) -> str:
    """Methods by measures, intervals in brackets, with n, the numbers of images or mosaics in the columns' order.

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
        counts = dict.fromkeys(means[name][m.name]["n"] for m in measures if means[name].get(m.name))
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
        + (f"; {report['unreadable']} more could not be read (report.json)" if report.get("unreadable") else "")
        + (f"; {report['bad_marks']} boxes or masks could not be read" if report.get("bad_marks") else "")
        + ". n: images, of grid pointing mosaics, in the order of the columns. A row with a smaller n was measured "
        "on the first ones alone and is not to be set beside one with more. Means with 95 % bootstrap intervals, "
        "which of one image say nothing. In italics trivial maps: `ones` and `gaussian` know nothing, "
        "`class-mean` the class alone, `other-image` is that of another image, `random-blob` has the values of "
        "T-TAME's map in a random place. Bold: best of the methods that are not trivial with the most images; †: a "
        "trivial map that does no worse. Settings: `report.json`.",
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
            "uniform. Area: share of pixels above half of the maximum." + _without_mosaics(report),
            PLACES,
        ),
    ]
    common = {name: report["methods"][name]["measures_common"] for name in methods}
    for title, text, measures in sections:
        lines += _tables("##", title, text, methods, kinds, means, common, measures)
    lines += _by_confidence(report, methods, kinds)
    lines += ["## Cost of a map", ""]
    lines += ["| method | kind | layer, settings | forward | backward | ms | times T-TAME | least to most | rounds |"]
    lines += ["|---|---|---|---|---|---|---|---|---|"]
    for name in methods:
        entry = report["methods"][name]
        settings = ", ".join(text for text in (entry["layer"], entry["about"]) if text)
        lines.append(
            f"| {name} | {entry['kind']} | {settings} | {entry.get('forward_passes', '')} | "
            f"{entry.get('backward_passes', '')} | {entry.get('ms_per_map', '')} | {entry.get('times_ttame', '')} | "
            f"{' to '.join(map(str, entry.get('times_ttame_range', ())))} | {entry.get('rounds', '')} |"
        )
    where = report["environment"]
    threads = f"{where['threads']} thread{'s' if where['threads'] > 1 else ''}"
    lines += [
        "",
        f"Passes of the classifier, counted by hooks. Milliseconds of one map, one picture at a time, on "
        f"{where['processor'] if where['device'] == 'cpu' else where['device']} ({threads}) in {where['precision']} "
        f"where the table names no other precision, up to {where['copies per pass']} perturbed copies per pass, "
        "medians over the rounds; the median ratio to T-TAME's time, taken in turn, with its least and most. Where a "
        "machine had other work meanwhile, its milliseconds drift and the ratio holds.",
        "",
    ]
    if len(report.get("measured_with", ())) > 1:
        lines += ["Measured with several sets of versions: " + "; ".join(report["measured_with"]) + ".", ""]
    if report["differences"]:
        lines += [
            "## T-TAME against each method",
            "",
            "Paired 95 % intervals of the difference; better or worse where 0 lies outside, else open, "
            f"as always on fewer than {FEWEST} images.",
            "",
            *verdict_table(report["differences"]),
            "",
        ]
    if report.get("sanity"):
        lines += ["## Sanity", "", "| check | made with | value | must | passed |", "|---|---|---|---|---|"]
        for name, check in report["sanity"].items():
            passed = {True: "yes", None: "not judged" if check["figures"] else "not made"}.get(
                check["passed"], "**no**"
            )
            size = size_text(check.get("with", {}))
            lines.append(f"| {name} | {size} | {check['value']} | {check['must']} | {passed} |")
        lines += ["", *(f"- {name}: {check['note']}" for name, check in report["sanity"].items() if check.get("note"))]
        lines.append("")
    for title, file in report["pictures"].items():
        lines += [f"![{title}]({file})", ""]
    return "\n".join(lines)


def _tables(
    level: str,
    title: str,
    text: str,
    methods: Sequence[str],
    kinds: dict[str, str],
    means: dict[str, Any],
    common: dict[str, Any],
    measures: Sequence[Measure],
) -> list[str]:
    """A section of a table, and, where methods saw different images, once more on those that all of them saw."""
    table = markdown_table(methods, kinds, means, measures)
    if not table:
        return []
    lines = [f"{level} {title}", "", *([text, ""] if text else []), table]
    mixed = [m for m in measures if len({means[name][m.name]["n"] for name in methods if m.name in means[name]}) > 1]
    if table := markdown_table(methods, kinds, common, mixed):
        lines += [f"{level}# {title.partition(':')[0]}, on the images that every method saw", "", table]
    return lines


def _by_confidence(report: dict[str, Any], methods: Sequence[str], kinds: dict[str, str]) -> list[str]:
    """Faithfulness once more, apart for the images that the classifier is least sure of."""
    parts = report.get("by_confidence")
    if not parts:
        return []
    lines = [
        "## Where the classifier is unsure",
        "",
        "Faithfulness once more, for the third of all images whose predicted class has the lowest confidence, and for "
        "the others: a mean over both hides where a map fails. Marks and verdicts as above and below.",
        "",
    ]
    for name, part in parts.items():
        low, high = part["confidence"]
        title = f"{name[0].upper()}{name[1:]}: {part['images']:,d} images, confidence {low:.2f} to {high:.2f}"
        lines += _tables("###", title, "", methods, kinds, part["measures"], part["measures_common"], FAITHFULNESS)
        if part["differences"]:
            lines += [f"#### {name[0].upper()}{name[1:]}: T-TAME against each method", ""]
            lines += [*verdict_table(part["differences"]), ""]
    return lines


def _without_mosaics(report: dict[str, Any]) -> str:
    """Why grid pointing, though asked for, has no column."""
    if "mosaic" not in report["settings"].get("metrics", ()) or report["mosaics"]:
        return ""
    least = report["settings"]["mosaic_confidence"]
    return f" No mosaic was made: too few images of four different classes, each with a confidence of {least} or more."
