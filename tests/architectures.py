"""The architectures of the sweep: every name of timm, every image-classification type of transformers."""

import fnmatch
from functools import cache
from typing import Any

import timm
import torch
import transformers
from timm.models import list_modules
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    CLIPImageProcessorPil,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES

# Names that are not tried at all, by pattern, with the reason.
EXCLUDED = {"*_enc": "an encoder: timm builds it without a classifier, and from_backbone refuses it"}
# Names whose own preprocessing has no equivalent in transformers: they are given a plain resize.
OTHER_PREPROCESSING = {"deepseek_vit*": "pads to a square (crop_mode 'border')"}

FULL_PARAMETERS = 10e6  # larger ones are attached on the meta device: shapes without numbers
# The architecture with the fewest parameters of every module of timm.
SMALLEST = [
    "beit_base_patch16_224",
    "cait_xxs24_224",
    "coat_tiny",
    "convit_tiny",
    "convmixer_768_32",
    "cpubone_nano",
    "crossvit_tiny_240",
    "cs3darknet_focus_s",
    "csatv2",
    "cspnext_tiny",
    "davit_tiny",
    "deepseek_vit_412m",
    "deit_tiny_patch16_224",
    "densenet121",
    "dla46x_c",
    "dpn48b",
    "edgenext_xx_small",
    "efficientformer_l1",
    "efficientformerv2_s0",
    "efficientvim_m1",
    "efficientvit_b0",
    "efficientvit_m0",
    "ese_vovnet19b_slim_dw",
    "fasternet_t0",
    "fastvit_t8",
    "focalnet_tiny_srf",
    "gcvit_xxtiny",
    "gemma4_vit_167m",
    "ghostnet_050",
    "gmlp_ti16_224",
    "halonet_h1",
    "hardcorenas_b",
    "hgnetv2_b0",
    "hiera_tiny_224",
    "hrnet_w18_small",
    "iformer_t",
    "inception_next_atto",
    "inception_resnet_v2",
    "inception_v3",
    "inception_v4",
    "lcnetv2_small",
    "legacy_seresnet18",
    "legacy_xception",
    "levit_128s",
    "lowformer_b0",
    "mobilenetv3_small_050",
    "mobilenetv5_base",
    "mobilevit_xxs",
    "mvitv2_tiny",
    "naflexvit_base_patch16_parfac_gap",
    "nasnetalarge",
    "nest_tiny",
    "nextvit_small",
    "pit_ti_224",
    "pnasnet5large",
    "poolformerv2_s12",
    "pvt_v2_b0",
    "qwen3_vit_88m",
    "rdnet_tiny",
    "regnetx_002",
    "repghostnet_050",
    "repvit_m1",
    "res2next50",
    "resnest14d",
    "resnetv2_18",
    "rexnet_100",
    "sam2_hiera_tiny",
    "samvit_base_patch16_224",
    "selecsls42",
    "sequencer2d_s",
    "shvit_s1",
    "skresnet18",
    "starnet_s050",
    "swiftformer_xs",
    "swin_tiny_patch4_window7_224",
    "swinv2_cr_tiny_224",
    "swinv2_tiny_window16_256",
    "test_byobnet",
    "test_coatnet",
    "test_convnext",
    "test_efficientnet",
    "test_mambaout",
    "test_nfnet",
    "test_resnet",
    "test_vit",
    "test_vit_relpos",
    "tiny_vit_5m_224",
    "tnt_s_legacy_patch16_224",
    "tresnet_m",
    "twins_svt_small",
    "vgg11",
    "visformer_tiny",
    "vit_tiny_patch16_dinov3_qkvb",
    "vit_tiny_r_s16_p8_224",
    "vitamin_small_224",
    "volo_d1_224",
    "xception41p",
    "xcit_nano_12_p8_224",
]
_SIZES = (192, 196, 224, 256)
# These fail at a smaller side: their attention is built for one grid, or random weights leave no place to check.
_SIDE = {"efficientformer_*": 224, "levit*": 224, "efficientvit_*": 224, "convmixer*": 160, "inception_v4": 299}


def excluded(name: str) -> str | None:
    return next((reason for pattern, reason in EXCLUDED.items() if fnmatch.fnmatch(name, pattern)), None)


@cache
def modules() -> dict[str, list[str]]:
    """{module of timm: its names}, for the modules that register any."""
    found = {module: timm.list_models(module=module) for module in sorted(list_modules())}
    return {module: names for module, names in found.items() if names}


@cache
def arguments(name: str) -> dict[str, Any]:
    """Arguments of `create_model` for the smallest input that the architecture takes (or its own)."""
    full = timm.get_pretrained_cfg(name).input_size[-1]
    fixed = next((side for pattern, side in _SIDE.items() if fnmatch.fnmatch(name, pattern)), None)
    for side in (fixed,) if fixed else _SIZES:
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


def make_timm(name: str, own_size: bool = False) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=7, **({} if own_size else arguments(name))).eval()


def make_small_timm(name: str, side: int, **shrunk: Any) -> tuple[nn.Module, CLIPImageProcessorPil]:
    """A timm architecture made narrower and shallower by `shrunk`, in the wrapper that records such arguments."""
    torch.manual_seed(0)
    arguments = {"img_size": side, **shrunk}
    overlay = {"input_size": (3, side, side)}
    config = TimmWrapperConfig(architecture=name, num_classes=7, model_args=arguments, pretrained_cfg=overlay)
    return TimmWrapperForImageClassification(config).eval(), plain_processor(side)


def make_on_meta(name: str) -> nn.Module:
    with torch.device("meta"):
        return timm.create_model(name, num_classes=7).eval()


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


def default_config(class_name: str) -> Any:
    model_type = next(
        key
        for key, found in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES.items()
        if class_name in (found if isinstance(found, tuple) else (found,))
    )
    return CONFIG_MAPPING[model_type]()


def make_transformers(class_name: str, **shrunk: Any) -> tuple[nn.Module, CLIPImageProcessorPil]:
    """A classifier of five classes with the type's default config, its depth and what `shrunk` names reduced."""
    kind = getattr(transformers, class_name)
    config = default_config(class_name)
    vision = getattr(config, "vision_config", config)
    if isinstance(getattr(vision, "num_hidden_layers", None), int):
        vision.num_hidden_layers = 4
    for key, value in shrunk.items():
        setattr(vision, key, value)
    config.num_labels = 5
    torch.manual_seed(0)
    side = getattr(vision, "image_size", None) or 224
    return kind(config).eval(), plain_processor(side if isinstance(side, int) else side[0])
