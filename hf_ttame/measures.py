"""What a report measures: its columns, which way is better, and what an interval says."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from .metrics.bootstrap import FEWEST
from .metrics.insertion_deletion import STARTS


@dataclass(frozen=True)
class Measure:
    """A column of the report. better: "lower", "higher", or "" where neither is. judged: counts in the verdict."""

    name: str
    better: str
    digits: int = 1
    table: str = "image"
    judged: bool = False


_SHARES = ("soft 100", "soft 50", "soft 15", "binary 50", "binary 15")
_JUDGED_IC = ("soft 100", "soft 50", "binary 50")  # IC 15 is reported and not judged
FAITHFULNESS = (
    Measure("mean mask", "", 2),
    *(Measure(f"AD {share}", "lower", judged=True) for share in _SHARES),
    *(Measure(f"IC {share}", "higher", judged=share in _JUDGED_IC) for share in _SHARES),
)
ORDERS = (
    Measure("ROAD MoRF confidence", "lower"),
    Measure("ROAD MoRF accuracy", "lower"),
    Measure("ROAD LeRF confidence", "higher"),
    Measure("ROAD LeRF accuracy", "higher"),
    *(Measure(f"insertion {start}", "higher", 3) for start in STARTS),
    *(Measure(f"deletion {start}", "lower", 3) for start in STARTS),
)
PLACES = (
    Measure("grid pointing", "higher", table="mosaic"),
    Measure("pointing game", "higher"),
    Measure("energy in box", "higher"),
    Measure("ADCC", "higher"),
    Measure("entropy", "", 3),
    Measure("area", "", 2),
)
MEASURES = (*FAITHFULNESS, *ORDERS, *PLACES)


def verdict(difference: dict[str, float] | None, better: str) -> str:
    """ "better", "worse" or "open" for the first method: its paired interval excludes 0 on one side, or does not.

    difference: {"low", "high", "n"}; of fewer than `FEWEST` pairs always "open".
    """
    if difference is None or not better:
        return "not measured"
    if difference["n"] < FEWEST:
        return "open"
    if difference["high"] < 0:
        return "better" if better == "lower" else "worse"
    if difference["low"] > 0:
        return "better" if better == "higher" else "worse"
    return "open"


def verdict_table(
    differences: Mapping[str, Mapping[str, Any]], shown: Callable[[str], str] = lambda name: name
) -> list[str]:
    """Lines of a Markdown table: by measure, the methods that the first is better or worse than, or open beside.

    Args:
        differences: {method: {measure: see `verdict`}}; a measure that no method has is left out.
        shown: a method's name as the table writes it.
    """
    lines = ["| measure | better than | worse than | open |", "|---|---|---|---|"]
    for measure in MEASURES:
        found: dict[str, list[str]] = {"better": [], "worse": [], "open": []}
        for method, table in differences.items():
            if measure.better and table.get(measure.name):
                found[verdict(table[measure.name], measure.better)].append(shown(method))
        if any(found.values()):
            lines.append(f"| {measure.name} | " + " | ".join(", ".join(names) for names in found.values()) + " |")
    return lines
