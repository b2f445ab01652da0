"""Train a T-TAME head on a frozen classifier (arXiv 2403.04523, section III).

    accelerate launch training/train.py --backbone timm/resnet50.a1_in1k --dataset ILSVRC/imagenet-1k --output runs/r50

Reads top to bottom: arguments, explainer, stream, optimiser, then one step at a time. The targets are the classifier's
own predictions, so the dataset needs no labels. `--resume` continues from the newest checkpoint in the output folder.
"""

import json
import os
import shutil
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from datasets.distributed import split_dataset_by_node
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import HfArgumentParser

from hf_ttame import TTameModel
from hf_ttame.image_processing import Normalisation
from hf_ttame.losses import LossWeights, ttame_loss
from hf_ttame.masking import apply_mask, resize_maps

sys.path.insert(0, str(Path(__file__).parent))  # this file is launched as a script, in a checkout and when installed
from data import TrainingStream, image_column, open_stream


@dataclass
class Arguments:
    """Arguments of the training script."""

    backbone: str = field(metadata={"help": "classifier: Hub id or folder; timm architecture with --no_pretrained"})
    dataset: str = field(metadata={"help": "pictures: Hub id, folder of parquet files or of pictures, parquet file"})
    output: str = field(metadata={"help": "folder for checkpoints and the trained explainer"})
    steps: int = field(default=1000, metadata={"help": "optimiser steps"})
    batch_size: int = field(default=32, metadata={"help": "pictures per step and process"})
    learning_rate: float = field(default=1e-3, metadata={"help": "peak of the OneCycle schedule"})
    optimizer: str = field(default="adamw", metadata={"help": "adamw, or sgd (the authors': Nesterov momentum 0.9)"})
    weight_decay: float = field(default=5e-4, metadata={"help": "not applied to biases and norms"})
    split: str = field(default="train", metadata={"help": "split of the dataset"})
    image_column: str | None = field(default=None, metadata={"help": "column of the pictures; found if not given"})
    min_crop: float = field(default=1.0, metadata={"help": "below 1: random resized crops of at least this area"})
    feature_layers: list[str] = field(default_factory=list, metadata={"help": "module names; default: the paper's"})
    head_init: str = field(default="auto", metadata={"help": "auto, random (the paper's) or classifier (warm start)"})
    fill: str = field(default="black", metadata={"help": "what masks put in place of removed pixels: black or mean"})
    cross_entropy_weight: float = 1.5
    area_weight: float = 2.0
    variation_weight: float = 0.01
    pretrained: bool = field(default=True, metadata={"help": "--no_pretrained: random weights, for trials"})
    workers: int = field(default=2, metadata={"help": "decoding processes"})
    seed: int = 0
    mixed_precision: str = field(default="no", metadata={"help": "no, bf16 or fp16"})
    save_every: int = field(default=250, metadata={"help": "steps between checkpoints; the newest two are kept"})
    resume: bool = field(default=False, metadata={"help": "continue from the newest checkpoint in the output folder"})


def check(arguments: Arguments) -> None:
    """Refuse what cannot work before anything is loaded."""
    for name in ("steps", "batch_size", "save_every"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(arguments, name)}")
    if arguments.optimizer not in ("adamw", "sgd"):
        raise ValueError(f"--optimizer must be adamw or sgd, got {arguments.optimizer!r}")
    if not 0 < arguments.min_crop <= 1:
        raise ValueError(f"--min_crop must lie in (0, 1], got {arguments.min_crop}")
    if arguments.fill not in ("black", "mean"):
        raise ValueError(f"--fill must be black or mean, got {arguments.fill!r}")
    if (Path(arguments.output) / "explainer").exists() and not arguments.resume:
        raise ValueError(f"{arguments.output!r} holds a trained explainer; choose another --output")


def make_optimizer(arguments: Arguments, parameters: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
    parameters = list(parameters)
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": arguments.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if arguments.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=arguments.learning_rate, momentum=0.9, nesterov=True)
    return torch.optim.AdamW(groups, lr=arguments.learning_rate)


def checkpoints(output: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(path for path in output.glob("checkpoint-*") if (path / "progress.json").exists())


def save_checkpoint(accelerator: Accelerator, output: Path, progress: dict) -> None:
    """Save everything that the next step depends on; the folder gets its name only when it is complete."""
    part, final = output / ".part", output / f"checkpoint-{progress['step']:08d}"
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        shutil.rmtree(part, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(part))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        (part / "progress.json").write_text(json.dumps(progress))
        shutil.rmtree(final, ignore_errors=True)
        os.replace(part, final)
        for old in checkpoints(output)[:-2]:
            shutil.rmtree(old)


def main(argv: list[str] | None = None) -> None:
    (arguments,) = HfArgumentParser(Arguments).parse_args_into_dataclasses(argv)
    check(arguments)
    output = Path(arguments.output)
    output.mkdir(parents=True, exist_ok=True)
    set_seed(arguments.seed)
    accelerator = Accelerator(mixed_precision=arguments.mixed_precision)

    # The explainer: only its head trains.
    model = TTameModel.from_backbone(
        arguments.backbone,
        pretrained=arguments.pretrained,
        feature_layers=arguments.feature_layers or None,
        head_init=arguments.head_init,
    )
    model.to(accelerator.device, memory_format=torch.channels_last).train()
    size, fill = tuple(model.config.image_size), model.fill(arguments.fill)

    # The stream: fixed steps, so that no process ever waits for another's data.
    newest = checkpoints(output)[-1] if arguments.resume and checkpoints(output) else None
    progress = json.loads((newest / "progress.json").read_text()) if newest else {"step": 0, "unreadable": 0}
    dataset = open_stream(arguments.dataset, arguments.split)
    column = image_column(dataset, arguments.image_column)
    if accelerator.num_processes > 1:
        dataset = split_dataset_by_node(dataset, accelerator.process_index, accelerator.num_processes)
    stream = TrainingStream(
        dataset,
        column,
        Normalisation(tuple(model.config.pixel_scale), tuple(model.config.pixel_shift), size),
        seed=arguments.seed,
        min_scale=arguments.min_crop,
        skip_batches=progress["step"],
        batch_size=arguments.batch_size,
    )
    workers = min(arguments.workers, dataset.num_shards)
    batches = iter(DataLoader(stream, batch_size=arguments.batch_size, num_workers=workers, drop_last=False))

    optimizer = make_optimizer(arguments, model.head.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, arguments.learning_rate, total_steps=arguments.steps)
    head, optimizer = accelerator.prepare(model.head, optimizer)
    accelerator.register_for_checkpointing(schedule)
    if newest:
        accelerator.load_state(str(newest))
    weights = LossWeights(arguments.cross_entropy_weight, arguments.area_weight, arguments.variation_weight)

    figures: dict[str, float] = {}
    bar = tqdm(initial=progress["step"], total=arguments.steps, disable=not accelerator.is_main_process, unit="step")
    with open(output / "log.jsonl", "a") as log:
        while progress["step"] < arguments.steps:
            began = time.perf_counter()
            batch = next(batches)
            pixel_values = batch["pixel_values"].to(accelerator.device, memory_format=torch.channels_last)

            # One step: what does the classifier see, which pixels keep it so?
            with torch.no_grad(), accelerator.autocast():
                logits, features = model.features(pixel_values)
            targets = logits.argmax(dim=1)
            classes, position, counts = targets.unique(return_inverse=True, return_counts=True)
            with accelerator.autocast():
                masks = head(features, classes).float().sigmoid()  # (B, N, h, w), every class of the batch
                own = masks[torch.arange(len(targets), device=targets.device), position]  # (B, h, w)
                masked = apply_mask(pixel_values, resize_maps(own, size), fill)
                masked_logits = model.classify(masked)
            terms = ttame_loss(masked_logits.float(), targets, masks, weights, counts)
            accelerator.backward(terms.total)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()

            progress["step"] += 1
            progress["unreadable"] += int(batch["unreadable"].sum())
            figures = {name: round(value.item(), 4) for name, value in terms._asdict().items()}
            figures["mask_area"] = round(own.mean().item(), 4)
            figures["images_per_second"] = round(
                len(targets) * accelerator.num_processes / (time.perf_counter() - began), 1
            )
            if not torch.isfinite(terms.total):
                raise FloatingPointError(
                    f"the loss became {figures['total']} at step {progress['step']}; lower --learning_rate"
                )
            if accelerator.is_main_process:
                bar.update()
                bar.set_postfix(figures)
                log.write(json.dumps({"step": progress["step"], **figures}) + "\n")
            if progress["step"] % arguments.save_every == 0 and progress["step"] < arguments.steps:
                log.flush()
                save_checkpoint(accelerator, output, progress)
    bar.close()

    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        model.head = accelerator.unwrap_model(head)
        model.eval().to(memory_format=torch.contiguous_format)
        model.save_pretrained(output / "explainer")
        record = {**asdict(arguments), **progress, "last": figures}
        record.pop("output")
        for name in ("backbone", "dataset"):
            if os.path.exists(record[name]):
                record[name] = Path(record[name]).name  # a local path is nobody else's business
        (output / "explainer" / "training.json").write_text(json.dumps(record, indent=2) + "\n")
        if progress["unreadable"]:
            print(f"{progress['unreadable']} unreadable pictures were skipped", file=sys.stderr)
        print(f"saved the explainer in {output / 'explainer'}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
