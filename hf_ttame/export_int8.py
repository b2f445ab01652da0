"""A graph with 8-bit weights, and how far it agrees with the exact one."""

import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_dynamic, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

from .export_check import Inputs, open_session, run

# What networks are made of. The softmax and the scaling of the maps stay exact: 256 levels would tie small scores.
_OPERATORS = (
    *("Conv", "Gemm", "MatMul", "Clip", "Relu", "Add", "Mul", "Concat", "GlobalAveragePool", "ReduceMean"),
    *("AveragePool", "MaxPool", "Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze"),
)


class _Pictures(CalibrationDataReader):
    def __init__(self, batches: Sequence[Inputs]):
        self.batches = iter([{name: tensor.numpy() for name, tensor in inputs.items()} for inputs in batches])

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self.batches, None)


def quantise(exact: Path, target: Path, calibration: Sequence[Inputs]) -> None:
    """Write a graph with 8-bit weights.

    Where convolutions hold most of the weights, activations are 8 bits too, their ranges taken from the calibration
    pictures. Else (transformers, whose activations have outliers) only the matrix products are quantised, their
    activations at run time.

    Args:
        exact: the float32 graph.
        target: file to write.
        calibration: inputs of the graph, by name.
    """
    metadata = onnx.load(exact).metadata_props
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)  # onnxruntime's advice to do what is done here
    try:
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            fused = Path(folder, "fused.onnx")
            quant_pre_process(exact, fused, skip_symbolic_shape=True)
            if _weights_of(exact, ("Conv",)) > _weights_of(exact, ("MatMul", "Gemm")):
                quantize_static(
                    fused,
                    target,
                    _Pictures(calibration),
                    op_types_to_quantize=list(_OPERATORS),
                    per_channel=True,
                    activation_type=QuantType.QUInt8,
                    weight_type=QuantType.QInt8,
                )
            else:
                quantize_dynamic(
                    fused,
                    target,
                    per_channel=True,
                    weight_type=QuantType.QInt8,
                    op_types_to_quantize=["MatMul", "Gemm"],
                )
    finally:
        root.setLevel(level)
    proto = onnx.load(target)
    del proto.metadata_props[:]
    proto.metadata_props.extend(metadata)
    onnx.save(proto, target)


def _weights_of(path: Path, operators: tuple[str, ...]) -> int:
    graph = onnx.load(path).graph
    sizes = {tensor.name: int(np.prod(tensor.dims)) for tensor in graph.initializer}
    used = {name for node in graph.node if node.op_type in operators for name in node.input}
    return sum(size for name, size in sizes.items() if name in used)


def agree(exact: Path, quantised: Path, batches: Sequence[Inputs], images: int) -> dict[str, float | int | None]:
    """How far a quantised graph says the same as the exact one on the first `images` pictures of the batches.

    Returns:
        images; top1: share of images with the same predicted class; map_correlation: mean Pearson correlation of the
        maps of the same class, None where there are none; maps: how many those are; maps_left_out: how many are
        flat, or of a class that the quantised graph does not explain; largest_score_difference.

    Raises:
        ValueError: a score or a map of the quantised graph is not finite.
    """
    sessions = open_session(exact), open_session(quantised)
    same: list[bool] = []
    correlations: list[float] = []
    scores: list[float] = []
    asked = 0
    for inputs in batches:
        ours, other = (run(session, inputs) for session in sessions)
        if not all(np.isfinite(other[name]).all() for name in ("scores", "maps")):
            raise ValueError(
                "the int8 graph gives values that are not finite; nothing was written: export without int8"
            )
        for image in range(min(len(ours["scores"]), images - len(same))):
            same.append(bool(ours["logits"][image].argmax() == other["logits"][image].argmax()))
            scores.append(float(np.abs(ours["scores"][image] - other["scores"][image]).max()))
            correlations += _correlations(ours, other, image)
            asked += ours["maps"].shape[1]
    return {
        "images": images,
        "top1": round(float(np.mean(same)), 4),
        "map_correlation": round(float(np.mean(correlations)), 4) if correlations else None,
        "maps": len(correlations),
        "maps_left_out": asked - len(correlations),
        "largest_score_difference": round(max(scores), 4),
    }


def _correlations(ours: dict[str, np.ndarray], other: dict[str, np.ndarray], image: int) -> list[float]:
    """Of each map that both graphs give for the image; a flat map has none."""
    first, second = (
        dict(zip(out["class_ids"][image].tolist(), out["maps"][image], strict=True))
        if "class_ids" in out
        else dict(enumerate(out["maps"][image]))
        for out in (ours, other)
    )
    pairs = [(first[class_id].ravel(), second[class_id].ravel()) for class_id in first.keys() & second.keys()]
    return [float(np.corrcoef(a, b)[0, 1]) for a, b in pairs if np.ptp(a) > 0 and np.ptp(b) > 0]
