"""Real runs of the training script on tiny data: killed, interrupted, out of disk, with two processes.

The runs are processes forked from a server that has imported everything once: a run takes about a second.
"""

import importlib.util
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from hub_server import running_hub
from PIL import Image
from safetensors.torch import load_file, save_file

from hf_ttame import TTameModel
from hf_ttame.pictures import DATA_ERRORS
from training.train import StopRequest, parse

PICTURES = 37
DAMAGED = (3, 20)


def picture(seed: int) -> Image.Image:
    """A bright patch on dark noise: something to see."""
    generator = np.random.default_rng(seed)
    pixels = generator.integers(0, 60, size=(60, 80, 3), dtype=np.uint8)
    top, left = generator.integers(0, 30), generator.integers(0, 50)
    pixels[top : top + 30, left : left + 30] = generator.integers(120, 255, size=3, dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures with a space")
    for seed in range(24):
        picture(seed).save(folder / f"{seed:02d}.png")
    return folder


@pytest.fixture(scope="module")
def parquet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three shards of unequal length, with two damaged pictures."""
    folder = tmp_path_factory.mktemp("parquet")
    column = datasets.Features(image=datasets.Image())
    rows = datasets.Dataset.from_dict({"image": [picture(seed) for seed in range(PICTURES)]}, features=column)
    cells = list(rows.cast_column("image", datasets.Image(decode=False))["image"])
    for seed in DAMAGED:
        cells[seed] = {"bytes": cells[seed]["bytes"][:200], "path": None}
    for shard, (start, end) in enumerate(((0, 10), (10, 22), (22, PICTURES))):
        part = datasets.Dataset.from_dict({"image": cells[start:end], "label": [0] * (end - start)})
        part.cast_column("image", datasets.Image()).to_parquet(str(folder / f"train-{shard}.parquet"))
    return folder


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small classifier with random weights that answers differently to different pictures."""
    from transformers import AutoModelForImageClassification, ResNetConfig, ViTImageProcessor

    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 12, 16, 24], depths=[1, 1, 1, 1], layer_type="basic")
    config.num_labels = 5
    model = AutoModelForImageClassification.from_config(config).eval()
    processor = ViTImageProcessor(size={"height": 64, "width": 64})
    pixel_values = processor([picture(seed) for seed in range(64)], return_tensors="pt")["pixel_values"]
    with torch.no_grad():  # spread and centre the logits, so that predictions and losses mean something
        pooled = model.resnet(pixel_values).pooler_output.flatten(1)
        model.classifier[1].weight.mul_(3 / (pooled @ model.classifier[1].weight.T).std(dim=0)[:, None])
        model.classifier[1].bias.copy_(-(pooled @ model.classifier[1].weight.T).mean(dim=0))
        assert len(model(pixel_values).logits.argmax(dim=1).unique()) >= 3
    path = tmp_path_factory.mktemp("backbone")
    model.save_pretrained(path)
    processor.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def server() -> Any:
    before = dict(os.environ)
    os.environ.update(ACCELERATE_USE_CPU="true", OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["training.train"])
    yield context
    os.environ.clear()
    os.environ.update(before)


def child(arguments: list[str], output: str, settings: dict[str, str], largest_file: int | None) -> None:
    from training.train import main

    os.environ.update(settings)
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    if largest_file is not None:  # what a full disk does: writing fails in the middle of a file
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # a child of the server would start another server
    try:
        status = main(arguments)
    except DATA_ERRORS as error:
        print(f"{type(error).__name__}: {error}", flush=True)
        status = 1
    sys.stdout.flush()
    os._exit(status)


class Run:
    """One run of the script, in one or more processes."""

    def __init__(self, server: Any, arguments: list[str], ranks: int = 1, largest_file: int | None = None):
        self.output = Path(arguments[arguments.index("--output") + 1])
        self.text = self.output.with_suffix(".txt")
        self.log = self.output / "log.jsonl"
        self.earlier = self._log_file()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.processes = []
        for rank in range(ranks):
            settings = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
            settings |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_WORLD_SIZE": str(ranks)}
            settings = settings if ranks > 1 else {}
            process = server.Process(target=child, args=(arguments, str(self.text), settings, largest_file))
            process.start()
            self.processes.append(process)

    def wait(self, expect: int = 0) -> str:
        for process in self.processes:
            process.join(120)
        text = self.text.read_text()
        assert [process.exitcode for process in self.processes] == [expect] * len(self.processes), text
        return text

    def _log_file(self) -> int | None:
        return self.log.stat().st_ino if self.log.exists() else None

    def wait_for_step(self, step: int) -> None:
        """Until this run, not one before it, has logged the step: a run begins by writing the log anew."""
        deadline = time.monotonic() + 60
        while self._log_file() in (None, self.earlier) or len(self.log.read_text().splitlines()) < step:
            assert time.monotonic() < deadline
            assert self.processes[0].is_alive(), self.text.read_text()
            time.sleep(0.002)

    def send(self, number: int) -> None:
        for process in self.processes:
            os.kill(process.pid, number)


SHORT = (
    "--batch_size",
    "8",
    "--learning_rate",
    "5e-3",
    "--window",
    "9",
    "--max_unreadable",
    "0.2",
    "--log_every",
    "1",
)


def arguments(backbone: str, data: Path, output: Path, *more: str) -> list[str]:
    return ["--backbone", backbone, "--dataset", str(data), "--output", str(output), *SHORT, *more]


def assert_same(a: Path, b: Path) -> None:
    one, other = load_file(a / "explainer" / "model.safetensors"), load_file(b / "explainer" / "model.safetensors")
    assert one.keys() == other.keys()
    assert all(name.startswith("head.") for name in one)
    for name in one:
        assert torch.equal(one[name], other[name]), name


def test_a_run_lowers_the_loss_and_tells_how_it_went(server: Any, backbone: str, folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    argv = arguments(backbone, folder, output, "--steps", "40", "--workers", "0", "--head_init", "random")
    argv += ["--holdout", "0.3", "--validate_every", "20", "--report_to", "tensorboard", "--save_every", "15"]
    text = Run(server, argv).wait()
    log = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    totals = [entry["total"] for entry in log]
    assert [entry["step"] for entry in log] == list(range(1, 41))
    assert np.mean(totals[20:]) < 0.9 * np.mean(totals[:10])
    assert "validation at step 20" in text
    assert "left" in text

    model = TTameModel.from_pretrained(output / "explainer")
    original = TTameModel.from_backbone(backbone, head_init="random")
    for (name, a), (_, b) in zip(
        model.backbone.state_dict().items(), original.backbone.state_dict().items(), strict=True
    ):
        assert torch.equal(a, b), name
    assert int(model.head.class_counts.sum()) == 40 * 8
    (explanation,) = model.explain(folder / "00.png")
    assert explanation.map.shape == (60, 80)

    report = json.loads((output / "report.json").read_text())
    assert report["steps"] == 40
    assert report["pictures"] == 320
    explained = int((model.head.class_counts > 0).sum())
    assert report["coverage"]["explained"] == explained
    others = f"; the maps of the other {5 - explained} are unchecked" if explained < 5 else ""
    assert f"explained {explained} of 5 classes{others}\n" in text
    assert [found["step"] for found in report["validations"]] == [20, 40]
    assert report["best"]["score"] == min(found["score"] for found in report["validations"])
    low, high = report["last_95"]["AD soft 50"]
    assert low <= report["validations"][-1]["AD soft 50"] <= high
    assert TTameModel.from_pretrained(output / "best").config.num_labels == 5
    for name in ("curves.png", "samples.png"):
        with Image.open(output / name) as image:
            assert min(image.size) > 100
    assert list((output / "hf-ttame").glob("events*")), "tensorboard"
    for path in (output / "explainer").glob("*.json"):
        assert str(tmp_path) not in path.read_text()
    again = Run(server, arguments(backbone, folder, output)).wait(1)
    assert "holds a trained explainer" in again
    assert "nothing to resume" in Run(server, [*argv, "--resume"]).wait()


@pytest.mark.parametrize(
    ("ranks", "workers", "kills", "save_every"),
    [(1, 0, 3, 1), (1, 2, 1, 4), (2, 0, 1, 4)],  # saving at every step: most kills fall into it
)
def test_a_killed_run_resumes_to_the_same_head(
    server: Any, backbone: str, parquet: Path, tmp_path: Path, ranks: int, workers: int, kills: int, save_every: int
) -> None:
    more = (
        "--steps",
        "24",
        "--save_every",
        str(save_every),
        "--workers",
        str(workers),
        "--holdout",
        "0.1",
    )
    whole, killed = (arguments(backbone, parquet, tmp_path / name, *more) for name in ("whole", "killed"))
    Run(server, whole, ranks).wait()
    seed = random.randrange(2**32)
    print(f"killed at the moments of random.Random({seed})")  # pytest shows it where the test fails
    moments = random.Random(seed)
    for step in sorted(moments.randint(1, 20) for _ in range(kills)):
        run = Run(server, [*killed, "--resume"], ranks)
        run.wait_for_step(step)
        time.sleep(moments.random() * 0.05)
        run.send(signal.SIGKILL)
        run.wait(-signal.SIGKILL)
        assert not (tmp_path / "killed" / "explainer").exists(), "the run ended before it could be killed"
    text = Run(server, [*killed, "--resume"], ranks).wait()
    assert "continuing" in text or "no checkpoint yet" in text
    assert_same(tmp_path / "whole", tmp_path / "killed")
    logs = [
        [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        for name in ("whole", "killed")
    ]
    assert [entry["total"] for entry in logs[0]] == [entry["total"] for entry in logs[1]]
    skipped = [json.loads((tmp_path / name / "report.json").read_text())["unreadable"] for name in ("whole", "killed")]
    assert skipped[0] == skipped[1]
    assert 1 <= skipped[0]["count"] <= len(DAMAGED)
    assert all("cannot be read" in name for name in skipped[0]["names"])


def test_an_interrupted_run_saves_first(server: Any, backbone: str, parquet: Path, tmp_path: Path) -> None:
    more = ("--steps", "40", "--save_every", "100", "--workers", "2")
    whole, stopped = (arguments(backbone, parquet, tmp_path / name, *more) for name in ("whole", "stopped"))
    Run(server, whole).wait()
    run = Run(server, stopped)
    run.wait_for_step(5)
    run.send(signal.SIGINT)
    text = run.wait(130)
    assert text.count("stopping after this step, or the next where it validates; a second Ctrl-C stops at once") == 1
    assert "continue with --resume" in text
    assert "Traceback" not in text
    (checkpoint,) = (tmp_path / "stopped").glob("checkpoint-*")
    assert f"stopped at step {int(checkpoint.name[11:])};" in text
    assert "--resume" in Run(server, stopped).wait(1)
    Run(server, [*stopped, "--resume"]).wait()
    assert_same(tmp_path / "whole", tmp_path / "stopped")


def test_ctrl_c_during_the_imports_ends_without_a_traceback() -> None:
    script = Path(__file__).parents[1] / "training" / "train.py"
    with subprocess.Popen(
        [sys.executable, "-X", "importtime", str(script)], stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr
        assert any("torch" in line for line in process.stderr)  # up to the first of torch's modules
        process.send_signal(signal.SIGINT)
        assert "Traceback" not in process.stderr.read()
    assert process.returncode == -signal.SIGINT


@pytest.mark.parametrize(("given", "told"), [("--stepz", "; nearest: --steps"), ("--xyzzy=3", "")])
def test_an_unknown_option_is_told_with_the_nearest(given: str, told: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"unknown option {given!r}{told}; all: --help")):
        parse(["--backbone", "a/b", "--dataset", "c/d", "--output", "e", given])


def test_one_training_at_a_time_writes_into_a_folder(
    server: Any, backbone: str, parquet: Path, tmp_path: Path
) -> None:
    argv = arguments(backbone, parquet, tmp_path / "run", "--steps", "5000", "--workers", "1")
    first = Run(server, argv)
    first.wait_for_step(2)
    assert "another training writes into" in Run(server, [*argv, "--resume"]).wait(1)
    first.send(signal.SIGKILL)
    first.wait(-signal.SIGKILL)
    (tmp_path / "run.txt").unlink()  # what the others said
    again = Run(server, [*argv, "--resume"])  # at once: the dead run's workers hold nothing
    deadline = time.monotonic() + 60
    while not again.text.exists() or "step 2/5000" not in again.text.read_text():
        assert time.monotonic() < deadline
        assert again.processes[0].is_alive(), again.text.read_text()
        time.sleep(0.05)
    again.send(signal.SIGINT)
    again.wait(130)


def test_two_interrupted_processes_stop_together(server: Any, backbone: str, parquet: Path, tmp_path: Path) -> None:
    run = Run(server, arguments(backbone, parquet, tmp_path / "two", "--steps", "400", "--workers", "0"), 2)
    run.wait_for_step(3)
    os.kill(run.processes[1].pid, signal.SIGTERM)  # one is asked, both stop
    run.wait(130)
    assert len(list((tmp_path / "two").glob("checkpoint-*"))) == 1


def test_a_full_disk_leaves_the_last_checkpoint(server: Any, backbone: str, parquet: Path, tmp_path: Path) -> None:
    more = ("--steps", "20", "--save_every", "5", "--workers", "0")
    whole, full = (arguments(backbone, parquet, tmp_path / name, *more) for name in ("whole", "full"))
    Run(server, whole).wait()
    run = Run(server, full)
    run.wait_for_step(7)
    run.send(signal.SIGKILL)
    run.wait(-signal.SIGKILL)
    (before,) = (tmp_path / "full").glob("checkpoint-00000005")
    text = Run(server, [*full, "--resume"], largest_file=6000).wait(1)
    assert f"warning: no checkpoint at step 10: '{full[5]}/checkpoint-00000010' cannot be written: " in text
    assert f"the explainer could not be saved: '{full[5]}/curves.png' cannot be written: " in text
    assert "; make room, or raise the limit on the size of a file; run again with --resume" in text
    assert sorted((tmp_path / "full").glob("checkpoint-*")) == [before]
    assert not (tmp_path / "full" / "explainer").exists()
    assert [file.name for file in (tmp_path / "full").glob(".*")] == [".lock"], "nothing half-written stays"
    Run(server, [*full, "--resume"]).wait()
    assert_same(tmp_path / "whole", tmp_path / "full")
    first = arguments(backbone, parquet, tmp_path / "first", *more)
    text = Run(server, first, largest_file=6000).wait(1)
    assert "not one checkpoint can be saved, so a kill would lose the run: " in text
    assert len((tmp_path / "first" / "log.jsonl").read_text().splitlines()) == 5, "and not after all 20 steps"


def test_checkpoints_hold_the_head_alone_and_are_pruned(
    server: Any, backbone: str, folder: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    Run(server, arguments(backbone, folder, output, "--steps", "9", "--save_every", "2", "--workers", "0")).wait()
    assert sorted(path.name for path in output.glob("checkpoint-*")) == ["checkpoint-00000008", "checkpoint-00000009"]
    saved = load_file(output / "checkpoint-00000009" / "model.safetensors")
    head = TTameModel.from_pretrained(output / "explainer").head.state_dict()
    assert saved.keys() == head.keys()
    assert all(torch.equal(saved[name], head[name]) for name in head)


def test_changed_arguments_are_refused_by_name(server: Any, backbone: str, folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    argv = arguments(backbone, folder, output, "--steps", "6", "--save_every", "2", "--workers", "0")
    run = Run(server, argv)
    run.wait_for_step(4)
    run.send(signal.SIGTERM)
    run.wait(130 if not (output / "explainer").exists() else 0)
    for changed, message in (
        (["--batch_size", "4"], "--batch_size was 8, now 4"),
        (["--workers", "1", "--seed", "3"], "--seed was 0, now 3; --workers was 0, now 1"),
        (["--area_weight", "1"], "--area_weight was 2.0, now 1.0"),
    ):
        text = Run(server, [*argv, "--resume", *changed]).wait(1)
        assert message in text
    assert "--processes was 1, now 2" in Run(server, [*argv, "--resume"], 2).wait(1)
    Run(server, [*argv, "--resume", "--save_every", "3", "--log_every", "2"]).wait()
    assert "nothing to resume" in Run(server, [*argv, "--resume"]).wait()
    assert "--seed was 0, now 3" in Run(server, [*argv, "--resume", "--seed", "3"]).wait(1), "of a complete run too"


@pytest.mark.parametrize("changed", ["backbone", "dataset", "validation"])
def test_what_has_changed_is_refused_by_name(
    server: Any, backbone: str, folder: Path, tmp_path: Path, changed: str
) -> None:
    """The arguments are the same, what they name is not."""
    places = {name: tmp_path / name for name in ("backbone", "dataset", "validation")}
    shutil.copytree(backbone, places["backbone"])
    shutil.copytree(folder, places["dataset"])
    shutil.copytree(folder, places["validation"])
    argv = arguments(str(places["backbone"]), places["dataset"], tmp_path / "run", "--workers", "0", "--steps", "4")
    argv += ["--validation", str(places["validation"]), "--save_every", "2"]
    Run(server, argv).wait()
    if changed == "backbone":
        weights = load_file(places[changed] / "model.safetensors")
        weights["classifier.1.bias"] += 1
        save_file(weights, places[changed] / "model.safetensors", {"format": "pt"})
    else:  # as many, of the same names
        picture(99).resize((30, 30)).save(places[changed] / "00.png")
    assert f"what it reads has changed: {changed}: " in Run(server, [*argv, "--resume"]).wait(1), "though complete"
    end_before_the_end(tmp_path / "run", 2)
    text = Run(server, [*argv, "--resume"]).wait(1)
    assert re.search(rf"what it reads has changed: {changed}: \S+ then, \S+ now; bring the earlier back", text)


def test_data_and_classifier_may_lie_elsewhere(server: Any, backbone: str, folder: Path, tmp_path: Path) -> None:
    """A cluster stages them into a folder of each job."""
    for job in ("first", "second"):
        shutil.copytree(backbone, tmp_path / job / "classifier")
        shutil.copytree(folder, tmp_path / job / "data")
    more = ("--workers", "0", "--steps", "4", "--save_every", "2", "--resume")
    argv = [
        arguments(str(tmp_path / job / "classifier"), tmp_path / job / "data", tmp_path / "run", *more)
        for job in ("first", "second")
    ]
    Run(server, argv[0]).wait()
    shutil.copytree(tmp_path / "run", tmp_path / "whole")
    assert "nothing to resume" in Run(server, argv[1]).wait()
    assert "--processes was 1, now 2" in Run(server, argv[1], 2).wait(1)
    end_before_the_end(tmp_path / "run", 2)
    assert "continuing" in Run(server, argv[1]).wait()
    assert_same(tmp_path / "whole", tmp_path / "run")


def end_before_the_end(output: Path, step: int) -> dict[str, Any]:
    """Leave what a run that was killed after the step would have left; what its checkpoint knows."""
    shutil.rmtree(output / "explainer")
    for checkpoint in output.glob("checkpoint-*"):
        if int(checkpoint.name[11:]) > step:
            shutil.rmtree(checkpoint)
    return json.loads((output / f"checkpoint-{step:08d}" / "progress.json").read_text())


def test_other_versions_are_told(server: Any, backbone: str, folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    argv = arguments(backbone, folder, output, "--steps", "4", "--save_every", "2", "--workers", "0")
    Run(server, argv).wait()
    progress = end_before_the_end(output, 2)
    packages = ("hf-ttame", "torch", "numpy", "pillow")
    assert progress["versions"] == {**{name: version(name) for name in packages}, "threads": "1"}
    progress["versions"]["torch"] = "1.0"
    (output / "checkpoint-00000002" / "progress.json").write_text(json.dumps(progress))
    warning = f"since the run began this has changed: torch 1.0 then, {version('torch')} now; "
    text = Run(server, [*argv, "--resume"]).wait()
    assert text.count(f"warning: {warning}") == 1
    (told,) = json.loads((output / "report.json").read_text())["warnings"]
    assert told.startswith(warning)


def test_best_is_the_head_that_the_report_describes(server: Any, backbone: str, folder: Path, tmp_path: Path) -> None:
    """Killed after a later best was measured, resumed without measuring it again."""
    output = tmp_path / "run"
    argv = arguments(backbone, folder, output, "--steps", "8", "--save_every", "2", "--workers", "0", "--keep", "9")
    argv += ["--holdout", "0.3", "--seed", "1"]
    Run(server, [*argv, "--validate_every", "1"]).wait()
    first = load_file(output / "best.safetensors")
    for step in range(2, 8, 2):  # the newest checkpoint that knew an earlier best than the run found in the end
        progress = json.loads((output / f"checkpoint-{step:08d}" / "progress.json").read_text())
        if progress["best"]["step"] != json.loads((output / "report.json").read_text())["best"]["step"]:
            break
    else:
        pytest.fail("the first validation was the best: this run cannot show it")
    progress = end_before_the_end(output, step)
    shutil.rmtree(output / "best")
    # Nothing is better than this, so that no validation on the way replaces it.
    progress["best"]["score"] = -1e9
    (output / f"checkpoint-{step:08d}" / "progress.json").write_text(json.dumps(progress))
    kept = load_file(output / f"checkpoint-{step:08d}" / "best.safetensors")
    assert any(not torch.equal(kept[name], first[name]) for name in kept)
    Run(server, [*argv, "--validate_every", "100", "--resume"]).wait()
    assert json.loads((output / "report.json").read_text())["best"] == progress["best"]
    saved = load_file(output / "best" / "model.safetensors")
    assert all(torch.equal(saved[f"head.{name}"], kept[name]) for name in kept)


def test_two_processes_follow_one(server: Any, backbone: str, folder: Path, tmp_path: Path) -> None:
    """A global batch of 32 that is the whole dataset: every step sees the same views, however they are dealt."""
    (tmp_path / "data").mkdir()
    for seed in range(32):
        picture(seed).save(tmp_path / "data" / f"{seed:02d}.png")
    heads, validated = [], []
    for ranks in (1, 2):
        output = tmp_path / str(ranks)
        argv = arguments(backbone, tmp_path / "data", output, "--steps", "12", "--workers", "0", "--no_batch_norm")
        argv += ["--window", "64", "--batch_size", str(32 // ranks), "--optimizer", "sgd", "--learning_rate", "1e-2"]
        argv += ["--validation", str(folder)]
        Run(server, argv, ranks).wait()
        validated.append(json.loads((output / "validation.json").read_text())["AD soft 50"])
        heads.append(load_file(output / "explainer" / "model.safetensors"))
    start = TTameModel.from_backbone(backbone, batch_norm=False).state_dict()
    moved = False
    for name in heads[0]:
        torch.testing.assert_close(heads[0][name], heads[1][name], rtol=0, atol=1e-4)
        moved |= bool((heads[0][name] - start[name]).abs().max() > 1e-3)
    assert moved, "training that changes nothing proves nothing"
    assert int(heads[1]["head.class_counts"].sum()) == 12 * 32
    assert len(set(validated[0])) > 12, "else their order would not show"
    assert validated[0] == pytest.approx(validated[1], abs=0.5), "picture by picture, in one order"


def test_running_statistics_are_averaged(server: Any, backbone: str, folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "two"
    argv = arguments(backbone, folder, output, "--steps", "3", "--workers", "0")
    Run(server, argv, 2).wait()
    saved = load_file(output / "explainer" / "model.safetensors")
    own = [
        torch.load(output / "checkpoint-00000003" / f"process_{rank}.pt", weights_only=True)["buffers"]
        for rank in range(2)
    ]
    name = "bns.0.running_mean"
    assert not torch.allclose(own[0][name], own[1][name], rtol=1e-3)
    torch.testing.assert_close(saved[f"head.{name}"], (own[0][name] + own[1][name]) / 2)


@pytest.mark.parametrize(
    "more",
    [
        ["--mixed_precision", "bf16", "--accumulate", "2", "--clip_norm", "0.1", "--optimizer", "sgd"],
        ["--class_set", "own", "--fill", "blur", "--no_channels_last", "--min_crop", "0.4", "--no_streaming"],
    ],
)
def test_options_train(server: Any, backbone: str, folder: Path, tmp_path: Path, more: list[str]) -> None:
    output = tmp_path / "run"
    (output / "samples").mkdir(parents=True)
    for stale in (output / "unreadable_0.txt", output / "samples" / "00000001.png", output / "log.jsonl"):
        stale.write_text("" if stale.suffix == ".jsonl" else "of a run that was killed before its first checkpoint")
    Run(server, arguments(backbone, folder, output, "--steps", "6", "--workers", "0", *more)).wait()
    assert not any((output / "samples").iterdir())
    assert json.loads((output / "report.json").read_text())["unreadable"]["count"] == 0
    head = load_file(output / "explainer" / "model.safetensors")
    assert all(tensor.isfinite().all() for tensor in head.values())
    assert int(head["head.class_counts"].sum()) == 6 * 8 * (2 if "--accumulate" in more else 1)
    log = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    assert len(log) == 6
    assert 0 < log[-1]["mask_area"] < 1


def test_gradients_are_clipped(server: Any, backbone: str, folder: Path, tmp_path: Path) -> None:
    """SGD with next to no gradient moves nothing; without the limit it does."""
    heads = {}
    for name, more in (("once", ["1e-9", "--steps", "1"]), ("clipped", ["1e-9"]), ("free", ["1e9"])):
        settings = [
            "--workers",
            "0",
            "--optimizer",
            "sgd",
            "--weight_decay",
            "0",
            "--steps",
            "4",
            "--clip_norm",
            *more,
        ]
        Run(server, arguments(backbone, folder, tmp_path / name, *settings)).wait()
        heads[name] = load_file(tmp_path / name / "explainer" / "model.safetensors")["head.fuser.weight"]
    assert (heads["clipped"] - heads["once"]).abs().max() < 1e-7
    assert (heads["free"] - heads["once"]).abs().max() > 1e-5


def test_a_hub_dataset_is_read_at_the_commit_at_which_the_run_began(
    backbone: str, parquet: Path, tmp_path: Path
) -> None:
    script = Path(__file__).parents[1] / "training" / "train.py"
    argv = ["--backbone", backbone, "--dataset", "me/pictures", "--output", str(tmp_path / "run"), *SHORT]
    argv += ["--workers", "1", "--steps", "4", "--save_every", "2", "--resume"]
    argv += ["--validation", "me/others", "--validate_every", "4"]
    with running_hub() as hub:
        environment = hub.environment(tmp_path / "home", ACCELERATE_USE_CPU="true")

        def train() -> None:
            done = subprocess.run([sys.executable, script, *argv], capture_output=True, text=True, env=environment)
            assert done.returncode == 0, done.stderr

        files = {file.name: file.read_bytes() for file in sorted(parquet.iterdir())}
        hub.put("me/pictures", files, kind="datasets")
        hub.put("me/others", {"validation.parquet": files["train-0.parquet"]}, kind="datasets")
        train()
        shutil.copytree(tmp_path / "run", tmp_path / "first")
        progress = end_before_the_end(tmp_path / "run", 2)
        assert all(re.fullmatch("[0-9a-f]{40}", progress[name]) for name in ("revision", "validation_revision"))
        hub.put("me/pictures", {**files, "train-0.parquet": files["train-1.parquet"]}, kind="datasets")
        hub.put("me/others", {"validation.parquet": files["train-1.parquet"]}, kind="datasets")
        train()
    assert_same(tmp_path / "first", tmp_path / "run")
    first, again = ((tmp_path / name / "validation.json").read_text() for name in ("first", "run"))
    assert first == again


def test_data_that_cannot_train(server: Any, backbone: str, parquet: Path, tmp_path: Path) -> None:
    def refused(data: Path, *more: str) -> str:
        output = tmp_path / "refused"
        return Run(server, arguments(backbone, data, output, "--workers", "0", *more)).wait(1)

    assert "image column 'photo' is not in the dataset; its columns: image, label" in refused(
        parquet, "--image_column", "photo"
    )
    assert "the column 'label' holds int64, not pictures" in refused(parquet, "--image_column", "label")
    for more in (["--validation_split", "train"], []):  # its files have no such split: all would be read
        text = refused(parquet / "train-0.parquet", "--validation", str(parquet / "train-0.parquet"), *more)
        assert "would read pictures that are trained on; give other ones" in text
    assert "would read pictures that are trained on" in refused(
        parquet, "--validation", str(parquet / "train-1.parquet")
    )
    assert "fp16 exists on GPUs only; give bf16" in refused(parquet, "--mixed_precision", "fp16")
    empty = tmp_path / "empty"
    empty.mkdir()
    rows = datasets.Dataset.from_dict({"image": []}, features=datasets.Features(image=datasets.Image()))
    rows.to_parquet(str(empty / "train.parquet"))
    assert "the dataset is empty" in refused(empty)
    assert "more than the share of 0.01 that --max_unreadable allows" in refused(parquet, "--max_unreadable", "0.01")
    if importlib.util.find_spec("wandb") is None:
        assert "needs its package; run: pip install wandb" in refused(parquet, "--report_to", "wandb")
    assert "--sync_batch_norm exists on GPUs only" in refused(parquet, "--sync_batch_norm")
    text = Run(server, arguments(backbone, parquet, parquet / "run", "--workers", "0")).wait(1)
    assert f"lies among the pictures of {str(parquet)!r}" in text
    (parquet / "run.txt").unlink()
    own = Path(shutil.copytree(parquet, tmp_path / "run" / "samples"))
    text = Run(server, arguments(backbone, own, tmp_path / "run", "--workers", "0")).wait(1)
    assert "keeps its own pictures" in text
    assert len(list(own.iterdir())) == 3
    few = tmp_path / "few"
    few.mkdir()
    for seed in range(3):
        picture(seed).save(few / f"{seed}.png")
    Run(server, arguments(backbone, few, tmp_path / "few_run", "--steps", "4", "--workers", "0")).wait()
    assert json.loads((tmp_path / "few_run" / "report.json").read_text())["pictures"] == 32, "batches of 8 from 3"


def test_a_short_run_is_judged_by_all_it_read(server: Any, backbone: str, folder: Path, tmp_path: Path) -> None:
    """Half of 24 pictures is damaged; one batch of eight ends before the stream has judged anything."""
    shutil.copytree(folder, tmp_path / "data")
    for file in sorted((tmp_path / "data").iterdir())[::2]:
        file.write_bytes(file.read_bytes()[:200])
    output = tmp_path / "run"
    argv = arguments(backbone, tmp_path / "data", output, "--steps", "1", "--workers", "0")
    argv += ["--max_unreadable", "0.05"]  # as many as of 100: five
    text = Run(server, argv).wait(1)
    found = re.search(r"(\d+) of the (\d+) pictures read so far cannot be decoded, more than the share of 0\.05", text)
    assert found, text
    unreadable, read = map(int, found.groups())
    assert read == 8 + unreadable < 24
    assert unreadable > 5
    assert len((output / "unreadable_0.txt").read_text().splitlines()) == unreadable
    assert (output / "checkpoint-00000001").exists()
    assert not (output / "explainer").exists()
    again = Run(server, [*argv, "--resume", "--max_unreadable", str((unreadable - 0.5) / 100)]).wait(1)
    assert found[0].split(",")[0] in again, "the count is kept"
    Run(server, [*argv, "--resume", "--max_unreadable", str(unreadable / 100)]).wait()
    assert json.loads((output / "report.json").read_text())["unreadable"]["count"] == unreadable


def test_an_error_in_a_worker_is_one_line(backbone: str, parquet: Path, tmp_path: Path) -> None:
    script = Path(__file__).parents[1] / "training" / "train.py"
    argv = arguments(
        backbone, parquet, tmp_path / "run", "--workers", "2", "--steps", "40", "--max_unreadable", "0.01"
    )
    settings = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    settings.pop("TTAME_DEBUG", None)
    done = subprocess.run([sys.executable, script, *argv], capture_output=True, text=True, timeout=120, env=settings)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert re.fullmatch(
        r"training: \d+ of the \d+ pictures read so far cannot be decoded, more than the share of 0\.01 that "
        r"--max_unreadable allows; "
        r".*unreadable_\*\.txt name them; .*",
        done.stderr.splitlines()[-1],
    )
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert steps[-1] < 20, "long before the end"


def test_an_unexpected_error_ends_the_process(backbone: str, parquet: Path, tmp_path: Path) -> None:
    """Whatever it is, with workers alive: no process is left that waits for them."""
    argv = arguments(backbone, parquet, tmp_path / "run", "--workers", "2", "--steps", "40")
    failing = (
        "import sys, training.train as train; losses = train.masking_losses\n"
        "def fail(model, head, pixel_values, *rest, **more):\n"
        "    if head.class_counts.sum() >= 16: raise RuntimeError('out of memory')\n"
        "    return losses(model, head, pixel_values, *rest, **more)\n"
        "train.masking_losses = fail; train.main(sys.argv[1:])"
    )
    settings = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    settings["PYTHONPATH"] = str(Path(__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", failing, *argv], capture_output=True, text=True, timeout=120, env=settings
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "RuntimeError: out of memory"


def test_a_collapse_is_told_once(server: Any, backbone: str, folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    argv = arguments(backbone, folder, output, "--steps", "90", "--workers", "0", "--head_init", "random")
    argv += ["--area_weight", "50", "--cross_entropy_weight", "0", "--learning_rate", "0.1"]
    text = Run(server, argv).wait()
    areas = [json.loads(line)["mask_area"] for line in (output / "log.jsonl").read_text().splitlines()]
    means = {step: sum(areas[step - 50 : step]) / 50 for step in range(50, 91)}
    low = [step for step, mean in means.items() if mean < 0.03]
    assert 50 < low[0] < low[-1] == 90, means
    assert text.count("warning at step") == 1
    assert f"warning at step {low[0]}: the mask has collapsed to all zeros (mean {means[low[0]]:.3f})" in text
    (warning,) = json.loads((output / "report.json").read_text())["warnings"]
    assert warning.startswith("the mask has collapsed to all zeros")


def test_a_second_ctrl_c_acts_at_once() -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        stop = StopRequest()
        assert not stop.asked
        signal.raise_signal(signal.SIGINT)
        assert stop.asked
        signal.raise_signal(signal.SIGTERM)  # asks politely, however often
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
