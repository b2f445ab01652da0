"""How a recipe starts its training: this Python, this checkout or installed package, further arguments last."""

import subprocess
import sys
from pathlib import Path


def train(*arguments: str, further: list[str]) -> None:
    """Run training/train.py through Accelerate (GPUs as `accelerate config` says); leave where it fails."""
    script = str(Path(__file__).resolve().parents[1] / "train.py")
    status = subprocess.call([sys.executable, "-m", "accelerate.commands.launch", script, *arguments, *further])
    if status:
        sys.exit(status)
