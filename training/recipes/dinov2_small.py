"""DINOv2-S/14 with a ten-class linear head, on Imagenette's training photographs.

    python training/recipes/dinov2_small.py BACKBONE IMAGENETTE OUTPUT [--ship DIR]

BACKBONE: a folder of transformers' Dinov2ForImageClassification. IMAGENETTE: a folder with train-*.parquet. Further
arguments go to training/train.py (`--resume`, `--head_init auto`, `--seed 1`).

The classifier reads the class token and the mean of the patch tokens with one linear layer, so it has a warm start,
the class activation map of the patch tokens. It gave nothing in three seeds (training/LOG.md): this recipe starts at
random; `--head_init auto` starts warm. A twentieth of the training photographs is held out; the head that is best on
160 of them is kept in OUTPUT/best. --ship writes it, without the backbone (1.8 MB), to DIR.

Hardware: a CPU. The head in model_cards/dinov2_small is what this command made in 100 minutes on one thread beside
other work (5 to 6 s a step; bfloat16 halves a pass where the CPU has instructions for it). Expected figures: a score
of about 12 after 200 steps, 9 after 400, 2.6 after 600 and -0.2 after 1,000 on the held-out photographs; those on
Imagenette's validation part are in its card. Ten classes are an easy judge: compare explainers on a classifier with
many.
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
    command += ["--batch_size", "16", "--min_crop", "0.5", "--head_init", "random", "--mixed_precision", "bf16"]
    command += ["--workers", "1"]  # another number reads the photographs in another order
    command += ["--holdout", "0.05", "--validation_size", "160", "--validate_every", "200"]
    train(*command, further=further)
    if target is not None:
        ship(output, target, torch.float32)


if __name__ == "__main__":
    main()
