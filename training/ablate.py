"""The paper's ablations on a backbone of yours: one run per variant and seed, one table, one plot.

    python training/ablate.py --backbone DIR --dataset PICTURES --output runs/ablation --seeds 0 1 2 -- \
        --steps 400 --batch_size 32 --holdout 0.1 --validation_size 200

What follows `--` goes to training/train.py in every run and must hold pictures to validate on (--holdout or
--validation). A run that is complete is not repeated, one that was interrupted is resumed: call it again after a kill.
Ctrl-C and SIGTERM save a checkpoint of the run that is going on, start no other, and end with status 130.

OUTPUT/ablation.md has the means over pictures and seeds with 95 percent bootstrap intervals over the pictures, and the
paired difference to the paper's form ("base": random start, three layers, black fill); ablation.json the same as
numbers; ablation.png the differences. Intervals over pictures say nothing about other seeds: the spread over the seeds
stands beside them. "warm start" is there where `--head_init classifier` works: also for a classifier that reads the
class token, where train.py takes it only when asked.
"""

import argparse
import importlib
import json
import os
import signal
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while these imports run ends without a traceback

import torch
from transformers import HfArgumentParser

from hf_ttame import TTameModel
from hf_ttame.features import probe_noise
from hf_ttame.launching import run_training
from hf_ttame.layer_choice import find_pooled_classifier
from hf_ttame.metrics import mean_interval
from hf_ttame.visualization import plot_intervals

if not __package__:  # launched as a script, in a checkout or as hf_ttame/training
    here = Path(__file__).resolve().parent
    __package__ = "hf_ttame.training" if here.parent.name == "hf_ttame" else "training"
    sys.path.insert(0, str(here.parents[__package__.count(".")]))
    importlib.import_module(__package__)

from .arguments import Arguments, check
from .identity import check_complete
from .report import write

_MASKS = ("soft 100", "soft 50", "soft 15", "binary 50", "binary 15")
MEASURES = ("mask area", *(f"AD {mask}" for mask in _MASKS), *(f"IC {mask}" for mask in _MASKS))
SHOWN = ("mask area", "AD soft 50", "IC soft 50", "AD binary 50", "IC binary 50")


def variants(backbone: str, pretrained: bool) -> dict[str, list[str]]:
    """Arguments of training/train.py per variant that this backbone has."""
    model = TTameModel.from_backbone(backbone, pretrained=pretrained, head_init="random")
    layers = [layer.name for layer in model.layers]
    found = {
        "base": [],
        "no skip connection": ["--no_skip_connection"],
        "no batch norm": ["--no_batch_norm"],
        "sigmoid branches": ["--branch_activation", "sigmoid"],
        **{f"{n} of {len(layers)} layers": ["--feature_layers", *layers[-n:]] for n in range(len(layers) - 1, 0, -1)},
        "no cross-entropy": ["--cross_entropy_weight", "0"],
        "no area": ["--area_weight", "0"],
        "no variation": ["--variation_weight", "0"],
        "own class only": ["--class_set", "own"],
        "fill mean": ["--fill", "mean"],
        "fill blur": ["--fill", "blur"],
    }
    if any(layer.prefix_tokens for layer in model.layers):
        found["class token multiplied"] = ["--class_token", "multiply"]
    found = {name: ["--head_init", "random", *arguments] for name, arguments in found.items()}
    size = (model.config.image_size[0], model.config.image_size[1])
    noise = probe_noise(len(model.config.pixel_scale), size)
    if find_pooled_classifier(model.backbone, noise, or_class_token=True):
        found["warm start"] = ["--head_init", "classifier"]
    return found


def summarise(runs: dict[str, list[Path]]) -> dict[str, dict[str, Any]]:
    """Per variant and measure: mean, interval, spread over seeds, paired difference to the base and its interval."""
    per_seed = {
        name: [json.loads((folder / "validation.json").read_text()) for folder in folders]
        for name, folders in runs.items()
    }
    table: dict[str, dict[str, Any]] = {}
    for name, seeds in per_seed.items():
        table[name] = {}
        for measure in MEASURES:
            values = torch.tensor([seed[measure] for seed in seeds], dtype=torch.float64)  # (seeds, pictures)
            base = torch.tensor([seed[measure] for seed in per_seed["base"]], dtype=torch.float64).mean(dim=0)
            difference = values.mean(dim=0) - base
            table[name][measure] = {
                "mean": round(float(values.mean()), 4),
                "interval_95": [round(bound, 4) for bound in mean_interval(values.mean(dim=0).numpy())[1:3]],
                "seeds": [round(float(seed.mean()), 4) for seed in values],
                "difference": round(float(difference.mean()), 4),
                "difference_95": [round(bound, 4) for bound in mean_interval(difference.numpy())[1:3]],
            }
    return table


def to_markdown(table: dict[str, dict[str, Any]], pictures: int) -> str:
    def cell(found: dict[str, Any]) -> str:
        low, high = found["interval_95"]
        spread = statistics.stdev(found["seeds"]) if len(found["seeds"]) > 1 else None
        return f"{found['mean']:.3g} ({low:.3g} to {high:.3g})" + (
            f", seeds ±{spread:.2g}" if spread is not None else ""
        )

    lines = [f"Means over {pictures} pictures with 95 % intervals. AD lower, IC higher is better, in percent.", ""]
    lines.append("| variant | " + " | ".join(SHOWN) + " | AD binary 50 less base |")
    lines.append("|---" * (len(SHOWN) + 2) + "|")
    for name, row in table.items():
        low, high = row["AD binary 50"]["difference_95"]
        cells = [cell(row[measure]) for measure in SHOWN]
        cells.append("" if name == "base" else f"{row['AD binary 50']['difference']:+.3g} ({low:.3g} to {high:.3g})")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    own, further = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", required=True)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--only", nargs="+", help="names of variants; the base is always among them")
    parser.add_argument("--processes", type=int, default=1, help="GPUs per run")
    arguments = parser.parse_args(own)

    def folder(name: str, seed: int) -> Path:
        return Path(arguments.output, name.replace(" ", "_"), f"seed_{seed}")

    def command(name: str, seed: int, more: Sequence[str]) -> list[str]:
        where = ["--backbone", arguments.backbone, "--dataset", arguments.dataset, "--output", str(folder(name, seed))]
        return [*where, "--seed", str(seed), "--resume", *further, *more]

    parser_of_runs = HfArgumentParser(Arguments)
    (asked,) = parser_of_runs.parse_args_into_dataclasses(command("base", arguments.seeds[0], []))
    check(asked)
    if not (asked.holdout or asked.validation):
        raise ValueError("give pictures to validate on, after `--`: --holdout 0.1 or --validation PICTURES")
    grid = variants(arguments.backbone, asked.pretrained)
    if arguments.only:
        if unknown := sorted(set(arguments.only) - set(grid)):
            raise ValueError(
                f"this backbone has no variant {', '.join(map(repr, unknown))}; it has: {', '.join(grid)}"
            )
        grid = {name: more for name, more in grid.items() if name == "base" or name in arguments.only}
    script = Path(__file__).with_name("train.py")
    runs: dict[str, list[Path]] = {}
    for name, more in grid.items():
        for seed in arguments.seeds:
            output = folder(name, seed)
            runs.setdefault(name, []).append(output)
            complete = (output / "explainer" / "training.json").exists()
            print(f"{name}, seed {seed}{': complete' if complete else ''}", flush=True)
            if complete:
                (wanted,) = parser_of_runs.parse_args_into_dataclasses(command(name, seed, more))
                check_complete(output, wanted, arguments.processes)
                continue
            ended = run_training(script, command(name, seed, more), ["--num_processes", str(arguments.processes)])
            if ended.stopped:
                raise KeyboardInterrupt
            if ended.status:
                return ended.status
    table = summarise(runs)
    pictures = len(json.loads((runs["base"][0] / "validation.json").read_text())["mask area"])
    write(arguments.output / "ablation.json", json.dumps({"pictures": pictures, "variants": table}, indent=2) + "\n")
    write(arguments.output / "ablation.md", to_markdown(table, pictures))
    rows = [
        (name, row["AD binary 50"]["difference"], *row["AD binary 50"]["difference_95"])
        for name, row in table.items()
        if name != "base"
    ]
    if rows:
        title = "AD binary 50 less that of the base, percentage points (lower is better)"
        write(arguments.output / "ablation.png", plot_intervals(title, rows))
    print(to_markdown(table, pictures))
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("ablate: stopped; the same command again continues", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError) as error:
        if os.environ.get("TTAME_DEBUG"):
            raise
        sys.exit(f"ablate: {error}")
