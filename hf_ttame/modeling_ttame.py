"""TTameModel: a frozen image classifier with an attention head that explains it in the same pass."""

import copy
import difflib
import json
import os
import re
import tempfile
import threading
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification, PreTrainedModel
from transformers.utils import ModelOutput

from .answers import answered, class_logits, probabilities
from .backbones import Backbone, check_finite, input_channels, labels_of, load_backbone, outputs_of, wrap_backbone
from .cards import is_ours, write_card
from .configuration_ttame import TTameConfig
from .disk import writing
from .explanation import Explanation
from .features import FeatureLayer, check_names, classify, extract, probe_layers, probe_noise
from .head import TTameHead, start_as_classifier, unsaturate
from .image_processing import (
    ImageInput,
    Normalisation,
    Placement,
    load_picture,
    measure_normalisation,
    measure_placement,
    place_maps,
    preprocess,
    shown,
    width_height,
)
from .layer_choice import choose_layers, find_pooled_classifier
from .masking import min_max
from .paths import check_path
from .records import Records, head_fingerprint
from .saving import (
    add_remote_code,
    align,
    check_download,
    checked_token,
    clean_configs,
    fetch_weights,
    fingerprint,
    move_into,
    patiently,
    portable_config,
    resolve_commit,
    values_fingerprint,
)

MAX_MAP_SIDE = 56  # the map grid is the largest grid among the layers, at most this
_REMEMBERED_PLACEMENTS = 4096


@dataclass
class TTameOutput(ModelOutput):
    """logits (B, K); map_logits (B, N, h, w), raw; class_ids (B, N), the classes of the maps."""

    logits: torch.Tensor | None = None
    map_logits: torch.Tensor | None = None
    class_ids: torch.Tensor | None = None


class TTameModel(PreTrainedModel):
    """Explains a frozen classifier: one pass gives logits and a map for any class (arXiv 2403.04523).

    Make one with `from_backbone`, load one with `from_pretrained`. The backbone is always in eval mode and its weights
    never get gradients; only `head` trains.
    """

    config_class = TTameConfig
    base_model_prefix = ""
    main_input_name = "pixel_values"
    _keys_to_ignore_on_load_missing = [r"^backbone\.", r"^head\.class_counts$"]

    def __init__(self, config: TTameConfig):
        config.check()
        super().__init__(config)
        self.layers = [FeatureLayer.from_dict(facts) for facts in config.feature_layers]
        self.head = TTameHead.from_config(config)
        self.backbone: Any = None  # a classifier, attached by from_backbone and from_pretrained
        self.image_processor: Any = None
        self._placements: dict[tuple[int, int], Placement] = {}
        self._records = Records("")  # of a head that was loaded
        self._warned_unseen = False
        self._capture_lock = threading.Lock()  # hooks of two passes at once would mix their features
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Keep torch's own initialisation: the head is initialised by its constructor."""
        if isinstance(module, TTameHead) and not getattr(module.class_counts, "_is_hf_initialized", False):
            module.class_counts.zero_()  # an older head has none; loading leaves missing values undefined

    def train(self, mode: bool = True) -> "TTameModel":
        super().train(mode)
        if self.backbone is not None:
            self.backbone.eval()  # batch-norm statistics and dropout of the classifier never change
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> "TTameModel":
        copied = type(self)(copy.deepcopy(self.config, memo))
        copied.head.load_state_dict(self.head.state_dict())
        copied.head.to(next(self.head.parameters()))
        if self.backbone is not None:
            copied._attach(copy.deepcopy(self.backbone, memo), self.image_processor)
        copied._records = self._records
        return copied.train(self.training)

    # ---- making -------------------------------------------------------------------------------------------------

    @classmethod
    def from_backbone(
        cls,
        backbone: str | os.PathLike | nn.Module,
        *,
        processor: Any = None,
        feature_layers: Sequence[str] | None = None,
        revision: str | None = None,
        map_size: tuple[int, int] | None = None,
        head_init: str = "auto",
        pretrained: bool = True,
        skip_connection: bool = True,
        batch_norm: bool = True,
        branch_activation: str = "relu",
        class_token: str = "drop",
        map_scaling: str = "sigmoid",
        outputs: str | None = None,
        **hub_kwargs: Any,
    ) -> "TTameModel":
        """A new explainer for a classifier, its head untrained.

        Args:
            backbone: a Hub id ("timm/resnet50.a1_in1k", "google/vit-base-patch16-224"), a folder, a transformers
                image classifier, or a timm model. With pretrained=False: a timm architecture name, random weights.
            processor: the image processor of a transformers module; a timm module has its own in `pretrained_cfg`.
            feature_layers: module names, fine to coarse; None: the paper's (`default_layers`), with the map that the
                classifier averages as the last one where the head starts from it.
            revision: branch, tag or commit of a Hub id.
            map_size: (h, w) of the maps; None: the largest grid among the layers, at most 56 x 56.
            head_init: "random" as the paper; "classifier": the head starts as the class activation map, or, where the
                classifier reads a class token, as its logits of every patch token; "auto": "classifier" where it is
                exactly the class activation map and the layers are the default ones, else "random".
            pretrained: load weights.
            skip_connection, batch_norm, branch_activation, class_token: the paper's ablations, see `TTameConfig`.
            map_scaling: what `explain` scales to [0, 1], "sigmoid" or "logits".
            outputs: what the logits mean: "softmax" one class of many, "sigmoid" each class by itself (multi-label),
                "single_logit" yes or no by the sign of the only one. None: as the backbone's config says
                (`problem_type`, `num_labels`); timm models record nothing, so say it for a multi-label one.
            **hub_kwargs: token, cache_dir, local_files_only; attn_implementation of a transformers backbone.

        Raises:
            ValueError: the backbone is not an image classifier with spatial features, or an argument does not fit it.
            TypeError: `backbone` is neither a name nor a model.
        """
        if head_init not in ("auto", "random", "classifier"):
            raise ValueError(f"head_init must be 'auto', 'random' or 'classifier', got {head_init!r}")
        if unknown := hub_kwargs.keys() - {"token", "cache_dir", "local_files_only", "attn_implementation"}:
            raise TypeError(f"from_backbone does not know the arguments {sorted(unknown)}; see its docstring")
        if isinstance(backbone, nn.Module):
            loaded = wrap_backbone(backbone, processor)
        else:
            loaded = load_backbone(
                os.fspath(backbone), processor=processor, revision=revision, pretrained=pretrained, **hub_kwargs
            )
        classifier = loaded.model
        check_finite(classifier)
        outputs = outputs or outputs_of(classifier.config)
        normalisation = measure_normalisation(loaded.processor, input_channels(classifier))
        reference = next(classifier.parameters())
        noise = probe_noise(len(normalisation.scale), normalisation.size).to(reference)
        classifier.eval()
        try:
            with torch.no_grad():
                classify(classifier, noise)
        except (RuntimeError, AssertionError, ValueError) as error:
            raise ValueError(
                f"{type(classifier).__name__} cannot take its processor's pictures of {tuple(noise.shape[1:])}: "
                f"{error}; pass a processor of the size that it was made for (or give `img_size=` to timm)"
            ) from error

        pooled = None
        if head_init == "classifier" or (head_init == "auto" and feature_layers is None):
            asked = head_init == "classifier" and class_token == "drop"
            pooled = find_pooled_classifier(classifier, noise, or_class_token=asked) if skip_connection else None
        if head_init == "classifier" and pooled is None:
            raise ValueError(
                "head_init='classifier' needs a skip connection and a linear classifier that reads the plain average "
                f"of a feature map, or its class token and class_token='drop'; {type(classifier).__name__} with "
                f"skip_connection={skip_connection} and class_token={class_token!r} has none; use head_init='random'"
            )
        layers = choose_layers(classifier, noise, feature_layers, pooled)
        if class_token == "multiply" and not all(layer.prefix_tokens for layer in layers):
            raise ValueError(
                "class_token='multiply' needs layers that hold a class token; of "
                f"{[layer.name for layer in layers]} at least one has none; use 'drop'"
            )
        grid = (max(layer.grid[0] for layer in layers), max(layer.grid[1] for layer in layers))
        config = TTameConfig(
            backbone=loaded.hub_id,
            backbone_revision=loaded.revision,
            backbone_fingerprint=fingerprint(classifier),
            backbone_values=values_fingerprint(classifier),
            backbone_config=portable_config(classifier),
            feature_layers=[layer.to_dict() for layer in layers],
            image_size=normalisation.size,
            pixel_scale=normalisation.scale,
            pixel_shift=normalisation.shift,
            processor_backend="pil" if type(loaded.processor).__name__.endswith("Pil") else None,
            map_size=map_size or (min(grid[0], MAX_MAP_SIDE), min(grid[1], MAX_MAP_SIDE)),
            skip_connection=skip_connection,
            batch_norm=batch_norm,
            branch_activation=branch_activation,
            last_layer_relu=pooled is None or pooled.non_negative,
            class_token=class_token,
            head_init="random" if pooled is None else "classifier",
            classifier_outputs=outputs,
            map_scaling=map_scaling,
            # So that transformers' own classification pipeline takes the sigmoid too.
            problem_type=None if outputs == "softmax" else "multi_label_classification",
            **labels_of(classifier.config, outputs),  # type: ignore[arg-type]
        )
        model = cls(config)
        if pooled is not None:
            start_as_classifier(model.head, pooled, outputs)
        model._attach(classifier, loaded.processor)
        model.to(reference.device).eval()
        if pooled is None:
            unsaturate(model.head, model.features(noise)[1])
        return model

    def _attach(self, backbone: nn.Module, processor: Any) -> None:
        self.backbone = backbone.eval().requires_grad_(False)
        align(self)
        self.image_processor = processor
        self._keys_to_ignore_on_save = [f"backbone.{key}" for key in backbone.state_dict()]
        self._placements.clear()

    # ---- explaining ---------------------------------------------------------------------------------------------

    def forward(self, pixel_values: torch.Tensor, class_ids: Any = None, **_: Any) -> TTameOutput:
        """Logits and map logits in one pass of the backbone.

        Args:
            pixel_values: (B, C, H, W), normalised by `image_processor`.
            class_ids: None the class with the highest logit (one, also where several are positive); an int; (B,) one
                class or (B, N) classes per image; "all".

        Returns:
            logits (B, K), map_logits (B, N, h, w), class_ids (B, N).

        Raises:
            ValueError: wrong shape of pixel_values or class_ids, or a class id outside 0..K-1.
        """
        with torch.no_grad():
            logits, features = self.features(pixel_values)
        if isinstance(class_ids, str) and class_ids == "all":
            ids = torch.arange(logits.shape[1], device=logits.device)
            return TTameOutput(logits, self.head(features), ids.expand(logits.shape[0], -1))
        ids = self._class_ids(class_ids, logits)
        return TTameOutput(logits, self.head(features, ids), ids)

    def features(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Logits (B, K) and the tapped feature maps, in the head's dtype, of one pass."""
        backbone = self._backbone()
        expected = (len(self.config.pixel_scale), *self.config.image_size)
        if pixel_values.ndim != 4 or tuple(pixel_values.shape[1:]) != expected:
            raise ValueError(
                f"pixel_values must be (B, {', '.join(map(str, expected))}), got {tuple(pixel_values.shape)}; "
                "prepare images with model.image_processor"
            )
        weight = self.head.fuser.weight
        with self._capture_lock:
            logits, features = extract(
                backbone, pixel_values.to(next(backbone.parameters()).dtype), self.layers, self.config.class_token
            )
        return class_logits(logits, self.config.classifier_outputs), [maps.to(weight.dtype) for maps in features]

    def classify(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Logits (B, K) of the frozen backbone alone; gradients flow to `pixel_values` where they are asked for."""
        backbone = self._backbone()
        logits = classify(backbone, pixel_values.to(next(backbone.parameters()).dtype))
        return class_logits(logits, self.config.classifier_outputs)

    def fill(self, colour: str = "black") -> torch.Tensor:
        """What removed pixels become, per channel (C,), in normalised space: "black", or "mean" (0)."""
        if colour not in ("black", "mean"):
            raise ValueError(f"fill must be 'black' or 'mean', got {colour!r}")
        shift = torch.tensor(self.config.pixel_shift, device=self.device)
        return shift if colour == "black" else torch.zeros_like(shift)

    def scale_maps(self, map_logits: torch.Tensor) -> torch.Tensor:
        """Map logits (..., h, w) to explanation maps in [0, 1], min-max scaled as the config's `map_scaling` says."""
        return min_max(map_logits.sigmoid() if self.config.map_scaling == "sigmoid" else map_logits)

    @torch.no_grad()
    def explain(
        self,
        images: ImageInput | Sequence[ImageInput],
        class_ids: int | str | Sequence[int | str] | None = None,
        top_k: int | None = None,
        batch_size: int = 32,
    ) -> list[Explanation]:
        """Explanations of pictures, at their own size.

        Args:
            images: one or many PIL images, paths or arrays (H, W[, C]).
            class_ids: class ids or label names, the same for every picture; None: the predicted class, of a
                multi-label classifier every class with a probability over 0.5 (the highest if there is none).
            top_k: instead of class_ids, the k classes with the highest scores.
            batch_size: pictures per pass.

        Returns:
            One Explanation per picture and class, picture by picture.

        Raises:
            ValueError: an unreadable picture, an unknown class (the nearest labels are named), or both selections.

        Example:
            >>> for explanation in model.explain("cat.jpg", top_k=3):
            ...     explanation.save(f"{explanation.class_id}.png")
        """
        if self.training:
            raise ValueError("explain() needs eval mode; call model.eval() first")
        if class_ids is not None and top_k is not None:
            raise ValueError("give class_ids or top_k, not both")
        if top_k is not None and not 1 <= top_k <= self.config.num_labels:
            raise ValueError(f"top_k must lie in 1..{self.config.num_labels}, got {top_k}")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        many: list[Any] = list(images) if isinstance(images, (list, tuple)) else [images]
        wanted = None if class_ids is None else torch.tensor(self.resolve_classes(class_ids))
        return [
            explanation
            for start in range(0, len(many), batch_size)
            for explanation in self._explain_batch(many[start : start + batch_size], start, wanted, top_k)
        ]

    def _explain_batch(
        self, images: Sequence[ImageInput], start: int, wanted: torch.Tensor | None, top_k: int | None
    ) -> Iterator[Explanation]:
        outputs = self.config.classifier_outputs
        pictures = [load_picture(image, len(self.config.pixel_scale)) for image in images]
        pixel_values = preprocess(self.image_processor, pictures).to(self.device)
        logits, features = self.features(pixel_values)
        scores = probabilities(logits, outputs)
        ids, counts = self._select(logits, wanted, top_k)
        self._warn_unseen(torch.cat([row[:count] for row, count in zip(ids, counts, strict=True)]))
        maps = self.scale_maps(self.head(features, ids)).cpu()
        for row, (picture, count) in enumerate(zip(pictures, counts, strict=True)):
            size = width_height(picture)
            placed, seen = place_maps(maps[row, :count], self._placement(size), tuple(self.config.image_size), *size)
            for column, class_id in enumerate(ids[row, :count].tolist()):
                yield Explanation(
                    map=placed[column].clamp(0, 1).numpy(),  # interpolation rounds past 1
                    seen=seen.numpy(),
                    image_index=start + row,
                    class_id=class_id,
                    label=self.config.id2label[class_id],
                    score=float(scores[row, class_id]),
                    image=shown(picture),
                )

    def _select(
        self, logits: torch.Tensor, wanted: torch.Tensor | None, top_k: int | None
    ) -> tuple[torch.Tensor, list[int]]:
        """The classes to explain, (B, N), and how many of them count in each row; the arguments of `explain`."""
        batch = len(logits)
        if wanted is not None:
            return wanted.to(logits.device).expand(batch, -1), [wanted.numel()] * batch
        # The classes of the answer have the highest scores, so that the first of the sorted ones are just those.
        outputs = self.config.classifier_outputs
        one = top_k or (1 if outputs != "sigmoid" else None)
        counts = [one] * batch if one else answered(logits, outputs).sum(dim=1).tolist()
        return logits.topk(max(counts), dim=1).indices, counts

    def _warn_unseen(self, ids: torch.Tensor) -> None:
        """Warn, once, where a map is asked for of a class that training never explained."""
        counts = self.head.class_counts
        if self._warned_unseen or not counts.any() or counts[ids].all():
            return
        self._warned_unseen = True
        unseen = ids.unique()[counts[ids.unique()] == 0].tolist()
        labels = ", ".join(repr(self.config.id2label[class_id]) for class_id in unseen[:5])
        warnings.warn(
            f"the explainer was trained without a single picture of {labels}: such maps were never checked against "
            f"anything; {int((counts == 0).sum())} of {len(counts)} classes are so (model.head.class_counts)",
            stacklevel=6,
        )

    def _placement(self, size: tuple[int, int]) -> Placement:
        if size not in self._placements:
            if len(self._placements) >= _REMEMBERED_PLACEMENTS:
                self._placements.clear()
            normalisation = Normalisation(
                tuple(self.config.pixel_scale), tuple(self.config.pixel_shift), tuple(self.config.image_size)
            )
            self._placements[size] = measure_placement(self.image_processor, normalisation, *size)
        return self._placements[size]

    def resolve_classes(self, class_ids: int | str | Sequence[int | str]) -> list[int]:
        """Class ids of ids, label names or numbers written as text; ValueError names the nearest labels."""
        if isinstance(class_ids, (int, str, np.integer)):
            class_ids = [class_ids]
        # The label as it is written wins over its lower case, and that over one of its comma-separated synonyms.
        exact = {label: class_id for class_id, label in reversed(self.config.id2label.items())}
        by_name: dict[str, list[int]] = {}
        for class_id, label in self.config.id2label.items():
            by_name.setdefault(label.lower(), []).append(class_id)
        whole_labels = set(by_name)
        for class_id, label in self.config.id2label.items():
            for name in {part.strip().lower() for part in label.split(",")} - whole_labels:
                by_name.setdefault(name, []).append(class_id)
        resolved = []
        for wanted in class_ids:
            name = str(wanted).strip()
            if isinstance(wanted, str) and list(self.config.id2label.values()).count(name) == 1:
                resolved.append(exact[name])
            elif isinstance(wanted, str) and name.lower() in by_name:
                found = by_name[name.lower()]
                if len(found) > 1:
                    raise ValueError(
                        f"class {wanted!r} is the name of {len(found)} classes; give one of the ids {found}"
                    )
                resolved.append(found[0])
            elif name.isdigit() and int(name) < self.config.num_labels:
                resolved.append(int(name))
            else:
                nearest = difflib.get_close_matches(name.lower(), by_name, n=4, cutoff=0.4)
                hint = f"nearest labels: {', '.join(map(repr, nearest))}" if nearest else "see model.config.id2label"
                raise ValueError(
                    f"class {wanted!r} is neither a label nor an id in 0..{self.config.num_labels - 1}; {hint}"
                )
        if not resolved:
            raise ValueError("class_ids must name at least one class, got an empty list")
        return resolved

    def _class_ids(self, class_ids: Any, logits: torch.Tensor) -> torch.Tensor:
        batch, classes = logits.shape
        if class_ids is None:
            return logits.argmax(dim=1, keepdim=True)
        try:
            ids = torch.as_tensor(class_ids, device=logits.device)
        except (TypeError, ValueError, RuntimeError):
            ids = torch.empty(0)
        if ids.ndim == 0:
            ids = ids.expand(batch, 1)
        elif ids.ndim == 1 and ids.shape[0] == batch:
            ids = ids[:, None]
        whole = not (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool)
        if ids.ndim != 2 or ids.shape[0] != batch or ids.numel() == 0 or not whole:
            raise ValueError(
                f"class_ids must be None, an int, 'all', or integers of shape ({batch},) or ({batch}, N), "
                f"got {class_ids!r}"
            )
        if not torch.compiler.is_compiling() and (ids.min() < 0 or ids.max() >= classes):
            raise ValueError(f"class ids must lie in 0..{classes - 1}, got {ids.min().item()}..{ids.max().item()}")
        return ids.long()

    def _backbone(self) -> Any:
        if self.backbone is None:
            raise ValueError(
                "this explainer has no backbone; load it with from_pretrained(..., backbone=FOLDER_OR_MODULE)"
            )
        return self.backbone

    # ---- saving and loading -------------------------------------------------------------------------------------

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        include_backbone: bool | None = None,
        head_dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        """Write the explainer; the files appear under their names only when they are complete.

        The report, the training record and card.json that lay beside the head when it was loaded are written too, as
        long as head, backbone and the config's settings of the maps are still the same.

        Args:
            save_directory: created where it does not exist.
            include_backbone: also write the backbone, into `backbone/`. None: only where it has no Hub id to refer to.
            head_dtype: store the head's floating-point weights in this dtype; loading returns to float32.
            **kwargs: as `PreTrainedModel.save_pretrained`.
        """
        target = Path(save_directory)
        if target.is_file():
            raise ValueError(f"{target} is a file; give a folder to save into")
        if kwargs.pop("push_to_hub", False):
            raise ValueError("save_pretrained only writes files; use model.push_to_hub(repo_id) to publish")
        include = self._pin_backbone() if include_backbone is None else include_backbone
        if not include and self.config.backbone is not None and self._pin_backbone():
            raise ValueError(
                f"the commit of {self.config.backbone!r} is not known and the Hub cannot be asked, so the saved head "
                "could meet other weights later; pass revision=COMMIT to from_backbone, or include_backbone=True"
            )
        target.parent.mkdir(parents=True, exist_ok=True)
        before = (self.config.backbone_included, self.config.head_fingerprint)
        with writing(target), tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as part:
            try:
                self.config.backbone_included = include
                if head_dtype is not None:
                    kwargs["state_dict"] = {
                        f"head.{name}": tensor.to(head_dtype) if tensor.is_floating_point() else tensor
                        for name, tensor in self.head.state_dict().items()
                    }
                saved = kwargs.get("state_dict") or self.head.state_dict(prefix="head.")
                head = head_fingerprint({name: saved[name] for name in saved if name.startswith("head.")})
                self.config.head_fingerprint = head
                super().save_pretrained(part, **kwargs)
            finally:
                self.config.backbone_included, self.config.head_fingerprint = before
            add_remote_code(Path(part))
            if self.image_processor is not None:
                self.image_processor.save_pretrained(part)
            if include:
                backbone = self._backbone()
                backbone.save_pretrained(Path(part, "backbone"))
                self.image_processor.save_pretrained(Path(part, "backbone"))
            clean_configs(Path(part))
            for name, record in self._records.of(head, self.config, kwargs.get("token")):
                Path(part, name).write_text(json.dumps(record, indent=2) + "\n")
            if is_ours(target / "README.md"):
                try:
                    write_card(part)
                except ValueError as error:  # never worth the weights
                    warnings.warn(f"the explainer is saved without a card: {error}", stacklevel=2)
            move_into(Path(part), target)
        self.config.head_fingerprint = head

    def _pin_backbone(self) -> bool:
        """Record the commit of the backbone's Hub id. True where none is known: the backbone must be included."""
        if self.config.backbone is None:
            return True
        commit = resolve_commit(self.config.backbone, self.config.backbone_revision)
        self.config.backbone_revision = commit or self.config.backbone_revision
        return commit is None

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> Any:
        """Publish the explainer with its card in one commit; arguments as `hf_ttame.hub.push_model`."""
        from .hub import push_model

        return push_model(self, repo_id, **kwargs)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        *args: Any,
        backbone: str | os.PathLike | nn.Module | None = None,
        strict: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Load an explainer and its backbone.

        Args:
            pretrained_model_name_or_path: a folder or a Hub id.
            backbone: a folder, Hub id or module to use instead of the recorded one. It must have the same classes,
                and the same channels and grids in the tapped layers. The config then names it.
            strict: raise, instead of warning, where the backbone's weights are not those the head was trained on.
            **kwargs: as `PreTrainedModel.from_pretrained`; dtype defaults to float32, attn_implementation is the
                backbone's, with a device_map the backbone goes where the head does.

        Raises:
            ValueError: no backbone is at hand, or one that the head cannot belong to.
        """
        source = os.fspath(pretrained_model_name_or_path)
        if "torch_dtype" in kwargs:  # its name in older versions of transformers
            former = kwargs.pop("torch_dtype")
            kwargs["dtype"] = kwargs.get("dtype") or former
        if kwargs.get("dtype") in (None, "auto"):
            kwargs["dtype"] = torch.float32  # a head stored in float16 computes in float32
        kwargs["use_safetensors"] = (
            True  # of the head; transformers opens a user's own .bin backbone with weights_only
        )
        if "token" in kwargs:
            kwargs["token"] = checked_token(kwargs["token"])
        hub_kwargs: dict[str, Any] = {
            key: kwargs[key] for key in ("token", "cache_dir", "local_files_only") if key in kwargs
        }
        where: dict[str, Any] = {**hub_kwargs, "revision": kwargs.get("revision")}
        check_path(source, "explainer", **hub_kwargs)
        cached = None if os.path.isdir(source) else (source, kwargs.get("revision"), kwargs.get("cache_dir"))
        loading_info = kwargs.get("output_loading_info", False)
        attention = {key: kwargs.pop(key) for key in ("attn_implementation",) if key in kwargs}
        try:
            if cached:
                patiently(lambda: fetch_weights(source, **where))
            load = super().from_pretrained
            model, info = patiently(lambda: load(source, *args, **{**kwargs, "output_loading_info": True}))
            processor = patiently(
                lambda: AutoImageProcessor.from_pretrained(
                    source, backend=model.config.processor_backend, trust_remote_code=False, **where
                )
            )
        except SafetensorError as error:
            if cached:
                check_download(*cached)
            raise ValueError(
                f"the weights in {source!r} are damaged ({error}); download or copy the folder again"
            ) from error
        except (OSError, RuntimeError) as error:
            if cached:
                check_download(*cached)
            raise ValueError(f"the explainer {source!r} cannot be loaded: {error}") from error
        except ValueError:  # perhaps a damaged file that is no JSON any more
            if cached:
                check_download(*cached)
            raise
        if cached:
            check_download(*cached)
        if missing := [key for key in info["missing_keys"] if key.startswith("head.")]:
            raise ValueError(f"{source!r} lacks the head's weights {sorted(missing)[:4]}; download or copy it again")
        check_finite(model.head)
        named = getattr(model.config, "head_fingerprint", None)
        exact = model.head.fuser.weight.dtype in (torch.float32, torch.float16)  # bfloat16 rounds the values
        if named and exact and named != (actual := head_fingerprint(model.head.state_dict())):
            raise ValueError(
                f"the head's weights in {source!r} (fingerprint {actual}) are not those that its config.json belongs "
                f"to ({str(named)[:32]}): a save or a copy was cut short; save or copy the whole folder again"
            )
        beside = {
            "revision": getattr(model.config, "_commit_hash", None) or kwargs.get("revision"),
            "cache_dir": kwargs.get("cache_dir"),
        }
        model._records = Records.beside(source, model.head.state_dict(), **beside)
        hub_kwargs |= attention
        own = (kwargs.get("revision"), kwargs.get("dtype"), hub_kwargs)
        model._load_backbone(source, backbone, processor, strict, *own)
        return (model, info) if loading_info else model

    def _load_backbone(
        self,
        source: str,
        backbone: Any,
        processor: Any,
        strict: bool,
        revision: str | None,
        dtype: Any,
        hub_kwargs: dict[str, Any],
    ) -> None:
        config = self.config
        own = {**hub_kwargs, "revision": revision}  # the explainer's revision says nothing about the backbone's
        # The backbone is compared in the dtype of its fingerprint, then cast.
        wanted = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        dtype = getattr(torch, str(config.backbone_fingerprint).split(":")[0], wanted)
        dtype = dtype if isinstance(dtype, torch.dtype) else wanted
        if isinstance(backbone, nn.Module):
            found = wrap_backbone(backbone, processor)
        elif backbone is not None:
            found = load_backbone(os.fspath(backbone), processor=processor, dtype=dtype, **hub_kwargs)
        elif config.backbone_included:
            found = load_backbone(
                source, processor=processor, dtype=dtype, subfolder="backbone", only_safetensors=True, **own
            )
        elif config.backbone is not None:
            validate_repo_id(config.backbone)  # a config may come from anybody: no path, no revision that is one
            if config.backbone_revision and not re.fullmatch(r"[0-9a-f]{40}", config.backbone_revision):
                raise ValueError(
                    f"backbone_revision must be a commit of 40 hex digits, got {config.backbone_revision!r}"
                )
            found = load_backbone(
                config.backbone,
                processor=processor,
                dtype=dtype,
                revision=config.backbone_revision,
                only_hub=True,
                only_safetensors=True,
                **hub_kwargs,
            )
        else:
            raise ValueError(
                f"{source!r} holds a head alone and its backbone has no Hub id; "
                "pass from_pretrained(..., backbone=FOLDER_OR_MODULE), or --backbone FOLDER"
            )
        known = self._check_backbone(found, strict)
        if not known:
            self._records = Records("")  # measured and trained with another backbone
        if backbone is not None:
            self._record_backbone(found, known)
        if not isinstance(backbone, nn.Module):
            found.model.to(wanted)
        self._attach(found.model, processor)
        found.model.to(self.device)

    def _check_backbone(self, found: Backbone, strict: bool) -> bool:
        """Whether these are the weights that the config records; warn, or raise ValueError where strict, if not."""
        check_finite(found.model)
        classes = len(labels_of(found.model.config, self.config.classifier_outputs)["id2label"])
        if classes != self.config.num_labels:
            raise ValueError(
                f"the head explains {self.config.num_labels} classes, this backbone has {classes}; "
                "pass the backbone that the head was trained on"
            )
        check_names(found.model, [layer.name for layer in self.layers])
        recorded, actual = self.config.backbone_fingerprint, fingerprint(found.model)
        values = self.config.backbone_values  # tell the same weights under other names
        if recorded == actual or (values and values == values_fingerprint(found.model)):
            return True
        self._check_layers(found)
        # Values are comparable only in the dtype in which they were recorded.
        if not recorded or recorded.split(":")[0] != actual.split(":")[0]:
            message = (
                f"whether the backbone's weights (fingerprint {actual}) are those of the training is not known "
                f"(recorded: {recorded}); load it in the dtype of the record"
            )
        else:
            message = (
                f"the backbone's weights (fingerprint {actual}) are not those the head was trained on ({recorded}); "
                "its maps may be wrong; pass the original backbone"
            )
        if strict:
            raise ValueError(message)
        warnings.warn(message, stacklevel=4)
        return False

    def _check_layers(self, found: Backbone) -> None:
        """Raise ValueError where a tapped layer has other channels, or another grid, than the head reads."""
        size = (len(self.config.pixel_scale), *self.config.image_size)
        noise = torch.zeros(2, *size).to(next(found.model.parameters()))
        names = [layer.name for layer in self.layers]
        try:
            layers = probe_layers(found.model.eval(), names, noise)
        except (RuntimeError, AssertionError, ValueError) as error:
            raise ValueError(
                f"the backbone cannot take the head's input of {size}: {error}; "
                "pass the backbone that the head was trained on"
            ) from error
        for own, other in zip(self.layers, layers, strict=True):
            expected = (own.channels, own.grid, own.prefix_tokens)
            if expected != (other.channels, other.grid, other.prefix_tokens):
                raise ValueError(
                    f"the head reads {own.channels} channels on a grid of {own.grid} with {own.prefix_tokens} prefix "
                    f"tokens from {own.name!r}, this backbone gives {other.channels} on {other.grid} with "
                    f"{other.prefix_tokens}; pass the backbone that the head was trained on"
                )

    def _record_backbone(self, found: Backbone, known: bool) -> None:
        """Let the config name the backbone in use: what is saved next must not refer to another one."""
        config = self.config
        named = (found.hub_id, found.revision)
        if known:  # the same weights, perhaps from another place
            if config.backbone is None:
                config.backbone, config.backbone_revision = named
        elif found.hub_id is None or named != (config.backbone, config.backbone_revision):
            config.backbone, config.backbone_revision = named
            config.backbone_fingerprint = fingerprint(found.model)
            config.backbone_values = values_fingerprint(found.model)
            config.backbone_config = portable_config(found.model)


AutoConfig.register("ttame", TTameConfig)
AutoModel.register(TTameConfig, TTameModel)
AutoModelForImageClassification.register(TTameConfig, TTameModel)
