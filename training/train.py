"""Train a T-TAME head on a frozen classifier (arXiv 2403.04523, section III).

    accelerate launch training/train.py --backbone timm/resnet50.a1_in1k --dataset ILSVRC/imagenet-1k --output runs/r50

Reads top to bottom: the loss of one batch, then arguments, explainer, stream, optimiser, and one step at a time. The
targets are the classifier's own predictions, so the dataset needs no labels.

OUTPUT/explainer is the explainer after the last step, OUTPUT/best the one that validated best; report.json, curves.png
and samples.png tell how it went. `--resume` continues from the newest checkpoint: on a CPU the result equals that of
the uninterrupted run to the bit. Ctrl-C and SIGTERM save a checkpoint first; a second Ctrl-C does not.

Several processes: gradients are averaged (DDP). The class set of the area term is that of all processes of one
micro-step, so N processes with batches of B follow one process with a batch of N * B where batch norm is off. With
batch norm, each process normalises by its own batch, and the running statistics are averaged when the head is saved.
Micro-steps of --accumulate have a class set each: accumulation is not the same as one large batch.
"""

import copy
import difflib
import importlib.util
import json
import os
import shutil
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while these imports run ends without a traceback

import torch
import torch.nn.functional as F
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import set_seed
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm.auto import tqdm
from transformers import HfArgumentParser
from transformers.utils.logging import disable_progress_bar

from hf_ttame import TTameModel
from hf_ttame.answers import choose_targets
from hf_ttame.dataset_input import local_digest
from hf_ttame.disk import full_disk, whole
from hf_ttame.image_processing import Normalisation
from hf_ttame.losses import LossTerms, LossWeights, ttame_loss
from hf_ttame.masking import apply_mask, resize_maps
from hf_ttame.memory import keep_freed_memory
from hf_ttame.pictures import DATA_ERRORS, image_column, open_stream

if not __package__:  # launched as a script, in a checkout or as hf_ttame/training
    here = Path(__file__).resolve().parent
    __package__ = "hf_ttame.training" if here.parent.name == "hf_ttame" else "training"
    sys.path.insert(0, str(here.parents[__package__.count(".")]))
    importlib.import_module(__package__)

from .arguments import Arguments, check
from .checkpoints import check_same, checkpoints, first_problem, load_checkpoint, save_checkpoint
from .data import filter_of, normaliser
from .folding import fold_batch_norms
from .identity import (
    agreed,
    check_complete,
    check_identity,
    is_small,
    pinned,
    version_advice,
    versions,
)
from .report import (
    Log,
    add_samples,
    append,
    attempt,
    clear,
    coverage,
    describe,
    draw_curves,
    machine,
    read_log,
    time_left,
    write,
    write_record,
    write_values,
)
from .stream import STREAM_FORMAT, TrainingStream, make_loader
from .validation import HeldOut, collapse, draw_samples, intervals, summary, validate
from .watch import LossWatch, too_many_unreadable

_EXPECTED: tuple[type[Exception], ...] = (*DATA_ERRORS, FloatingPointError)  # told in one line
_HOPELESS = 50  # steps in a row whose loss is no number, after which fp16 will not recover


class Losses(NamedTuple):
    """Loss terms, the mean mask of the explained classes, and the classes explained in all processes (ranks * B,)."""

    terms: LossTerms
    mask_area: torch.Tensor
    targets: torch.Tensor


def masking_losses(
    model: TTameModel,
    head: nn.Module,
    pixel_values: torch.Tensor,
    weights: LossWeights = LossWeights(),
    *,
    fill: torch.Tensor | None,
    class_set: str = "batch",
    gather: Callable[[torch.Tensor], torch.Tensor] = lambda targets: targets,
    autocast: Callable[[], Any] = lambda: torch.autocast("cpu", enabled=False),
    classify: Callable[[torch.Tensor], torch.Tensor] | None = None,
    generator: torch.Generator | None = None,
) -> Losses:
    """One batch: what does the classifier see, and which pixels keep it so?

    Args:
        model: the explainer; its backbone is frozen.
        head: the head that trains, as Accelerate wrapped it.
        pixel_values: (B, C, H, W).
        weights: of the loss terms.
        fill: what removed pixels become, per channel (C,) in normalised space (`TTameModel.fill`); None: blurred.
        class_set: the area and variation terms see the maps of all classes of the "batch", or each image's "own".
        gather: (B,) targets of this process to (ranks * B,) of all.
        autocast: makes the context of mixed precision.
        classify: pixel values to logits; None: `model.classify`.
        generator: draws, for a multi-label classifier, which of an image's positive classes is explained.
    """
    outputs = model.config.classifier_outputs
    with torch.no_grad(), autocast():
        logits, features = model.features(pixel_values)
        targets = choose_targets(logits, outputs, generator)
        everyones = gather(targets)
    counts = None
    with autocast():
        if class_set == "batch":
            classes, counts = everyones.unique(return_counts=True)
            masks = head(features, classes).float().sigmoid()  # (B, N, h, w), every class of the batch
            own = masks[torch.arange(len(targets), device=targets.device), torch.searchsorted(classes, targets)]
        else:
            masks = head(features, targets[:, None]).float().sigmoid()  # (B, 1, h, w)
            own = masks[:, 0]
        full = resize_maps(own, (pixel_values.shape[-2], pixel_values.shape[-1]))
        if fill is None:
            base = blurred(pixel_values)
            masked = base + apply_mask(pixel_values - base, full)
        else:
            masked = apply_mask(pixel_values, full, fill)
        masked_logits = (classify or model.classify)(masked)
    terms = ttame_loss(masked_logits.float(), targets, masks, weights, counts, outputs)
    return Losses(terms, own.detach().mean(), everyones)


def blurred(pixel_values: torch.Tensor) -> torch.Tensor:
    """The pictures averaged over 1/14 of their side and drawn up again: colours stay, shapes go."""
    side = max(1, min(pixel_values.shape[-2:]) // 14)
    size = pixel_values.shape[-2:]
    return F.interpolate(F.avg_pool2d(pixel_values, side, ceil_mode=True), size=size, mode="bilinear")


def make_optimizer(arguments: Arguments, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    parameters = list(parameters)
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": arguments.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if arguments.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=arguments.learning_rate, momentum=0.9, nesterov=True)
    return torch.optim.AdamW(groups, lr=arguments.learning_rate)


def make_schedule(arguments: Arguments, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.OneCycleLR:
    """OneCycle over the run. The authors' SGD keeps its momentum, which torch would cycle by default."""
    return torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        arguments.learning_rate,
        total_steps=arguments.steps,
        cycle_momentum=arguments.optimizer != "sgd",
    )


def follow_step(accelerator: Accelerator, schedule: torch.optim.lr_scheduler.LRScheduler) -> None:
    """The schedule follows the optimiser's step, except one that the scaler of fp16 passed over."""
    if not accelerator.optimizer_step_was_skipped:
        schedule.step()


@torch.no_grad()
def finished(head: Any, accelerator: Accelerator) -> Any:
    """A copy of the head for use: eval mode, running statistics averaged over the processes."""
    head = copy.deepcopy(head).eval()
    for name, buffer in head.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            buffer.copy_(accelerator.reduce(buffer, "mean"))
    return head


def hold_alone(output: Path) -> None:
    """Lock the folder for this process until it ends, however it ends.

    A record lock: the workers that are forked later do not hold it, so a killed run can be resumed at once. Windows
    has none.

    Raises:
        ValueError: another training writes there, such as one of which only the launcher was killed.
    """
    try:
        import fcntl
    except ModuleNotFoundError:
        return
    descriptor = os.open(output / ".lock", os.O_RDWR | os.O_CREAT, 0o666)  # stays open
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise ValueError(
            f"another training writes into {str(output)!r}; wait for it, stop it, or choose another --output"
        ) from None
    except OSError:
        pass  # a file system without locks


class StopRequest:
    """Remembers Ctrl-C and SIGTERM until a step is complete; a second Ctrl-C acts at once.

    says: tell on stderr that it was heard.
    """

    def __init__(self, says: bool = False) -> None:
        self.asked = False
        self.says = says
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._ask)

    def _ask(self, number: int, _: Any) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        if self.says and not self.asked:
            words = b"\nstopping after this step, or the next where it validates; a second Ctrl-C stops at once\n"
            os.write(2, words)  # print is not for signal handlers
        self.asked = True


def parse(argv: list[str] | None = None) -> Arguments:
    """Raises ValueError, with the nearest name, for an option that does not exist."""
    parser = HfArgumentParser(Arguments, description=__doc__)
    arguments, unknown = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    if unknown:
        known = [name for action in parser._actions for name in action.option_strings]
        near = difflib.get_close_matches(unknown[0].split("=")[0], known, n=1)
        raise ValueError(f"unknown option {unknown[0]!r}{f'; nearest: {near[0]}' if near else ''}; all: --help")
    return arguments


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    check(arguments)
    try:
        return train(arguments)
    except BaseException as error:
        # The frames hold the loader. Its workers pass over a first SIGTERM, and so this process would wait for them.
        traceback.clear_frames(error.__traceback__)
        raise


def train(arguments: Arguments) -> int:
    """The run, from the classifier to the saved explainer; its exit status."""
    output = Path(arguments.output)
    if arguments.resume and (output / "explainer" / "training.json").exists():
        check_complete(output, arguments, int(os.environ.get("WORLD_SIZE", "1")))
        print(f"{output / 'explainer'} is complete; there is nothing to resume")
        return 0
    output.mkdir(parents=True, exist_ok=True)
    disable_progress_bar()  # of loading and saving: the training has its own
    warnings.filterwarnings("ignore", message="'set_vital'")  # torchdata and torch disagree about a notice
    keep_freed_memory()
    set_seed(arguments.seed)
    accelerator = Accelerator(
        mixed_precision=arguments.mixed_precision,
        gradient_accumulation_steps=arguments.accumulate,
        log_with=None if arguments.report_to == "none" else arguments.report_to,
        project_dir=str(output),
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )
    leads, ranks = accelerator.is_main_process, accelerator.num_processes
    if leads:
        hold_alone(output)
    if arguments.mixed_precision == "fp16" and accelerator.scaler is None:
        raise ValueError("--mixed_precision fp16 exists on GPUs only; give bf16, or no")
    if arguments.sync_batch_norm and accelerator.device.type != "cuda":
        raise ValueError("--sync_batch_norm exists on GPUs only; drop it, running statistics are averaged when saving")
    if arguments.report_to != "none" and importlib.util.find_spec(arguments.report_to) is None:
        raise ValueError(
            f"--report_to {arguments.report_to} needs its package; run: pip install {arguments.report_to}"
        )
    run = {**asdict(arguments), "processes": ranks}
    newest = checkpoints(output)[-1] if arguments.resume and checkpoints(output) else None
    progress: dict[str, Any] = {"step": 0, "seconds": 0.0, "last": {}, "warnings": [], "arguments": run}
    progress |= {"validations": [], "best": None, "last_95": None, "unreadable": 0}
    progress |= {"versions": versions(), "identity": {}, "revision": None, "validation_revision": None}
    best_head = output / "best.safetensors"
    if newest:
        progress |= json.loads((newest / "progress.json").read_text())
        check_same(progress["arguments"], run, progress["identity"])
        progress["arguments"] = run
        if advice := version_advice(progress["versions"], versions()):
            accelerator.print(f"warning: {advice}", file=sys.stderr)
            progress["warnings"] = [*(text for text in progress["warnings"] if text != advice), advice]
    elif leads:
        clear(output)
    accelerator.wait_for_everyone()

    # The explainer: only its head trains.
    model = TTameModel.from_backbone(
        arguments.backbone,
        pretrained=arguments.pretrained,
        feature_layers=arguments.feature_layers or None,
        head_init=arguments.head_init,
        skip_connection=arguments.skip_connection,
        batch_norm=arguments.batch_norm,
        branch_activation=arguments.branch_activation,
        class_token=arguments.class_token,
        outputs=arguments.outputs,
        map_scaling=arguments.map_scaling,
    )
    if len(model.config.pixel_scale) not in (1, 3):
        raise ValueError(
            f"training reads colour pictures, and grey ones for one channel; this backbone takes "
            f"{len(model.config.pixel_scale)} channels: train its head in a loop of your own, see docs/training.md"
        )
    backbone = model.backbone  # as it came, and is saved
    fold_batch_norms(model)
    layout = torch.channels_last if arguments.channels_last else torch.contiguous_format
    model.to(accelerator.device).to(memory_format=layout).train()
    if arguments.sync_batch_norm:
        model.head = nn.SyncBatchNorm.convert_sync_batchnorm(model.head)
    plain_head = model.head  # the head itself; what trains below may be wrapped and compiled
    normalisation = Normalisation(
        tuple(model.config.pixel_scale), tuple(model.config.pixel_shift), tuple(model.config.image_size)
    )

    normalise = normaliser(normalisation, accelerator.device)
    fill = None if arguments.fill == "blur" else model.fill(arguments.fill)

    # The stream: the steps are fixed and the stream is endless, so that no process ever waits for another's data.
    progress["revision"] = progress["revision"] or agreed(
        accelerator, lambda: pinned(arguments.dataset, arguments.revision)
    )
    dataset = open_stream(arguments.dataset, arguments.split, progress["revision"], arguments.streaming)
    stream = TrainingStream(
        dataset,
        image_column(dataset, arguments.image_column),
        normalisation.size,
        seed=arguments.seed,
        window=arguments.window,
        min_scale=arguments.min_crop,
        rank=accelerator.process_index,
        ranks=ranks,
        holdout=arguments.holdout,
        resample=filter_of(model.image_processor),
    )
    identity = {
        "order of the pictures": STREAM_FORMAT,
        "backbone": model.config.backbone_fingerprint,
        "dataset": local_digest(arguments.dataset, arguments.split),
        "shards of the dataset": dataset.num_shards,
        "validation": local_digest(arguments.validation, arguments.validation_split),
    }
    check_identity(progress["identity"], identity)
    progress["identity"] = identity
    loader = make_loader(stream, arguments.batch_size, arguments.workers, accelerator.device.type == "cuda")
    held_out = None
    if arguments.validation:
        name, known = arguments.validation, progress["validation_revision"]
        if known is None and name == arguments.dataset:
            known = progress["revision"]
        elif known is None:
            known = agreed(accelerator, lambda: pinned(name, None))
        progress["validation_revision"] = known
        other = open_stream(arguments.validation, arguments.validation_split, known)
        column = image_column(other, arguments.image_column)
        others = TrainingStream(other, column, normalisation.size, holdout=1.0)
        whole_set = is_small(arguments.validation, arguments.validation_split)
        chosen = others.held_out(arguments.validation_size, whole_set)
        held_out = HeldOut(model, chosen, accelerator.process_index, ranks)
    elif arguments.holdout:
        chosen = stream.held_out(arguments.validation_size, is_small(arguments.dataset, arguments.split))
        held_out = HeldOut(model, chosen, accelerator.process_index, ranks)
    elif leads:
        print("no validation: give --validation PICTURES, or --holdout 0.1 to keep a share of the dataset for it")

    optimizer = make_optimizer(arguments, plain_head.parameters())
    schedule = make_schedule(arguments, optimizer)
    head, optimizer = accelerator.prepare(plain_head, optimizer)
    accelerator.register_for_checkpointing(schedule)
    if newest:
        loader.load_state_dict(load_checkpoint(accelerator, newest, plain_head))
        if leads and (newest / best_head.name).exists():  # a later one may have been measured before the kill
            with whole(best_head) as part:
                shutil.copyfile(newest / best_head.name, part)
        accelerator.print(f"continuing {newest}")
    elif arguments.resume:
        accelerator.print("no checkpoint yet: starting at the beginning")
    classify = model.classify
    if arguments.compile:
        classify, head = torch.compile(model.classify), torch.compile(head)
    weights = LossWeights(
        cross_entropy=arguments.cross_entropy_weight,
        area=arguments.area_weight,
        variation=arguments.variation_weight,
        area_exponent=arguments.area_exponent,
    )
    if arguments.report_to != "none":
        accelerator.init_trackers("hf-ttame", {name: str(value) for name, value in run.items()})

    paused = 0.0  # seconds of validation, which no step takes

    def track(figures: dict[str, float], step: int) -> None:
        attempt(f"--report_to {arguments.report_to}", lambda: accelerator.log(figures, step=step))

    def save_head() -> None:
        """The head in use, as the best."""
        with whole(best_head) as part:
            save_file({name: tensor.contiguous() for name, tensor in model.head.state_dict().items()}, part)

    def validation(held_out: HeldOut) -> dict[str, torch.Tensor]:
        """Measure the head as it would be saved now, draw the samples, and keep it where it is the best so far."""
        nonlocal paused
        since = time.perf_counter()
        accelerator.print(f"validating on {len(held_out)} pictures", flush=True)
        try:
            model.head = finished(plain_head, accelerator)
            values = validate(model, held_out, accelerator, arguments.batch_size)
            if leads:

                def draw_all() -> None:
                    add_samples(output, progress["step"], draw_samples(model, held_out, accelerator.device))

                attempt("samples.png", draw_all)
            found = {"step": progress["step"], **summary(values)}
            progress["validations"].append(found)
            better = progress["best"] is None or found["score"] < progress["best"]["score"]
            if better and (not leads or attempt("the best head", save_head)):
                progress["best"] = found
        finally:
            model.head = plain_head
        names = ("score", "AD soft 50", "IC soft 50", "AD binary 50", "IC binary 50", "mask area")
        accelerator.print(
            f"validation at step {progress['step']} on {len(held_out)} pictures: "
            + ", ".join(f"{name} {found[name]:.3g}" for name in names)
        )
        track({f"validation/{name}": value for name, value in found.items() if name != "step"}, progress["step"])
        paused += time.perf_counter() - since
        return values

    kept = f"; {len(held_out)} pictures for validation" if held_out is not None else ""
    accelerator.print(f"training on {', '.join(layer.name for layer in model.layers)}{kept}", flush=True)
    stop = StopRequest(leads)
    stopped = False

    def gather(targets: torch.Tensor) -> torch.Tensor:
        """Targets of all processes of this micro-step; on the way, whether any was asked to stop."""
        nonlocal stopped
        if ranks == 1:
            stopped = stop.asked
            return targets
        asked = targets.new_full((1,), int(stop.asked))
        everyone = accelerator.gather(torch.cat([targets, asked])).view(ranks, -1)
        stopped = bool(everyone[:, -1].any())
        return everyone[:, :-1].flatten()

    log = Log(output / "log.jsonl", progress["step"], leads)
    pending: list[tuple[int, torch.Tensor]] = []  # figures stay on the device until they are written
    names = (*LossTerms._fields, "mask_area")
    pictures = arguments.accumulate * arguments.batch_size * ranks  # per step
    bar = tqdm(initial=progress["step"], total=arguments.steps, unit="step", disable=None if leads else True)
    batches = iter(loader)
    began, first, waited, flushed_at = time.perf_counter(), progress["step"], 0.0, time.perf_counter()
    recent = [line["mask_area"] for line in read_log(log.path)][-50:]
    watch = LossWatch(1 if accelerator.scaler is None else _HOPELESS)

    def flush() -> None:
        """Write the pending figures, stop at a loss that is no number, warn of a collapse."""
        nonlocal waited, flushed_at
        if not pending:
            return
        progress["unreadable"] = unreadable_everywhere()
        if progress["step"] < arguments.steps:  # the end waits for its save
            refuse_unreadable()
        figures = torch.stack([row for _, row in pending]).tolist()
        seconds = max(time.perf_counter() - flushed_at, 1e-9)
        speed = {
            "images_per_second": round(len(pending) * pictures / seconds, 1),
            "waited": round(waited / seconds, 3),  # share of the time spent waiting for pictures
        }
        lines = [
            {"step": step, **{name: round(value, 5) for name, value in zip(names, row, strict=True)}, **speed}
            for (step, _), row in zip(pending, figures, strict=True)
        ]
        log.add(lines)
        recent.extend(line["mask_area"] for line in lines)
        del recent[:-50]
        pending.clear()
        progress["last"] = lines[-1]
        watch.see(lines)
        advice = collapse(sum(recent) / len(recent)) if len(recent) == 50 else None
        if advice and not any(advice.partition(" (")[0] in earlier for earlier in progress["warnings"]):
            progress["warnings"].append(advice)
            accelerator.print(f"warning at step {progress['step']}: {advice}")
        line = dict(lines[-1], learning_rate=schedule.get_last_lr()[0])
        track(line, line.pop("step"))
        bar.set_postfix({name: f"{lines[-1][name]:.3g}" for name in names})
        if bar.disable and leads:
            left = time_left(began + paused, progress["step"] - first, arguments.steps - progress["step"])
            print(f"step {progress['step']}/{arguments.steps} loss {lines[-1]['total']:.4g} {left}", flush=True)
        waited, flushed_at = 0.0, time.perf_counter()

    unreadable_here = progress["unreadable"] if leads else 0

    def unreadable_everywhere() -> int:
        """Pictures that all processes passed over since the run began, counted again in every epoch."""
        return int(accelerator.reduce(torch.tensor(unreadable_here, device=accelerator.device), "sum"))

    def refuse_unreadable() -> None:
        """Judge the share of unreadable pictures among all that were read."""
        read = progress["step"] * pictures + progress["unreadable"]
        if excess := too_many_unreadable(read, progress["unreadable"], arguments.max_unreadable):
            accelerator.end_training()
            raise ValueError(
                f"{excess}; {output / 'unreadable_*.txt'} name them; the checkpoints stay: --resume with a larger "
                "--max_unreadable goes on"
            )

    def draw(micro_step: int) -> torch.Generator:
        """A random choice that depends on the place in the run alone, so that a resumed run makes the same."""
        place = (arguments.seed * 1_000_003 + micro_step) * ranks + accelerator.process_index
        return torch.Generator(accelerator.device).manual_seed(place)

    while progress["step"] < arguments.steps and not stopped:
        figures = torch.zeros(len(names), device=accelerator.device)
        for micro in range(arguments.accumulate):
            asked_at = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                raise ValueError(
                    f"process {accelerator.process_index} has no pictures: {arguments.dataset!r} is empty, or has "
                    f"too few for processes x workers = {ranks} x {max(1, arguments.workers)}; lower --workers"
                ) from None
            waited += time.perf_counter() - asked_at
            pixel_values = normalise(batch["pixels"])
            if not arguments.channels_last:
                pixel_values = pixel_values.contiguous()

            # One step: what does the classifier see, which pixels keep it so?
            with accelerator.accumulate(head):
                losses = masking_losses(
                    model,
                    head,
                    pixel_values,
                    weights,
                    fill=fill,
                    class_set=arguments.class_set,
                    gather=gather,
                    autocast=accelerator.autocast,
                    classify=classify,
                    generator=draw(progress["step"] * arguments.accumulate + micro),
                )
                accelerator.backward(losses.terms.total)
                if arguments.clip_norm is not None and accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(plain_head.parameters(), arguments.clip_norm)
                optimizer.step()
                optimizer.zero_grad()
            plain_head.class_counts += losses.targets.bincount(minlength=len(plain_head.class_counts))
            figures += torch.stack([*losses.terms, losses.mask_area]).detach() / arguments.accumulate
            unreadable_here += len(batch["unreadable"])
            if batch["unreadable"]:
                append(output / f"unreadable_{accelerator.process_index}.txt", batch["unreadable"])
        follow_step(accelerator, schedule)

        progress["step"] += 1
        pending.append((progress["step"], figures))
        bar.update()
        last = progress["step"] == arguments.steps
        if progress["step"] % arguments.log_every == 0 or last or stopped:
            flush()
        if held_out is not None and (progress["step"] % arguments.validate_every == 0 or last):
            flush()
            values = validation(held_out)
            if last:
                progress["last_95"] = intervals(values)
                if leads:
                    write_values(output / "validation.json", values)
            flushed_at = time.perf_counter()
        if progress["step"] % arguments.save_every == 0 or last or stopped:
            flush()
            so_far = {**progress, "seconds": progress["seconds"] + time.perf_counter() - began}
            best = best_head if progress["best"] else None
            problem = save_checkpoint(
                accelerator, output, so_far, plain_head, loader.state_dict(), arguments.keep, best
            )
            if problem and not last and not checkpoints(output):  # at the end the explainer may still fit
                raise OSError(f"not one checkpoint can be saved, so a kill would lose the run: {problem}; run again")
            if problem:
                accelerator.print(f"warning: no checkpoint at step {progress['step']}: {problem}", file=sys.stderr)
            if leads:
                attempt("curves.png", lambda: draw_curves(output, progress["validations"]))
            flushed_at = time.perf_counter()
    bar.close()
    del batches, loader  # ends the workers
    progress["seconds"] += time.perf_counter() - began

    if progress["step"] < arguments.steps:
        accelerator.print(f"stopped at step {progress['step']}; continue with --resume", file=sys.stderr)
        accelerator.end_training()
        return 130

    refuse_unreadable()

    # The results, under their names only when they are complete.
    model.head = finished(plain_head, accelerator)
    model.backbone = backbone
    problem = None
    if leads:
        try:
            model.eval().to(memory_format=torch.contiguous_format)
            files = output.glob("unreadable_*.txt")
            unreadable = sorted({line for file in files for line in file.read_text().splitlines()})
            not_validated = held_out.unreadable if held_out else []
            found = coverage(plain_head.class_counts, model.config.id2label)
            report, record = describe(
                progress, progress["step"] * pictures, found, unreadable, not_validated, machine(accelerator)
            )
            draw_curves(output, progress["validations"])
            write(output / "report.json", json.dumps(report, indent=2) + "\n")
            model.save_pretrained(output / "explainer")
            if progress["best"] is not None:
                model.head.load_state_dict(load_file(best_head))
                model.save_pretrained(output / "best")
                write_record(output / "best", record)
            write_record(output / "explainer", record)
            untrained = found["classes"] - found["explained"]
            print(
                f"explained {found['explained']} of {found['classes']} classes"
                + (f"; the maps of the other {untrained} are unchecked" if untrained else "")
            )
            if unreadable or not_validated:
                also = f" in training and {len(not_validated)} for validation" if not_validated else ""
                print(
                    f"unreadable pictures were passed over: {len(unreadable)}{also}; report.json lists the first 100, "
                    "unreadable_*.txt all"
                )
            print(f"saved the explainer in {output / 'explainer'}; see {output / 'curves.png'}")
        except (OSError, SafetensorError) as error:
            reason = full_disk(error, output / "explainer") or error
            problem = f"the explainer could not be saved: {reason}; run again with --resume"
    problem = first_problem(accelerator, problem)
    accelerator.end_training()
    if problem:
        raise OSError(problem)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:  # a second Ctrl-C
        sys.exit(130)
    except _EXPECTED as error:
        if os.environ.get("TTAME_DEBUG"):
            raise
        sys.exit(f"training: {full_disk(error) or str(error) or type(error).__name__}")
