"""What stands ready where the blocks of a page run: small files under the names that the pages use, and on a Hub on
loopback small repositories under theirs.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import datasets
import torch
from conftest import make_timm, make_vit, vit_processor
from hub_server import Hub
from PIL import Image
from test_convert import make_checkpoint, torchvision_model
from timm.models._hub import save_for_hf

from hf_ttame import TTameModel
from hf_ttame.demo import EXPLAINER, PHOTOGRAPHS

ROOT = Path(__file__).parents[1]
# Paths that the pages speak of, and what stands there; the pages are read in a clone, so its scripts are there too.
PREPARED = {
    "photo.jpg": "photo.jpg",
    "other.jpg": "other.jpg",
    "a.jpg": "photo.jpg",
    "b.jpg": "other.jpg",
    "path/to/explainer": "explainer",
    "path/to/this/folder": "explainer",
    "runs/my-vit/explainer": "explainer",
    "path/to/my-vit": "backbone",
    "path/to/classifier": "backbone",
    "path/to/another-classifier": "backbone",
    "path/to/pictures": "pictures",
    "path/to/parquet": "parquet",
    "T-TAME.ckpt": "T-TAME.ckpt",
}
SCRIPTS = ("training", "examples", "spaces")


def make_stage(folder: Path, photo: Callable[..., Image.Image]) -> None:
    """The files of PREPARED: a tiny classifier of ImageNet's classes, its explainer, a few pictures, a checkpoint."""
    labels = json.loads((EXPLAINER / "config.json").read_text())["id2label"]
    backbone = make_vit(classes=len(labels))
    backbone.config.id2label = {int(number): label for number, label in labels.items()}
    backbone.config.label2id = {label: int(number) for number, label in labels.items()}
    backbone.save_pretrained(folder / "backbone")
    vit_processor().save_pretrained(folder / "backbone")
    TTameModel.from_backbone(folder / "backbone").save_pretrained(folder / "explainer")
    (folder / "pictures").mkdir()
    for seed in range(6):
        photo(seed=seed).save(folder / "pictures" / f"{seed}.png")
    shutil.copy(PHOTOGRAPHS / "cat.jpg", folder / "photo.jpg")
    shutil.copy(PHOTOGRAPHS / "coffee.jpg", folder / "other.jpg")
    table = _table(photo).add_column("file_name", [f"{row}.png" for row in range(12)])
    (folder / "parquet").mkdir()
    table.to_parquet(str(folder / "parquet" / "0.parquet"))
    torch.save(make_checkpoint("resnet50", torchvision_model("resnet50")), folder / "T-TAME.ckpt")


def fill_hub(hub: Hub, folder: Path, photo: Callable[..., Image.Image]) -> None:
    """The repositories that the pages name, each a tiny one of its kind."""
    name = "timm/resnet50.a1_in1k"
    save_for_hf(make_timm("test_resnet"), str(folder / "timm"), safe_serialization=True)
    commit = hub.put(name, folder / "timm")
    explainer = TTameModel.from_backbone(make_timm("test_resnet"))
    explainer.config.backbone, explainer.config.backbone_revision = name, commit
    explainer.save_pretrained(folder / "of-timm", include_backbone=False)
    hub.put("me/ttame-resnet50", folder / "of-timm")
    _table(photo).to_parquet(str(folder / "imagenet.parquet"))
    content = (folder / "imagenet.parquet").read_bytes()
    shards = {f"data/{split}-00000-of-00001.parquet": content for split in ("train", "validation")}
    hub.put("ILSVRC/imagenet-1k", shards, "datasets")


def put_stage(stage: Path, page: Path) -> None:
    """A page's own copy of all of it."""
    for name, source in PREPARED.items():
        (page / name).parent.mkdir(parents=True, exist_ok=True)
        if (stage / source).is_dir():
            shutil.copytree(stage / source, page / name)
        else:
            (page / name).symlink_to(stage / source)
    for script in SCRIPTS:
        (page / script).symlink_to(ROOT / script)


def _table(photo: Callable[..., Image.Image]) -> datasets.Dataset:
    rows = {"image": [photo(80, 70, seed) for seed in range(12)], "label": [seed % 7 for seed in range(12)]}
    return datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
