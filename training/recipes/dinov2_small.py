"""DINOv2-S/14 with a ten-class linear head, on Imagenette's training photographs.

    python training/recipes/dinov2_small.py BACKBONE IMAGENETTE OUTPUT [--ship DIR]

BACKBONE: a folder of transformers' Dinov2ForImageClassification. IMAGENETTE: a folder with train-*.parquet. Further
arguments go to training/train.py (`--resume`, `--head_init random`, `--seed 1`).

The classifier reads the class token and the mean of the patch tokens with one linear layer: the warm start begins as
the class activation map of the patch tokens. A twentieth of the training photographs is held out for validation; the
best head on it is kept in OUTPUT/best. --ship writes it, without the backbone (1.9 MB), to DIR.

Hardware: 2 CPU cores are enough. These settings were not run to their end. The head in model_cards/dinov2_small took
90 minutes on one thread with `--steps 500 --batch_size 16 --workers 1 --mixed_precision bf16 --holdout 0.02
--validation_size 64 --validate_every 125`; its card has the figures. Ten classes are an easy judge: compare explainers
on a classifier with many.
"""

import sys

import torch
from launch import train
from ship import ship


def main() -> None:
    if len(sys.argv) < 4 or any(argument.startswith("-") for argument in sys.argv[1:4]):
        sys.exit(__doc__)
    backbone, data, output = sys.argv[1:4]
    further = sys.argv[4:]
    target = None
    if "--ship" in further:
        position = further.index("--ship")
        target, further = further[position + 1], further[:position] + further[position + 2 :]
    command = ["--backbone", backbone, "--dataset", data, "--output", output, "--steps", "1000"]
    command += ["--batch_size", "32", "--min_crop", "0.5", "--holdout", "0.05", "--validate_every", "200"]
    train(*command, further=further)
    if target is not None:
        ship(output, target, torch.float32)


if __name__ == "__main__":
    main()
