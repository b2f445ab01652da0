"""The benchmarks run and end in one JSON line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(ROOT / "benchmarks" / script), *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


def test_inference_ends_in_one_json_line():
    done = run("inference.py", "--models", "test_vit", "--rounds", "1", "--batch", "2")
    assert done.returncode == 0, done.stderr
    assert "test_vit, batch 2:" in done.stderr
    assert len(done.stdout.splitlines()) == 1
    summary = json.loads(done.stdout)
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
def test_export_ends_in_one_json_line(tmp_path):
    pytest.importorskip("onnxscript")
    written = tmp_path / "export.json"
    done = run("export.py", "--models", "test_resnet", "--rounds", "1", "--int8", "--output", str(written))
    assert done.returncode == 0, done.stderr
    assert written.read_text() == done.stdout
    figures = json.loads(done.stdout)["models"]["test_resnet"]
    assert figures["pytorch_over_onnxruntime"] > 0
    assert max(figures["largest_differences"].values()) < 1e-4
    assert figures["int8_mb"] < figures["float32_mb"]
    assert figures["int8_agreement"]["images"] == 3


def test_inference_refuses_no_rounds():
    done = run("inference.py", "--rounds", "0")
    assert done.returncode == 2
    assert "--rounds must be at least 1" in done.stderr
