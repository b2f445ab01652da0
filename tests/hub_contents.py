"""What the Hub on loopback holds before its clients come."""

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import torch
from conftest import make_timm
from hub_server import Hub
from safetensors.torch import load_file
from timm.models._hub import save_for_hf

from hf_ttame import TTameModel
from hf_ttame.records import fingerprint_of_folder


class Evil:
    """Unpickling it writes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def fill(hub: Hub, work: Path, vit_folder: Path) -> None:
    """Classifiers, whole and as pickles; an explainer, with and without records; folders of a dataset and a Space.

    Args:
        hub: receives the repositories.
        work: folder of the clients.
        vit_folder: a transformers classifier with its processor.
    """
    save_for_hf(make_timm("test_resnet"), str(work / "timm-repository"), safe_serialization=True)
    hub.put("org/tiny-vit", vit_folder)
    hub.put("timm/tiny-resnet", work / "timm-repository")
    hub.put("org/public", {"x.txt": b"x"})
    hub.put("org/own-card", {"README.md": b"# Mine\n"})

    ready = work / "ready"
    TTameModel.from_backbone(vit_folder).save_pretrained(ready)
    hub.put("org/ready", ready)
    head = {"head_fingerprint": fingerprint_of_folder(ready)}
    report = {"images": 12, "methods": {"ttame": {"measures": {"AD soft 50": {"mean": 20.25}}}}, **head}
    records = {"report.json": report, "training.json": {"steps": 77, **head}, "card.json": {"license": "mit"}}
    for name, record in records.items():
        (ready / name).write_text(json.dumps(record))
    hub.put("org/measured", ready)

    weights = load_file(vit_folder / "model.safetensors")
    for name, state in (("pickled", weights), ("evil", {**weights, "x": Evil(work / "evil-pickle-was-run")})):
        torch.save(state, work / "pytorch_model.bin")
        files = {file.name: file.read_bytes() for file in vit_folder.glob("*.json")}
        hub.put(f"org/{name}-vit", {**files, "pytorch_model.bin": (work / "pytorch_model.bin").read_bytes()})

    (work / "maps").mkdir()
    pyarrow.parquet.write_table(pyarrow.table({"id": [1], "score": [0.5]}), work / "maps" / "maps-00000.parquet")
    (work / "space").mkdir()
    (work / "space" / "README.md").write_text("---\ntitle: x\nsdk: gradio\n---\nhi")
    (work / "space" / "app.py").write_text("print()\n")
