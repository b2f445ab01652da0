"""Arguments of the training script, and what is refused before anything is loaded."""

from dataclasses import dataclass, field
from pathlib import Path

from hf_ttame.paths import check_outside, check_path
from hf_ttame.pictures import contents

from .checkpoints import checkpoints


@dataclass
class Arguments:
    """Arguments of the training script."""

    backbone: str = field(metadata={"help": "classifier: Hub id or folder; timm architecture with --no_pretrained"})
    dataset: str = field(metadata={"help": "pictures: Hub id; folder or file of parquet, tar or pictures"})
    output: str = field(metadata={"help": "folder for checkpoints, report and the trained explainer"})

    # How long, and with what.
    steps: int = field(default=1000, metadata={"help": "optimiser steps"})
    batch_size: int = field(default=32, metadata={"help": "pictures per process and micro-step"})
    accumulate: int = field(default=1, metadata={"help": "micro-steps per step; not equal to a batch so much larger"})
    optimizer: str = field(default="adamw", metadata={"help": "adamw, or sgd (the authors': Nesterov momentum 0.9)"})
    learning_rate: float = field(default=1e-3, metadata={"help": "peak of the OneCycle schedule"})
    weight_decay: float = field(default=5e-4, metadata={"help": "not applied to biases and norms"})
    clip_norm: float | None = field(default=None, metadata={"help": "largest norm of the gradient"})
    seed: int = 0

    # The data.
    split: str = field(default="train", metadata={"help": "split of the dataset"})
    revision: str | None = field(default=None, metadata={"help": "of a dataset on the Hub"})
    image_column: str | None = field(default=None, metadata={"help": "column of the pictures; found if not given"})
    streaming: bool = field(default=True, metadata={"help": "--no_streaming: download once and map into memory"})
    min_crop: float = field(default=1.0, metadata={"help": "below 1: random resized crops of at least this area"})
    window: int = field(default=2048, metadata={"help": "pictures shuffled together, per worker, held undecoded"})
    workers: int = field(default=2, metadata={"help": "decoding processes per process"})
    max_unreadable: float = field(default=0.05, metadata={"help": "share of unreadable pictures that stops the run"})

    # The explainer and its loss.
    pretrained: bool = field(default=True, metadata={"help": "--no_pretrained: random weights, for trials"})
    feature_layers: list[str] = field(default_factory=list, metadata={"help": "module names; default: the paper's"})
    head_init: str = field(default="auto", metadata={"help": "auto, random (the paper's) or classifier (warm start)"})
    outputs: str | None = field(
        default=None, metadata={"help": "softmax, sigmoid (multi-label) or single_logit; default: as its config says"}
    )
    skip_connection: bool = field(default=True, metadata={"help": "--no_skip_connection: the paper's ablation"})
    batch_norm: bool = field(default=True, metadata={"help": "--no_batch_norm: the paper's ablation"})
    branch_activation: str = field(default="relu", metadata={"help": "relu, or sigmoid (the paper's ablation)"})
    class_token: str = field(default="drop", metadata={"help": "drop, or multiply (the paper's ablation)"})
    map_scaling: str = field(default="sigmoid", metadata={"help": "what explain() scales: sigmoid or logits"})
    fill: str = field(default="black", metadata={"help": "what masks put in place of pixels: black, mean or blur"})
    class_set: str = field(default="batch", metadata={"help": "area term: classes of the batch (authors') or own"})
    cross_entropy_weight: float = 1.5
    area_weight: float = 2.0
    area_exponent: float = 0.3
    variation_weight: float = 0.01

    # Validation.
    validation: str | None = field(default=None, metadata={"help": "pictures for it, as --dataset"})
    validation_split: str = field(default="validation", metadata={"help": "split of --validation"})
    holdout: float = field(default=0.0, metadata={"help": "instead: share of --dataset that training never sees"})
    validation_size: int = field(default=256, metadata={"help": "pictures to validate on, at most"})
    validate_every: int = field(default=250, metadata={"help": "steps between validations"})

    # The machine.
    mixed_precision: str = field(default="no", metadata={"help": "no, bf16 or fp16"})
    channels_last: bool = field(default=True, metadata={"help": "--no_channels_last: NCHW in memory"})
    compile: bool = field(default=False, metadata={"help": "torch.compile the head and the second pass"})
    sync_batch_norm: bool = field(default=False, metadata={"help": "batch norm over all GPUs, not on CPU"})

    # The run.
    save_every: int = field(default=250, metadata={"help": "steps between checkpoints"})
    keep: int = field(default=2, metadata={"help": "checkpoints kept"})
    resume: bool = field(default=False, metadata={"help": "continue from the newest checkpoint in the output folder"})
    log_every: int = field(default=10, metadata={"help": "steps between lines of the log"})
    report_to: str = field(default="none", metadata={"help": "none, tensorboard, trackio or wandb"})


_CHOICES = {
    "optimizer": ("adamw", "sgd"),
    "outputs": (None, "softmax", "sigmoid", "single_logit"),
    "head_init": ("auto", "random", "classifier"),
    "branch_activation": ("relu", "sigmoid"),
    "class_token": ("drop", "multiply"),
    "map_scaling": ("sigmoid", "logits"),
    "fill": ("black", "mean", "blur"),
    "class_set": ("batch", "own"),
    "mixed_precision": ("no", "bf16", "fp16"),
    "report_to": ("none", "tensorboard", "trackio", "wandb"),
}
_AT_LEAST_ONE = (
    "steps", "batch_size", "accumulate", "window", "validation_size", "validate_every", "save_every", "keep",
    "log_every",
)  # fmt: skip


def check(arguments: Arguments) -> None:
    """Raise ValueError for what cannot work, before anything is loaded."""
    for name, allowed in _CHOICES.items():
        if getattr(arguments, name) not in allowed:
            raise ValueError(
                f"--{name} must be one of {', '.join(map(str, allowed))}, got {getattr(arguments, name)!r}"
            )
    for name in _AT_LEAST_ONE:
        if getattr(arguments, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(arguments, name)}")
    if arguments.workers < 0:
        raise ValueError(f"--workers must be at least 0, got {arguments.workers}")
    for name in ("learning_rate", "area_exponent", "min_crop", "clip_norm"):
        value = getattr(arguments, name)
        if value is not None and not value > 0:
            raise ValueError(f"--{name} must be positive, got {value}")
    if arguments.min_crop > 1:
        raise ValueError(f"--min_crop must lie in (0, 1], got {arguments.min_crop}")
    if not 0 <= arguments.holdout < 1:
        raise ValueError(f"--holdout must lie in [0, 1), got {arguments.holdout}")
    if not 0 <= arguments.max_unreadable <= 1:
        raise ValueError(f"--max_unreadable must lie in [0, 1], got {arguments.max_unreadable}")
    if arguments.validation and arguments.holdout:
        raise ValueError("give --validation (other pictures) or --holdout (a share of these), not both")
    if arguments.pretrained:
        check_path(arguments.backbone, "backbone")
    for name in (arguments.dataset, *([arguments.validation] if arguments.validation else [])):
        check_path(name, "dataset", "dataset")
        check_outside(arguments.output, name)
        if Path(name).resolve().is_relative_to(Path(arguments.output, "samples").resolve()):
            raise ValueError(
                f"{name!r} lies where --output {arguments.output!r} keeps its own pictures; choose another"
            )
    if arguments.validation:
        check_apart(arguments)
    output = Path(arguments.output)
    if output.is_file():
        raise ValueError(f"--output {arguments.output!r} is a file; give a folder")
    if arguments.resume:
        return
    if (output / "explainer" / "training.json").exists():
        raise ValueError(f"{arguments.output!r} holds a trained explainer; choose another --output")
    if checkpoints(output):
        raise ValueError(
            f"{arguments.output!r} holds the checkpoints of an earlier run; continue it with --resume, or choose "
            "another --output"
        )


def check_apart(arguments: Arguments) -> None:
    """Raise ValueError where pictures are both trained and validated on: the score would mean nothing."""
    names = (arguments.dataset, str(arguments.validation))
    splits = (arguments.split, arguments.validation_split)
    shared = names[0] == names[1] and splits[0] == splits[1]
    one, other = (Path(name).resolve() for name in names)
    if one.exists() and other.exists() and (one.is_relative_to(other) or other.is_relative_to(one)):
        found, others = contents(one, splits[0]), contents(other, splits[1])
        if isinstance(found, list) and isinstance(others, list):
            shared = not set(found).isdisjoint(others)
        elif not isinstance(found, list) and not isinstance(others, list):
            shared = bool(found._fingerprint == others._fingerprint)
    if shared:
        raise ValueError(
            f"--validation {arguments.validation!r} would read pictures that are trained on; give other ones, another "
            "--validation_split, or --holdout 0.1 to keep a share of --dataset apart"
        )
