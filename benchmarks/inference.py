"""What an explanation costs beside the plain forward pass of its classifier, and beside the published head.

    python benchmarks/inference.py --rounds 30 --memory

Three variants of the same model on the same batch; random weights, 1000 classes, eval mode, no gradient, float32,
model and input in channels_last, no compilation:

- plain: logits of the frozen backbone, nothing else.
- explain: logits and tapped features in one pass, the head for the predicted class alone, scaled to [0, 1] and resized
  to the input.
- published: the same pass, then the head as the paper writes it: convolution, batch norm, skip and ReLU one after the
  other, every layer resized to the map grid, all layers concatenated, one 1x1 convolution to the maps of all classes;
  the predicted class is picked from these, scaled and resized. Explain must give the same maps.

Time: after the warm-up rounds, every round runs each variant once, in an order that changes from round to round. The
figures are medians over the rounds of the ratios within a round, so that a load on the machine that comes and goes
falls on all variants alike. The medians in milliseconds stand beside them; only the ratios are meant to be compared.
Where other programs want the same cores, set OMP_WAIT_POLICY=passive and GOMP_SPINCOUNT=0: threads that spin while
they wait for one that was moved aside drown every difference. The summary records the policy.

Memory (--memory, batch 32): the peak of what torch allocates during the call, weights and input not counted; on CPU
from the allocations that torch.profiler records, on CUDA torch.cuda.max_memory_allocated. Unlike the peak resident
memory of a process it knows neither fragmentation nor what was in use before (on Linux getrusage even hands a parent's
peak down to its children); what the convolution library takes past torch's allocator is not in it. "Over plain"
compares whole passes: a head shows there only where its peak is above the backbone's own. "Head" is the peak of the
head alone, its features not counted. Whether a tensor of shape (B, K, h, w) was made is read from the shapes of all
results, views included.

Prints a line per model to stderr and ends in one JSON line on stdout.
"""

import argparse
import itertools
import json
import math
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import hf_ttame
from hf_ttame import TTameModel
from hf_ttame.masking import resize_maps

BATCHES = {"vit_base_patch16_224": 4, "vgg16": 4, "resnet50": 8, "tf_efficientnet_lite0": 16}
DEFAULT_BATCH = 8
MEMORY_BATCH = 32
WARM_UP_ROUNDS = 2
MAP_TOLERANCE = 1e-3  # min-max scaling enlarges rounding where a map is nearly flat


def explain_head(model: TTameModel, logits: torch.Tensor, features: list[torch.Tensor]) -> torch.Tensor:
    """Map logits (B, 1, h, w) of the predicted classes, as the package computes them."""
    return model.head(features, logits.argmax(dim=1, keepdim=True))


def published_head(model: TTameModel, logits: torch.Tensor, features: list[torch.Tensor]) -> torch.Tensor:
    """Map logits (B, 1, h, w) of the predicted classes, picked from those of all classes."""
    head = model.head
    assert head.bns is not None
    resized = []
    for layer, maps in enumerate(features):
        z = head.bns[layer](head.convs[layer](maps)) + maps
        if layer < len(features) - 1 or head.last_layer_relu:
            z = F.relu(z)
        resized.append(F.interpolate(z, size=head.map_size, mode="bilinear", align_corners=False))
    every_class = head.fuser(torch.cat(resized, dim=1))  # (B, K, h, w)
    images = torch.arange(len(logits), device=logits.device)
    return every_class[images, logits.argmax(dim=1)][:, None]


HEADS = {"explain": explain_head, "published": published_head}


def run_plain(model: TTameModel, pixel_values: torch.Tensor) -> torch.Tensor:
    """Logits (B, K)."""
    return model.classify(pixel_values)


def run_with_head(name: str, model: TTameModel, pixel_values: torch.Tensor) -> torch.Tensor:
    """Maps (B, 1, H, W) of the predicted classes, in [0, 1]."""
    logits, features = model.features(pixel_values)
    height, width = pixel_values.shape[-2:]
    return resize_maps(model.scale_maps(HEADS[name](model, logits, features)), (height, width))


VARIANTS: dict[str, Callable[[TTameModel, torch.Tensor], torch.Tensor]] = {
    "plain": run_plain,
    "explain": partial(run_with_head, "explain"),
    "published": partial(run_with_head, "published"),
}


def build(name: str, batch: int, device: str) -> tuple[TTameModel, torch.Tensor]:
    """The explainer of a timm architecture with random weights, and a batch of noise."""
    torch.manual_seed(0)
    model = TTameModel.from_backbone(name, pretrained=False).eval().to(device, memory_format=torch.channels_last)
    pixel_values = torch.randn(batch, len(model.config.pixel_scale), *model.config.image_size)
    return model, pixel_values.to(device, memory_format=torch.channels_last)


def synchronise(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


@torch.no_grad()
def measure_time(name: str, batch: int, rounds: int, device: str) -> dict[str, Any]:
    """Median times and medians of the ratios within rounds."""
    model, pixel_values = build(name, batch, device)
    difference = (
        (VARIANTS["explain"](model, pixel_values) - VARIANTS["published"](model, pixel_values)).abs().max().item()
    )
    if not difference <= MAP_TOLERANCE:
        raise RuntimeError(f"{name}: explain and published differ by {difference}; the figures would mean nothing")
    seconds: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    orders = itertools.cycle(itertools.permutations(VARIANTS))
    for round_number in range(-WARM_UP_ROUNDS, rounds):
        for variant in next(orders):
            synchronise(device)
            start = time.perf_counter()
            VARIANTS[variant](model, pixel_values)
            synchronise(device)
            if round_number >= 0:
                seconds[variant].append(time.perf_counter() - start)

    def ratio(numerator: str, denominator: str) -> float:
        pairs = zip(seconds[numerator], seconds[denominator], strict=True)
        return round(statistics.median(a / b for a, b in pairs), 3)

    return {
        "batch": batch,
        "rounds": rounds,
        "explain_over_plain": ratio("explain", "plain"),
        "published_over_plain": ratio("published", "plain"),
        "published_over_explain": ratio("published", "explain"),
        **{f"{variant}_ms": round(1000 * statistics.median(times), 1) for variant, times in seconds.items()},
        "largest_map_difference": difference,
    }


def peak_memory(call: Callable[[], Any], device: str) -> float:
    """Highest total of what is allocated during the call and alive at the same time, in MiB."""
    call()  # first use: libraries and caches
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        profile.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    records = [event for event in events if event.get("name") == "[memory]"]
    records.sort(key=lambda event: event["ts"])
    totals = list(itertools.accumulate(event["args"]["Bytes"] for event in records))
    if not totals:
        raise RuntimeError("the profiler recorded no allocations")
    return max(totals) / 2**20


class Shapes(TorchDispatchMode):
    """Collects the shapes of all tensors that are made while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.seen.update(tuple(leaf.shape) for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor))
        return result


@torch.no_grad()
def measure_memory(name: str, device: str) -> dict[str, Any]:
    """Peaks in MiB: whole passes over that of plain, and the heads alone."""
    model, pixel_values = build(name, MEMORY_BATCH, device)
    peaks = {variant: peak_memory(partial(run, model, pixel_values), device) for variant, run in VARIANTS.items()}
    logits, features = model.features(pixel_values)
    heads = {variant: peak_memory(partial(run, model, logits, features), device) for variant, run in HEADS.items()}
    h, w = model.head.map_size
    every_class = (MEMORY_BATCH, model.head.num_classes, h, w)
    made = {}
    for variant, run in HEADS.items():
        with Shapes() as shapes:
            run(model, logits, features)
        made[f"{variant}_makes_all_class_maps"] = every_class in shapes.seen
    figures = {
        "plain_mib": peaks["plain"],
        "explain_over_plain_mib": peaks["explain"] - peaks["plain"],
        "published_over_plain_mib": peaks["published"] - peaks["plain"],
        "explain_head_mib": heads["explain"],
        "published_head_mib": heads["published"],
        "all_class_maps_mib": math.prod(every_class) * 4 / 2**20,
    }
    return {"batch": MEMORY_BATCH, **{key: round(value, 1) for key, value in figures.items()}, **made}


def versions() -> dict[str, str]:
    packages = {"python": platform.python_version(), "hf-ttame": hf_ttame.__version__}
    return packages | {package: version(package) for package in ("torch", "timm", "transformers")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(BATCHES), metavar="NAME", help="timm architecture names")
    parser.add_argument(
        "--rounds", type=int, default=30, help="measured rounds; a multiple of 6 uses every order alike"
    )
    parser.add_argument("--batch", type=int, help=f"default: {BATCHES}, others {DEFAULT_BATCH}")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--memory", action="store_true", help=f"also the peak memory at batch {MEMORY_BATCH}")
    arguments = parser.parse_args()
    if arguments.rounds < 1:
        parser.error("--rounds must be at least 1")

    figures = {}
    for name in arguments.models:
        batch = arguments.batch or BATCHES.get(name, DEFAULT_BATCH)
        result = measure_time(name, batch, arguments.rounds, arguments.device)
        line = (
            f"{name}, batch {batch}: plain {result['plain_ms']:.0f} ms, explain / plain "
            f"{result['explain_over_plain']:.3f}, published / plain {result['published_over_plain']:.3f}, "
            f"published / explain {result['published_over_explain']:.3f}"
        )
        if arguments.memory:
            memory = result["memory"] = measure_memory(name, arguments.device)
            line += (
                f"; peak memory at batch {MEMORY_BATCH} over plain: "
                f"explain {memory['explain_over_plain_mib']:+.0f} MiB, "
                f"published {memory['published_over_plain_mib']:+.0f} MiB; "
                f"head alone: explain {memory['explain_head_mib']:.0f} MiB, "
                f"published {memory['published_head_mib']:.0f} MiB "
                f"(all-class maps: {memory['all_class_maps_mib']:.0f} MiB; made: "
                f"explain {memory['explain_makes_all_class_maps']}, "
                f"published {memory['published_makes_all_class_maps']})"
            )
        print(line, file=sys.stderr, flush=True)
        figures[name] = result
    summary = {
        "benchmark": "inference",
        "device": torch.cuda.get_device_name() if torch.device(arguments.device).type == "cuda" else arguments.device,
        "dtype": "float32",
        "memory_format": "channels_last",
        "threads": torch.get_num_threads(),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", "default"),
        "versions": versions(),
        "models": figures,
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
