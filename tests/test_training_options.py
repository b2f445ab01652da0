"""Real short runs of the training script with the options that change what a run does."""

import json
import signal
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import test_training_run as runs
import torch
from conftest import make_timm
from PIL import Image
from safetensors.torch import load_file

from hf_ttame import TTameModel
from hf_ttame.backbones import wrap_backbone

server, backbone, folder, parquet = runs.server, runs.backbone, runs.folder, runs.parquet  # fixtures


def train(
    server: Any, output: Path, argv: list[str], limit: float = 120
) -> tuple[str, list[dict[str, Any]], dict[str, torch.Tensor]]:
    """What the run printed, its log, and the head that it saved; after `limit` seconds it fails."""
    run = runs.Run(server, argv)
    run.processes[0].join(limit)
    text = run.wait()
    log = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    head = load_file(output / "explainer" / "model.safetensors")
    assert all(tensor.isfinite().all() for tensor in head.values())
    return text, log, head


def test_grey_training_to_the_end(server: Any, parquet: Path, tmp_path: Path) -> None:
    cfg = {"input_size": (1, 64, 64), "mean": (0.4,), "std": (0.2,)}
    backbone = wrap_backbone(make_timm("test_resnet", in_chans=1, pretrained_cfg_overlay=cfg))
    backbone.model.save_pretrained(tmp_path / "grey")
    output = tmp_path / "run"
    argv = runs.arguments(str(tmp_path / "grey"), parquet, output, "--steps", "6", "--workers", "0")
    text, log, _ = train(server, output, [*argv, "--holdout", "0.4", "--validate_every", "3", "--max_unreadable", "1"])
    assert len(log) == 6
    assert "warning" not in text
    model = TTameModel.from_pretrained(output / "best")
    assert len(model.config.pixel_scale) == 1
    assert not torch.equal(model.head.fuser.weight, TTameModel.from_backbone(str(tmp_path / "grey")).head.fuser.weight)

    # Each of the eight samples, of two validations, is a grey picture under its map, not an empty square.
    with Image.open(output / "samples.png") as sheet:
        assert sheet.size == (2 * 164, 8 * 160 + 20)
        assert all(
            len(sheet.crop((4, 20 + 160 * i, 156, 180 + 160 * i)).getcolors(1 << 16) or ()) > 50 for i in range(8)
        )

    # The damaged pictures are counted where they lie, each once; the published record names no file.
    report, record = (json.loads((output / name).read_text()) for name in ("report.json", "explainer/training.json"))
    counts = [report[name]["count"] for name in ("unreadable", "unreadable_validation")]
    assert counts[1] > 0, "the hold-out must hold a damaged picture"
    assert sum(counts) == len(runs.DAMAGED)
    assert all("cannot be read" in name for name in report["unreadable_validation"]["names"])
    assert record["unreadable_validation"] == {"count": counts[1]}
    assert f"unreadable pictures were passed over: {counts[0]} in training and {counts[1]} for validation" in text


def child_that_cannot_draw(*arguments: Any) -> None:
    import training.train

    def fail(*_: Any) -> Any:
        return Image.fromarray(np.zeros((4, 4, 1), dtype=np.uint8))  # Pillow knows no such picture: TypeError

    training.train.draw_samples = fail
    runs.child(*arguments)


def test_samples_that_cannot_be_drawn_cost_no_run(
    server: Any, backbone: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "child", child_that_cannot_draw)
    argv = runs.arguments(backbone, folder, tmp_path / "run", "--steps", "2", "--workers", "0", "--holdout", "0.3")
    text, _, _ = train(server, tmp_path / "run", argv)
    assert "warning: samples.png could not be written: TypeError: Cannot handle this data type" in text
    assert (tmp_path / "run" / "best").exists()


def child_whose_tracker_fails(*arguments: Any) -> None:
    import accelerate

    def fail(*_: Any, **__: Any) -> None:
        raise ConnectionError("the tracker cannot be reached")

    accelerate.Accelerator.log = fail
    runs.child(*arguments)


def test_a_tracker_that_fails_costs_no_run(
    server: Any, backbone: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "child", child_whose_tracker_fails)
    argv = runs.arguments(backbone, folder, tmp_path / "run", "--steps", "2", "--workers", "0")
    text, _, _ = train(server, tmp_path / "run", [*argv, "--report_to", "tensorboard"])
    assert "ConnectionError: the tracker cannot be reached" in text
    assert (tmp_path / "run" / "explainer").exists()


def test_multi_label_training(server: Any, backbone: str, folder: Path, tmp_path: Path) -> None:
    """What is explained of a picture is drawn among its positive classes, not the most likely one every time."""
    more = ("--steps", "30", "--workers", "0", "--head_init", "random")
    found = {}
    for outputs in ("softmax", "sigmoid"):
        output = tmp_path / outputs
        _, log, head = train(server, output, runs.arguments(backbone, folder, output, *more, "--outputs", outputs))
        found[outputs] = head["head.class_counts"]
        assert TTameModel.from_pretrained(output / "explainer").config.classifier_outputs == outputs
    totals = [line["total"] for line in log]
    assert sum(totals[-5:]) < 0.9 * sum(totals[:5])
    assert found["softmax"].sum() == found["sigmoid"].sum() == 30 * 8
    assert not torch.equal(found["softmax"], found["sigmoid"]), "the same pictures, other targets"


def printing_compiler(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> Any:
    print(f"compiled a graph of {len(graph.graph.nodes)} nodes", flush=True)
    return graph.forward


def child_with_cheap_compiler(*arguments: Any) -> None:
    """torch.compile traces as ever; the graphs run as they are, without a C++ compiler."""
    torch.compiler.set_default_backend(printing_compiler)
    runs.child(*arguments)


@pytest.mark.parametrize(
    "compiler",
    [
        pytest.param(
            "cheap",
            marks=pytest.mark.skipif(not hasattr(torch.compiler, "set_default_backend"), reason="an older torch"),
        ),
        pytest.param("inductor", marks=pytest.mark.slow),
    ],
)
def test_compiled_training_is_the_same(
    server: Any, backbone: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiler: str
) -> None:
    more = ("--steps", "4", "--workers", "0", "--holdout", "0.3", "--validate_every", "2")
    plain, compiled = (runs.arguments(backbone, folder, tmp_path / name, *more) for name in ("plain", "compiled"))
    _, expected, _ = train(server, tmp_path / "plain", plain)
    if compiler == "cheap":
        monkeypatch.setattr(runs, "child", child_with_cheap_compiler)
    text, found, _ = train(server, tmp_path / "compiled", [*compiled, "--compile"], limit=900)
    if compiler == "cheap":
        assert text.count("compiled a graph of") >= 2, "the head and the second pass"
    for a, b in zip(expected, found, strict=True):
        assert b["total"] == pytest.approx(a["total"], rel=1e-3)
        assert b["mask_area"] == pytest.approx(a["mask_area"], rel=1e-3)


def child_with_own_cache(arguments: list[str], text: str, *others: Any) -> None:
    """Beside the run: what --no_streaming converts would stay in the user's cache."""
    datasets.config.HF_DATASETS_CACHE = Path(text).parent / "cache"
    runs.child(arguments, text, *others)


def test_accumulated_steps_resume_to_the_same_head(
    server: Any, backbone: str, parquet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of files that are mapped into memory instead of streamed."""
    monkeypatch.setattr(runs, "child", child_with_own_cache)
    more = ("--steps", "12", "--save_every", "3", "--workers", "0", "--accumulate", "2", "--no_streaming")
    whole, killed = (runs.arguments(backbone, parquet, tmp_path / name, *more) for name in ("whole", "killed"))
    _, log, head = train(server, tmp_path / "whole", whole)
    run = runs.Run(server, killed)
    run.wait_for_step(4)
    run.send(signal.SIGKILL)
    run.wait(-signal.SIGKILL)
    text, resumed, _ = train(server, tmp_path / "killed", [*killed, "--resume"])
    assert "continuing" in text
    assert list((tmp_path / "cache").rglob("*.arrow")), "converted, not streamed"
    runs.assert_same(tmp_path / "whole", tmp_path / "killed")
    assert [line["total"] for line in resumed] == [line["total"] for line in log]
    assert int(head["head.class_counts"].sum()) == 12 * 8 * 2
