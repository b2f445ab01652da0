"""The ablations: a small real run, what is refused before it, and Ctrl-C."""

import json
import signal
from pathlib import Path

import numpy as np
import pytest
from conftest import make_timm
from PIL import Image
from training_launch import ROOT, interrupt, train_here

from hf_ttame.backbones import wrap_backbone
from hf_ttame.launching import Ended
from training import ablate

SETTINGS = ["--", "--steps", "2", "--batch_size", "4", "--workers", "0", "--holdout", "0.4", "--validation_size", "4"]


@pytest.fixture(scope="module")
def cold_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("convnext")
    loaded = wrap_backbone(make_timm("test_convnext"), None)
    loaded.model.save_pretrained(folder)
    loaded.processor.save_pretrained(folder)
    return folder


def test_runs_become_one_table_and_are_not_repeated(
    vit_folder: Path,
    twelve_pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    started: list[list[str]] = []
    train = train_here(monkeypatch)

    def count(script: Path, arguments: list[str], options: list[str]) -> Ended:
        started.append(arguments)
        return train(script, arguments, options)

    monkeypatch.setattr(ablate, "run_training", count)
    output = tmp_path / "ablation"
    command = [
        "--backbone",
        str(vit_folder),
        "--dataset",
        str(twelve_pictures),
        "--output",
        str(output),
        "--seeds",
        "0",
        "1",
    ]
    command += ["--only", "class token multiplied", "warm start", *SETTINGS]
    assert ablate.main(command) == 0
    assert len(started) == 3 * 2
    first = capsys.readouterr().out

    # One cell by hand: pictures and seeds averaged, and the paired difference to the base.
    runs = {
        name: [json.loads((output / name / f"seed_{seed}" / "validation.json").read_text()) for seed in (0, 1)]
        for name in ("base", "class_token_multiplied", "warm_start")
    }
    table = json.loads((output / "ablation.json").read_text())
    assert table["pictures"] == 4
    assert list(table["variants"]) == ["base", "class token multiplied", "warm start"]
    ours, base = (np.array([seed["AD binary 50"] for seed in runs[name]]) for name in ("warm_start", "base"))
    assert ours.shape == (2, 4)
    cell = table["variants"]["warm start"]["AD binary 50"]
    assert cell["mean"] == pytest.approx(ours.sum() / 8, abs=1e-4)
    assert cell["seeds"] == pytest.approx(ours.sum(axis=1) / 4, abs=1e-4)
    assert cell["difference"] == pytest.approx((ours - base).sum() / 8, abs=1e-4)
    assert cell["interval_95"][0] <= cell["mean"] <= cell["interval_95"][1]
    assert cell["difference_95"][0] <= cell["difference"] <= cell["difference_95"][1]
    assert (ours != base).any(), "two forms that come out alike prove nothing"
    written = (output / "ablation.md").read_text()
    (row,) = [line for line in written.splitlines() if line.startswith("| warm start |")]
    assert f"| {ours.mean():.3g} (" in row
    assert f"| {(ours - base).mean():+.3g} (" in row
    assert written in first
    with Image.open(output / "ablation.png") as plot:
        assert min(plot.size) > 100
    for name, head_init in (("base", "random"), ("warm_start", "classifier")):
        report = json.loads((output / name / "seed_1" / "report.json").read_text())
        assert (report["arguments"]["head_init"], report["arguments"]["seed"]) == (head_init, 1)

    assert ablate.main(command) == 0
    assert len(started) == 3 * 2, "a complete run is not repeated"
    again = capsys.readouterr().out
    assert again.count(": complete\n") == 3 * 2
    assert again.endswith(written + "\n")
    with pytest.raises(ValueError, match=r"--clip_norm was None, now 3\.0"):  # complete, but of another table
        ablate.main([*command, "--clip_norm", "3"])


def test_a_warm_start_stands_there_where_there_is_one(
    vit_folder: Path, dinov2_folder: Path, cold_folder: Path
) -> None:
    assert "warm start" in ablate.variants(str(vit_folder), True), "reads the class token: on request"
    found = ablate.variants(str(dinov2_folder), True)
    assert found["warm start"] == ["--head_init", "classifier"]
    assert found["base"] == ["--head_init", "random"]
    assert "warm start" not in ablate.variants(str(cold_folder), True)


def test_what_cannot_work_is_refused_before_anything_is_trained(
    vit_folder: Path, twelve_pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ablate, "run_training", lambda *_: pytest.fail("a training was started"))
    where = ["--dataset", str(twelve_pictures), "--output", str(tmp_path / "out")]
    for more, message in (
        (["--backbone", str(vit_folder), *where], "give pictures to validate on"),
        (["--backbone", str(vit_folder), *where, "--only", "warm", *SETTINGS], "no variant 'warm'; it has: base, no "),
        (["--backbone", "./nothing", *where, *SETTINGS], "the backbone './nothing' does not exist"),
    ):
        with pytest.raises(ValueError, match=message) as refused:
            ablate.main(more)
        assert len(str(refused.value).splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_after_ctrl_c_the_same_command_continues(vit_folder: Path, twelve_pictures: Path, tmp_path: Path) -> None:
    run = tmp_path / "out" / "base" / "seed_0"
    command = [
        "--backbone",
        vit_folder,
        "--dataset",
        twelve_pictures,
        "--output",
        tmp_path / "out",
        "--only",
        "no area",
    ]
    command += [*SETTINGS, "--steps", "1000000", "--log_every", "1"]
    status, output = interrupt([ROOT / "training" / "ablate.py", *command], run, signal.SIGINT, everyone=True)
    assert status == 130, output
    assert output.endswith("ablate: stopped; the same command again continues\n")
    assert "Traceback" not in output
    (checkpoint,) = run.glob("checkpoint-*")
    assert json.loads((checkpoint / "progress.json").read_text())["step"] == int(checkpoint.name[11:]) > 0
    assert not (tmp_path / "out" / "no_area").exists(), "no other training was started"
