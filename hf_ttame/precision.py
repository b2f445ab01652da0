"""Passes in lower precision where only speed asks for it: the modules compute in it, everything around in float32."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch

from .modeling_ttame import TTameModel

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@contextmanager
def passes_in(model: TTameModel, precision: str) -> Iterator[None]:
    """Run backbone and head under autocast while the block runs; what they return is float32.

    Maps, masks and imputed pixels, which are made of what the modules return, are computed in float32 as ever.

    Args:
        model: the explainer, weights in float32.
        precision: of PRECISIONS; "float32" leaves the modules as they are, and is not rounded to TensorFloat-32.

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
        with _without_tensorfloat() if precision == "float32" else nullcontext():
            yield
    finally:
        for module in modules:
            del module.forward  # the class's own is back


@contextmanager
def _without_tensorfloat() -> Iterator[None]:
    """Let no convolution on a GPU round float32 to TensorFloat-32, as it does by default, while the block runs."""
    convolutions = getattr(torch.backends.cudnn, "conv", None)
    holder, name, exact = (
        (torch.backends.cudnn, "allow_tf32", False)  # before PyTorch 2.9
        if convolutions is None
        else (convolutions, "fp32_precision", "ieee")
    )
    before = getattr(holder, name)
    setattr(holder, name, exact)
    try:
        yield
    finally:
        setattr(holder, name, before)


@contextmanager
def in_float32(model: TTameModel) -> Iterator[None]:
    """Undo `passes_in` of the backbone while the block runs: for differences that lower precision would round away."""
    lower = model.backbone.__dict__.pop("forward", None)
    try:
        with _without_tensorfloat():
            yield
    finally:
        if lower is not None:
            model.backbone.forward = lower
