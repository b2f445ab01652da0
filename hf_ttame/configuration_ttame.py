"""Everything about an explainer that is not a weight: which backbone, which layers, which head."""

from collections.abc import Sequence
from typing import Any

from transformers import PretrainedConfig

from .answers import OUTPUTS

# 2 added classifier_outputs and layers that are entries of the library's own list; 1 loads as it is.
FORMAT_VERSION = 2
_MAX_SIDE, _MAX_CLASSES = 8192, 1_000_000  # a config may come from anybody: it must not fill the memory
LAYOUTS = ("NCHW", "NHWC", "tokens")


class TTameConfig(PretrainedConfig):
    """Facts of one explainer. They are found by a probe when it is made, so that loading needs none.

    Args:
        backbone: Hub id of the classifier; None where it has none.
        backbone_revision: the commit of `backbone` that the head was trained on.
        backbone_included: the backbone is saved beside the head, in the folder `backbone/`.
        backbone_fingerprint: short hash of the backbone's weights, checked on loading.
        backbone_values: the same without the weights' names, checked where those are others, as in another version of
            transformers.
        backbone_config: the backbone's own config.
        head_fingerprint: short hash of the head's weights, by which a report names the head that it measured.
        feature_layers: per tapped layer, fine to coarse: `name` (see `FeatureLayer`), `channels`, `grid` [h, w] at
            `image_size`, `layout` (NCHW, NHWC or tokens), `prefix_tokens`, `clone` (a later module overwrites the
            tapped tensor).
        image_size: [H, W] of the backbone's input in pixels.
        pixel_scale, pixel_shift: per channel, normalised = pixel_scale * pixel + pixel_shift for a pixel in [0, 1].
        processor_backend: "pil" where the processor resizes with Pillow (as timm's does), None for its default;
            preprocessor_config.json does not record it, and the results differ by up to 0.016.
        map_size: [h, w] of the maps.
        skip_connection, batch_norm, branch_activation, last_layer_relu: see `TTameHead`.
        class_token: "drop" prefix tokens, or "multiply" the patch tokens by the class token (the paper's ablation).
        head_init: how the head started, "random" or "classifier".
        classifier_outputs: what the backbone's logits mean, "softmax", "sigmoid" or "single_logit" (see `answers`).
        map_scaling: what `explain` scales to [0, 1], the map "logits" or their "sigmoid".
        format_version: version of this layout.

    Raises:
        ValueError: a value is missing, out of range, or of a newer format.
    """

    model_type = "ttame"

    def __init__(
        self,
        backbone: str | None = None,
        backbone_revision: str | None = None,
        backbone_included: bool = False,
        backbone_fingerprint: str | None = None,
        backbone_values: str | None = None,
        backbone_config: dict[str, Any] | None = None,
        head_fingerprint: str | None = None,
        feature_layers: Sequence[dict[str, Any]] = (),
        image_size: Sequence[int] = (224, 224),
        pixel_scale: Sequence[float] = (1.0, 1.0, 1.0),
        pixel_shift: Sequence[float] = (0.0, 0.0, 0.0),
        processor_backend: str | None = None,
        map_size: Sequence[int] = (28, 28),
        skip_connection: bool = True,
        batch_norm: bool = True,
        branch_activation: str = "relu",
        last_layer_relu: bool = True,
        class_token: str = "drop",
        head_init: str = "random",
        classifier_outputs: str = "softmax",
        map_scaling: str = "logits",
        format_version: int = FORMAT_VERSION,
        **kwargs: Any,
    ):
        self.backbone = backbone
        self.backbone_revision = backbone_revision
        self.backbone_included = backbone_included
        self.backbone_fingerprint = backbone_fingerprint
        self.backbone_values = backbone_values
        self.backbone_config = backbone_config or {}
        self.head_fingerprint = head_fingerprint
        self.feature_layers = [dict(layer) for layer in feature_layers]
        self.image_size = list(image_size)
        self.pixel_scale = list(pixel_scale)
        self.pixel_shift = list(pixel_shift)
        self.processor_backend = processor_backend
        self.map_size = list(map_size)
        self.skip_connection = skip_connection
        self.batch_norm = batch_norm
        self.branch_activation = branch_activation
        self.last_layer_relu = last_layer_relu
        self.class_token = class_token
        self.head_init = head_init
        self.classifier_outputs = classifier_outputs
        self.map_scaling = map_scaling
        self.format_version = format_version
        self.check()
        if kwargs.get("transformers_weights"):
            raise ValueError(
                "config.json names a file of weights (transformers_weights), which could be a pickle; an explainer's "
                "weights are model.safetensors: remove the entry"
            )
        classes = kwargs.get("num_labels")
        if classes is not None and not (isinstance(classes, int) and 1 <= classes <= _MAX_CLASSES):
            raise ValueError(f"num_labels must lie in 1..{_MAX_CLASSES}, got {classes!r}")
        super().__init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As `PretrainedConfig.from_dict`, except that `backbone` is left to the model.

        `AutoModel.from_pretrained(..., backbone=FOLDER_OR_MODULE)` would otherwise write it into the config.

        Raises:
            ValueError: it is the config of another kind of model.
        """
        kind = config_dict.get("model_type") or config_dict.get("architecture") or "unknown"
        if kind != cls.model_type and "feature_layers" not in config_dict:
            raise ValueError(
                f"this is no explainer: its config.json is of the kind {kind!r}, not 'ttame'; `ttame train` makes an "
                "explainer of a classifier, TTameModel.from_backbone one with an untrained head"
            )
        own = {"backbone": kwargs.pop("backbone")} if "backbone" in kwargs else {}
        found = super().from_dict(config_dict, **kwargs)
        return (found[0], {**found[1], **own}) if isinstance(found, tuple) else found

    def check(self) -> None:
        """Raise ValueError where a value is out of range; values set after construction are checked by the model."""
        if not isinstance(self.format_version, int) or not 1 <= self.format_version <= FORMAT_VERSION:
            raise ValueError(
                f"format_version must lie in 1..{FORMAT_VERSION}, got {self.format_version!r}: a higher one was saved "
                "by a newer hf-ttame; run `pip install -U hf-ttame`"
            )
        for name, allowed in (
            ("branch_activation", ("relu", "sigmoid")),
            ("class_token", ("drop", "multiply")),
            ("head_init", ("random", "classifier")),
            ("classifier_outputs", OUTPUTS),
            ("map_scaling", ("logits", "sigmoid")),
            ("processor_backend", (None, "pil", "torchvision")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}")
        for name in ("image_size", "map_size"):
            size = getattr(self, name)
            if len(size) != 2 or not 1 <= min(size) <= max(size) <= _MAX_SIDE:
                raise ValueError(f"{name} must be [height, width] with both in 1..{_MAX_SIDE}, got {size}")
        if len(self.pixel_scale) != len(self.pixel_shift) or 0 in self.pixel_scale:
            raise ValueError(
                "pixel_scale and pixel_shift must have one entry per channel and no scale may be 0, "
                f"got {self.pixel_scale} and {self.pixel_shift}"
            )
        for layer in self.feature_layers:
            missing = {"name", "channels", "grid", "layout", "prefix_tokens", "clone"} - layer.keys()
            if missing:
                raise ValueError(
                    f"feature layer {layer} lacks {sorted(missing)}; make it with TTameModel.from_backbone"
                )
            if layer["layout"] not in LAYOUTS:
                raise ValueError(f"layout of feature layer {layer['name']!r} must be one of {LAYOUTS}, got {layer}")
            if layer["channels"] < 1 or len(layer["grid"]) != 2 or min(layer["grid"]) < 1:
                raise ValueError(f"feature layer needs channels >= 1 and a grid [h, w] of at least 1 x 1, got {layer}")
