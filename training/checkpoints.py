"""Checkpoints that appear whole or not at all, and the refusal to continue a run that would not be the same.

A checkpoint is a folder `checkpoint-00000250` of the head (not the classifier), the optimiser, the schedule, the loss
scale, the best head so far, and per process the random state, the position in the stream and the head's batch-norm
statistics.
"""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from hf_ttame.disk import full_disk

# Whatever is not named here changes the result, or the order of the pictures.
FREE = {
    "output", "resume", "save_every", "keep", "log_every", "report_to", "validate_every", "max_unreadable",
}  # fmt: skip


def checkpoints(output: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(path for path in output.glob("checkpoint-*") if (path / "progress.json").exists())


def check_same(recorded: Mapping[str, Any], wanted: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
    """Raise ValueError, with their names, where arguments differ that a continued run must share.

    identity: of the recorded run, see `identity.check_identity`. What it tells by its content may lie elsewhere now.
    """
    changed = [
        f"--{name} was {recorded.get(name)!r}, now {value!r}"
        for name, value in wanted.items()
        if name not in FREE and not identity.get(name) and recorded.get(name) != value
    ]
    if changed:
        raise ValueError(
            "a resumed run must equal the uninterrupted one, but arguments have changed: "
            + "; ".join(changed)
            + "; give the earlier values, or start anew in another --output"
        )


def save_checkpoint(
    accelerator: Accelerator,
    output: Path,
    progress: dict[str, Any],
    head: nn.Module,
    stream: dict[str, Any],
    keep: int,
    best: Path | None = None,
) -> str | None:
    """Save everything that the next step depends on, then remove all but the newest `keep` checkpoints.

    Args:
        accelerator: holds the head, the optimiser, the schedule and the loss scale.
        output: folder of the checkpoints.
        progress: written as progress.json; `progress["step"]` names the checkpoint.
        head: its buffers differ between processes.
        stream: position of this process in the stream.
        keep: how many checkpoints stay.
        best: file of the best head so far, which `progress` describes; the checkpoint keeps a copy.

    Returns:
        None, or what went wrong in any of the processes, such as a full disk; earlier checkpoints then stand.
    """
    part, final = output / ".checkpoint.part", output / f"checkpoint-{progress['step']:08d}"
    if accelerator.is_main_process:
        shutil.rmtree(part, ignore_errors=True)
    accelerator.wait_for_everyone()
    problem = None
    try:
        accelerator.save_state(str(part))
        own = {"stream": stream, "buffers": dict(head.named_buffers())}
        torch.save(own, part / f"process_{accelerator.process_index}.pt")
    except Exception as error:  # torch, safetensors and the system each raise their own for a full disk
        problem = full_disk(error, final) or f"{type(error).__name__}: {error}".splitlines()[0]
    problem = first_problem(accelerator, problem)
    if accelerator.is_main_process and problem is None:
        try:
            if best is not None:
                shutil.copyfile(best, part / best.name)
            (part / "progress.json").write_text(json.dumps(progress))
            for file in part.iterdir():
                _flush(file)
            shutil.rmtree(final, ignore_errors=True)
            os.replace(part, final)
            _flush(output)
            for old in checkpoints(output)[:-keep]:
                (old / "progress.json").unlink()  # no longer complete, wherever a kill interrupts this
            for old in output.glob("checkpoint-*"):
                if not (old / "progress.json").exists():
                    shutil.rmtree(old)
        except OSError as error:
            problem = full_disk(error, final) or str(error)
    if accelerator.is_main_process:
        shutil.rmtree(part, ignore_errors=True)
    return first_problem(accelerator, problem)


def load_checkpoint(accelerator: Accelerator, checkpoint: Path, head: nn.Module) -> dict[str, Any]:
    """Load what `save_checkpoint` saved; returns the position in the stream."""
    own = checkpoint / f"process_{accelerator.process_index}.pt"
    if not own.exists():
        raise ValueError(
            f"{checkpoint} holds nothing of process {accelerator.process_index}; several machines must write to one "
            "shared --output"
        )
    accelerator.load_state(str(checkpoint))
    state = torch.load(own, map_location="cpu", weights_only=True)
    for name, buffer in head.named_buffers():
        buffer.copy_(state["buffers"][name])
    return state["stream"]


def first_problem(accelerator: Accelerator, problem: str | None) -> str | None:
    """The first problem that any process reports; every process gets the same answer."""
    if accelerator.num_processes == 1:
        return problem
    everyone: list[Any] = [None] * accelerator.num_processes
    torch.distributed.all_gather_object(everyone, problem)
    return next((found for found in everyone if found), None)


def _flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, have reached the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
