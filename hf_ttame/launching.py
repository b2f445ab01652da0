"""How the training script is started and stopped: by `ttame train`, by a recipe, by the ablations."""

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple


class Ended(NamedTuple):
    """How a training ended: its exit status, and whether Ctrl-C or SIGTERM came in the meantime."""

    status: int
    stopped: bool


class _Stop(Exception):
    """A signal that came while no training ran."""


def run_training(script: str | Path, arguments: Sequence[str], options: Sequence[str] = ()) -> Ended:
    """Run the training script as `accelerate launch` does (GPUs as `accelerate config` says), and wait for its end.

    Ctrl-C and SIGTERM reach the training, which saves a checkpoint and ends by itself with status 130; they never end
    this process before it.

    Args:
        script: training/train.py.
        arguments: of the script.
        options: of `accelerate launch`.

    Returns:
        The exit status (128 and the signal's number where a signal ended it) and whether one of these signals came:
        then start nothing further. The training has printed its error.

    Raises:
        ValueError: the options, or the settings of `accelerate config`, do not fit together.
    """
    import psutil

    came: list[int] = []

    def pass_on(number: int, _: object) -> None:
        came.append(number)
        children = psutil.Process().children()
        if not children:
            raise _Stop
        for child in children:  # not SIGINT: a terminal's Ctrl-C reaches them by itself, and twice ends them at once
            child.terminate()

    path = os.environ.get("PYTHONPATH")
    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), path]))
        status = _launch([*options, str(script), *arguments])
    except _Stop:
        status = 128 + came[-1]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if path is None:
            os.environ.pop("PYTHONPATH", None)
        else:
            os.environ["PYTHONPATH"] = path
    return Ended(status, bool(came) or status == 130)


def _launch(arguments: list[str]) -> int:
    """The exit status of `accelerate launch`, no traceback. With several GPUs torch takes the signals over."""
    import logging
    import subprocess

    import torch
    from accelerate.commands.config.config_args import default_config_file
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.getLogger("accelerate.commands.launch").setLevel(logging.ERROR)  # which of its defaults it took
    parsed = launch_command_parser().parse_args(arguments)
    configured = parsed.config_file is not None or os.path.isfile(default_config_file)
    if not (configured or torch.accelerator.is_available() or "OMP_NUM_THREADS" in os.environ):
        # One process on a CPU: Accelerate would give it one thread.
        parsed.num_cpu_threads_per_process = parsed.num_cpu_threads_per_process or torch.get_num_threads()
    sys.stdout.flush()
    try:
        launch_command(parsed)
    except subprocess.CalledProcessError as error:
        return int(error.returncode if error.returncode > 0 else 128 - error.returncode)
    except ChildFailedError:
        return 1
    except SignalException as error:
        return 128 + int(error.sigval)
    return 0
