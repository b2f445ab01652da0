"""The benchmarks run and end in one JSON line."""

import json
import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(monkeypatch: pytest.MonkeyPatch, script: str, *arguments: str) -> None:
    path = str(ROOT / "benchmarks" / script)
    monkeypatch.setattr(sys, "argv", [path, *arguments])
    runpy.run_path(path, run_name="__main__")


def test_inference_ends_in_one_json_line(monkeypatch, capsys):
    run(monkeypatch, "inference.py", "--models", "test_vit", "--rounds", "1", "--batch", "2")
    out, err = capsys.readouterr()
    assert "test_vit, batch 2:" in err
    assert len(out.splitlines()) == 1
    summary = json.loads(out)
    assert {"device", "dtype", "memory_format", "threads", "versions", "models"} <= summary.keys()
    assert {"python", "torch", "timm", "transformers", "hf-ttame"} == summary["versions"].keys()
    figures = summary["models"]["test_vit"]
    assert (figures["batch"], figures["rounds"]) == (2, 1)
    for key in ("explain_over_plain", "published_over_plain", "published_over_explain"):
        assert figures[key] > 0
    for variant in ("plain", "explain", "published"):
        assert figures[f"{variant}_ms"] > 0
    assert figures["largest_map_difference"] < 1e-3
    assert "memory" not in figures


@pytest.mark.slow
def test_export_ends_in_one_json_line(monkeypatch, capsys, tmp_path):
    pytest.importorskip("onnxscript")
    written = tmp_path / "export.json"
    run(monkeypatch, "export.py", "--models", "test_resnet", "--rounds", "1", "--int8", "--output", str(written))
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == json.loads(written.read_text())
    figures = json.loads(written.read_text())["models"]["test_resnet"]
    assert figures["pytorch_over_onnxruntime"] > 0
    assert max(figures["largest_differences"].values()) < 1e-4
    assert figures["int8_mb"] < figures["float32_mb"]
    assert figures["int8_agreement"]["images"] == 3


def test_inference_refuses_no_rounds(monkeypatch, capsys):
    with pytest.raises(SystemExit) as refused:
        run(monkeypatch, "inference.py", "--rounds", "0")
    assert refused.value.code == 2
    assert "--rounds must be at least 1" in capsys.readouterr().err
