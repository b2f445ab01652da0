"""An exported graph beside PyTorch, on the same pixels."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime
import torch

if TYPE_CHECKING:
    from .export import ExplainerGraph

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
def compare(graph: "ExplainerGraph", path: Path, batches: Sequence[Inputs], tolerance: float) -> dict[str, float]:
    """Largest absolute difference per output.

    Maps that vary by less than a hundredth of their values before the scaling are held to a wider tolerance, and left
    out of what is returned: the scaling enlarges the rounding of float32 with them.

    Raises:
        ValueError: one is above the tolerance (see `export_onnx`), or the graph chooses other classes.
    """
    session = open_session(path)
    differences: dict[str, float] = {}
    for inputs in batches:
        got = run(session, inputs)
        expected = dict(zip(graph.names, graph(**inputs), strict=True))
        for name, tensor in expected.items():
            if name == "class_ids":
                if not np.array_equal(got[name], tensor):
                    raise ValueError(f"the exported graph explains the classes {got[name]}, PyTorch {tensor}")
                continue
            difference = (torch.from_numpy(got[name]) - tensor).abs()
            allowed = torch.tensor(tolerance)
            if name == "maps":
                difference = difference.amax(dim=(-2, -1))
                rounding = _enlarged_rounding(graph, expected["map_logits"])
                allowed = torch.maximum(allowed, rounding)
                differences[name] = max(differences.get(name, 0.0), float((difference * (rounding < 1e-4)).max()))
            else:
                if name != "scores":
                    allowed = allowed * tensor.abs().max().clamp(min=1)
                differences[name] = max(differences.get(name, 0.0), float(difference.max()))
            if not (difference <= allowed).all():
                raise ValueError(
                    f"the exported graph's {name} differ from PyTorch's by {float(difference.max()):.2g}, above the "
                    f"tolerance of {tolerance:g}; nothing was written"
                )
    return differences


def _enlarged_rounding(graph: "ExplainerGraph", map_logits: torch.Tensor) -> torch.Tensor:
    """(B, N): what a few units in the last place before the min-max scaling are after it."""
    sigmoid = graph.model.config.map_scaling == "sigmoid"
    values = (map_logits.sigmoid() if sigmoid else map_logits).flatten(2)
    span = values.amax(dim=2) - values.amin(dim=2)
    return 8 * torch.finfo(values.dtype).eps * values.abs().amax(dim=2) / span.clamp(min=1e-30)
