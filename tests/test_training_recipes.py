"""The recipes: what they hand to the training script, short real runs, and how they are stopped."""

import json
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import datasets
import pytest
from training_launch import ROOT, interrupt, train_here
from transformers import HfArgumentParser

from hf_ttame import TTameModel
from hf_ttame.launching import Ended, run_training
from training.arguments import Arguments, check

RECIPES = ROOT / "training" / "recipes"
TINY = ("--steps", "2", "--batch_size", "4", "--workers", "0", "--validation_size", "4", "--holdout", "0.4")


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """recipe(name, *arguments, run=...): the file as a script, its trainings started by `run`."""
    import runpy

    monkeypatch.syspath_prepend(str(RECIPES))

    def call(name: str, *arguments: object, run: Callable[..., Ended]) -> None:
        import launch

        monkeypatch.setattr(launch, "run_training", run)
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(RECIPES / f"{name}.py"), run_name="__main__")

    return call


@pytest.fixture(scope="module")
def parquet(twelve_pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("imagenette")
    for shard in range(2):
        rows = {
            "image": [str(twelve_pictures / f"{seed}.png") for seed in range(6 * shard, 6 * shard + 6)],
            "label": [0] * 6,
        }
        part = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
        part.to_parquet(str(folder / f"train-0000{shard}-of-00002.parquet"))
    return folder


def test_every_recipe_hands_over_what_the_training_script_takes(
    recipe: Callable[..., None],
    vit_folder: Path,
    twelve_pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    work = tmp_path / "work"
    for name in ("train", "holdout"):
        (work / name).mkdir(parents=True)
    (work / "backbone").symlink_to(vit_folder)  # prepared: the recipe goes on to its training
    monkeypatch.chdir(tmp_path)  # where nothing resembles a Hub id
    seen: dict[str, list[list[str]]] = {}

    def note(name: str) -> Callable[..., Ended]:
        def run(script: Path, arguments: list[str], options: list[str] | None = None) -> Ended:
            assert script == ROOT / "training" / "train.py"
            seen.setdefault(name, []).append(arguments)
            return Ended(0, False)

        return run

    for name in ("vgg16", "resnet50", "vit_b_16"):
        recipe(name, "out", "--seed", "1", run=note(name))
    for name in ("resnet50", "vit_b_16"):
        recipe(name, "out", "--warm", "--seed", "1", run=note(name))
    for name in ("efficientnet_lite0", "dinov2_small_class_token"):
        recipe(
            name,
            twelve_pictures,
            *([twelve_pictures] if "dinov2" in name else []),
            work,
            "--seed",
            "1",
            run=note(name),
        )
    recipe("dinov2_small", vit_folder, twelve_pictures, "out", "--seed", "1", run=note("dinov2_small"))
    recipe("my_dataset", vit_folder, twelve_pictures, "out", "--seed", "1", run=note("my_dataset"))
    assert {path.stem for path in RECIPES.glob("*.py")} - {"launch", "ship"} == set(seen)
    for commands in seen.values():
        for command in commands:
            (arguments,) = HfArgumentParser(Arguments).parse_args_into_dataclasses(command)
            check(arguments)
            assert arguments.seed == 1, "further arguments come last"
            assert arguments.holdout or arguments.validation
    paper = [
        HfArgumentParser(Arguments).parse_args_into_dataclasses(seen[name][0])[0] for name in ("vgg16", "vit_b_16")
    ]
    for arguments, fill in zip(paper, ("black", "mean"), strict=True):
        assert (arguments.steps, arguments.batch_size, arguments.optimizer) == (320300, 32, "sgd")
        assert (arguments.learning_rate, arguments.weight_decay) == (1e-3, 5e-4)
        assert (arguments.head_init, arguments.mixed_precision, arguments.fill) == ("random", "fp16", fill)
        assert arguments.min_crop == 1.0, "the paper's crops have one size"


def test_my_dataset_trains(
    recipe: Callable[..., None],
    vit_folder: Path,
    twelve_pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe("my_dataset", vit_folder, twelve_pictures, tmp_path / "run", *TINY, run=train_here(monkeypatch))
    explainer = TTameModel.from_pretrained(tmp_path / "run" / "explainer")
    assert int(explainer.head.class_counts.sum()) == 8
    assert json.loads((tmp_path / "run" / "report.json").read_text())["arguments"]["fill"] == "black"


def test_my_dataset_compares_fills(
    recipe: Callable[..., None],
    vit_folder: Path,
    twelve_pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = train_here(monkeypatch)
    for fill in ("--fill=blur", "--fil"):  # one fill in all three rows of the table
        with pytest.raises(SystemExit, match="drop --fill"):
            recipe("my_dataset", vit_folder, twelve_pictures, tmp_path / "runs", "--compare-fills", fill, run=run)
    recipe("my_dataset", vit_folder, twelve_pictures, tmp_path / "runs", "--compare-fills", *TINY, run=run)
    *_, header, few, names, black, mean, blur = capsys.readouterr().out.splitlines()
    assert "on 4 held-out pictures, judged with black pixels in every row" in header
    assert "differences of several points mean nothing" in few
    assert names.split()[:3] == ["fill", "mask", "area"]
    for fill, line in zip(("black", "mean", "blur"), (black, mean, blur), strict=True):
        report = json.loads((tmp_path / "runs" / fill / "report.json").read_text())
        assert report["arguments"]["fill"] == fill
        last = report["validations"][-1]
        shown = [last[name] for name in ("mask area", "AD soft 50", "IC soft 50", "AD binary 50", "IC binary 50")]
        assert line.split() == [fill, *(f"{value:.2f}" for value in shown)]


def test_dinov2_small_trains_and_ships(
    recipe: Callable[..., None],
    dinov2_folder: Path,
    parquet: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run, shipped = tmp_path / "run", tmp_path / "shipped"
    # In this process Accelerate keeps the precision of the tests before.
    more = ("--ship", shipped, *TINY, "--mixed_precision", "no")
    recipe("dinov2_small", dinov2_folder, parquet, run, *more, run=train_here(monkeypatch))
    report = json.loads((run / "report.json").read_text())
    assert report["steps"] == 2
    assert report["best"] is not None
    explainer = TTameModel.from_pretrained(shipped, backbone=str(dinov2_folder))
    assert explainer.config.head_init == "random", "the warm start gave nothing here"
    assert json.loads((shipped / "training.json").read_text())["steps"] == 2


def test_a_wrong_path_is_one_line(
    recipe: Callable[..., None], twelve_pictures: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        recipe("my_dataset", "./nothing", twelve_pictures, tmp_path / "run", run=run_training)
    assert ended.value.code == 1
    errors = capfd.readouterr().err
    assert errors.startswith("training: the backbone './nothing' does not exist")
    assert len(errors.splitlines()) == 1, errors


@pytest.mark.parametrize(
    ("number", "everyone"),
    [
        (signal.SIGTERM, True),
        pytest.param(signal.SIGTERM, False, marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, True, marks=pytest.mark.slow),
        (signal.SIGINT, False),
    ],
)
def test_a_stopped_recipe_leaves_a_checkpoint_and_nothing_running(
    vit_folder: Path, twelve_pictures: Path, tmp_path: Path, number: signal.Signals, everyone: bool
) -> None:
    run = tmp_path / "runs" / "black"
    command = [RECIPES / "my_dataset.py", vit_folder, twelve_pictures, run.parent, "--compare-fills", *TINY]
    command += ["--steps", "1000000", "--log_every", "1"]
    status, output = interrupt(command, run, number, everyone=everyone)
    assert status == 130, output
    assert "continue with --resume" in output
    assert "Traceback" not in output
    assert list(run.glob("checkpoint-*/progress.json"))
    assert not (tmp_path / "runs" / "mean").exists(), "no other training was started"
