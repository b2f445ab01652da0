"""The shipped explainer: EfficientNet-Lite0, 1,000 ImageNet classes, trained on Imagenette and ImageNet samples.

    python training/recipes/efficientnet_lite0.py DATA WORK     # DATA holds imagenette/ and imagenet-samples/

1. Writes the training pictures to WORK/train: the training part of Imagenette and the samples of classes that are not
   kept for testing (`imagenet_label % 5 != 0`); the first 500 after a seeded shuffle go to WORK/holdout, on which
   choices are made.
2. Writes the classifier to WORK/backbone.
3. Trains with the command at the end of this file, into WORK/run; further arguments go to training/train.py.
4. With --ship DIR, writes the best head on the hold-out, without the backbone and in float16 (6.2 MB), to DIR.

The head in hf_ttame/assets/efficientnet_lite0 was made with these settings, by an earlier form of the training: it
read the photographs in another order, was not validated on the way (the head of the last step was taken), and its
counts of classes were added later.

Hardware: 2 CPU cores. Measured: 39 minutes for the shipped head's 1,200 steps in float32 on both cores, beside other
work; a step of 16 takes 0.52 s on two cores when alone (benchmarks/training.json); with `--mixed_precision bf16` it
halves on recent CPUs. Expected figures: those of the shipped head in model_cards/efficientnet_lite0. Twice the steps
make it worse: there are 6,067 photographs. What was tried: training/LOG.md.
"""

import sys
from pathlib import Path

import datasets
from launch import train
from ship import ship

from hf_ttame.demo import load_efficientnet_lite0
from hf_ttame.image_processing import processor_from_timm

HOLDOUT = 500
SHARDS = 8


def prepare(data: Path, work: Path) -> None:
    """Write WORK/train, WORK/holdout and WORK/backbone."""
    columns = ["image", "imagenet_label"]
    imagenette = datasets.load_dataset(
        "parquet", data_files=[str(f) for f in sorted((data / "imagenette").glob("train-*.parquet"))], split="train"
    ).select_columns(columns)
    samples = datasets.load_dataset(
        "parquet", data_files=[str(f) for f in (data / "imagenet-samples").glob("*.parquet")], split="train"
    ).select_columns(columns)
    samples = samples.select([i for i, label in enumerate(samples["imagenet_label"]) if label % 5 != 0])
    undecoded = [part.cast_column("image", datasets.Image(decode=False)) for part in (imagenette, samples)]
    undecoded = [part.cast_column("imagenet_label", datasets.Value("int64")) for part in undecoded]
    everything = datasets.concatenate_datasets(undecoded).shuffle(seed=0)
    parts = {"holdout": range(HOLDOUT), "train": range(HOLDOUT, len(everything))}
    for name, rows in parts.items():
        chosen = everything.select(rows).cast_column("image", datasets.Image(decode=True))
        folder = work / name
        folder.mkdir(parents=True, exist_ok=True)
        shards = SHARDS if name == "train" else 1
        for index in range(shards):
            file = folder / f"{name}-{index:05d}-of-{shards:05d}.parquet"
            chosen.shard(shards, index, contiguous=True).to_parquet(str(file))
    backbone = load_efficientnet_lite0()
    backbone.save_pretrained(work / "backbone")
    processor_from_timm(backbone.config.pretrained_cfg).save_pretrained(work / "backbone")


def main() -> None:
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    data, work = Path(sys.argv[1]), Path(sys.argv[2])
    if not (work / "backbone" / "preprocessor_config.json").exists():  # what is written last
        prepare(data, work)
    further = sys.argv[3:]
    target = None
    if "--ship" in further:
        position = further.index("--ship")
        target, further = further[position + 1], further[:position] + further[position + 2 :]
    command = ["--backbone", str(work / "backbone"), "--dataset", str(work / "train"), "--output", str(work / "run")]
    command += ["--steps", "1200", "--batch_size", "32", "--learning_rate", "1e-3", "--min_crop", "0.5"]
    command += ["--validation", str(work / "holdout"), "--validation_size", "200", "--validate_every", "300"]
    train(*command, further=further)
    if target is not None:
        ship(work / "run", target)


if __name__ == "__main__":
    main()
