"""Methods by name, on one explainer's backbone."""

import difflib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ..features import FeatureLayer, probe_layers
from ..layer_choice import default_layers
from ..modeling_ttame import TTameModel
from . import attention, attributions, cams, trivial
from .contract import Explain, Method
from .rise import rise

TRIVIAL = ("ones", "gaussian", "random-blob", "class-mean", "other-image", "gradcam-blurred")
_KINDS = {
    "ttame": "one pass",
    **dict.fromkeys(("gradcam", "gradcam++", "layercam", "hirescam", "xgradcam"), "gradient"),
    "eigencam": "one pass",
    "rollout": "one pass",
    "gradient-attention": "gradient",
    "integrated-gradients": "gradient",
    **dict.fromkeys(("scorecam", "ablationcam", "occlusion", "rise"), "perturbation"),
    **dict.fromkeys(TRIVIAL, "trivial"),
    "gradcam-blurred": "gradient",  # a control, and a map of this image and class like any other
}
ALL = tuple(_KINDS)
FROM_THE_HEAD = ("ttame", "random-blob", "class-mean", "other-image", "gradcam-blurred")
"""Methods whose maps another head would change: its own maps, those that borrow from them, and Grad-CAM blurred to the
size of its maps. All others show the classifier alone."""
_FOR_TOKENS = ("rollout", "gradient-attention")


@dataclass(frozen=True)
class MethodSettings:
    """rise_masks: passes per map of RISE. integration_steps: of integrated gradients. batch_size: perturbed copies per
    pass. seed: of everything random."""

    rise_masks: int = 4000
    integration_steps: int = 50
    batch_size: int = 32
    seed: int = 0

    def to_dict(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if key != "batch_size"}


def expand_names(names: Sequence[str], model: TTameModel) -> list[str]:
    """Names as asked for, "all" and "trivial" expanded, the explainer itself first, each once.

    "all" leaves out what the backbone cannot have (attention maps without tokens).

    Raises:
        ValueError: an unknown name; the nearest are named.
    """
    tokens = model.layers[-1].layout == "tokens"
    found = ["ttame"]
    for name in names:
        if name == "all":
            found += [known for known in ALL if tokens or known not in _FOR_TOKENS]
        elif name == "trivial":
            found += TRIVIAL
        elif name.split("@")[0] in ALL:
            found.append(name)
        else:
            near = difflib.get_close_matches(name, ALL, n=3, cutoff=0.4)
            raise ValueError(
                f"method {name!r} is unknown; {'nearest: ' + ', '.join(near) + '; ' if near else ''}"
                f"there are all, trivial, {', '.join(ALL)}; cams take a layer: gradcam@LAYER"
            )
        if "@" in name and name.split("@")[0] not in cams.NAMES:
            raise ValueError(f"{name!r}: only {', '.join(cams.NAMES)} read one layer")
    return list(dict.fromkeys(found))


def cam_layer(model: TTameModel, name: str | None = None) -> FeatureLayer:
    """The layer of a class activation map: the one named, or the last of the backbone's default layers.

    The default is the last stage or block and not the explainer's own last layer, which may be another: a head that
    starts from the classifier taps the map before the pooling. Neither is the better one for every method: the last
    stage of EfficientNet-Lite0 ends without an activation and is negative in half its values. `NAME@LAYER` reads
    another.
    """
    shape = (2, len(model.config.pixel_scale), *model.config.image_size)
    blank = torch.zeros(shape, device=model.device)
    if name is None:
        try:
            name = default_layers(model.backbone, blank)[-1]
        except ValueError:
            return model.layers[-1]
    for layer in model.layers:
        if layer.name == name:
            return layer
    return probe_layers(model.backbone, [name], blank)[0]


def ttame(model: TTameModel) -> Explain:
    """The explainer itself, as `explain` scales its maps."""

    @torch.no_grad()
    def explain(pixel_values: torch.Tensor, class_ids: torch.Tensor) -> torch.Tensor:
        return model.scale_maps(model(pixel_values, class_ids).map_logits[:, 0].float())

    return explain


def make_method(
    name: str, model: TTameModel, settings: MethodSettings = MethodSettings(), bank: trivial.MapBank | None = None
) -> Method:
    """A method by name; class activation maps take a layer as in "gradcam@layer4".

    Args:
        name: see ALL.
        model: explainer whose backbone is explained.
        settings: numbers of the methods that have any.
        bank: the explainer's maps of the dataset, for "class-mean" and "other-image".

    Raises:
        ValueError: an unknown name or layer, or a method that this backbone cannot have.
        ModuleNotFoundError: the package behind the method is not installed.
    """
    base, _, wanted_layer = name.partition("@")
    if base not in _KINDS:
        expand_names([name], model)
    kind, own = _KINDS[base], ttame(model)
    if base == "ttame":
        return Method(name, kind, own, about=", ".join(layer.name for layer in model.layers))
    if base in cams.NAMES:
        layer = cam_layer(model, wanted_layer or None)
        passes = 1 + layer.channels if base in ("scorecam", "ablationcam") else 1
        about = "always in float32" if base == "ablationcam" else ""
        return Method(name, kind, cams.cam(base, model, layer, settings.batch_size), layer.name, about, passes=passes)
    if base == "rollout":
        return Method(name, kind, attention.rollout(model))
    if base == "gradient-attention":
        return Method(name, kind, attention.gradient_attention(model))
    if base == "integrated-gradients":
        steps = settings.integration_steps
        explain = attributions.integrated_gradients(model, steps, settings.batch_size)
        return Method(name, kind, explain, about=f"{steps} steps from black, absolute values", passes=steps)
    if base == "occlusion":
        explain = attributions.occlusion(model, settings.batch_size)
        return Method(name, kind, explain, about="squares of a seventh", passes=170)  # 13 x 13 places
    if base == "rise":
        explain = rise(model, settings.rise_masks, settings.batch_size, settings.seed)
        return Method(name, kind, explain, about=f"{settings.rise_masks} masks", passes=settings.rise_masks)
    if base == "ones":
        return Method(name, kind, trivial.ones)
    if base == "gaussian":
        return Method(name, kind, trivial.centre_gaussian)
    if base == "random-blob":
        bind = trivial.random_blob(own, settings.seed)
        return Method(name, kind, _needs_position, about="the values of T-TAME's map in a random place", bind=bind)
    if base == "gradcam-blurred":
        layer = cam_layer(model)
        grid = (model.config.map_size[0], model.config.map_size[1])
        explain = trivial.blurred(cams.cam("gradcam", model, layer), grid)
        return Method(name, kind, explain, layer.name, f"{grid[0]} x {grid[1]}")
    if bank is None:
        raise ValueError(f"{name!r} borrows maps of other images; pass bank=MapBank(maps, targets)")
    if base == "class-mean":
        return Method(
            name, kind, _needs_position, about="T-TAME's maps of the class's other images", bind=bank.class_mean
        )
    return Method(name, kind, _needs_position, about="T-TAME's map of another image", bind=bank.another_image)


def _needs_position(pixel_values: torch.Tensor, class_ids: torch.Tensor) -> torch.Tensor:
    raise ValueError("this map depends on the image's position in the dataset; use method.at(indices)")
