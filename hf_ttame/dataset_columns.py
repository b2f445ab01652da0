"""The columns of a batch of prepared pictures: one pass of the model, and its results as rows."""

import io
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from .answers import probabilities
from .dataset_input import Batch
from .dataset_output import kept_name
from .image_processing import shown
from .modeling_ttame import TTameModel
from .visualization import colour_map

_STRENGTH = 0.55  # share of colour in an overlay
_PALETTE = colour_map(np.arange(256) / 255).tobytes()


def wanted_classes(model: TTameModel, class_ids: Any, top_k: int | None) -> torch.Tensor | None:
    """The asked classes (N,), each once; ValueError where model or selection do not fit."""
    if model.training:
        raise ValueError("explaining needs eval mode; call model.eval() first")
    if class_ids is not None and top_k is not None:
        raise ValueError("give class_ids (--class) or top_k (--top-k), not both")
    if top_k is not None and not 1 <= top_k <= model.config.num_labels:
        raise ValueError(f"top_k must lie in 1..{model.config.num_labels}, got {top_k}")
    return None if class_ids is None else torch.tensor(list(dict.fromkeys(model.resolve_classes(class_ids))))


@dataclass
class Launched:
    """Of B pictures, on the device: predicted (B,), ids (B, N), scores (B, N), maps (B, N, h, w) uint8; `counts` says
    how many of the N classes count in each row."""

    predicted: torch.Tensor
    ids: torch.Tensor
    scores: torch.Tensor
    maps: torch.Tensor
    counts: list[int]


@torch.no_grad()
def launch(model: TTameModel, batch: Batch, wanted: torch.Tensor | None, top_k: int | None) -> Launched | None:
    """Start the pass of a batch; a GPU is not waited for."""
    if batch.pixel_values is None:
        return None
    pixel_values = batch.pixel_values.to(model.device, non_blocking=True, memory_format=torch.channels_last)
    logits, features = model.features(pixel_values)
    ids, counts = model._select(logits, wanted, top_k)
    scores = probabilities(logits, model.config.classifier_outputs).gather(1, ids)
    maps = model.scale_maps(model.head(features, ids)).mul(255).round().to(torch.uint8)
    return Launched(logits.argmax(dim=1), ids, scores, maps, counts)


def collect(model: TTameModel, batch: Batch, launched: Launched | None, overlays: bool) -> dict[str, Any]:
    """The columns of a batch, a row per picture and class."""
    if launched is None:
        h, w = model.config.map_size
        empty = np.zeros(0, dtype=np.int32)
        columns: dict[str, Any] = {"id": [], "predicted": empty, "class_id": empty, "label": []}
        columns |= {"score": np.zeros(0, dtype=np.float32), "map": np.zeros((0, h, w), dtype=np.uint8)}
        return columns | ({"overlay": []} if overlays else {}) | {name: [] for name in batch.columns}
    counts = np.array(launched.counts)
    chosen = np.arange(launched.ids.shape[1]) < counts[:, None]
    rows = np.repeat(np.arange(len(counts)), counts)
    ids = launched.ids.cpu()
    model._warn_unseen(ids[torch.from_numpy(chosen)])
    scores = launched.scores.float().cpu().numpy()[chosen]
    if not np.isfinite(scores).all():
        raise ValueError(f"the classifier's scores are not finite in {model.dtype}; use --dtype float32 or bfloat16")
    class_ids = ids.numpy()[chosen].astype(np.int32)
    maps = launched.maps.cpu().numpy()[chosen]
    columns = {
        "id": [batch.ids[row] for row in rows],
        "predicted": launched.predicted.cpu().numpy()[rows].astype(np.int32),
        "class_id": class_ids,
        "label": [model.config.id2label[class_id] for class_id in class_ids.tolist()],
        "score": scores,
        "map": maps,
    }
    if overlays:
        assert batch.pixel_values is not None
        seen = [_as_seen(model, pixel_values) for pixel_values in batch.pixel_values]
        columns["overlay"] = [_overlay(seen[row], explanation) for row, explanation in zip(rows, maps, strict=True)]
    for name, values in batch.columns.items():
        columns[kept_name(name)] = [values[row] for row in rows]
    return columns


def _as_seen(model: TTameModel, pixel_values: torch.Tensor) -> Image.Image:
    """The classifier's input (C, H, W) as a picture."""
    scale, shift = (torch.tensor(v)[:, None, None] for v in (model.config.pixel_scale, model.config.pixel_shift))
    levels = ((pixel_values - shift) / scale).clamp(0, 1).mul(255).round().permute(1, 2, 0).numpy()
    return Image.fromarray(levels.astype(np.uint8)) if levels.shape[2] == 3 else shown(levels)


def _overlay(picture: Image.Image, explanation: np.ndarray) -> bytes:
    """JPEG of a map (h, w) uint8 over a picture: all in Pillow, which is quick."""
    coloured = Image.fromarray(explanation).resize(picture.size, Image.Resampling.BILINEAR)
    coloured.putpalette(_PALETTE)
    file = io.BytesIO()
    Image.blend(picture, coloured.convert("RGB"), _STRENGTH).save(file, "JPEG", quality=88)
    return file.getvalue()
