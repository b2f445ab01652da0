"""docs/backbones.md and docs/backbones.json from the reports of the sweep.

pytest -m sweep tests/test_any_backbone.py --report sweep.jsonl && python tests/backbone_table.py sweep.jsonl
"""

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent.parent / "docs"
MARK = "<!-- below: tests/backbone_table.py -->\n"  # above it docs/backbones.md is written by hand


def cell(layers: list[dict[str, Any]]) -> str:
    return ", ".join(f"`{x['name']}` {x['grid'][0]}x{x['grid'][1]}" for x in layers)


def main(paths: list[str]) -> None:
    rows = {}
    for path in paths:
        for line in Path(path).read_text().splitlines():
            row = json.loads(line)
            rows[row["library"], row["name"]] = row  # a later line of the same name replaces an earlier one
    found = [rows[key] for key in sorted(rows)]
    count = Counter((row["library"], row["result"]) for row in found)
    paths_of = Counter((row["library"], row["path"]) for row in found if row["result"] == "passed")
    families = {row["family"] for row in found if row["library"] == "timm"}
    passed = {row["family"] for row in found if row["library"] == "timm" and row.get("path") == "trained"}
    above = (DOCS / "backbones.md").read_text().split(MARK)[0]
    lines = [
        above + MARK,
        "| library | tried | passed | of these trained / explained / meta | refused | excluded | failed |",
    ]
    lines.append("|---|---|---|---|---|---|---|")
    for library in ("timm", "transformers"):
        tried = sum(n for (where, _), n in count.items() if where == library)
        kinds = " / ".join(str(paths_of[library, path]) for path in ("trained", "explained", "meta"))
        rest = " | ".join(str(count[library, result]) for result in ("refused", "excluded", "failed"))
        lines.append(f"| {library} | {tried} | {count[library, 'passed']} | {kinds} | {rest} |")
    lines.append(f"\ntimm: {len(passed)} of {len(families)} model modules with their smallest architecture trained.\n")
    unplaced = [f"{row['name']} ({', '.join(row['unplaced'])})" for row in found if row.get("unplaced")]
    if unplaced:
        lines.append(f"Place not shown, since the random weights mix the whole image there: {', '.join(unplaced)}.\n")
    lines += ["### Not passed\n", "| architecture | result | reason |", "|---|---|---|"]
    lines += [f"| {r['name']} | {r['result']} | {r['reason']} |" for r in found if r["result"] != "passed"]
    for library, title in (("timm", "timm, the smallest of every module"), ("transformers", "transformers")):
        lines.append(f"\n### {title}\n")
        lines += ["| family | tried | input | layers | layout | start |", "|---|---|---|---|---|---|"]
        for row in found:
            if row["library"] == library and row["result"] == "passed" and row["path"] == "trained":
                side, layout = row["input"][-1], "/".join(dict.fromkeys(x["layout"] for x in row["layers"]))
                prefix = max(x["prefix_tokens"] for x in row["layers"])
                layout += f" +{prefix}" if prefix else ""
                names = f"| {row['family']} | {row['name']} | {side}"
                lines.append(f"{names} | {cell(row['layers'])} | {layout} | {row['head_init']} |")
    (DOCS / "backbones.md").write_text("\n".join(lines) + "\n")
    kept = ("library", "family", "name", "result", "path", "reason")
    brief = [{key: row[key] for key in kept if key in row} for row in found]
    (DOCS / "backbones.json").write_text("[\n" + ",\n".join(json.dumps(row) for row in brief) + "\n]\n")


if __name__ == "__main__":
    main(sys.argv[1:])
