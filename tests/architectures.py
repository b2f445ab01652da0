"""The architectures of the sweep: every name of timm, every image-classification type of transformers."""

import fnmatch
from collections.abc import Callable
from functools import cache
from typing import Any

import timm
import torch
import transformers
from timm.models import list_modules
from torch import nn
from transformers import CONFIG_MAPPING, CLIPImageProcessorPil
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES

# Names that are not tried at all, by pattern, with the reason.
EXCLUDED: dict[str, str] = {}
# Names whose own preprocessing has no equivalent in transformers: they are given a plain resize.
OTHER_PREPROCESSING = {"deepseek_vit*": "pads to a square (crop_mode 'border')"}

FULL_PARAMETERS = 40e6  # larger ones are attached on the meta device: shapes without numbers
_SIZES = (128, 112, 160, 192, 224, 256)


def excluded(name: str) -> str | None:
    return next((reason for pattern, reason in EXCLUDED.items() if fnmatch.fnmatch(name, pattern)), None)


@cache
def modules() -> dict[str, list[str]]:
    """{module of timm: its names}, for the modules that register any."""
    found = {module: timm.list_models(module=module) for module in sorted(list_modules())}
    return {module: names for module, names in found.items() if names}


@cache
def parameters(name: str) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in timm.create_model(name).parameters())


@cache
def arguments(name: str) -> dict[str, Any]:
    """Arguments of `create_model` for the smallest input that the architecture takes (or its own)."""
    full = timm.get_pretrained_cfg(name).input_size[-1]
    for side in _SIZES:
        if side >= full:
            break
        shape = (3, side, side)
        for extra in ({"img_size": side}, {}):
            if not extra and timm.get_pretrained_cfg(name).fixed_input_size:
                continue
            given = {"pretrained_cfg_overlay": {"input_size": shape}, **extra}
            try:
                with torch.device("meta"):
                    model = timm.create_model(name, num_classes=7, **given).eval()
                    model(torch.zeros(1, *shape))
                return given
            except Exception:  # whatever an architecture raises says that it does not take this size
                continue
    return {}


def make_timm(name: str, meta: bool = False) -> nn.Module:
    torch.manual_seed(0)
    with torch.device("meta" if meta else "cpu"):
        return timm.create_model(name, num_classes=7, **arguments(name)).eval()


def processor_of(name: str, module: nn.Module) -> Any:
    """None where the module's own preprocessing will do."""
    if any(fnmatch.fnmatch(name, pattern) for pattern in OTHER_PREPROCESSING):
        return plain_processor(module.pretrained_cfg["input_size"][-1])
    return None


def plain_processor(side: int, channels: int = 3) -> CLIPImageProcessorPil:
    half = [0.5] * channels
    size = {"height": side, "width": side}
    return CLIPImageProcessorPil(size=size, do_center_crop=False, image_mean=half, image_std=half)


def transformers_classes() -> list[str]:
    """Class names of the image-classification mapping, variants included; timm's wrapper is swept by timm's names."""
    names: list[str] = []
    for model_type, found in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES.items():
        if model_type != "timm_wrapper":
            names.extend(found if isinstance(found, tuple) else (found,))
    return names


def make_transformers(class_name: str, **shrunk: Any) -> tuple[nn.Module, CLIPImageProcessorPil]:
    """A classifier of five classes with the type's default config, its depth and what `shrunk` names reduced."""
    kind = getattr(transformers, class_name)
    model_type = next(
        key
        for key, found in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES.items()
        if class_name in (found if isinstance(found, tuple) else (found,))
    )
    config = CONFIG_MAPPING[model_type]()
    vision = getattr(config, "vision_config", config)
    if isinstance(getattr(vision, "num_hidden_layers", None), int):
        vision.num_hidden_layers = 4
    for key, value in shrunk.items():
        setattr(vision, key, value)
    config.num_labels = 5
    torch.manual_seed(0)
    side = getattr(vision, "image_size", None) or 224
    return kind(config).eval(), plain_processor(side if isinstance(side, int) else side[0])


Builder = Callable[[], tuple[nn.Module, Any]]
