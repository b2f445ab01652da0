"""What a saved explainer holds of its backbone, and how its files get their final names."""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn


def fingerprint(backbone: nn.Module) -> str:
    """ "dtype:hash" of names, shapes and some 4,096 evenly spaced values of every weight and buffer."""
    digest = hashlib.sha256()
    state = backbone.state_dict()
    for name in sorted(state):
        tensor = state[name].detach()
        flat = tensor.flatten()
        sample = flat[:: max(1, flat.numel() // 4096)].to("cpu", torch.float64).contiguous()
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(sample.numpy().tobytes())
    dtype = str(next(backbone.parameters()).dtype).removeprefix("torch.")
    return f"{dtype}:{digest.hexdigest()[:32]}"


def portable_config(backbone: nn.Module) -> dict[str, Any]:
    """The backbone's config without its labels, which stand at the top, and without the path it was loaded from."""
    left_out = ("_name_or_path", "transformers_version", "label_names", "id2label", "label2id")
    config: Any = backbone.config
    return {key: value for key, value in config.to_diff_dict().items() if key not in left_out}


def move_into(part: Path, target: Path) -> None:
    """Move complete files from `part` into `target`, the config last: without it nothing loads."""
    had_backbone = False
    if (target / "config.json").is_file():
        earlier = json.loads((target / "config.json").read_text())
        had_backbone = earlier.get("model_type") == "ttame" and bool(earlier.get("backbone_included"))
    files = sorted((p for p in part.rglob("*") if p.is_file()), key=lambda p: p.name == "config.json")
    target.mkdir(exist_ok=True)
    for file in files:
        final = target / file.relative_to(part)
        final.parent.mkdir(parents=True, exist_ok=True)
        os.replace(file, final)
    # Weights of an earlier save under other names (more shards, an included backbone) would be loaded instead.
    written = {target / file.relative_to(part) for file in files}
    # Only what an explainer's own save wrote is removed: the folder may hold other things.
    for folder in (target, target / "backbone") if had_backbone else (target,):
        for stale in {*folder.glob("model*.safetensors"), *folder.glob("model.safetensors.index.json")} - written:
            stale.unlink()
    if had_backbone and not (part / "backbone").is_dir():
        shutil.rmtree(target / "backbone", ignore_errors=True)
