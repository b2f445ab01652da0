"""Finding a classifier: a Hub id, a folder, a transformers module or a timm module, always with its processor."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification, PreTrainedModel

from .image_processing import processor_from_timm
from .saving import patiently, resolve_commit


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
        **hub_kwargs: token, cache_dir, local_files_only.

    Raises:
        ValueError: there is no such classifier, it has no weights, or it is no image classifier.
    """
    if not pretrained:
        return _random_timm(name, processor)
    folder = Path(name, subfolder)
    local = Path(name).is_dir()
    if local and not any(folder.glob("*.safetensors")) and not any(folder.glob("*.bin")):
        raise ValueError(f"{str(folder)!r} holds no weights; a model folder has config.json and model.safetensors")
    if not local and "/" not in name:
        raise ValueError(
            f"{name!r} is neither a folder nor a Hub id; a Hub id has the form 'timm/resnet50.a1_in1k'; "
            "for a timm architecture without weights pass pretrained=False"
        )
    where = {"revision": revision, "subfolder": subfolder, "trust_remote_code": False, **hub_kwargs}
    try:
        config = AutoConfig.from_pretrained(name, **where)
        if getattr(config, "model_args", None):
            config.model_args.pop("num_classes", None)  # repeated by some timm repositories
        model, info = patiently(
            lambda: AutoModelForImageClassification.from_pretrained(
                name, config=config, dtype=dtype, output_loading_info=True, **where
            )
        )
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"the backbone {name!r} cannot be loaded: {error}") from error
    except ValueError as error:
        raise ValueError(f"{name!r} is not an image classifier that transformers or timm can load: {error}") from error
    if info["missing_keys"]:
        raise ValueError(
            f"{name!r} lacks the weights {sorted(info['missing_keys'])[:4]}: it is not a trained image classifier; "
            "fine-tune it first, or give one that has a classification head"
        )
    if processor is None:
        if config.model_type == "timm_wrapper":
            processor = processor_from_timm(config.pretrained_cfg)
        else:
            processor = _load_processor(name, where)
    if local:
        return Backbone(model, processor)
    return Backbone(model, processor, name, resolve_commit(name, revision, **hub_kwargs) or revision)


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
        if not type(module).__name__.endswith("ForImageClassification"):
            raise ValueError(
                f"{type(module).__name__} is not an image classifier; load it with AutoModelForImageClassification"
            )
        cfg = getattr(module.config, "pretrained_cfg", None)
        if processor is None and cfg:
            processor = processor_from_timm(cfg)
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
        return Backbone(_wrap_timm(module), processor or processor_from_timm(_input_config(module)))
    raise TypeError(
        f"a backbone module must be a transformers image classifier or a timm model, got {type(module).__name__}"
    )


def check_finite(module: nn.Module) -> None:
    """Raise ValueError, with the tensor's name, where a weight is NaN or infinite."""
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
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


def _wrap_timm(module: Any) -> PreTrainedModel:
    """The module inside transformers' wrapper, so that it saves and loads like every other backbone."""
    from transformers import TimmWrapperConfig, TimmWrapperForImageClassification

    cfg = _input_config(module)
    architecture = cfg.get("architecture")
    given = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    # A transformer built for another input size needs to be told so, others do not know the argument.
    for model_args in ({}, {"img_size": list(cfg["input_size"][1:])}):
        facts = {"architecture": architecture, "num_classes": module.num_classes, "pretrained_cfg": cfg}
        config = TimmWrapperConfig.from_dict({**facts, **({"model_args": model_args} if model_args else {})})
        try:
            wrapper = TimmWrapperForImageClassification(config)
        except TypeError:
            continue
        built = {name: tuple(tensor.shape) for name, tensor in wrapper.timm_model.state_dict().items()}
        if built == given:
            break
    else:
        raise ValueError(
            f"the module is not timm's {architecture!r} as its pretrained_cfg says, so it could not be rebuilt on "
            "loading; save it as a transformers or timm folder and pass that"
        )
    wrapper.timm_model = module
    return wrapper


def _random_timm(name: str, processor: Any) -> Backbone:
    import timm

    if not timm.is_model(name):
        raise ValueError(f"{name!r} is not a timm architecture; timm.list_models() names them all")
    return wrap_backbone(timm.create_model(name, pretrained=False), processor)
