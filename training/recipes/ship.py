"""From a finished run to what is published: the best head alone, with the record of its training."""

import json
import sys
from pathlib import Path

import torch

from hf_ttame import TTameModel
from hf_ttame.records import fingerprint_of_folder


def ship(run: str | Path, target: str | Path, dtype: torch.dtype = torch.float16) -> None:
    """Write the run's best explainer (its last, where nothing was validated) without its backbone.

    Args:
        run: output folder of training/train.py.
        target: folder to write.
        dtype: of the head's weights.
    """
    best = Path(run, "best")
    source = best if (best / "training.json").exists() else Path(run, "explainer")
    model = TTameModel.from_pretrained(source)
    model.save_pretrained(target, include_backbone=False, head_dtype=dtype)
    record = json.loads((source / "training.json").read_text())
    record["head_fingerprint"] = fingerprint_of_folder(Path(target))  # in this dtype it is another
    Path(target, "training.json").write_text(json.dumps(record, indent=2) + "\n")
    size = Path(target, "model.safetensors").stat().st_size / 1e6
    print(f"wrote {source.name} to {target}, {size:.1f} MB", file=sys.stderr)
