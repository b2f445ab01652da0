"""How long a map takes: one picture at a time, every method in turn with the explainer.

A time alone depends on what else the machine does; the ratio of two that were taken one after the other hardly does.
Times are kept in latency.json of the run's folder and taken anew where the machine, the versions or the head are not
those of the file.
"""

import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from .baselines import Cost, Method
from .masking import resize_maps
from .modeling_ttame import TTameModel
from .saving import write_whole

FILE = "latency.json"
ROUNDS = 12
_SLOW, _SLOW_ROUNDS = 10, 3  # methods with more passes per map than that are timed so often


def measure_latency(
    model: TTameModel,
    methods: Sequence[Method],
    pictures: Sequence[tuple[int, torch.Tensor, int]],
    folder: Path,
    environment: dict[str, Any],
    head: str,
    step: Callable[[str], None] = lambda name: None,
) -> dict[str, dict[str, Any]]:
    """Milliseconds per map of every method, at the size of the input, and how many times the explainer's own.

    Args:
        model: the explainer, its passes in the precision that is to be timed.
        methods: the explainer first.
        pictures: (position in the dataset, pixel values (1, C, H, W), class), taken in turn.
        folder: holds latency.json.
        environment: what a time depends on.
        head: fingerprint of the explainer's head.
        step: told the name of each method before it is timed.

    Returns:
        {method: {"ms_per_map": median, "times_ttame": median of the ratios, "times_ttame_range": [least, largest],
        "rounds", "layer"}}.
    """
    kept: dict[str, Any] = {"environment": environment, "head": head, "methods": {}}
    if (folder / FILE).exists():
        earlier = json.loads((folder / FILE).read_text())
        if (earlier["environment"], earlier["head"]) == (environment, head):
            kept["methods"] = earlier["methods"]
    ours = methods[0]

    def seconds(method: Method, picture: tuple[int, torch.Tensor, int]) -> float:
        index, pixel_values, target = picture
        explain = method.at(torch.tensor([index]))
        with Cost(model.backbone) as cost:
            maps = explain(pixel_values, torch.tensor([target], device=pixel_values.device))
            resize_maps(maps.detach().float(), (pixel_values.shape[-2], pixel_values.shape[-1]))
        return cost.seconds

    for method in methods:
        if method.name in kept["methods"] and kept["methods"][method.name]["layer"] == method.layer:
            continue
        step(method.name)
        rounds = _SLOW_ROUNDS if method.passes > _SLOW else ROUNDS
        if rounds == ROUNDS:
            seconds(method, pictures[0])  # the first call allocates
        seconds(ours, pictures[0])
        pairs = []
        for number in range(rounds):
            picture = pictures[number % len(pictures)]
            own = seconds(ours, picture)
            pairs.append((own, own if method is ours else seconds(method, picture)))
        ratios = [time / own for own, time in pairs]
        kept["methods"][method.name] = {
            "ms_per_map": round(1000 * statistics.median(time for _, time in pairs), 2),
            "times_ttame": round(statistics.median(ratios), 2),
            "times_ttame_range": [round(min(ratios), 2), round(max(ratios), 2)],
            "rounds": rounds,
            "layer": method.layer,
        }
        write_whole(folder / FILE, json.dumps(kept, indent=2) + "\n")
    return {method.name: kept["methods"][method.name] for method in methods}
