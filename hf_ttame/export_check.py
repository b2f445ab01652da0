"""An exported graph beside PyTorch, on the same pixels."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch

from .answers import probabilities

Inputs = dict[str, torch.Tensor]
_TOGETHER = 8
_WIDEST = 1e-2  # of a map in [0, 1]: the widest tolerance that one is ever held to


@dataclass
class Comparison:
    """Largest absolute difference per output, None where nothing was compared; and what became of the maps.

    maps: how many were held to the tolerance, which `differences` speaks of; faint: to a wider one, at most 0.01;
    left_out: to none.
    """

    differences: dict[str, float | None] = field(default_factory=dict)
    maps: dict[str, int] = field(default_factory=lambda: {"compared": 0, "faint": 0, "left_out": 0})


def groups(pixel_values: torch.Tensor, batch: int | None) -> list[torch.Tensor]:
    """Pictures (P, C, H, W) in batches: of a free size one alone, then all; of a fixed one, repeated to fill it."""
    if batch is None:
        return [pixel_values[:1], *pixel_values.split(_TOGETHER)]
    filled = -(-len(pixel_values) // batch) * batch
    return list(pixel_values[torch.arange(filled) % len(pixel_values)].split(batch))


def open_session(path: Path) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors alone
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def run(session: Any, inputs: Inputs) -> dict[str, np.ndarray]:
    """The graph's outputs by name."""
    names = [output.name for output in session.get_outputs()]
    values = session.run(names, {name: tensor.numpy() for name, tensor in inputs.items()})
    return dict(zip(names, values, strict=True))


@torch.no_grad()
def compare(model: Any, path: Path, batches: Sequence[Inputs], tolerance: float) -> Comparison:
    """The file beside the model, its head as it is stored.

    Map logits are always held to the tolerance. The min-max scaling enlarges the rounding of float32 where a map
    varies little beside its values: such a faint map is held to what that rounding can make of it. Where that is more
    than a hundredth, float32 does not say what the map is, in PyTorch either (a sigmoid that is saturated
    everywhere): it is left out, and counted.

    Args:
        model: the explainer.
        path: the exported graph.
        batches: its inputs, by name.
        tolerance: see `export_onnx`.

    Raises:
        ValueError: a difference is above the tolerance, or the graph chooses other classes.
    """
    session = open_session(path)
    result = Comparison(dict.fromkeys(("logits", "scores", "map_logits", "maps")))
    for inputs in batches:
        got = {name: torch.from_numpy(value) for name, value in run(session, inputs).items()}
        output = model(inputs["pixel_values"], class_ids=got.get("class_ids", inputs.get("class_ids", "all")))
        logits, map_logits = output.logits, output.map_logits
        expected = {
            "logits": logits,
            "scores": probabilities(logits, model.config.classifier_outputs),
            "map_logits": map_logits,
            "maps": model.scale_maps(map_logits),
        }
        spread = tolerance * logits.abs().max().clamp(min=1)
        if "class_ids" in got:  # classes whose logits are equal up to rounding may change places
            ids = got["class_ids"]
            if not torch.allclose(logits.gather(1, ids), logits.topk(ids.shape[1]).values, rtol=0, atol=float(spread)):
                raise ValueError(f"the exported graph explains the classes {ids.tolist()}; PyTorch ranks others first")
        rounding = _enlarged_rounding(model, map_logits)
        left_out, faint = rounding > _WIDEST, (rounding > tolerance) & (rounding <= _WIDEST)
        allowed = {
            "logits": spread,
            "scores": torch.tensor(tolerance),
            "map_logits": tolerance * map_logits.abs().max().clamp(min=1),
            # No map in [0, 1] is further than 1 from another; NaN is.
            "maps": rounding.clamp(min=tolerance).masked_fill(left_out, 1 + tolerance),
        }
        for name, tensor in expected.items():
            difference = (got[name] - tensor).abs()
            if not (difference <= allowed[name]).all():
                raise ValueError(
                    f"the exported graph's {name} differ from PyTorch's by {float(difference.max()):.2g}, above the "
                    f"tolerance of {tolerance:g}; nothing was written"
                )
            if name == "maps":
                difference = difference[~(left_out | faint).expand_as(difference)]
            if difference.numel():
                result.differences[name] = max(result.differences[name] or 0.0, float(difference.max()))
        result.maps["faint"] += int(faint.sum())
        result.maps["left_out"] += int(left_out.sum())
        result.maps["compared"] += int((~(left_out | faint)).sum())
    return result


def _enlarged_rounding(model: Any, map_logits: torch.Tensor) -> torch.Tensor:
    """(B, N, 1, 1): what a few units in the last place before the min-max scaling are after it."""
    values = map_logits.sigmoid() if model.config.map_scaling == "sigmoid" else map_logits
    low, high = values.amin(dim=(-2, -1), keepdim=True), values.amax(dim=(-2, -1), keepdim=True)
    return 8 * torch.finfo(values.dtype).eps * torch.maximum(low.abs(), high.abs()) / (high - low).clamp(min=1e-30)
