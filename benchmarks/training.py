"""What a training step costs beside the plain forward pass of its classifier, and whether the data keep up.

    python benchmarks/training.py --rounds 12
    python benchmarks/training.py --device cuda --dtype bfloat16 --batch 64 128 256 512 --models vit_base_patch16_224

Three variants on the same batch of noise; random weights, 1000 classes, model and input in channels_last:

- plain: logits of the frozen backbone, no gradient, nothing else.
- step: the training script's own step, with the frozen batch norms folded into the convolutions: a pass without
  gradient, the head for the classes of the batch, the masked pass, its backward to the mask, AdamW.
- published: the same with the classifier as it came, nothing folded, and the head as the paper writes it: every layer
  resized to the map grid, all layers concatenated, one convolution to the maps of all classes, of which those of the
  batch enter the loss.

Of several --batch sizes the one with the most pictures per second is reported, up to the first that does not fit into
memory.

The limit of step / plain is 3 (a pass, a pass, its backward to the mask) plus the head. After the warm-up, every round
runs each variant once, in an order that changes from round to round; the figures are medians of the ratios within a
round, so that a load on the machine that comes and goes falls on all variants alike. Where other programs want the
same cores, set OMP_WAIT_POLICY=passive.

Data: photographs of 500 x 375 pixels (or --pictures FOLDER) through the training stream with --workers processes,
alone; "data / step" is how many times faster they arrive than the step takes them, with all cores each, and the share
of the time that the step would wait for them (0 where they arrive faster). Beside it the milliseconds per picture of
decoding, cropping with resizing, and collating, in one thread.

Prints a line per model to stderr and ends in one JSON line on stdout.
"""

import argparse
import copy
import itertools
import json
import os
import platform
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from hf_ttame import TTameModel
from hf_ttame.losses import ttame_loss
from hf_ttame.masking import apply_mask, resize_maps
from hf_ttame.memory import keep_freed_memory

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `training` is the package, not this file
from hf_ttame.pictures import decode, image_column, open_stream, undecoded
from training.data import augment
from training.folding import fold_batch_norms
from training.stream import TrainingStream, collate, make_loader
from training.train import masking_losses

BATCHES = {"vit_base_patch16_224": 4, "vgg16": 4, "resnet50": 8, "tf_efficientnet_lite0": 16}
DEFAULT_BATCH = 8
WARM_UP_ROUNDS = 2


class Contestant:
    """One model with an optimiser; `plain`, `step` and `published` each do one round's work."""

    def __init__(self, name: str, batch: int, device: str, dtype: str):
        torch.manual_seed(0)
        self.model = TTameModel.from_backbone(name, pretrained=False)  # as it came: plain and published
        self.trained = TTameModel.from_backbone(copy.deepcopy(self.model.backbone))
        self.trained.head = self.model.head
        fold_batch_norms(self.trained)  # as the training script has it
        for model in (self.model, self.trained):
            model.to(device).to(memory_format=torch.channels_last).train()
        x = torch.randn(batch, len(self.model.config.pixel_scale), *self.model.config.image_size)
        self.x = x.to(device, memory_format=torch.channels_last)
        self.fill = self.model.fill()
        self.optimizer = torch.optim.AdamW(self.model.head.parameters(), lr=1e-4)
        half = getattr(torch, dtype)
        self.autocast = lambda: torch.autocast(device.split(":")[0], dtype=half, enabled=half != torch.float32)

    def plain(self) -> None:
        with torch.no_grad(), self.autocast():
            self.model.classify(self.x)

    def step(self) -> torch.Tensor:
        losses = masking_losses(self.trained, self.model.head, self.x, fill=self.fill, autocast=self.autocast)
        return self._update(losses.terms.total)

    def published(self) -> torch.Tensor:
        model = self.model
        with torch.no_grad(), self.autocast():
            logits, features = model.features(self.x)
        targets = logits.argmax(dim=1)
        with self.autocast():
            masks = self._published_maps(features).float().sigmoid()[:, targets]  # (B, B, h, w) of (B, K, h, w)
            own = masks.diagonal(dim1=0, dim2=1).permute(2, 0, 1)
            size = (self.x.shape[-2], self.x.shape[-1])
            masked_logits = model.classify(apply_mask(self.x, resize_maps(own, size), self.fill))
        return self._update(ttame_loss(masked_logits.float(), targets, masks).total)

    def _published_maps(self, features: list[torch.Tensor]) -> torch.Tensor:
        head = self.model.head
        assert head.bns is not None
        resized = []
        for layer, maps in enumerate(features):
            z = F.relu(head.bns[layer](head.convs[layer](maps)) + maps)
            resized.append(F.interpolate(z, size=head.map_size, mode="bilinear", align_corners=False))
        return head.fuser(torch.cat(resized, dim=1))

    def _update(self, loss: torch.Tensor) -> torch.Tensor:
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()


def seconds(run: Callable[[], Any], device: str) -> float:
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    began = time.perf_counter()
    run()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - began


def measure_step(name: str, batch: int, rounds: int, device: str, dtype: str) -> dict[str, Any]:
    """Medians over the rounds of the times and of the ratios within a round."""
    contestant = Contestant(name, batch, device, dtype)
    variants: dict[str, Callable[[], Any]] = {
        "plain": contestant.plain,
        "step": contestant.step,
        "published": contestant.published,
    }
    orders = list(itertools.permutations(variants))
    times: dict[str, list[float]] = {variant: [] for variant in variants}
    for index in range(WARM_UP_ROUNDS + rounds):
        for variant in orders[index % len(orders)]:
            spent = seconds(variants[variant], device)
            if index >= WARM_UP_ROUNDS:
                times[variant].append(spent)

    def ratio(a: str, b: str) -> float:
        return round(statistics.median(x / y for x, y in zip(times[a], times[b], strict=True)), 3)

    step = statistics.median(times["step"])
    return {
        "batch": batch,
        "rounds": rounds,
        **{f"{variant}_ms": round(1000 * statistics.median(values), 1) for variant, values in times.items()},
        "step_over_plain": ratio("step", "plain"),
        "published_over_plain": ratio("published", "plain"),
        "published_over_step": ratio("published", "step"),
        "step_images_per_second": round(batch / step, 1),
    }


def measure_best(name: str, batches: list[int], rounds: int, device: str, dtype: str) -> dict[str, Any]:
    """`measure_step` of the batch size with the most pictures per second; "tried" has them all."""
    found: list[dict[str, Any]] = []
    for batch in batches:
        try:
            found.append(measure_step(name, batch, rounds, device, dtype))
        except torch.OutOfMemoryError:
            if not found:
                raise
            break
    best = max(found, key=lambda result: result["step_images_per_second"])
    return {**best, "tried": {result["batch"]: result["step_images_per_second"] for result in found}}


def make_pictures(folder: Path, count: int = 64) -> None:
    """JPEGs of ImageNet's usual size and about its usual 100 kB."""
    generator = np.random.default_rng(0)
    for index in range(count):
        coarse = Image.fromarray(generator.integers(0, 256, (24, 32, 3), dtype=np.uint8))
        pixels = np.asarray(coarse.resize((500, 375), Image.Resampling.BICUBIC), dtype=np.int16)
        noisy = np.clip(pixels + generator.integers(-24, 24, pixels.shape), 0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(folder / f"{index:03d}.jpg", quality=90)


def measure_data(folder: str, size: tuple[int, int], batch: int, workers: int, batches: int) -> dict[str, Any]:
    """Pictures per second of the training stream alone, and where the time of one picture goes."""
    dataset = open_stream(folder)
    column = image_column(dataset)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="'set_vital'")
        loader = iter(make_loader(TrainingStream(dataset, column, size, window=256), batch, workers))
        for _ in range(5 * max(1, workers)):  # the workers start, and what they had prepared is used up
            next(loader)
        began = time.perf_counter()
        for _ in range(batches):
            next(loader)
        rate = batches * batch / (time.perf_counter() - began)
        del loader
    cells = list(itertools.islice((row[column] for row in undecoded(dataset, column)), 64))
    cells = [Path(cell).read_bytes() if isinstance(cell, str) else cell for cell in cells]
    took = dict.fromkeys(("decode", "crop_resize", "collate"), 0.0)
    views = []
    for index, cell in enumerate(cells):
        began = time.perf_counter()
        picture = decode(cell, 2 * max(size))
        decoded = time.perf_counter()
        pixels = augment(picture, size, np.random.default_rng(index))
        took["decode"] += decoded - began
        took["crop_resize"] += time.perf_counter() - decoded
        views.append({"pixels": pixels, "picture": (0, 0, index), "unreadable": []})
    began = time.perf_counter()
    collate(views)
    took["collate"] = time.perf_counter() - began
    return {
        "images_per_second": round(rate, 1),
        "workers": workers,
        **{f"{name}_ms_per_picture": round(1000 * spent / len(cells), 3) for name, spent in took.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(BATCHES), metavar="NAME", help="timm architecture names")
    parser.add_argument("--rounds", type=int, default=12, help="measured rounds; best a multiple of 6")
    parser.add_argument("--batch", type=int, nargs="+", help=f"default: {BATCHES}, others {DEFAULT_BATCH}")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--pictures", help="folder or parquet file for the data part; default: made on the spot")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--data-batches", type=int, default=20)
    arguments = parser.parse_args()
    if arguments.rounds < 1 or arguments.data_batches < 1:
        parser.error("--rounds and --data-batches must be at least 1")

    keep_freed_memory()  # as the training script does
    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        if arguments.pictures is None:
            make_pictures(Path(folder))
        data = measure_data(arguments.pictures or folder, (224, 224), 32, arguments.workers, arguments.data_batches)
    for name in arguments.models:
        batches = arguments.batch or [BATCHES.get(name, DEFAULT_BATCH)]
        result = measure_best(name, batches, arguments.rounds, arguments.device, arguments.dtype)
        result["data_over_step"] = round(data["images_per_second"] / result["step_images_per_second"], 2)
        result["waits"] = round(max(0.0, 1 - result["data_over_step"]), 3)
        figures[name] = result
        print(
            f"{name}, batch {result['batch']}: plain {result['plain_ms']:.0f} ms, step / plain "
            f"{result['step_over_plain']:.2f}, published / plain {result['published_over_plain']:.2f}, "
            f"published / step {result['published_over_step']:.2f}, {result['step_images_per_second']:.0f} images/s, "
            f"data / step {result['data_over_step']:.1f}, waits {result['waits']:.0%}",
            file=sys.stderr,
            flush=True,
        )
    summary = {
        "benchmark": "training",
        "device": torch.cuda.get_device_name() if arguments.device.startswith("cuda") else arguments.device,
        "dtype": arguments.dtype,
        "threads": torch.get_num_threads(),
        "cores": len(os.sched_getaffinity(0)),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", "default"),
        "versions": {
            "python": platform.python_version(),
            **{package: version(package) for package in ("hf-ttame", "torch", "timm", "pillow")},
        },
        "data": data,
        "models": figures,
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
