"""Trainings of the recipes and ablations: inside this process for what they compute, as real processes for signals."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import pytest

from hf_ttame.launching import Ended

ROOT = Path(__file__).parents[1]


def train_here(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Ended]:
    """The training script in this process, in place of `run_training`: without ten seconds of imports per run."""
    from training import train

    monkeypatch.setattr(train, "keep_freed_memory", lambda: None)  # it would hold for the whole process
    monkeypatch.setattr(train.StopRequest, "__init__", lambda self, says: setattr(self, "asked", False))

    def run(script: Path, arguments: Sequence[str], options: Sequence[str] = ()) -> Ended:
        assert script.samefile(train.__file__)
        return Ended(train.main(list(arguments)), False)

    return run


def interrupt(command: Sequence[object], run: Path, number: signal.Signals, *, everyone: bool) -> tuple[int, str]:
    """Start, wait for a training's first steps in `run`, send a signal; exit status and output.

    Args:
        command: of Python.
        run: output folder of the training that it starts.
        number: the signal.
        everyone: to the whole process group, as Ctrl-C in a terminal does, or to the first process alone.
    """
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    started = subprocess.Popen(
        [sys.executable, *map(str, command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 200
        while not (run / "log.jsonl").exists() and started.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        if started.poll() is None:
            (os.killpg if everyone else os.kill)(started.pid, number)
        output, _ = started.communicate(timeout=100)  # until nobody holds the pipe
        with pytest.raises(ProcessLookupError):
            os.killpg(started.pid, 0)  # nothing of the group is left
    finally:
        with suppress(ProcessLookupError):
            os.killpg(started.pid, signal.SIGKILL)
    return started.returncode, output
