"""From any image classifier to feature maps: which modules to tap, and how their outputs become (B, C, h, w)."""

import difflib
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

# Names of the layer norm before attention, in timm and in transformers.
_FIRST_NORMS = ("norm1", "layernorm_before", "layer_norm1", "ln_1")


@dataclass(frozen=True)
class FeatureLayer:
    """One tapped module and what its output looks like; stored in the config."""

    name: str
    channels: int
    grid: tuple[int, int]
    layout: str  # "NCHW", "NHWC" or "tokens" (B, prefix + h * w, C)
    prefix_tokens: int
    clone: bool  # a later module overwrites the output in place

    @classmethod
    def from_dict(cls, facts: dict[str, Any]) -> "FeatureLayer":
        return cls(**{**facts, "grid": tuple(facts["grid"])})

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "grid": list(self.grid)}

    def to_maps(self, output: torch.Tensor, class_token: str = "drop") -> torch.Tensor:
        """The module's output as (B, C, h, w).

        Tokens: prefix tokens are dropped and the rest laid out on the grid, row by row; with class_token="multiply"
        (the paper's ablation) the patch tokens are multiplied channel by channel by the first prefix token.
        """
        if self.layout == "NCHW":
            return output
        if self.layout == "NHWC":
            return output.permute(0, 3, 1, 2)
        patches = output[:, self.prefix_tokens :]
        if class_token == "multiply" and self.prefix_tokens:
            patches = patches * output[:, :1]
        return patches.transpose(1, 2).unflatten(2, self.grid)


def inner_module(backbone: nn.Module) -> nn.Module:
    """The module that layer names refer to: the timm model inside transformers' wrapper, else the backbone itself."""
    inner = getattr(backbone, "timm_model", None)
    return inner if isinstance(inner, nn.Module) else backbone


def classify(backbone: nn.Module, pixel_values: torch.Tensor) -> torch.Tensor:
    """Logits (B, K) of a classifier that returns them plainly or in an output object."""
    output = backbone(pixel_values)
    return output if isinstance(output, torch.Tensor) else output.logits


def _first_tensor(output: Any) -> torch.Tensor | None:
    while isinstance(output, (tuple, list)) and output:
        output = output[0]
    return output if isinstance(output, torch.Tensor) else None


@contextmanager
def capture(module: nn.Module, layers: dict[str, bool]) -> Iterator[dict[str, list[torch.Tensor]]]:
    """Collect what the named modules return while the block runs; {name: clone the output}. No hook stays behind."""
    found: dict[str, list[torch.Tensor]] = {name: [] for name in layers}

    def hook_for(name: str, clone: bool) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            tensor = _first_tensor(output)
            if tensor is not None:
                found[name].append(tensor.clone() if clone else tensor)

        return hook

    handles = []
    try:
        for name, clone in layers.items():
            handles.append(module.get_submodule(name).register_forward_hook(hook_for(name, clone)))
        yield found
    finally:
        for handle in handles:
            handle.remove()


def extract(
    backbone: nn.Module, pixel_values: torch.Tensor, layers: Sequence[FeatureLayer], class_token: str = "drop"
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Logits (B, K) and the feature maps [(B, C_l, h_l, w_l)] of one forward pass."""
    with capture(inner_module(backbone), {layer.name: layer.clone for layer in layers}) as found:
        logits = classify(backbone, pixel_values)
    return logits, [layer.to_maps(found[layer.name][0], class_token) for layer in layers]


def check_names(backbone: nn.Module, names: Sequence[str]) -> None:
    """Raise ValueError, with the nearest names, where a layer name is not a module of the backbone."""
    known = [name for name, _ in inner_module(backbone).named_modules() if name]
    for name in names:
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=4, cutoff=0.0)
            raise ValueError(
                f"feature layer {name!r} is not in the backbone; nearest: {', '.join(nearest)}; "
                "list them with `ttame layers NAME`"
            )
    if not names or len(set(names)) != len(names):
        raise ValueError(f"feature_layers must be one or more different module names, got {list(names)}")


def default_layers(backbone: nn.Module) -> list[str]:
    """The paper's layers, in forward order.

    Plain vision transformers: the first layer norm of the last three blocks. Networks with stages: the outputs of the
    last three stages (where a pooling directly follows a stage, as in VGG, the pooled output).

    Raises:
        ValueError: the backbone has neither; `feature_layers` must be given.
    """
    module = inner_module(backbone)
    if blocks := _transformer_blocks(module):
        return blocks[-3:]
    if stages := _stages(module):
        return stages[-3:]
    raise ValueError(
        f"no default layers are known for {type(module).__name__}; pass feature_layers=[...], "
        "fine to coarse, and list the modules with `ttame layers NAME`"
    )


def _transformer_blocks(module: nn.Module) -> list[str]:
    """Names of the first layer norm of every block, if all blocks stand in one list; else nothing."""
    lists = []
    for name, child in module.named_modules():
        if isinstance(child, (nn.ModuleList, nn.Sequential)) and len(child) >= 3:
            norm = next(
                (n for n in _FIRST_NORMS if all(isinstance(getattr(b, n, None), nn.Module) for b in child)), None
            )
            if norm:
                lists.append([f"{name}.{i}.{norm}" for i in range(len(child))])
    return lists[0] if len(lists) == 1 else []


def _stages(module: nn.Module) -> list[str]:
    info = getattr(module, "feature_info", None)
    if info is not None:
        names = [entry["module"] for entry in getattr(info, "info", info)]
        return list(dict.fromkeys(_pooled(module, name) for name in names))
    for name, child in module.named_modules():
        if name.split(".")[-1] == "stages" and isinstance(child, nn.ModuleList) and len(child) >= 3:
            return [f"{name}.{i}" for i in range(len(child))]
    return []


def _pooled(module: nn.Module, name: str) -> str:
    """`name`, or the pooling that follows it directly in a sequence."""
    parent, _, last = name.rpartition(".")
    sequence = module.get_submodule(parent)
    if not isinstance(sequence, nn.Sequential) or not last.isdigit() or int(last) + 1 >= len(sequence):
        return name
    following = int(last) + 1
    if not isinstance(sequence[following], (nn.MaxPool2d, nn.AvgPool2d)):
        return name
    return f"{parent}.{following}" if parent else str(following)


def _patch_grid(backbone: nn.Module, height: int, width: int) -> tuple[int, int] | None:
    """The grid of patch tokens, from the backbone's patch size; None where it has none."""
    embed = getattr(inner_module(backbone), "patch_embed", None)
    patch = getattr(embed, "patch_size", None) or getattr(getattr(backbone, "config", None), "patch_size", None)
    if patch is None:
        return None
    patch_h, patch_w = (patch, patch) if isinstance(patch, int) else tuple(patch)[-2:]
    return height // patch_h, width // patch_w


def _layout(backbone: nn.Module, name: str, output: torch.Tensor, height: int, width: int) -> dict[str, Any]:
    """Layout facts of one output: channels, grid, layout, prefix tokens."""
    if output.ndim == 4:
        _, a, b, c = output.shape
        # A square input gives a square grid: the axis that differs from the other two holds the channels.
        nhwc = a == b != c if height == width else getattr(inner_module(backbone), "output_fmt", "NCHW") == "NHWC"
        if a == b == c:
            nhwc = str(getattr(inner_module(backbone), "output_fmt", "NCHW")).endswith("NHWC")
        channels, grid = (c, (a, b)) if nhwc else (a, (b, c))
        return {"channels": channels, "grid": grid, "layout": "NHWC" if nhwc else "NCHW", "prefix_tokens": 0}
    if output.ndim == 3:
        tokens, channels = output.shape[1], output.shape[2]
        token_grid = _patch_grid(backbone, height, width)
        if token_grid is None or not 0 <= tokens - math.prod(token_grid) <= 16:
            raise ValueError(
                f"feature layer {name!r} gives {tokens} tokens, which do not fit a patch grid of {token_grid} with up "
                "to 16 prefix tokens; tap a layer whose tokens are the image's patches"
            )
        prefix = tokens - math.prod(token_grid)
        return {"channels": channels, "grid": token_grid, "layout": "tokens", "prefix_tokens": prefix}
    raise ValueError(
        f"feature layer {name!r} gives a tensor of shape {tuple(output.shape)}, not feature maps (B, C, h, w), "
        "(B, h, w, C) or tokens (B, N, C); tap a layer before the pooling"
    )


@torch.no_grad()
def probe_layers(backbone: nn.Module, names: Sequence[str], pixel_values: torch.Tensor) -> list[FeatureLayer]:
    """Run the backbone once and note what the named modules return.

    Args:
        backbone: the classifier, in eval mode.
        names: module names, fine to coarse.
        pixel_values: (B, C, H, W), any values.

    Raises:
        ValueError: an unknown name, or an output that is not feature maps.
    """
    check_names(backbone, names)
    module = inner_module(backbone)
    versions: dict[str, int] = {}

    def note(name: str) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            versions[name] = getattr(_first_tensor(output), "_version", 0)

        return hook

    handles = [module.get_submodule(name).register_forward_hook(note(name)) for name in names]
    try:
        with capture(module, dict.fromkeys(names, False)) as found:
            classify(backbone, pixel_values)
    finally:
        for handle in handles:
            handle.remove()
    height, width = pixel_values.shape[-2:]
    layers = []
    for name in names:
        outputs = found[name]
        if len(outputs) != 1 or outputs[0].shape[0] != pixel_values.shape[0]:
            raise ValueError(
                f"feature layer {name!r} must run once per pass and keep the batch, got {len(outputs)} outputs of "
                f"shape {[tuple(o.shape) for o in outputs[:2]]} for a batch of {pixel_values.shape[0]}; tap another"
            )
        facts = _layout(backbone, name, outputs[0], height, width)
        layers.append(FeatureLayer(name=name, clone=outputs[0]._version != versions[name], **facts))
    return layers


@torch.no_grad()
def tappable_layers(backbone: nn.Module, pixel_values: torch.Tensor) -> list[FeatureLayer]:
    """Every module whose output is feature maps of more than one place, in the order in which they run.

    Args:
        backbone: the classifier, in eval mode.
        pixel_values: (B, C, H, W), any values.
    """
    module = inner_module(backbone)
    height, width = pixel_values.shape[-2:]
    found: dict[str, list[FeatureLayer]] = {}

    def note(name: str) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            tensor = _first_tensor(output)
            if tensor is None or tensor.shape[0] != pixel_values.shape[0]:
                return
            try:
                layer = FeatureLayer(name=name, clone=False, **_layout(backbone, name, tensor, height, width))
            except ValueError:
                return
            if min(layer.grid) > 1:
                found.setdefault(name, []).append(layer)

        return hook

    handles = [child.register_forward_hook(note(name)) for name, child in module.named_modules() if name]
    try:
        classify(backbone, pixel_values)
    finally:
        for handle in handles:
            handle.remove()
    return [layers[0] for layers in found.values() if len(layers) == 1]  # a module that runs twice cannot be tapped


@dataclass(frozen=True)
class PooledClassifier:
    """A linear classifier that reads the plain average of one feature layer.

    The logits are weight @ mean(layer) + bias, plus what `weight` does not cover (a class token beside the average).
    """

    layer: str
    weight: torch.Tensor  # (K, C), the columns that read the average
    bias: torch.Tensor | None  # (K,)
    non_negative: bool  # whether the layer's values never fall below zero, so that a ReLU leaves them alone


@torch.no_grad()
def find_pooled_classifier(backbone: nn.Module, pixel_values: torch.Tensor) -> PooledClassifier | None:
    """The linear classifier and the map whose average it reads, found by comparing numbers; None where there is none.

    Args:
        backbone: the classifier, in eval mode.
        pixel_values: (B, C, H, W), B >= 2, random.
    """
    module = inner_module(backbone)
    height, width = pixel_values.shape[-2:]
    linears: list[tuple[nn.Linear, torch.Tensor, torch.Tensor]] = []
    means: list[tuple[str, torch.Tensor, bool]] = []

    def note(name: str, child: nn.Module) -> Any:
        def hook(_module: nn.Module, args: Any, output: Any) -> None:
            tensor = _first_tensor(output)
            if isinstance(child, nn.Linear) and tensor is not None and tensor.ndim == 2:
                linears.append((child, args[0].clone(), tensor.clone()))
            elif tensor is not None and tensor.ndim in (3, 4) and tensor.shape[0] == pixel_values.shape[0]:
                try:
                    facts = _layout(backbone, name, tensor, height, width)
                except ValueError:
                    return
                maps = FeatureLayer(name=name, clone=False, **facts).to_maps(tensor)
                if min(maps.shape[-2:]) > 1:
                    means.append((name, maps.mean(dim=(-2, -1)), bool(maps.min() >= 0)))

        return hook

    handles = [child.register_forward_hook(note(name, child)) for name, child in module.named_modules() if name]
    try:
        logits = classify(backbone, pixel_values)
    finally:
        for handle in handles:
            handle.remove()
    classifiers = [(linear, x) for linear, x, out in linears if out.shape == logits.shape and torch.equal(out, logits)]
    if not classifiers:
        return None
    linear, x = classifiers[-1]
    # The shortest name: "layer4" rather than its last activation, which is the same tensor.
    for name, mean, non_negative in sorted(means, key=lambda entry: entry[0].count(".")):
        width_ = mean.shape[1]
        for start in range(0, x.shape[1] - width_ + 1, width_):
            part = x[:, start : start + width_]
            if torch.allclose(part, mean, rtol=1e-4, atol=1e-5):
                weight = linear.weight[:, start : start + width_].clone()
                return PooledClassifier(
                    name, weight, None if linear.bias is None else linear.bias.clone(), non_negative
                )
    return None
