"""ViT-B/16 on ImageNet-1k, as in the paper or with the warm start.

    python training/recipes/vit_b_16.py OUTPUT              # the paper's settings
    python training/recipes/vit_b_16.py OUTPUT --warm       # ours: starts as the classifier's logits of tokens

Further arguments go to training/train.py (`--resume`, `--report_to tensorboard`, `--batch_size 256 --steps 40000`).

Data: ILSVRC/imagenet-1k, streamed from the Hub (gated: accept its terms, `hf auth login`); a local copy with
`--dataset FOLDER`. Settings of the paper: 8 epochs of batch 32 (320,300 steps), SGD with Nesterov momentum 0.9, weight
decay 5e-4 not on biases, OneCycle to 1e-3, fp16, crop 224 of 256, flip, validation on 2,000 pictures.
Every GPU takes `--batch_size` pictures a step: on 8 of them, `--batch_size 4` keeps the batch and the epochs.
The fill is "mean": the authors' ViT run multiplied the normalised image. Their weights are torchvision's; these are
timm's of the same architecture. With --warm: AdamW, 20,000 steps, black fill. What that start does for a smaller
classifier of this kind, which reads the class token too, stands in training/LOG.md.

Hardware: one GPU with 16 GB (not tried). This recipe was never run to its end.

Expected time: on a GPU not measured; pictures divided by what `python benchmarks/training.py` tells there. On 2 CPU
cores a step takes 1.6 pictures a second (measured, benchmarks/training.json), so the paper's 320,300 x 32 pictures
would take 74 days there and the 20,000 x 32 of --warm 4.6 days (arithmetic, without the validations).

Expected figures: none of ours, it was not run; the paper reports its own. For scale, on Imagenette's validation
photographs our EfficientNet-Lite0 (warm start, 1,200 steps of 32, 2 CPU cores) reaches AD 32.7 and IC 29.0 with binary
masks of half the pixels (model_cards/efficientnet_lite0): another classifier and other pictures.

Tested on small data: the script, its stream, resuming, SGD (tests/test_training_run.py) and the schedule and momentum
of SGD (tests/test_training.py); that the script takes this very command (tests/test_training_recipes.py). Not tested:
fp16, and ImageNet from the Hub.
"""

import sys

from launch import train

PAPER = ["--steps", "320300", "--optimizer", "sgd", "--learning_rate", "1e-3", "--weight_decay", "5e-4"]
PAPER += ["--head_init", "random", "--mixed_precision", "fp16", "--fill", "mean"]
WARM = ["--steps", "20000", "--head_init", "classifier", "--mixed_precision", "bf16"]


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    further = [argument for argument in sys.argv[2:] if argument != "--warm"]
    settings = WARM if "--warm" in sys.argv else PAPER
    command = [
        "--backbone",
        "timm/vit_base_patch16_224.augreg_in1k",
        "--dataset",
        "ILSVRC/imagenet-1k",
        "--output",
        sys.argv[1],
    ]
    command += ["--batch_size", "32", "--workers", "8", "--save_every", "1000", "--validate_every", "10000"]
    command += ["--validation", "ILSVRC/imagenet-1k", "--validation_size", "2000", *settings]
    train(*command, further=further)


if __name__ == "__main__":
    main()
