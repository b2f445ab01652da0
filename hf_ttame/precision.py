"""Passes in lower precision where only speed asks for it: the modules compute in it, everything around in float32."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .modeling_ttame import TTameModel

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@contextmanager
def passes_in(model: TTameModel, precision: str) -> Iterator[None]:
    """Run backbone and head under autocast while the block runs; what they return is float32.

    Maps, masks and imputed pixels, which are made of what the modules return, are computed in float32 as ever.

    Args:
        model: the explainer, weights in float32.
        precision: of PRECISIONS; "float32" changes nothing.

    Raises:
        ValueError: another precision.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    from accelerate.utils import convert_outputs_to_fp32

    modules = [] if precision == "float32" else [model.backbone, model.head]
    for module in modules:
        lower = torch.autocast(model.device.type, PRECISIONS[precision])(module.forward)
        module.forward = convert_outputs_to_fp32(lower)
    try:
        yield
    finally:
        for module in modules:
            del module.forward  # the class's own is back


@contextmanager
def in_float32(model: TTameModel) -> Iterator[None]:
    """Undo `passes_in` of the backbone while the block runs: for differences that lower precision would round away.

    Convolutions on a GPU do not round to TensorFloat-32 there either, as they do in PyTorch's default.
    """
    lower = model.backbone.__dict__.pop("forward", None)
    try:
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            yield
    finally:
        if lower is not None:
            model.backbone.forward = lower
