"""The benchmarks run and end in one JSON line."""

import json
import runpy
import sys
from pathlib import Path

import pytest

from hf_ttame import TTameModel

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


def test_confidence_with_fewer_methods_and_half_the_bits(monkeypatch, capsys, tmp_path, vit_folder, photo):
    pytest.importorskip("pytorch_grad_cam")
    for number in range(3):
        photo(seed=number).save(tmp_path / f"{number}.png")
    TTameModel.from_backbone(vit_folder).save_pretrained(tmp_path / "explainer")
    where = ("--model", str(tmp_path / "explainer"), "--dataset", str(tmp_path), "--split", "train")
    run(monkeypatch, "confidence.py", *where, "--methods", "gradcam", "--precision", "bfloat16")
    half = json.loads(capsys.readouterr().out)
    assert half["precision"] == "bfloat16"
    assert {name.split()[0] for name in half["methods"]} == {"gradcam", "ttame"}
    assert half["images"] == 3
    run(monkeypatch, "confidence.py", *where, "--methods", "random")
    whole = json.loads(capsys.readouterr().out)
    assert (whole["precision"], list(whole["methods"])) == ("float32", ["random", "ttame sigmoid", "ttame logits"])
    one, other = (report["methods"]["ttame sigmoid"]["mean mask"] for report in (half, whole))
    assert one == pytest.approx(other, abs=0.02)
    with pytest.raises(SystemExit):
        run(monkeypatch, "confidence.py", *where, "--methods", "gradcm")
    assert "--methods must be of random, gaussian, gradcam, ttame, got gradcm" in capsys.readouterr().err


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
