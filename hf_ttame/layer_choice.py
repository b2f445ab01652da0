"""Which layers to tap when nobody says so, and where the classifier's own map lies."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .features import (
    FeatureLayer,
    check_names,
    classify,
    first_tensor,
    inner_module,
    layout_of,
    listed,
    probe_layers,
    run,
    run_listed,
)

# Names of the layer norm before attention, in timm and in transformers.
_FIRST_NORMS = ("norm1", "layernorm_before", "layer_norm1", "ln_1")


@torch.no_grad()
def choose_layers(
    backbone: nn.Module, pixel_values: torch.Tensor, names: Sequence[str] | None, pooled: "PooledClassifier | None"
) -> list[FeatureLayer]:
    """The layers to tap, probed: those named, else the default ones with the map that the classifier averages last.

    Args:
        backbone: the classifier, in eval mode.
        pixel_values: (B, C, H, W), random.
        names: names as in `FeatureLayer`, fine to coarse, or None.
        pooled: where the head is to start as the class activation map, see `find_pooled_classifier`.

    Raises:
        ValueError: an unknown name, a layer without maps, no default layers, or `names` without the pooled map.
    """
    chosen = list(names) if names is not None else default_layers(backbone, pixel_values)
    if pooled is not None and names is None and pooled.layer in chosen:
        chosen = [name for name in chosen if name != pooled.layer] + [pooled.layer]
    elif pooled is not None and names is None:
        chosen[-1] = pooled.layer
    check_names(backbone, chosen)
    if pooled is not None and pooled.layer != chosen[-1]:
        raise ValueError(
            f"head_init='classifier' needs {pooled.layer!r}, the map that the classifier averages, as the last "
            f"feature layer, got {chosen}"
        )
    layers = probe_layers(backbone, chosen, pixel_values)
    if any(listed(name) for name in chosen):
        logits, _ = run_listed(backbone, pixel_values, chosen)
        if not torch.allclose(logits, classify(backbone, pixel_values), rtol=1e-3, atol=1e-4):
            raise ValueError(
                f"{type(inner_module(backbone)).__name__} gives other logits in the pass that returns its "
                f"intermediates {chosen}; name modules instead: list them with `ttame layers NAME`"
            )
    return layers


@torch.no_grad()
def default_layers(backbone: nn.Module, pixel_values: torch.Tensor) -> list[str]:
    """Three layers in forward order, fine to coarse, by the first rule that fits.

    1. Plain vision transformers (all blocks in one list, one token grid): the first layer norm of the last three
       blocks, as the paper.
    2. Networks whose stages are modules that return feature maps: the last three stages (where a pooling directly
       follows a stage, as in VGG, the pooled output), as the paper.
    3. Other networks that return their intermediates themselves (timm's `forward_intermediates`, transformers'
       `hidden_states` and `reshaped_hidden_states`): the last result on each of the last three grids; where there are
       fewer grids, the latest results.

    Args:
        backbone: the classifier, in eval mode.
        pixel_values: (B, C, H, W), any values.

    Raises:
        ValueError: no rule fits; `feature_layers` must be given.
    """
    module = inner_module(backbone)
    tappable = {layer.name: layer for layer in tappable_layers(backbone, pixel_values)}
    blocks = _transformer_blocks(module)
    facts = {(tappable[name].layout, tappable[name].grid) if name in tappable else None for name in blocks}
    if len(facts) == 1 and (fact := facts.pop()) and fact[0] == "tokens":
        return blocks[-3:]
    stages = [tappable[name] for name in _stages(module) if name in tappable]
    maps = [layer for layer in stages if layer.layout != "tokens"]
    if maps and maps[-1:] == stages[-1:] and len(maps) >= 3:
        return [layer.name for layer in _last_grids(maps)]
    if intermediates := _intermediates(backbone, pixel_values):
        return [layer.name for layer in _last_grids(intermediates)]
    if maps:
        return [layer.name for layer in _last_grids(maps)]
    raise ValueError(
        f"no default layers are known for {type(module).__name__}; pass feature_layers=[...], "
        "fine to coarse, and list the modules with `ttame layers NAME`"
    )


def _last_grids(layers: Sequence[FeatureLayer], count: int = 3) -> list[FeatureLayer]:
    """Per grid the last layer that has it, of the last `count` grids; filled up with the latest others."""
    last = {layer.grid: position for position, layer in enumerate(layers)}
    chosen = sorted(last.values())[-count:]
    others = [position for position in range(len(layers)) if position not in chosen]
    chosen += others[len(others) - max(0, count - len(chosen)) :]
    return [layers[position] for position in sorted(chosen)]


def _transformer_blocks(module: nn.Module) -> list[str]:
    """Names of the first layer norm of every block, if all blocks stand in one list; else nothing."""
    lists = []
    for name, child in module.named_modules():
        if isinstance(child, (nn.ModuleList, nn.Sequential)) and len(child) >= 1:
            norm = next(
                (n for n in _FIRST_NORMS if all(isinstance(getattr(b, n, None), nn.Module) for b in child)), None
            )
            if norm:
                lists.append([f"{name}.{i}.{norm}" for i in range(len(child))])
    return lists[0] if len(lists) == 1 and len(lists[0]) >= 3 else []


def _stages(module: nn.Module) -> list[str]:
    """Names of the stages: timm's own list of them, or a module list called stages."""
    info = getattr(module, "feature_info", None)
    if info is not None:
        known = {name for name, _ in module.named_modules()}
        names = [entry["module"] for entry in getattr(info, "info", info)]
        return list(dict.fromkeys(_pooled(module, name) for name in names if name in known))
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


def _intermediates(backbone: nn.Module, pixel_values: torch.Tensor) -> list[FeatureLayer]:
    """The maps in the library's own list, in forward order."""
    module: Any = inner_module(backbone)
    if module is not backbone:
        if not hasattr(module, "forward_intermediates"):
            return []
        count = len(module.forward_intermediates(pixel_values, intermediates_only=True))
        names = [f"hidden_states[{i}]" for i in range(count)]
    elif getattr(backbone, "config", None) is None:
        return []  # no model of transformers
    else:
        output = run(backbone, pixel_values, [])
        which = "reshaped_hidden_states" if getattr(output, "reshaped_hidden_states", None) else "hidden_states"
        names = [f"{which}[{i}]" for i in range(len(getattr(output, which, None) or ()))]
    _, outputs = run_listed(backbone, pixel_values, names)
    height, width = pixel_values.shape[-2:]
    layers = []
    for name, tensor in outputs.items():
        try:
            layer = FeatureLayer(name=name, clone=False, **layout_of(backbone, name, tensor, height, width))
        except ValueError:
            continue
        if min(layer.grid) > 1:
            layers.append(layer)
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
            tensor = first_tensor(output)
            if tensor is None or tensor.shape[0] != pixel_values.shape[0]:
                return
            try:
                layer = FeatureLayer(name=name, clone=False, **layout_of(backbone, name, tensor, height, width))
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
    """A linear classifier that reads the plain average of one feature layer, or the class token beside it.

    The logits are weight @ mean(layer) + bias, plus what `weight` does not cover (a class token beside the average).
    With `reads` "token" they are weight @ token + bias, the token being the first of the same layer.
    """

    layer: str
    weight: torch.Tensor  # (K, C), the columns that read the average, or the token
    bias: torch.Tensor | None  # (K,)
    non_negative: bool  # whether the layer's values never fall below zero, so that a ReLU leaves them alone
    reads: str = "mean"


@torch.no_grad()
def find_pooled_classifier(
    backbone: nn.Module, pixel_values: torch.Tensor, *, or_class_token: bool = False
) -> PooledClassifier | None:
    """The linear classifier and the map whose average it reads, found by comparing numbers; None where there is none.

    Args:
        backbone: the classifier, in eval mode.
        pixel_values: (B, C, H, W), B >= 2, random.
        or_class_token: where no average is read, take a classifier that reads the class token of a layer.
    """
    module = inner_module(backbone)
    height, width = pixel_values.shape[-2:]
    linears: list[tuple[nn.Linear, torch.Tensor, torch.Tensor]] = []
    means: list[tuple[str, torch.Tensor, bool]] = []
    tokens: list[tuple[str, torch.Tensor, bool]] = []

    def note(name: str, child: nn.Module) -> Any:
        def hook(_module: nn.Module, args: Any, output: Any) -> None:
            tensor = first_tensor(output)
            if isinstance(child, nn.Linear) and tensor is not None and tensor.ndim == 2:
                linears.append((child, args[0].clone(), tensor.clone()))
            elif tensor is not None and tensor.ndim in (3, 4) and tensor.shape[0] == pixel_values.shape[0]:
                try:
                    facts = layout_of(backbone, name, tensor, height, width)
                except ValueError:
                    return
                layer = FeatureLayer(name=name, clone=False, **facts)
                maps = layer.to_maps(tensor)
                if min(maps.shape[-2:]) > 1:
                    means.append((name, maps.mean(dim=(-2, -1)), bool(maps.min() >= 0)))
                    if layer.prefix_tokens:
                        tokens.append((name, tensor[:, 0].clone(), bool(maps.min() >= 0)))

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
    runs = Counter(name for name, _, _ in means)
    for reads, candidates in (("mean", means), ("token", tokens if or_class_token else [])):
        once = [entry for entry in candidates if runs[entry[0]] == 1]  # a module that runs twice cannot be tapped
        # The shortest name: "layer4" rather than its last activation, which is the same tensor.
        for name, vector, non_negative in sorted(once, key=lambda entry: entry[0].count(".")):
            columns = _columns_reading(vector, x)
            if columns is not None:
                weight = linear.weight[:, columns].clone()
                bias = None if linear.bias is None else linear.bias.clone()
                return PooledClassifier(name, weight, bias, non_negative, reads)
    return None


def _columns_reading(vector: torch.Tensor, x: torch.Tensor) -> slice | None:
    """Where the classifier's input x (B, D) holds `vector` (B, C), as a multiple of C; None where nowhere."""
    width = vector.shape[1]
    for start in range(0, x.shape[1] - width + 1, width):
        part = x[:, start : start + width]
        # Relative to its size, and it must tell two pictures apart: values near zero would match anything.
        error, size = (part - vector).norm(), part.norm()
        if error <= 1e-4 * size and (part[0] - part[1]).norm() > 1e-3 * size:
            return slice(start, start + width)
    return None
