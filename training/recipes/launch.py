"""How a recipe starts its training: this Python, this checkout or installed package, further arguments last."""

import signal
import sys
from pathlib import Path

before = signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while this imports ends without a traceback
from hf_ttame.launching import run_training  # noqa: E402

signal.signal(signal.SIGINT, before)


def train(*arguments: str, further: list[str]) -> None:
    """Run training/train.py through Accelerate (GPUs as `accelerate config` says); leave where it fails or is stopped.

    After Ctrl-C or SIGTERM the training saves a checkpoint first, and the exit status is 130.
    """
    script = Path(__file__).resolve().parents[1] / "train.py"
    try:
        ended = run_training(script, [*arguments, *further])
    except (ValueError, OSError) as error:
        sys.exit(f"training: {error}")
    if ended.stopped and not ended.status:
        print("the training is complete; nothing further was started, --resume goes on", file=sys.stderr)
    if ended.stopped or ended.status:
        sys.exit(ended.status or 130)
