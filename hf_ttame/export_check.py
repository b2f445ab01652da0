"""An exported graph beside PyTorch, on the same pixels."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch

from .answers import probabilities

Inputs = dict[str, torch.Tensor]
_TOGETHER = 8


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
def compare(model: Any, path: Path, batches: Sequence[Inputs], tolerance: float) -> dict[str, float]:
    """Largest absolute difference per output between the file and the model, its head as it is stored.

    Maps that vary by less than a hundredth of their values before the scaling are held to a wider tolerance, and left
    out of what is returned: the scaling enlarges the rounding of float32 with them.

    Args:
        model: the explainer.
        path: the exported graph.
        batches: its inputs, by name.
        tolerance: see `export_onnx`.

    Raises:
        ValueError: a difference is above the tolerance, or the graph chooses other classes.
    """
    session = open_session(path)
    differences: dict[str, float] = {}
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
        allowed = {
            "logits": spread,
            "scores": torch.tensor(tolerance),
            "map_logits": tolerance * map_logits.abs().max().clamp(min=1),
            "maps": _enlarged_rounding(model, map_logits).clamp(min=tolerance),
        }
        for name, tensor in expected.items():
            difference = (got[name] - tensor).abs()
            if not (difference <= allowed[name]).all():
                raise ValueError(
                    f"the exported graph's {name} differ from PyTorch's by {float(difference.max()):.2g}, above the "
                    f"tolerance of {tolerance:g}; nothing was written"
                )
            if name == "maps":
                difference = difference[(allowed[name] == tolerance).expand_as(difference)]
            differences[name] = max(differences.get(name, 0.0), float(difference.max()) if len(difference) else 0.0)
    return differences


def _enlarged_rounding(model: Any, map_logits: torch.Tensor) -> torch.Tensor:
    """(B, N, 1, 1): what a few units in the last place before the min-max scaling are after it."""
    values = map_logits.sigmoid() if model.config.map_scaling == "sigmoid" else map_logits
    low, high = values.amin(dim=(-2, -1), keepdim=True), values.amax(dim=(-2, -1), keepdim=True)
    return 8 * torch.finfo(values.dtype).eps * torch.maximum(low.abs(), high.abs()) / (high - low).clamp(min=1e-30)
