"""Does the warm start help a classifier that reads the class token alone? DINOv2-S/14, ten classes.

    python training/recipes/dinov2_small_class_token.py BACKBONE IMAGENETTE WORK
    python training/recipes/dinov2_small_class_token.py BACKBONE IMAGENETTE WORK --head_init random --output RANDOM

BACKBONE: a folder of transformers' Dinov2ForImageClassification. IMAGENETTE: a folder with train-*.parquet. Further
arguments go to training/train.py.

1. Writes WORK/backbone: the same network as timm's `vit_small_patch14_dinov2` with the class-token half of its
   classifier alone. (Of transformers' classes for DINOv2 none reads only the class token.)
2. Trains briefly with `--head_init classifier`, into WORK/run: what counts is how the two starts compare after the
   same few steps. Every 45 steps the head is measured on held-out training photographs.

Hardware: 2 CPU cores. Time and figures: training/LOG.md.
"""

import sys
from pathlib import Path
from typing import Any

import timm
import torch
from launch import train
from transformers import AutoImageProcessor, AutoModelForImageClassification

from hf_ttame.backbones import wrap_backbone

# transformers' names, and timm's.
_RENAMED = {
    "embeddings.patch_embeddings.projection": "patch_embed.proj",
    "embeddings.cls_token": "cls_token",
    "encoder.layer.": "blocks.",
    "attention.o_proj": "attn.proj",
    "layer_scale1.lambda1": "ls1.gamma",
    "layer_scale2.lambda1": "ls2.gamma",
    "layernorm.": "norm.",
}


@torch.no_grad()
def prepare(folder: str, target: Path) -> None:
    """Write the class-token classifier to `target`."""
    source: Any = AutoModelForImageClassification.from_pretrained(folder)
    processor = AutoImageProcessor.from_pretrained(folder)
    size = processor.crop_size["height"]
    classes = source.config.num_labels
    module: Any = timm.create_model("vit_small_patch14_dinov2", num_classes=classes, img_size=size)
    weights: dict[str, torch.Tensor] = {}
    for name, tensor in source.dinov2.state_dict().items():
        for old, new in _RENAMED.items():
            name = name.replace(old, new)
        weights[name] = tensor
    for kind in ("weight", "bias"):
        for block in range(len(module.blocks)):
            parts = [weights.pop(f"blocks.{block}.attention.{part}_proj.{kind}") for part in "qkv"]
            weights[f"blocks.{block}.attn.qkv.{kind}"] = torch.cat(parts)
    del weights["embeddings.mask_token"], weights["embeddings.position_embeddings"]
    embeddings = source.dinov2.embeddings
    patches = torch.zeros(1, 1 + (size // 14) ** 2, module.embed_dim)
    weights["pos_embed"] = embeddings.interpolate_pos_encoding(patches, size, size)
    weights["head.weight"] = source.classifier.weight[:, : module.embed_dim]
    weights["head.bias"] = source.classifier.bias
    module.load_state_dict(weights)
    module.eval()
    x = torch.randn(2, 3, size, size)
    expected = source.dinov2(x).last_hidden_state[:, 0] @ weights["head.weight"].T + weights["head.bias"]
    torch.testing.assert_close(module(x), expected, atol=1e-3, rtol=1e-3)
    module.pretrained_cfg.update(mean=processor.image_mean, std=processor.image_std)
    backbone = wrap_backbone(module, processor).model
    backbone.config.id2label = source.config.id2label
    backbone.config.label2id = source.config.label2id
    backbone.save_pretrained(target)
    processor.save_pretrained(target)


def main() -> None:
    if len(sys.argv) < 4 or any(argument.startswith("-") for argument in sys.argv[1:4]):
        sys.exit(__doc__)
    folder, data, work = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    if not (work / "backbone" / "preprocessor_config.json").exists():  # written last
        prepare(folder, work / "backbone")
    command = ["--backbone", str(work / "backbone"), "--dataset", data, "--output", str(work / "run")]
    command += ["--steps", "90", "--batch_size", "16", "--min_crop", "0.5", "--holdout", "0.02"]
    command += ["--validation_size", "64", "--validate_every", "45", "--head_init", "classifier"]
    train(*command, further=sys.argv[4:])


if __name__ == "__main__":
    main()
