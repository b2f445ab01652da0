"""From any image classifier to feature maps: what is tapped in one pass, and how it becomes (B, C, h, w)."""

import difflib
import inspect
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

MAX_PREFIX_TOKENS = 16
# "hidden_states[2]": the library's own list of intermediate results instead of a module.
_LISTED = re.compile(r"(hidden_states|reshaped_hidden_states)\[(\d+)\]")


@dataclass(frozen=True)
class FeatureLayer:
    """One tapped place and what comes out of it; stored in the config.

    `name` is a module's name ("layer4"), or an entry of a list that the library returns: "hidden_states[2]" (for timm
    models the list of `forward_intermediates`), "reshaped_hidden_states[2]".
    """

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
        """The output as (B, C, h, w).

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


def listed(name: str) -> tuple[str, int] | None:
    """("hidden_states", 2) of "hidden_states[2]"; None where the name is a module's."""
    match = _LISTED.fullmatch(name)
    return (match[1], int(match[2])) if match else None


def inner_module(backbone: nn.Module) -> nn.Module:
    """The module that layer names refer to: the timm model inside transformers' wrapper, else the backbone itself."""
    inner = getattr(backbone, "timm_model", None)
    return inner if isinstance(inner, nn.Module) else backbone


def run(backbone: nn.Module, pixel_values: torch.Tensor, indices: Sequence[int] | None = None) -> Any:
    """The backbone's output object (or its bare logits); with `indices` also those intermediates it returns itself.

    timm's wrapper returns just the intermediates asked for; transformers' models return all of them.
    """
    arguments: dict[str, Any] = {}
    if indices is not None:
        arguments["output_hidden_states"] = list(indices) if inner_module(backbone) is not backbone else True
    config: Any = getattr(backbone, "config", None)
    trained_at = getattr(getattr(config, "vision_config", config), "image_size", None)
    if trained_at is not None and _interpolates(backbone):
        size = (trained_at, trained_at) if isinstance(trained_at, int) else tuple(trained_at)
        if size != tuple(pixel_values.shape[-2:]):
            arguments["interpolate_pos_encoding"] = True
    return backbone(pixel_values, **arguments)


def _interpolates(backbone: nn.Module) -> bool:
    """Whether the position encoding can follow another input size; some models pass the word on unnamed."""
    named = "interpolate_pos_encoding" in inspect.signature(backbone.forward).parameters
    return named or getattr(getattr(backbone, "config", None), "model_type", None) in ("clip", "siglip", "metaclip_2")


def logits_of(output: Any) -> torch.Tensor:
    """Logits (B, K) of a plain tensor or an output object; PP-LCNet's stand in `last_hidden_state`."""
    if isinstance(output, torch.Tensor):
        return output
    logits = getattr(output, "logits", None)
    return output.last_hidden_state if logits is None else logits


def probe_noise(channels: int, size: tuple[int, int], seed: int = 0) -> torch.Tensor:
    """Two pictures of noise (2, channels, H, W), always the same ones: what a backbone is probed with."""
    return torch.randn(2, channels, *size, generator=torch.Generator().manual_seed(seed))


def classify(backbone: nn.Module, pixel_values: torch.Tensor) -> torch.Tensor:
    """Logits (B, K) of a classifier that returns them plainly or in an output object."""
    return logits_of(run(backbone, pixel_values))


def first_tensor(output: Any) -> torch.Tensor | None:
    while isinstance(output, (tuple, list)) and output:
        output = output[0]
    return output if isinstance(output, torch.Tensor) else None


@contextmanager
def capture(module: nn.Module, layers: dict[str, bool]) -> Iterator[dict[str, list[torch.Tensor]]]:
    """Collect what the named modules return while the block runs; {name: clone the output}. No hook stays behind."""
    found: dict[str, list[torch.Tensor]] = {name: [] for name in layers}

    def hook_for(name: str, clone: bool) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            tensor = first_tensor(output)
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
    hooked = {layer.name: layer.clone for layer in layers if listed(layer.name) is None}
    with capture(inner_module(backbone), hooked) as found:
        logits, outputs = run_listed(backbone, pixel_values, [layer.name for layer in layers])
    outputs |= {name: tensors[0] for name, tensors in found.items()}
    return logits, [layer.to_maps(outputs[layer.name], class_token) for layer in layers]


def run_listed(
    backbone: nn.Module, pixel_values: torch.Tensor, names: Sequence[str]
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits (B, K) and, by name, those of `names` that stand in a list which the library returns.

    Raises:
        ValueError: the backbone returns no such list, or a shorter one.
    """
    entries = {name: entry for name in names if (entry := listed(name))}
    if not entries:
        return classify(backbone, pixel_values), {}
    indices = sorted({index for _, index in entries.values()})
    is_timm = inner_module(backbone) is not backbone
    try:
        output = run(backbone, pixel_values, indices)
        if is_timm:  # a compact list, in ascending order
            found = dict(zip(indices, output.hidden_states, strict=True))
            return logits_of(output), {name: found[index] for name, (_, index) in entries.items()}
        return logits_of(output), {name: getattr(output, which)[i] for name, (which, i) in entries.items()}
    except (AttributeError, IndexError, TypeError, AssertionError) as error:
        raise ValueError(
            f"{type(inner_module(backbone)).__name__} does not return {', '.join(entries)} ({error}); "
            "name modules instead: list them with `ttame layers NAME`"
        ) from error


def check_names(backbone: nn.Module, names: Sequence[str]) -> None:
    """Raise ValueError, with the nearest names, where a layer name is not a module of the backbone."""
    known = {name for name, _ in inner_module(backbone).named_modules() if name}
    for name in names:
        if name not in known and not listed(name):
            nearest = difflib.get_close_matches(name, known, n=4, cutoff=0.0)
            raise ValueError(
                f"feature layer {name!r} is not in the backbone; nearest: {', '.join(nearest)}; "
                "list them with `ttame layers NAME`"
            )
    if not names or len(set(names)) != len(names):
        raise ValueError(f"feature_layers must be one or more different module names, got {list(names)}")


def _patch_grid(backbone: nn.Module, height: int, width: int) -> tuple[int, int] | None:
    """The grid of patch tokens as the backbone states it; None where it states none."""
    embed: Any = getattr(inner_module(backbone), "patch_embed", None)
    if callable(getattr(embed, "dynamic_feat_size", None)):
        grid = embed.dynamic_feat_size((height, width))
        return int(grid[0]), int(grid[1])
    config: Any = getattr(backbone, "config", None)
    patch = getattr(embed, "patch_size", None) or getattr(getattr(config, "vision_config", config), "patch_size", None)
    if patch is None:
        return None
    patch_h, patch_w = (patch, patch) if isinstance(patch, int) else tuple(patch)[-2:]
    return height // patch_h, width // patch_w


def _token_layout(backbone: nn.Module, tokens: int, height: int, width: int) -> tuple[tuple[int, int], int] | None:
    """(grid, prefix tokens) of a row of tokens; None where they cannot be patches of the image, row by row.

    First the grid that the backbone states; else (a hierarchy, where the grid shrinks from stage to stage) the grid
    in the proportions of the image that leaves the fewest prefix tokens over.
    """
    stated = _patch_grid(backbone, height, width)
    if stated and 0 <= tokens - math.prod(stated) <= MAX_PREFIX_TOKENS:
        return stated, tokens - math.prod(stated)
    for prefix in range(min(MAX_PREFIX_TOKENS + 1, tokens)):
        patches = tokens - prefix
        grid = (round(math.sqrt(patches * height / width)), round(math.sqrt(patches * width / height)))
        if min(grid) > 1 and math.prod(grid) == patches:
            return grid, prefix
    return None


def _out_of_order(backbone: nn.Module) -> bool:
    """Whether token rows inside the backbone are not in reading order: Hiera sorts them by mask unit."""
    return any("reroll" in name.rsplit(".", 1)[-1] for name, _ in inner_module(backbone).named_modules())


def layout_of(backbone: nn.Module, name: str, output: torch.Tensor, height: int, width: int) -> dict[str, Any]:
    """Layout facts of one output: channels, grid, layout, prefix tokens."""
    if output.ndim == 4:
        _, a, b, c = output.shape
        stated = str(getattr(inner_module(backbone), "output_fmt", "NCHW"))
        if listed(name) and inner_module(backbone) is not backbone:
            nhwc = False  # timm returns its intermediates as NCHW
        elif a * width == b * height and b * width != c * height:
            nhwc = True  # the first two axes have the image's proportions
        elif b * width == c * height and a * width != b * height:
            nhwc = False
        else:
            nhwc = stated.endswith("NHWC")
        channels, grid = (c, (a, b)) if nhwc else (a, (b, c))
        return {"channels": channels, "grid": grid, "layout": "NHWC" if nhwc else "NCHW", "prefix_tokens": 0}
    if output.ndim == 3:
        tokens, channels = output.shape[1], output.shape[2]
        if _out_of_order(backbone):
            raise ValueError(
                f"feature layer {name!r} gives tokens in mask-unit order, not in reading order; tap an entry of the "
                "library's own list, such as 'hidden_states[2]' (timm) or 'reshaped_hidden_states[2]' (transformers)"
            )
        found = _token_layout(backbone, tokens, height, width)
        if found is None:
            raise ValueError(
                f"feature layer {name!r} gives {tokens} tokens, which fit no grid of an image of {height} x {width} "
                f"pixels with up to {MAX_PREFIX_TOKENS} prefix tokens (stated patch grid: "
                f"{_patch_grid(backbone, height, width)}); tap a layer whose tokens are the image's patches"
            )
        return {"channels": channels, "grid": found[0], "layout": "tokens", "prefix_tokens": found[1]}
    raise ValueError(
        f"feature layer {name!r} gives a tensor of shape {tuple(output.shape)}, not feature maps (B, C, h, w), "
        "(B, h, w, C) or tokens (B, N, C); tap a layer before the pooling"
    )


@torch.no_grad()
def probe_layers(backbone: nn.Module, names: Sequence[str], pixel_values: torch.Tensor) -> list[FeatureLayer]:
    """Run the backbone once and note what the named layers return.

    Args:
        backbone: the classifier, in eval mode.
        names: names as in `FeatureLayer`, fine to coarse.
        pixel_values: (B, C, H, W), any values.

    Raises:
        ValueError: an unknown name, or an output that is not feature maps.
    """
    check_names(backbone, names)
    module = inner_module(backbone)
    hooked = [name for name in names if listed(name) is None]
    versions: dict[str, int] = {}

    def note(name: str) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            versions[name] = getattr(first_tensor(output), "_version", 0)

        return hook

    handles = [module.get_submodule(name).register_forward_hook(note(name)) for name in hooked]
    try:
        with capture(module, dict.fromkeys(hooked, False)) as found:
            _, outputs = run_listed(backbone, pixel_values, names)
    finally:
        for handle in handles:
            handle.remove()
    height, width = pixel_values.shape[-2:]
    layers = []
    for name in names:
        tensors = [outputs[name]] if name in outputs else found[name]
        if len(tensors) != 1 or tensors[0].shape[0] != pixel_values.shape[0]:
            raise ValueError(
                f"feature layer {name!r} must run once per pass and keep the batch, got {len(tensors)} outputs of "
                f"shape {[tuple(t.shape) for t in tensors[:2]]} for a batch of {pixel_values.shape[0]}; tap another"
            )
        facts = layout_of(backbone, name, tensors[0], height, width)
        clone = name in versions and tensors[0]._version != versions[name]
        layers.append(FeatureLayer(name=name, clone=clone, **facts))
    return layers
