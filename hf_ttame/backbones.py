"""Finding a classifier: a Hub id, a folder, a transformers module or a timm module, always with its processor."""

import json
import pickle
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification, PreTrainedModel

from .image_processing import measure_normalisation, processor_from_timm
from .paths import check_path, nearest_path
from .saving import (
    DamagedDownload,
    check_download,
    checked_token,
    is_pickled,
    patiently,
    resolve_commit,
    without_conversion,
)

# Image classifiers of transformers that cannot be explained by a map, by model type.
_WITHOUT_MAPS = {
    "imagegpt": "it reads a picture as a row of colour clusters and keeps no feature maps",
    "perceiver": "its latents have no place in the image",
    "shieldgemma2": "it is a language model that answers about an image, without a classifier on feature maps",
    "siglip2": "its input is a row of flattened patches, not an image (B, C, H, W); SigLIP models of a fixed size "
    "have the type 'siglip' and work",
}


@dataclass(frozen=True)
class Backbone:
    """A classifier in transformers' form (timm models in its wrapper), its processor, and where it came from."""

    model: PreTrainedModel
    processor: Any
    hub_id: str | None = None
    revision: str | None = None


def load_backbone(
    name: str,
    *,
    processor: Any = None,
    revision: str | None = None,
    pretrained: bool = True,
    dtype: Any = torch.float32,
    subfolder: str = "",
    attn_implementation: str | None = None,
    only_hub: bool = False,
    only_safetensors: bool = False,
    **hub_kwargs: Any,
) -> Backbone:
    """Load a classifier with its weights.

    Args:
        name: a folder or a Hub id; with pretrained=False a timm architecture name.
        processor: used instead of the one that lies beside the weights.
        revision: of a Hub id.
        pretrained: False builds the timm architecture `name` with random weights.
        dtype: of the weights.
        subfolder: where in the folder or repository the classifier lies.
        attn_implementation: "eager", "sdpa", ... of a transformers classifier; None: its default.
        only_hub: `name` comes from somebody's config: a Hub id, never a folder.
        only_safetensors: refuse pickles, which otherwise are read as tensors and plain values only.
        **hub_kwargs: token, cache_dir, local_files_only.

    Raises:
        ValueError: there is no such classifier, it has no weights, or it is no image classifier.
    """
    if not pretrained:
        return _random_timm(name, processor)
    if "token" in hub_kwargs:
        hub_kwargs["token"] = checked_token(hub_kwargs["token"])
    if not only_hub:
        check_path(name, "backbone", **hub_kwargs)
    folder = Path(name, subfolder)
    local = Path(name).is_dir()
    if only_hub and Path(name).exists():
        raise ValueError(
            f"the explainer's backbone is the Hub id {name!r}, but the working directory holds a path of that name, "
            "which would be loaded instead; change the directory, or pass backbone=FOLDER"
        )
    if local and not any(folder.glob("*.safetensors")) and not any(folder.glob("*.bin")):
        raise ValueError(f"{str(folder)!r} holds no weights; a model folder has config.json and model.safetensors")
    if not local and "/" not in name:
        raise ValueError(
            f"{name!r} is neither a folder nor a Hub id"
            + (f"; nearest: {near!r}" if (near := nearest_path(name)) else "")
            + "; a Hub id has the form 'timm/resnet50.a1_in1k'; "
            "for a timm architecture without weights pass pretrained=False (`ttame layers`: --no-pretrained)"
        )
    where = {"revision": revision, "subfolder": subfolder, "trust_remote_code": False, **hub_kwargs}
    safetensors = {"use_safetensors": True} if only_safetensors else {}
    attention = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    try:
        config = AutoConfig.from_pretrained(name, **where)
        if only_safetensors:
            config.transformers_weights = None  # a config could name a pickle as the file to load
        check_spatial(config)
        if getattr(config, "model_args", None):
            config.model_args.pop("num_classes", None)  # repeated by some timm repositories
        with without_conversion():
            model, info = patiently(
                lambda: AutoModelForImageClassification.from_pretrained(
                    name, config=config, dtype=dtype, output_loading_info=True, **safetensors, **attention, **where
                )
            )
        if not local:
            check_download(name, revision, hub_kwargs.get("cache_dir"))
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"the weights of {name!r} are a pickle that holds more than tensors and plain values, and are not opened: "
            "that could run foreign code; ask its owner for model.safetensors"
        ) from error
    except (OSError, RuntimeError, SafetensorError) as error:
        if not local:
            check_download(name, revision, hub_kwargs.get("cache_dir"))
        raise ValueError(f"the backbone {name!r} cannot be loaded: {error}") from error
    except (NoMaps, DamagedDownload):
        raise
    except (ValueError, ImportError) as error:
        raise ValueError(f"{name!r} is not an image classifier that transformers or timm can load: {error}") from error
    if info["missing_keys"]:
        raise ValueError(
            f"{name!r} lacks the weights {sorted(info['missing_keys'])[:4]}: it is not a trained image classifier; "
            "fine-tune it first, or give one that has a classification head"
        )
    if processor is None:
        saved = local and (folder / "preprocessor_config.json").is_file()
        if config.model_type == "timm_wrapper" and saved:  # Pillow resizes as timm does, but only RGB pictures
            processor = _saved_processor(folder, "Pil" if input_channels(model) == 3 else "")
        elif config.model_type == "timm_wrapper":
            processor = processor_from_timm(config.pretrained_cfg, input_channels(model))
        else:
            processor = _load_processor(name, where)
    if local:
        return Backbone(model, processor)
    if is_pickled(name, revision, hub_kwargs.get("cache_dir")):
        warnings.warn(
            f"the weights of {name!r} are a pickle (read as tensors only, nothing in it was run); an explainer of it "
            "is saved with its own copy as safetensors, so that nobody else has to open one",
            stacklevel=3,
        )
        return Backbone(model, processor)
    return Backbone(model, processor, name, resolve_commit(name, revision, **hub_kwargs) or revision)


def _saved_processor(folder: Path, suffix: str) -> Any:
    """The processor saved beside a timm model; AutoImageProcessor would go by the model's type and pass it over."""
    kind = json.loads((folder / "preprocessor_config.json").read_text()).get("image_processor_type", "")
    kind = kind.removesuffix("Fast").removesuffix("Pil")
    found = getattr(transformers, kind + suffix, None) or getattr(transformers, kind, None)
    if found is None:
        raise ValueError(f"{str(folder)!r} names an image processor {kind!r} that transformers does not have")
    return found.from_pretrained(folder)


def _load_processor(name: str, where: dict[str, Any]) -> Any:
    try:
        return AutoImageProcessor.from_pretrained(name, **where)
    except OSError as error:
        raise ValueError(
            f"{name!r} has no preprocessor_config.json, so its preprocessing is unknown; save the processor beside "
            "the weights, or pass processor=AutoImageProcessor..."
        ) from error


def wrap_backbone(module: nn.Module, processor: Any = None) -> Backbone:
    """A transformers image classifier with its processor, or a timm model, as a Backbone.

    Raises:
        TypeError: neither of the two.
        ValueError: no processor is known, or the module has no classifier.
    """
    if isinstance(module, PreTrainedModel):
        check_spatial(module.config)
        if "ForImageClassification" not in type(module).__name__:
            raise ValueError(
                f"{type(module).__name__} is not an image classifier; load it with AutoModelForImageClassification"
            )
        cfg = getattr(module.config, "pretrained_cfg", None)
        if processor is None and cfg:
            processor = processor_from_timm(cfg, input_channels(module))
        if processor is None:
            raise ValueError(
                f"{type(module).__name__} comes without its preprocessing; pass processor=AutoImageProcessor..."
            )
        return Backbone(module, processor)
    if hasattr(module, "pretrained_cfg") and hasattr(module, "num_classes"):
        if module.num_classes == 0:
            raise ValueError(
                "the timm model has num_classes=0, so no classifier to explain; create it with its classifier"
            )
        wrapper = _wrap_timm(module, processor)
        return Backbone(wrapper, processor or processor_from_timm(_input_config(module), input_channels(wrapper)))
    raise TypeError(
        f"a backbone module must be a transformers image classifier or a timm model, got {type(module).__name__}"
    )


class NoMaps(ValueError):
    """The classifier keeps nothing that has a place in the image."""


def check_spatial(config: Any) -> None:
    """Raise NoMaps, with the reason, where a classifier of transformers has no feature maps."""
    if reason := _WITHOUT_MAPS.get(config.model_type):
        raise NoMaps(f"a {config.model_type} classifier cannot be explained by a map: {reason}")


def outputs_of(config: Any) -> str:
    """What a classifier's logits mean, by its config: "softmax", "sigmoid" or "single_logit" (see `answers`)."""
    if config.problem_type == "regression":
        raise ValueError(
            "the backbone's problem_type is 'regression': it has no classes to explain; if the sign of its one output "
            "is a yes or no, pass outputs='single_logit'"
        )
    if config.num_labels == 1:
        return "single_logit"
    return "sigmoid" if config.problem_type == "multi_label_classification" else "softmax"


def labels_of(config: Any, outputs: str) -> dict[str, dict]:
    """id2label and label2id of the classes that can be explained; a single logit has two: no and yes."""
    labels = dict(config.id2label or {i: f"LABEL_{i}" for i in range(config.num_labels)})
    if (outputs == "single_logit") != (len(labels) == 1):
        raise ValueError(
            f"outputs={outputs!r} does not fit a classifier of {len(labels)} logits; 'single_logit' is for exactly one"
        )
    if outputs == "single_logit":
        (yes,) = labels.values()
        labels = {0: f"not {yes}", 1: yes}
    return {"id2label": labels, "label2id": {label: class_id for class_id, label in labels.items()}}


def check_finite(module: nn.Module) -> None:
    """Raise ValueError, with the tensor's name, where a weight is NaN or infinite.

    Other buffers may be infinite: some backbones keep open clipping bounds in them.
    """
    for name, tensor in module.state_dict().items():
        is_weight = name.endswith(("weight", "bias", "running_mean", "running_var"))
        if is_weight and tensor.is_floating_point() and not tensor.isfinite().all():
            raise ValueError(
                f"weights must be finite, but {name!r} of {type(module).__name__} holds NaN or infinity; "
                "the file is damaged or the training diverged"
            )


def _input_config(module: Any) -> dict[str, Any]:
    """timm's preprocessing facts, with the input size that the module was really built for."""
    cfg = dict(module.pretrained_cfg)
    size = getattr(getattr(module, "patch_embed", None), "img_size", None)
    if size is not None:
        cfg["input_size"] = (cfg["input_size"][0], *tuple(size))
    return cfg


def input_channels(model: PreTrainedModel) -> int:
    """C of the backbone's input (B, C, H, W)."""
    config: Any = model.config
    if cfg := getattr(config, "pretrained_cfg", None):
        return int((config.model_args or {}).get("in_chans") or cfg["input_size"][0])
    return int(getattr(getattr(config, "vision_config", config), "num_channels", 3))


def _wrap_timm(module: Any, processor: Any) -> PreTrainedModel:
    """The module inside transformers' wrapper, so that it saves and loads like every other backbone."""
    from transformers import TimmWrapperConfig, TimmWrapperForImageClassification

    module.eval()
    cfg = _input_config(module)
    weights = module.state_dict()
    classifier = module.get_classifier() if hasattr(module, "get_classifier") else None
    classes = getattr(classifier, "out_features", module.num_classes)  # a replaced layer may have others
    first = next((child for child in module.modules() if isinstance(child, nn.Conv2d)), None)
    # What timm's cfg does not record, as far as it can be read off the module.
    size = {"img_size": list(cfg["input_size"][1:])}
    channels = {"in_chans": first.in_channels} if first is not None else {}
    pool = getattr(module, "global_pool", None)
    pool = getattr(pool, "pool_type", pool)
    pooling = {"global_pool": pool} if isinstance(pool, str) else {}
    dynamic = {"dynamic_img_size": True}
    candidates: tuple[dict[str, Any], ...] = (
        {},
        size,
        channels,
        {**size, **channels},
        pooling,
        {**size, **pooling},
        dynamic,
        {**dynamic, **size},
    )
    for model_args in candidates:
        facts = {"architecture": cfg.get("architecture"), "num_classes": classes, "pretrained_cfg": cfg}
        config = TimmWrapperConfig.from_dict({**facts, **({"model_args": dict(model_args)} if model_args else {})})
        try:
            with torch.device("meta"):
                wrapper = TimmWrapperForImageClassification(config)
        except TypeError:
            continue
        built = {name: tensor.shape for name, tensor in wrapper.timm_model.state_dict().items()}
        if built == {name: tensor.shape for name, tensor in weights.items()} and _rebuilds(module, config, processor):
            wrapper.timm_model = module
            return wrapper
    raise ValueError(
        f"the module is not timm's {cfg.get('architecture')!r} as its pretrained_cfg says, so loading could not "
        "rebuild it; wrap it with the arguments it was made with: TimmWrapperForImageClassification(TimmWrapperConfig("
        "architecture=..., num_classes=..., model_args={...})), load its weights there, and pass that"
    )


@torch.no_grad()
def _rebuilds(module: Any, config: Any, processor: Any) -> bool:
    """Whether a model built from the config alone gives the module's logits: arguments do not show in the weights."""
    from transformers import TimmWrapperForImageClassification

    reference = next(module.parameters())
    if reference.is_meta:
        return True  # nothing to compare but shapes
    with torch.device("meta"):  # no weights are drawn at random only to be replaced
        rebuilt: Any = TimmWrapperForImageClassification(config)
        rebuilt.timm_model.load_state_dict(module.state_dict(), assign=True)
    if any(tensor.is_meta for tensor in (*rebuilt.parameters(), *rebuilt.buffers())):  # a buffer that is not saved
        rebuilt = TimmWrapperForImageClassification(config)
        rebuilt.timm_model.load_state_dict(module.state_dict())
    rebuilt.to(reference).eval()
    channels = input_channels(rebuilt)
    height, width = config.pretrained_cfg["input_size"][1:]
    if processor is not None:
        height, width = measure_normalisation(processor, channels).size
    noise = torch.randn(1, channels, height, width, generator=torch.Generator().manual_seed(0)).to(reference)
    try:
        expected = module(noise)
    except (RuntimeError, AssertionError):
        return True  # the module does not take this size either: said later, in better words
    try:
        return bool(torch.allclose(rebuilt(noise).logits, expected, rtol=1e-4, atol=1e-5))
    except (RuntimeError, AssertionError):  # the rebuilt one does not take this size
        return False


def _random_timm(name: str, processor: Any) -> Backbone:
    import timm

    if not timm.is_model(name):
        raise ValueError(f"{name!r} is not a timm architecture; timm.list_models() names them all")
    return wrap_backbone(timm.create_model(name, pretrained=False), processor)
