"""The authors' checkpoints (PyTorch Lightning, three backbones) as explainers.

Written from the documented layout: the file's names and shapes, not its code. Tested on files made in that layout; no
real checkpoint was at hand. Nothing is unpickled beyond tensors and plain values.
"""

import os
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from transformers import TimmWrapperConfig, TimmWrapperForImageClassification

from .cards import is_ours, write_card
from .modeling_ttame import TTameModel

LICENCE = "academic-non-commercial"
_HEAD = re.compile(r"generic\.attn_mech\.(?:1\.)?((?:convs|bns|fuser)\..+)")
_PAPERS_ATTENTION = "TAttentionV1"
_PAPERS = (True, "relu", "drop")  # skip_connection, branch_activation, class_token
_BODIES = ("generic.body.", "generic.arrangement.body.")


@dataclass(frozen=True)
class _Architecture:
    """One of the three backbones, and how torchvision's names become timm's."""

    timm_name: str
    telling: str  # a torchvision key that the other two do not have
    layers: tuple[str, ...]
    renames: tuple[tuple[str, str], ...]  # applied in turn, to weights and to layer names


_ARCHITECTURES = {
    "vgg16": _Architecture(
        "vgg16",
        "features.28.weight",
        ("features.16", "features.23", "features.30"),
        (
            (r"^classifier\.0\.", "pre_logits.fc1."),
            (r"^classifier\.3\.", "pre_logits.fc2."),
            (r"^classifier\.6\.", "head.fc."),
        ),
    ),
    "resnet50": _Architecture("resnet50", "layer4.2.conv3.weight", ("layer2", "layer3", "layer4"), ()),
    "vit_b_16": _Architecture(
        "vit_base_patch16_224",
        "encoder.pos_embedding",
        ("blocks.9.norm1", "blocks.10.norm1", "blocks.11.norm1"),
        (
            (r"^encoder\.layers\.encoder_layer_(\d+)", r"blocks.\1"),
            (r"\.ln_(\d)", r".norm\1"),
            (r"\.self_attention\.in_proj_", ".attn.qkv."),
            (r"\.self_attention\.out_proj\.", ".attn.proj."),
            (r"\.mlp\.(?:0|linear_1)\.", ".mlp.fc1."),
            (r"\.mlp\.(?:3|linear_2)\.", ".mlp.fc2."),
            (r"^encoder\.ln\.", "norm."),
            (r"^encoder\.pos_embedding$", "pos_embed"),
            (r"^class_token$", "cls_token"),
            (r"^conv_proj\.", "patch_embed.proj."),
            (r"^heads\.head\.", "head."),
        ),
    ),
}


def convert_reference_checkpoint(
    path: str | os.PathLike,
    *,
    skip_connection: bool = True,
    branch_activation: str = "relu",
    class_token: str = "drop",
) -> TTameModel:
    """An explainer from a checkpoint of the paper's authors.

    The weights are for academic, non-commercial use; the config and every card of the explainer say so.

    Args:
        path: the Lightning `.ckpt`, of VGG-16, ResNet-50 or ViT-B/16.
        skip_connection, branch_activation, class_token: the paper's ablations, which the weights do not show. Whether
            there is a batch norm is read from the file.

    Raises:
        ValueError: not such a file, or one that holds more than tensors and plain values.
    """
    checkpoint = _load(Path(path))
    state, settings = checkpoint["state_dict"], checkpoint.get("hyper_parameters") or {}
    if not isinstance(settings, Mapping):
        raise ValueError(f"hyper_parameters of {str(path)!r} must be a dict, got {type(settings).__name__}")
    head = {match[1]: tensor for key, tensor in state.items() if (match := _HEAD.fullmatch(key))}
    prefix = next((prefix for prefix in _BODIES if any(key.startswith(prefix) for key in state)), None)
    if not head or prefix is None:
        raise ValueError(
            f"{str(path)!r} is no T-TAME checkpoint: it needs weights under generic.attn_mech. and generic.body., got "
            f"{sorted({'.'.join(key.split('.')[:2]) for key in state})[:6]}"
        )
    if "fuser.weight" not in head:
        raise ValueError(f"the head in {str(path)!r} lacks fuser.weight; it is not a whole checkpoint")
    _check_version(settings.get("attention_version"), skip_connection, branch_activation, class_token)
    body = {key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(prefix)}
    name, architecture = _find_architecture(body, settings)
    layers = _layer_names(settings.get("layers"), architecture)
    channels = [head[f"convs.{i}.weight"].shape[0] for i in range(len(layers)) if f"convs.{i}.weight" in head]
    if len(channels) != len(layers) or f"convs.{len(layers)}.weight" in head:
        raise ValueError(f"{str(path)!r} names the layers {layers}, but its head does not have one branch for each")

    weights = {_rename(key, architecture): tensor for key, tensor in body.items()}
    for key in ("pre_logits.fc1.weight", "pre_logits.fc2.weight"):
        if key in weights:  # timm's VGG-16 has its fully connected layers as convolutions
            side = 7 if key.endswith("fc1.weight") else 1
            weights[key] = weights[key].unflatten(1, (-1, side, side))
    classes = head["fuser.weight"].shape[0]
    config = TimmWrapperConfig.from_dict(
        {
            "architecture": architecture.timm_name,
            "num_classes": classes,
            "pretrained_cfg": {
                "architecture": architecture.timm_name,
                "num_classes": classes,
                "input_size": (3, 224, 224),
                "mean": IMAGENET_DEFAULT_MEAN,
                "std": IMAGENET_DEFAULT_STD,
                "interpolation": "bilinear",
                "crop_pct": 224 / 256,
                "crop_mode": "center",
            },
        }
    )
    with torch.device("meta"):  # the weights come from the file: none are drawn at random first
        backbone: Any = TimmWrapperForImageClassification(config)
    try:
        backbone.timm_model.load_state_dict({key: tensor.float() for key, tensor in weights.items()}, assign=True)
    except RuntimeError as error:
        raise ValueError(f"the backbone in {str(path)!r} is not torchvision's {name}: {error}") from error
    model = TTameModel.from_backbone(
        backbone,
        feature_layers=layers,
        head_init="random",
        batch_norm="bns.0.weight" in head,
        skip_connection=skip_connection,
        branch_activation=branch_activation,
        class_token=class_token,
        map_scaling="logits",
    )
    try:
        model.head.load_state_dict({key: tensor.float() for key, tensor in head.items()})
    except RuntimeError as error:
        raise ValueError(f"the head in {str(path)!r} does not fit {name} and its layers {layers}: {error}") from error
    model.config.head_license = LICENCE
    model.config.converted_from = (
        f"authors' checkpoint, {name}, attention {settings.get('attention_version', 'unnamed')}"
    )
    return model


def convert_to_folder(path: str | os.PathLike, output: str | os.PathLike, **ablations: Any) -> TTameModel:
    """Convert a checkpoint, save it with its backbone (and its licence in the card) into `output`."""
    model = convert_reference_checkpoint(path, **ablations)
    model.save_pretrained(output)
    if is_ours(Path(output, "README.md")):
        write_card(output)
    return model


def _load(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"{str(path)!r} is not a file; give the authors' .ckpt")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{str(path)!r} holds more than tensors and plain values and is not opened: that could run foreign "
            "code; where you trust it, load it yourself and save {'state_dict': ..., 'hyper_parameters': dict(...)}"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise ValueError(f"{str(path)!r} cannot be read as a checkpoint: {error}") from error
    state = checkpoint.get("state_dict") if isinstance(checkpoint, Mapping) else None
    if not isinstance(state, Mapping) or not all(isinstance(tensor, torch.Tensor) for tensor in state.values()):
        raise ValueError(f"{str(path)!r} has no state_dict of tensors; give the authors' .ckpt")
    return dict(checkpoint)


def _check_version(version: Any, skip_connection: bool, branch_activation: str, class_token: str) -> None:
    """Warn where the file names an attention other than the paper's, and no ablation was asked for."""
    if version in (None, _PAPERS_ATTENTION) or (skip_connection, branch_activation, class_token) != _PAPERS:
        return
    warnings.warn(
        f"the checkpoint names the attention {str(version)[:48]!r}, not {_PAPERS_ATTENTION!r}: it may be one of the "
        "paper's ablations, which its weights do not show; it is converted as the paper's own. If it is one, pass "
        "skip_connection=False, branch_activation='sigmoid' or class_token='multiply'",
        stacklevel=3,
    )


def _find_architecture(body: Mapping[str, Any], settings: Mapping[str, Any]) -> tuple[str, _Architecture]:
    found = [name for name, architecture in _ARCHITECTURES.items() if architecture.telling in body]
    named = settings.get("model_name")
    if len(found) != 1 or (named is not None and named != found[0]):
        raise ValueError(
            f"the backbone must be one of {sorted(_ARCHITECTURES)}; the file's weights are those of "
            f"{found[0] if found else 'none of them'}, its model_name is {named!r}"
        )
    return found[0], _ARCHITECTURES[found[0]]


def _layer_names(given: Any, architecture: _Architecture) -> list[str]:
    """The layers by timm's names, fine to coarse."""
    if not given:
        return list(architecture.layers)
    names = given.split() if isinstance(given, str) else [str(name) for name in given]
    return [_rename(name, architecture) for name in names]


def _rename(key: str, architecture: _Architecture) -> str:
    for pattern, replacement in architecture.renames:
        key = re.sub(pattern, replacement, key)
    return key
