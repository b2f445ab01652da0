"""What a server has to know beside the graph: classes, preprocessing, what the outputs mean. One JSON object."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil

from . import __version__
from .image_processing import Picture, preprocess

FORMAT = "ttame-onnx/1"
# Of a pixel in [0, 1]. The torchvision backend of a processor resizes up to 0.02 away from Pillow; a crop that is one
# pixel off is 0.1 and more away on a photograph.
PIXEL_TOLERANCE = 0.05


def describe(model: Any, classes: str, batch: int | None, licence: str | None, pictures: Sequence[Picture]) -> dict:
    """Everything that a server needs to know.

    Args:
        model: an explainer.
        classes: which maps the graph gives, as in `export_onnx`.
        batch: the fixed batch, None where it is free.
        licence: a sentence; None: what the configs know.
        pictures: on which the description of the preprocessing is compared with the processor.

    Returns:
        values that JSON can hold.
    """
    config = model.config
    size, grid = list(config.image_size), list(config.map_size)
    counts = model.head.class_counts
    return {
        "format": FORMAT,
        "made_by": f"hf-ttame {__version__}, torch {torch.__version__}",
        "classes": classes,
        "batch": batch,
        "inputs": {"pixel_values": f"(B, {len(config.pixel_scale)}, {size[0]}, {size[1]}) float32, preprocessed"}
        | ({"class_ids": "(B, N) int64, the classes to explain"} if classes == "given" else {}),
        "outputs": {
            "logits": f"(B, {config.num_labels}) float32",
            "scores": f"(B, {config.num_labels}) float32, probabilities",
            **(
                {}
                if classes in ("given", "all")
                else {"class_ids": "(B, N) int64, the classes of the maps, the highest score first"}
            ),
            "map_logits": f"(B, N, {grid[0]}, {grid[1]}) float32, raw",
            "maps": f"(B, N, {grid[0]}, {grid[1]}) float32 in [0, 1], min-max scaled per map; they cover the input: "
            "resize them bilinearly, pixel centres at half integers",
        },
        "map_size": grid,
        "map_scaling": f"min-max of the {'sigmoid of the ' if config.map_scaling == 'sigmoid' else ''}map logits",
        "classifier_outputs": config.classifier_outputs,
        "labels": [config.id2label[class_id] for class_id in range(config.num_labels)],
        # Other classes have maps that were never checked against anything; null: not recorded.
        "trained_classes": counts.nonzero()[:, 0].tolist() if counts.any() else None,
        "preprocessing": describe_preprocessing(model.image_processor, config, pictures),
        "backbone": _backbone(config),
        "licence": licence or _licence(config),
    }


def describe_preprocessing(processor: Any, config: Any, pictures: Sequence[Picture]) -> dict[str, Any] | None:
    """The processor as resize, centre crop and normalisation with Pillow; None where that does not reproduce it.

    The sizes of the processor's config are candidates only: what counts is that its pixel values come out.

    Args:
        processor: an image processor.
        config: of the explainer; its pixel_scale and pixel_shift are the normalisation, measured.
        pictures: to compare on.
    """
    scale, shift = np.array(config.pixel_scale), np.array(config.pixel_shift)
    if len(scale) != 3 or not all(isinstance(picture, Image.Image) for picture in pictures):
        return None  # Pillow has no pictures of other channels
    expected = preprocess(processor, pictures)
    resample = getattr(processor, "resample", None)
    found = None
    for resize, crop in _geometries(processor, tuple(config.image_size)):
        description = {
            "mode": "RGB",
            "resize": resize,
            "resample": Image.Resampling(
                Image.Resampling.BILINEAR if resample is None else int(resample)
            ).name.lower(),
            "crop": crop,
            "mean": np.round(-shift / scale, 7).tolist(),  # of a pixel in [0, 1]: (pixel - mean) / std
            "std": np.round(1 / scale, 7).tolist(),
        }
        values = preprocess(_as_processor(description), pictures)
        if values.shape != expected.shape:
            continue
        difference = float(((values - expected) / torch.tensor(scale)[:, None, None]).abs().max())
        if difference <= PIXEL_TOLERANCE and (found is None or difference < found["largest_pixel_difference"]):
            found = {**description, "largest_pixel_difference": round(difference, 7)}
    return found


def _geometries(processor: Any, target: tuple[int, int]) -> list[tuple[dict[str, int], list[int] | None]]:
    """(resize, crop) that the fields of a processor may mean."""
    size = dict(getattr(processor, "size", None) or {})
    height, width = target
    if {"height", "width"} <= {key for key, value in size.items() if value}:
        resize = {"height": int(size["height"]), "width": int(size["width"])}
        return [(resize, None if tuple(resize.values()) == target else [height, width])]
    if edge := size.get("shortest_edge"):
        pct = getattr(processor, "crop_pct", None) or 1
        edges = {int(edge), int(edge / pct), int(edge * 256 / 224)}  # the last as LeViT's processor enlarges
        cropped = [({"shortest_edge": edge}, [height, width]) for edge in sorted(edges) if edge >= max(target)]
        return [*cropped, ({"height": height, "width": width}, None)]
    return []


def _as_processor(description: dict[str, Any]) -> CLIPImageProcessorPil:
    crop = description["crop"]
    return CLIPImageProcessorPil(
        size=description["resize"],
        resample=Image.Resampling[description["resample"].upper()],
        do_center_crop=crop is not None,
        crop_size={"height": crop[0], "width": crop[1]} if crop else None,
        image_mean=description["mean"],
        image_std=description["std"],
    )


def _backbone(config: Any) -> dict[str, Any]:
    facts = config.backbone_config
    return {
        "id": config.backbone or (facts.get("pretrained_cfg") or {}).get("hf_hub_id"),
        "revision": config.backbone_revision,
        "architecture": facts.get("architecture") or facts.get("model_type"),
        "fingerprint": config.backbone_fingerprint,
    }


def _licence(config: Any) -> str:
    if converted := getattr(config, "converted_from", None):
        return f"{converted}; for academic, non-commercial use only"
    backbone = (config.backbone_config.get("pretrained_cfg") or {}).get("license")
    stated = f"timm states {backbone} for the classifier's weights" if backbone else "not recorded for the classifier"
    return f"{stated}; the explainer's card states its own"
