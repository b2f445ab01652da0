"""`ttame compare` on a tiny backbone: one run, a killed and resumed one, two processes, and the report's words."""

import copy
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from hf_ttame import TTameModel, evaluation_rows
from hf_ttame import evaluation as module
from hf_ttame.baselines import FROM_THE_HEAD, TRIVIAL, Method, MethodSettings, expand_names, make_method
from hf_ttame.evaluation import compare
from hf_ttame.evaluation_images import Images, Scan
from hf_ttame.evaluation_measuring import _inside_regions
from hf_ttame.evaluation_plan import Plan
from hf_ttame.evaluation_rows import Store, read_rows, versions_of, write_rows
from hf_ttame.features import inner_module
from hf_ttame.measures import FAITHFULNESS, FEWEST, Measure, verdict
from hf_ttame.metrics import mean_interval
from hf_ttame.passes import PassBar
from hf_ttame.pictures import parse_where
from hf_ttame.precision import in_float32, passes_in
from hf_ttame.regions import read_mask, region_of_boxes, region_of_mask
from hf_ttame.report_page import markdown_table, to_markdown
from hf_ttame.report_plots import _curves, _log_milliseconds
from hf_ttame.reporting import by_confidence, columns_of, summarise, write_report

ROOT = Path(__file__).parents[1]
METHODS = ("gradcam", "scorecam", "ones", "random-blob")


@pytest.fixture(scope="module")
def pictures(photo: Callable[..., Image.Image], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    images = [photo(70 + n, 64 + n, seed=n) for n in range(10)]
    features = datasets.Features(
        {"image": datasets.Image(), "number": datasets.Value("int64"), "box": datasets.List(datasets.Value("int64"))}
    )
    rows = {"image": images, "number": list(range(10)), "box": [[5, 5, 40, 40]] * 10}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(folder / "validation-0.parquet"))
    return folder


@pytest.fixture(scope="module")
def model(timm_cnn: nn.Module, pictures: Path) -> TTameModel:
    """An explainer whose classifier predicts at least four classes: mosaics need them."""
    made = TTameModel.from_backbone(copy.deepcopy(timm_cnn))  # its memory format is changed
    classifier = inner_module(made.backbone).fc
    assert isinstance(classifier, nn.Linear)
    (batch,) = Images(plan(pictures, limit=10, batch_size=10), made).batches(10)
    with torch.no_grad():
        classifier.weight.mul_(5)
        classifier.bias.sub_(made.classify(batch.pixel_values).mean(dim=0))
        assert len(made.classify(batch.pixel_values[:6]).argmax(dim=1).unique()) >= 4
    return TTameModel.from_backbone(inner_module(made.backbone))


def plan(pictures: Path, **changes) -> Plan:
    settings = MethodSettings(rise_masks=8, batch_size=8)
    facts = {"methods": METHODS, "limit": 6, "slow_limit": 3, "curve_limit": 1, "mosaics": 2, "batch_size": 4}
    return Plan(str(pictures), box_column="box", mosaic_confidence=0.0, settings=settings, **{**facts, **changes})


@pytest.fixture(scope="module")
def finished(pictures: Path, model: TTameModel, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    output = tmp_path_factory.mktemp("runs") / "whole"
    return output, compare(model, plan(pictures), output, progress=False)


def rows_without_time(folder: Path) -> dict:
    rows = read_rows(folder / "per_image.parquet")
    return {key: {k: v for k, v in row.items() if k not in ("sheet map", "head")} for key, row in rows.items()}


def same_rows(a: dict, b: dict) -> bool:
    if a.keys() != b.keys():
        return False

    def same(one: object, other: object) -> bool:
        return one == other if isinstance(one, str) else np.allclose(one, other, atol=1e-3)

    return all(
        a[key].keys() == b[key].keys() and all(same(a[key][name], b[key][name]) for name in a[key]) for key in a
    )


def test_the_report_holds_every_method_with_the_images_it_was_asked_for(finished: tuple[Path, dict]) -> None:
    output, report = finished
    names = list(report["methods"])
    assert names[:3] == ["ttame", "gradcam", "scorecam"]
    for name, entry in report["methods"].items():
        expected = 3 if name == "scorecam" else 6
        assert entry["measures"]["AD soft 100"]["n"] == expected
        assert entry["measures"]["ROAD MoRF confidence"]["n"] == 1
        assert entry["measures"]["insertion blur"]["n"] == 1
        assert entry["measures"]["energy in box"]["n"] == expected
        assert ("ADCC" in entry["measures"]) == (name != "scorecam")
        assert entry["measures_common"]["AD soft 100"]["n"] == 3
    assert (report["methods"]["ttame"]["forward_passes"], report["methods"]["ttame"]["backward_passes"]) == (1, 0)
    assert (report["methods"]["gradcam"]["forward_passes"], report["methods"]["gradcam"]["backward_passes"]) == (1, 1)
    assert json.loads((output / "report.json").read_text()) == report
    assert not [path for path in output.iterdir() if path.name.startswith((".", "part-"))]
    for file in ("road.png", "insertion_deletion.png", "latency.png", "contact_sheet.jpg"):
        with Image.open(output / file) as picture:
            assert min(picture.size) > 100
    assert str(output.parent.parent) not in (output / "report.json").read_text()  # no path of this machine


def test_trivial_maps_score_as_they_must(finished: tuple[Path, dict]) -> None:
    measures = finished[1]["methods"]
    ones = measures["ones"]["measures"]
    # The picture itself: no drop, no increase, all of the mask; no order, no place.
    assert (ones["AD soft 100"]["mean"], ones["IC soft 100"]["mean"], ones["mean mask"]["mean"]) == (0, 0, 1)
    assert ones["entropy"]["mean"] == pytest.approx(1)
    assert ones["area"]["mean"] == 1
    assert ones["ADCC"]["mean"] == 0
    blob, own = measures["random-blob"]["measures"], measures["ttame"]["measures"]
    assert blob["mean mask"]["mean"] == pytest.approx(own["mean mask"]["mean"], abs=0.02)  # up to the resizing
    assert ones["grid pointing"]["mean"] == pytest.approx(25)
    assert measures["gaussian"]["measures"]["grid pointing"]["mean"] == pytest.approx(25, abs=0.1)
    assert own["grid pointing"]["n"] == 1


def test_figures_are_those_of_the_rows(finished: tuple[Path, dict]) -> None:
    output, report = finished
    rows = read_rows(output / "per_image.parquet")
    values = [rows["image", index, "gradcam"]["AD binary 50"] for index in range(6)]
    interval = mean_interval(np.array(values))
    found = report["methods"]["gradcam"]["measures"]["AD binary 50"]
    assert (found["mean"], found["low"], found["high"]) == tuple(round(v, 4) for v in interval[:3])
    own = [rows["image", index, "ttame"]["AD binary 50"] for index in range(6)]
    difference = report["differences"]["gradcam"]["AD binary 50"]
    assert difference["mean"] == pytest.approx(np.mean(np.array(own) - np.array(values)), abs=1e-3)
    assert {row["target"] for key, row in rows.items() if key[1] == 0 and key[0] == "image"} == {
        rows["image", 0, "ttame"]["target"]
    }


def test_a_killed_run_continues_and_measures_nothing_twice(
    pictures: Path, model: TTameModel, finished: tuple[Path, dict], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "killed"
    short = plan(pictures, metrics=("confidence", "mosaic"))
    measured: list[tuple[str, tuple[int, ...]]] = []
    real = module.measure_batch

    def until_the_kill(model, method, batch, *rest):
        if len(measured) == 7:
            raise KeyboardInterrupt
        measured.append((method.name, tuple(batch.indices.tolist())))
        return real(model, method, batch, *rest)

    monkeypatch.setattr(evaluation_rows, "_FLUSH_SECONDS", -1)  # every result is written at once
    monkeypatch.setattr(module, "write_report", lambda *_: {"methods": {}})  # drawn by other tests
    monkeypatch.setattr(module, "measure_batch", until_the_kill)
    with pytest.raises(KeyboardInterrupt):
        compare(model, short, output, progress=False)
    assert not (output / "report.json").exists()
    first = list(measured)

    def noting(model, method, batch, *rest):
        measured.append((method.name, tuple(batch.indices.tolist())))
        return real(model, method, batch, *rest)

    monkeypatch.setattr(module, "measure_batch", noting)
    compare(model, short, output, progress=False)
    jobs = [(name, index) for name, indices in measured for index in indices]
    assert len(jobs) == len(set(jobs))
    assert len(first) == 7
    found, whole = rows_without_time(output), rows_without_time(finished[0])
    assert same_rows(found, {key: {name: row[name] for name in found[key]} for key, row in whole.items()})
    # Once more: nothing is left to do. Then one method and one image more: only they are measured.
    count = len(measured)
    compare(model, plan(pictures, methods=("layercam",), metrics=("confidence",), limit=7), output, progress=False)
    assert {name for name, _ in measured[count:]} == {"ttame", "layercam", *TRIVIAL}
    assert [indices for name, indices in measured[count:] if name == "ttame"] == [(6,)]


def test_every_map_is_foretold_shown_and_kept(
    pictures: Path,
    model: TTameModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    bars: list[PassBar] = []
    foretold: list[int] = []

    class Kept(PassBar):
        def __init__(self, backbone: nn.Module, total: int, *rest) -> None:
            super().__init__(backbone, total, *rest)
            bars.append(self)
            foretold.append(total)

    parts: list[int] = []
    real = module.measure_batch

    def until_the_kill(model, method, batch, *rest):
        if len(parts) == 3:
            raise KeyboardInterrupt
        parts.append(len(batch.indices))
        return real(model, method, batch, *rest)

    monkeypatch.setattr(module, "PassBar", Kept)
    monkeypatch.setattr(module, "write_report", lambda *_: {"methods": {}})  # drawn by other tests
    monkeypatch.setattr(module, "_PART_SECONDS", 0)  # every image takes long
    monkeypatch.setattr(module, "measure_batch", until_the_kill)
    methods = ("gradcam", "scorecam", "ablationcam", "occlusion", "integrated-gradients", "rise")
    wanted = plan(pictures, methods=methods, limit=4, slow_limit=1, mosaics=None)
    with pytest.raises(KeyboardInterrupt):
        compare(model, wanted, tmp_path)
    assert parts == [1, 1, 1]
    kept = [key for part in tmp_path.glob("part-*.parquet") for key in read_rows(part)]
    assert len(kept) == 3, "kept, though no half minute has passed"
    monkeypatch.setattr(module, "measure_batch", real)
    compare(model, wanted, tmp_path)
    shown = capsys.readouterr().err
    assert "scan: 100%" in shown
    assert "pass/s" in shown
    assert bars[1].count == bars[1].bar.n == bars[1].bar.total
    assert foretold[1] == pytest.approx(bars[1].count, rel=0.2)
    assert foretold[1] < foretold[0]


def test_parts_grow_where_more_images_take_no_longer(model: TTameModel, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("hf_ttame.passes.time.monotonic", lambda: clock[0])
    images = torch.randn(1, 3, 64, 64)
    with PassBar(model.backbone, 100, 80.0, disable=True) as bar, torch.no_grad():  # a cold start: 80 s for one pass

        def step(count: int, seconds: float) -> None:
            with bar.step("", count):
                model.classify(images.expand(count, -1, -1, -1))
                clock[0] += seconds

        assert bar.images_in(15, 10) == 1
        for count, room in ((10, 2), (20, 4), (40, 8), (80, 16)):  # always the same second
            step(count, 1.0)
            assert bar.images_in(15, 10) == room
        step(160, 12.0)
        assert bar.images_in(15, 10) == 20, "what took 12 s of 15 may grow by a quarter"
        step(200, 30.0)
        assert bar.images_in(15, 10) == 10, "what took 30 s is halved"


def test_a_report_without_mosaics_says_why(finished: tuple[Path, dict]) -> None:
    asked = {**finished[1], "mosaics": 0}
    assert "No mosaic was made: too few images of four different classes" in to_markdown(asked)
    assert "No mosaic" not in to_markdown(finished[1])
    not_asked = {**asked, "settings": {**asked["settings"], "metrics": ["confidence"]}}
    assert "No mosaic" not in to_markdown(not_asked)


def test_mosaics_follow_the_limit(pictures: Path) -> None:
    for limit, mosaics, most in ((4, None, 4), (500, None, 100), (None, None, 100), (4, 50, 50), (4, 0, 0)):
        assert plan(pictures, limit=limit, mosaics=mosaics).most_mosaics == most


def test_results_of_another_run_are_not_mixed(
    pictures: Path, model: TTameModel, finished: tuple[Path, dict], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=r"seed \(0 there, 1 here\)"):
        compare(model, plan(pictures, seed=1), finished[0], progress=False)
    backbone = copy.deepcopy(model.backbone)
    torch.nn.init.ones_(next(backbone.parameters()))
    other = TTameModel.from_backbone(backbone)
    with pytest.raises(ValueError, match="backbone_fingerprint"):
        compare(other, plan(pictures), finished[0], progress=False)
    monkeypatch.setattr(model.image_processor, "do_center_crop", not model.image_processor.do_center_crop)
    with pytest.raises(ValueError, match="different: processor"):
        compare(model, plan(pictures), finished[0], progress=False)


def test_another_dataset_of_the_same_name_is_refused(
    pictures: Path, model: TTameModel, finished: tuple[Path, dict], tmp_path: Path, photo: Callable[..., Image.Image]
) -> None:
    other = Path(shutil.copytree(pictures, tmp_path / pictures.name))
    assert compare(model, plan(other), finished[0], progress=False)["images"] == 6, "a copy is the same"
    rows = datasets.Dataset.from_parquet(str(other / "validation-0.parquet"), cache_dir=str(tmp_path / "cache"))
    rows.select(range(1, 10)).to_parquet(str(other / "validation-0.parquet"))
    with pytest.raises(ValueError, match="identity"):
        compare(model, plan(other), finished[0], progress=False)


def test_no_output_among_the_pictures(pictures: Path, model: TTameModel) -> None:
    with pytest.raises(ValueError, match="lies among the pictures"):
        compare(model, plan(pictures), pictures / "out", progress=False)
    assert not (pictures / "out").exists()


def test_a_hub_dataset_is_the_one_of_the_beginning(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Hub cannot be reached, or moved on: the run goes on with the commit that it began with."""
    hub = Plan("org/pictures")
    monkeypatch.setattr(module, "dataset_commit", lambda name, revision: "a" * 40)
    assert module._identity(hub, tmp_path) == "a" * 40
    (tmp_path / "settings.json").write_text(json.dumps({"identity": "a" * 40}))
    monkeypatch.setattr(module, "dataset_commit", lambda name, revision: None)
    assert module._identity(hub, tmp_path) == "a" * 40
    assert len(module._identity(plan(pictures), tmp_path) or "") == 32, "files are looked at again"


def test_a_wrong_split_leaves_no_trace(pictures: Path, model: TTameModel, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no split 'valdation'"):
        compare(model, plan(pictures, split="valdation"), tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_mosaics_are_measured_once_and_go_on(
    pictures: Path, model: TTameModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that grew has the figures of one that was as large from the beginning."""
    measured: list[tuple[str, int]] = []
    real = module.measure_mosaic

    def noted(model, method, number, *rest):
        measured.append((method.name, number))
        return real(model, method, number, *rest)

    monkeypatch.setattr(module, "measure_mosaic", noted)
    settings = {"metrics": ("confidence", "mosaic"), "methods": ("gradcam", "scorecam")}
    compare(model, plan(pictures, limit=6, mosaics=1, **settings), tmp_path / "grown", progress=False)
    assert {number for _, number in measured} == {0}
    assert "scorecam" not in dict(measured), "slow methods have a number of their own"
    grown = plan(pictures, limit=10, mosaics=5, slow_mosaics=1, **settings)
    report = compare(model, grown, tmp_path / "grown", progress=False)
    kept = [entry for entry in measured if entry[0] not in ("class-mean", "other-image")]  # borrowed from more images
    assert len(kept) == len(set(kept))
    compare(model, grown, tmp_path / "at-once", progress=False)
    assert same_rows(rows_without_time(tmp_path / "grown"), rows_without_time(tmp_path / "at-once"))
    rows = read_rows(tmp_path / "grown" / "per_image.parquet")
    found = [rows["mosaic", number, "gradcam"]["grid pointing"] for number in range(report["mosaics"])]
    assert report["methods"]["gradcam"]["measures"]["grid pointing"]["mean"] == pytest.approx(np.mean(found), abs=1e-3)


def test_times_are_taken_in_turn_and_kept(
    pictures: Path, model: TTameModel, finished: tuple[Path, dict], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entries = finished[1]["methods"]
    assert entries["ttame"]["times_ttame"] == 1
    assert entries["scorecam"]["times_ttame"] > 5
    assert entries["scorecam"]["rounds"] == 3
    assert entries["gradcam"]["rounds"] == 12
    least, most = entries["scorecam"]["times_ttame_range"]
    assert least <= entries["scorecam"]["times_ttame"] <= most
    output = Path(shutil.copytree(finished[0], tmp_path / "run"))
    report = compare(model, plan(pictures), output, progress=False)
    assert {name: entry["ms_per_map"] for name, entry in report["methods"].items()} == {
        name: entry["ms_per_map"] for name, entry in entries.items()
    }
    times = json.loads((output / "latency.json").read_text())
    times["methods"]["gradcam"] |= {"layer": "another", "ms_per_map": -1}
    (output / "latency.json").write_text(json.dumps(times))
    assert compare(model, plan(pictures), output, progress=False)["methods"]["gradcam"]["ms_per_map"] > 0
    monkeypatch.setattr(module, "environment", lambda *_: {**finished[1]["environment"], "processor": "another"})
    again = compare(model, plan(pictures), output, progress=False)
    assert again["methods"]["scorecam"]["ms_per_map"] != entries["scorecam"]["ms_per_map"]
    other = copy.deepcopy(model)
    torch.nn.init.normal_(other.head.fuser.weight)
    fresh = compare(other, plan(pictures), output, progress=False)
    assert fresh["methods"]["scorecam"]["ms_per_map"] != again["methods"]["scorecam"]["ms_per_map"], "ratios are to it"


def test_two_processes_share_the_work(pictures: Path, tmp_path: Path, vit_folder: Path) -> None:
    explainer = tmp_path / "explainer"
    TTameModel.from_backbone(vit_folder).save_pretrained(explainer)
    arguments = [
        "-m", "hf_ttame.cli", "compare", str(explainer), "--dataset", str(pictures), "--methods", "rollout,ones",
        "--metrics", "confidence", "--limit", "7", "--batch-size", "2",
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}
    output = tmp_path / "by-two"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*launch, *arguments, "--output", str(output)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert not list(output.glob("part-*"))
    alone = tmp_path / "alone"
    same = Plan(str(pictures), methods=("rollout", "ones"), metrics=("confidence",), limit=7, batch_size=2)
    compare(TTameModel.from_pretrained(explainer), same, alone, progress=False)
    rows = rows_without_time(output)
    assert len(rows) == 7 * (3 + len(TRIVIAL) - 1)  # ttame, rollout, and the trivial maps, which are always there
    assert same_rows(rows, rows_without_time(alone))


def test_only_the_rows_that_are_asked_for(pictures: Path, model: TTameModel) -> None:
    selected = Images(plan(pictures, where="number%3==1"), model)
    assert sum(len(batch.indices) for batch in selected.batches(None)) == 3
    assert parse_where("label % 5 == 0") == ("label", 5, 0)
    for bad in ("label", "label%5", "label%x==0", "label%0==0"):
        with pytest.raises(ValueError, match="--where"):
            parse_where(bad)
    with pytest.raises(ValueError, match="the columns: image, number"):
        list(Images(plan(pictures, where="nothing%3==1"), model).batches(None))


def test_boxes_are_moved_into_the_input(model: TTameModel, photo: Callable[..., Image.Image], tmp_path: Path) -> None:
    # 128 x 128 pictures are halved and cropped to 64 (timm's crop of 0.95 to 1.0): a box over everything holds all.
    everything = {"image": [photo(128, 128)], "box": [[0, 0, 128, 128]]}
    folder = tmp_path / "boxes"
    folder.mkdir()
    datasets.Dataset.from_dict(everything, features=datasets.Features(
        {"image": datasets.Image(), "box": datasets.List(datasets.Value("int64"))}
    )).to_parquet(str(folder / "validation-0.parquet"))  # fmt: skip
    (batch,) = Images(Plan(str(folder), box_column="box"), model).batches(None)
    half = torch.zeros(1, 64, 64)
    half[:, :, :32] = 1.0
    asked = Plan(str(folder), box_column="box")

    def measured(cell: object, shown: torch.Tensor = half) -> tuple[float, float, int]:
        batch.marks = [cell]
        found = _inside_regions(model, batch, shown, asked)
        return found["pointing game"].item(), found["energy in box"].item(), int(found["bad marks"].item())

    assert measured([0, 0, 128, 128])[1:] == (pytest.approx(100), 0)
    left, right = [0, 0, 64, 128], [64, 0, 128, 128]
    assert measured(left) == (100, pytest.approx(100), 0)
    assert measured(left, 1 - half)[0] == 0
    assert measured([right, left])[:2] == (100, pytest.approx(100)), "several boxes are one region"
    assert measured([left, [64, 0, 64, 128], right, ["x"]])[1:] == (pytest.approx(100), 2), "bad ones are counted"
    assert measured([left] * 4)[1] == pytest.approx(100), "four boxes are not one"
    assert measured([None, left])[1:] == (pytest.approx(100), 1)
    for nothing, bad in ((None, 0), ([], 0), ([[9, 9, 3, 3]], 1), ([500, 500, 600, 600], 0), (7, 1), ("box", 1)):
        found = measured(nothing)
        assert np.isnan(found[:2]).all()
        assert found[2] == bad


def test_masks_are_moved_into_the_input(model: TTameModel, photo: Callable[..., Image.Image], tmp_path: Path) -> None:
    folder = tmp_path / "masks"
    folder.mkdir()
    small, whole = Image.new("L", (32, 32)), Image.new("P", (128, 128), 1)
    small.paste(255, (0, 0, 16, 32))  # a quarter of the picture's size, its left half
    cells = [{"bytes": save(picture)} for picture in (small, whole, Image.new("1", (128, 128)))]
    cells += [{"bytes": b"nothing"}, None]
    datasets.Dataset.from_dict({"image": [photo(128, 128, seed=n) for n in range(5)], "mask": cells}).cast(
        datasets.Features({"image": datasets.Image(), "mask": datasets.Image()})
    ).to_parquet(str(folder / "validation-0.parquet"))
    asked = Plan(str(folder), mask_column="mask", methods=("ones",), metrics=("confidence",))
    (batch,) = Images(asked, model).batches(None)
    half = torch.zeros(5, 64, 64)
    half[:, :, :32] = 1.0
    found = _inside_regions(model, batch, half, asked)
    assert found["energy in box"][:2].tolist() == pytest.approx([100, 100], abs=4)
    assert found["energy in box"][2:].isnan().all(), "empty, damaged, missing"
    assert found["bad marks"].tolist() == [0, 0, 0, 1, 0]
    assert _inside_regions(model, batch, 1 - half, asked)["energy in box"][0] < 4
    report = compare(model, asked, tmp_path / "out", progress=False)
    assert report["bad_marks"] == 1
    assert report["methods"]["ttame"]["measures"]["energy in box"]["n"] == 2
    assert "; 1 boxes or masks could not be read" in (tmp_path / "out/report.md").read_text()
    with pytest.raises(ValueError, match="no column 'musk'; its columns: image, mask"):
        Images(Plan(str(folder), mask_column="musk"), model)
    with pytest.raises(ValueError, match="box_column or mask_column"):
        Plan(str(folder), mask_column="mask", box_column="mask")


def test_boxes_and_masks_of_a_wide_picture_agree(model: TTameModel) -> None:
    """A picture of 200 x 100, of which the crop leaves the middle; the object is off its centre."""
    placement = model._placement((200, 100))
    box = (75, 20, 90, 55)
    drawn = Image.new("LA", (200, 100), (0, 255))
    drawn.paste((255, 255), box)
    small = drawn.convert("L").resize((100, 50), Image.Resampling.NEAREST)
    expected = region_of_boxes([box], placement, (64, 64))
    assert expected is not None
    rows, columns = expected.any(dim=1).nonzero()[:, 0], expected.any(dim=0).nonzero()[:, 0]
    assert 0.05 < expected.float().mean() < 0.2
    assert rows.float().mean() < 26, "it lies above the middle, and left of it"
    assert columns.float().mean() < 22
    for mask in (drawn, small):
        found = region_of_mask(read_mask({"bytes": save(mask)}), placement, (200, 100), (64, 64))
        assert found is not None
        assert (found != expected).float().mean() < 0.02
    turned = drawn.convert("L").transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees clockwise
    upright = read_mask(save(turned, exif=exif))
    assert np.array_equal(upright, read_mask(save(drawn)))
    with pytest.raises(ValueError, match="a mask of 100 x 200 pixels does not fit a picture of 200 x 100"):
        region_of_mask(read_mask(save(turned)), placement, (200, 100), (64, 64))


def save(picture: Image.Image, **options: object) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, "PNG", **options)
    return stream.getvalue()


def test_mosaics_have_four_classes_and_use_an_image_once() -> None:
    targets = torch.tensor([0, 0, 1, 2, 3, 3, 1, 2, 0, 4])
    tiles = torch.zeros(10, 1, 2, 2)
    scanned = Scan(torch.arange(10), targets, torch.ones(10), torch.zeros(10, 2, 2), tiles, torch.arange(10))
    groups = scanned.mosaics(5)
    assert len(groups) == 2
    assert len({row for group in groups for row in group}) == 8
    assert all(len({int(targets[row]) for row in group}) == 4 for group in groups)
    assert scanned.mosaics(1) == groups[:1]
    first = Scan(torch.arange(6), targets[:6], torch.ones(6), torch.zeros(6, 2, 2), tiles[:6], torch.arange(6))
    assert first.mosaics(5) == groups[:1], "of a run that grew they are still the same"


def test_maps_of_unreadable_pictures_are_not_lent() -> None:
    maps = torch.tensor([1.0, 2.0, 3.0])[:, None, None].expand(3, 2, 2)
    targets = torch.tensor([5, 6, 7])
    nothing = torch.zeros(0, 1, 1, 1)
    bank = Scan(torch.tensor([0, 1, 4]), targets, torch.ones(3), maps, nothing, torch.zeros(0)).bank()
    x, readable = torch.zeros(3, 3, 2, 2), torch.tensor([0, 1, 4])  # positions 2 and 3 could not be read
    assert bank.another_image(readable)(x, targets)[:, 0, 0].tolist() == [3.0, 3.0, 2.0]
    assert bank.class_mean(readable)(x, targets)[:, 0, 0].tolist() == [2.5, 2.0, 1.5]


def test_unreadable_pictures_are_left_out_and_two_are_needed(
    model: TTameModel, photo: Callable[..., Image.Image], tmp_path: Path
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    for number in range(3):
        photo(seed=number).save(folder / f"{number}.png")
    (folder / "broken.jpg").write_bytes(b"nothing")
    report = compare(
        model,
        Plan(str(folder), methods=("ones",), metrics=("confidence",), batch_size=2),
        tmp_path / "out",
        progress=False,
    )
    assert (report["images"], report["unreadable"]) == (3, 1)
    assert [image["file"] for image in report["unreadable_images"]] == ["broken.jpg"]
    assert str(tmp_path) not in (tmp_path / "out" / "report.json").read_text()
    assert (
        "3 images of a local folder validation, predicted class, the same for all methods; 1 more could not"
        in (tmp_path / "out" / "report.md").read_text()
    )
    for number in (1, 2):
        (folder / f"{number}.png").unlink()
    with pytest.raises(ValueError, match=r"at least 2 readable images are needed, got 1 of .*; 1 could not be read"):
        compare(model, Plan(str(folder), methods=("ones",)), tmp_path / "other", progress=False)


@pytest.mark.parametrize("path", ["wards\\west\\b.jpg", "wards/west/b.jpg", "b.jpg", None])
def test_of_an_unreadable_picture_the_file_s_name_alone_is_kept(
    path: str | None, model: TTameModel, photo: Callable[..., Image.Image], tmp_path: Path
) -> None:
    cells = [{"bytes": save(photo(seed=n)), "path": None} for n in range(2)] + [{"bytes": b"nothing", "path": path}]
    table = datasets.Dataset.from_dict({"image": cells}, features=datasets.Features({"image": datasets.Image()}))
    folder = tmp_path / "rows"
    folder.mkdir()
    table.to_parquet(str(folder / "validation-0.parquet"))
    images = Images(Plan(str(folder), batch_size=2), model)
    assert [batch.indices.tolist() for batch in images.batches(None)] == [[0, 1]]
    assert images.unreadable == {2: "b.jpg" if path else ""}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metrics": ("speed",)}, "metrics must be of"),
        ({"metrics": ()}, "metrics must be of"),
        ({"limit": 0}, "limit must be at least 1"),
        ({"batch_size": 0}, "batch_size"),
        ({"mosaics": -1}, "mosaics"),
        ({"metrics": ("road",)}, "with the metric confidence"),  # it has a column of boxes
    ],
)
def test_plans_are_checked(changes: dict, message: str, pictures: Path) -> None:
    with pytest.raises(ValueError, match=message):
        plan(pictures, **changes)


def test_rows_survive_writing_and_damage_is_named(tmp_path: Path) -> None:
    rows = {("image", 3, "b"): {"x": 1.5, "curve": [1.0, 2.0]}, ("mosaic", 0, "a"): {"y": 2.0}}
    write_rows(tmp_path / "part-0000-1.parquet", rows)
    assert Store(tmp_path, "head").earlier == rows
    (tmp_path / "part-0000-2.parquet").write_bytes(b"half a file")
    with pytest.raises(ValueError, match=r"part-0000-2\.parquet is damaged"):
        Store(tmp_path, "head")


def test_a_new_head_measures_only_its_own_rows_and_the_old_ones_are_kept(
    pictures: Path, model: TTameModel, finished: tuple[Path, dict], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "run"
    shutil.copytree(finished[0], output)
    real, measured = module.measure_batch, []

    def noted(model, method, *rest):
        measured.append(method.name)
        return real(model, method, *rest)

    monkeypatch.setattr(module, "measure_batch", noted)
    other = copy.deepcopy(model)
    torch.nn.init.normal_(other.head.fuser.weight, generator=torch.Generator().manual_seed(5))
    report = compare(other, plan(pictures), output, progress=False, contact_sheet=False)
    assert "contact_sheet.jpg" in finished[1]["pictures"].values()
    assert "contact_sheet.jpg" not in report["pictures"].values()
    assert set(measured) == {"ttame", *FROM_THE_HEAD}
    before, after = finished[1]["methods"], report["methods"]
    assert after["gradcam"]["measures"] == before["gradcam"]["measures"]
    assert after["ttame"]["measures"] != before["ttame"]["measures"]
    assert len(list(output.glob("per_image-*.parquet"))) == 1
    measured.clear()
    again = compare(model, plan(pictures), output, progress=False)["methods"]  # the old head again
    assert {name: entry["measures"] for name, entry in again.items()} == {
        name: entry["measures"] for name, entry in before.items()
    }
    assert not measured
    # A map that is scaled in another way is another map.
    other = copy.deepcopy(model)
    other.config.map_scaling = "logits"
    compare(other, plan(pictures), output, progress=False)
    assert "ttame" in measured


def test_passes_in_lower_precision_leave_everything_else_in_float32(
    pictures: Path, model: TTameModel, finished: tuple[Path, dict], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="precision must be one of float32, bfloat16"):
        plan(pictures, precision="int8")
    report = compare(model, plan(pictures, precision="bfloat16"), tmp_path / "lower", progress=False)
    assert report["environment"]["precision"] == "bfloat16"
    assert "in bfloat16" in (tmp_path / "lower" / "report.md").read_text()
    lower, exact = read_rows(tmp_path / "lower" / "per_image.parquet"), read_rows(finished[0] / "per_image.parquet")
    assert lower.keys() == exact.keys()
    p = np.array([[rows["image", index, "gradcam"]["p"] for index in range(6)] for rows in (lower, exact)])
    assert 0 < np.abs(p[0] - p[1]).max() < 0.05  # another precision, the same classifier
    with pytest.raises(ValueError, match="different: precision"):
        compare(model, plan(pictures), tmp_path / "lower", progress=False)


@pytest.mark.parametrize("backbone", ["timm_cnn", "timm_vit"])
def test_every_quick_method_runs_in_lower_precision(backbone: str, request: pytest.FixtureRequest) -> None:
    model = TTameModel.from_backbone(copy.deepcopy(request.getfixturevalue(backbone))).eval()
    x = torch.randn(2, 3, *model.config.image_size, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([0, 1])
    before = model(x, ids).map_logits
    for name in expand_names(["all"], model):
        if name in ("rise", "class-mean", "other-image", "random-blob"):
            continue  # thousands of passes; maps of other images
        with passes_in(model, "bfloat16"):
            maps = make_method(name, model).explain(x, ids)
        assert maps.dtype == torch.float32, name
        assert torch.isfinite(maps).all(), name
    assert torch.equal(model(x, ids).map_logits, before)


def test_verdicts_and_bold_figures() -> None:
    assert verdict({"low": -3, "high": -1, "n": FEWEST}, "lower") == "better"
    assert verdict({"low": -3, "high": -1, "n": FEWEST}, "higher") == "worse"
    assert verdict({"low": -1, "high": 1, "n": FEWEST}, "lower") == "open"
    assert verdict({"low": -3, "high": -1, "n": FEWEST - 1}, "lower") == "open", "too few to tell"
    assert verdict(None, "lower") == "not measured"
    means = {
        "ttame": {"m": {"mean": 2.0, "low": 1.0, "high": 3.0, "n": 9}},
        "other": {"m": {"mean": 4.0, "low": 3.0, "high": 5.0, "n": 9}},
        "ones": {"m": {"mean": 1.0, "low": 1.0, "high": 1.0, "n": 9}},
        "few": {"m": {"mean": 0.5, "low": 0.0, "high": 1.0, "n": 3}},
    }
    kinds = {"ttame": "one pass", "other": "gradient", "ones": "trivial", "few": "perturbation"}
    table = markdown_table(list(means), kinds, means, [Measure("m", "lower")])
    assert "| ttame | 9 | **2.0** (1.0 to 3.0) |" in table
    assert "| other | 9 | 4.0 (3.0 to 5.0) |" in table
    assert "| *ones* | 9 | 1.0† (1.0 to 1.0) |" in table
    assert "| few | 3 | 0.5 (0.0 to 1.0) |" in table, "three images do not beat nine"
    assert "| other | 9 | **4.0**" in markdown_table(list(means), kinds, means, [Measure("m", "higher")])


def test_summary_pairs_only_shared_images() -> None:
    rows = {("image", n, "ttame"): {"AD soft 100": float(n)} for n in range(4)}
    rows |= {("image", n, "slow"): {"AD soft 100": float(n) + 1} for n in range(2)}
    found = summarise(rows, ["ttame", "slow"])
    assert found["means"]["ttame"]["AD soft 100"] == {**mean_interval(np.arange(4.0))._asdict(), **{
        k: round(v, 4) for k, v in mean_interval(np.arange(4.0))._asdict().items()}}  # fmt: skip
    assert found["differences"]["slow"]["AD soft 100"] == {"mean": -1.0, "low": -1.0, "high": -1.0, "n": 2}
    assert found["common"]["ttame"]["AD soft 100"] == {"mean": 0.5, "low": 0.0, "high": 1.0, "n": 2}
    measure = next(m for m in FAITHFULNESS if m.name == "AD soft 100")
    assert np.isnan(columns_of(rows, ["slow"], measure)[3, 0])


def rows_by_confidence(images: int) -> dict:
    """The classifier is the surer of an image the larger its n; T-TAME is worse on the least sure third."""
    rows = {}
    for n in range(images):
        unsure = n < images // 3
        index = (7 * n) % images  # the images stand in another order than their confidence
        p = (n + 1) / (images + 1)
        rows["image", index, "ttame"] = {"p": p, "AD soft 100": 30.0 if unsure else 5.0, "mean mask": 0.5}
        rows["image", index, "gradcam"] = {"p": p, "AD soft 100": 20.0 + n % 2 if unsure else 9.0, "mean mask": 0.4}
        if n % 2:
            rows["image", index, "rise"] = {"p": p, "AD soft 100": 3.0, "mean mask": 0.3}
    return rows


def test_faithfulness_where_the_classifier_is_unsure() -> None:
    names = ["ttame", "gradcam", "rise"]
    found = by_confidence(rows_by_confidence(61), names)
    assert list(found) == ["least sure third", "the others"]
    unsure, sure = found.values()
    assert (unsure["images"], sure["images"]) == (20, 41)
    assert unsure["confidence"] == [round(1 / 62, 4), round(20 / 62, 4)]
    assert sure["confidence"] == [round(21 / 62, 4), round(61 / 62, 4)]
    assert unsure["measures"]["ttame"]["AD soft 100"] == {"mean": 30.0, "low": 30.0, "high": 30.0, "n": 20}
    assert unsure["measures"]["gradcam"]["AD soft 100"]["mean"] == 20.5
    assert sure["measures"]["ttame"]["AD soft 100"] == {"mean": 5.0, "low": 5.0, "high": 5.0, "n": 41}
    assert unsure["measures_common"]["ttame"]["AD soft 100"]["n"] == 10  # those that RISE saw
    assert unsure["differences"]["gradcam"]["AD soft 100"]["mean"] == 9.5
    assert unsure["verdicts"] == {"gradcam": {"AD soft 100": "worse"}, "rise": {"AD soft 100": "open"}}  # ten pairs
    assert sure["verdicts"] == {"gradcam": {"AD soft 100": "better"}, "rise": {"AD soft 100": "worse"}}
    assert by_confidence(rows_by_confidence(3 * FEWEST), names)
    assert by_confidence(rows_by_confidence(3 * FEWEST - 1), names) == {}
    # The first method's confidence counts, in whatever order the rows are; where it has none, another's.
    rows = rows_by_confidence(61)
    for key, row in rows.items():
        if key[2] != "ttame":
            row["p"] = 1 - row["p"]  # as if of another machine, only worse
    assert by_confidence(dict(reversed(rows.items())), names) == found
    rows = rows_by_confidence(61)
    for key, row in rows.items():
        if key[2] == "ttame":
            row["p"] = float("nan")
    assert by_confidence(rows, names) == found
    assert by_confidence(rows, ["ttame"]) == {}


def test_the_report_shows_where_the_classifier_is_unsure(tmp_path: Path) -> None:
    kinds = {"ttame": "one pass", "gradcam": "gradient", "rise": "perturbation"}
    methods = [Method(name, kind, lambda x, ids: x[:, 0]) for name, kind in kinds.items()]
    where = {"device": "cpu", "processor": "a CPU", "threads": 1, "precision": "float32", "copies per pass": 32}
    facts = {"model": "m", "data": "pictures", "images": 61, "mosaics": 0, "settings": {}, "environment": where}
    report = write_report(tmp_path, rows_by_confidence(61), methods, facts, {})
    assert json.loads((tmp_path / "report.json").read_text())["by_confidence"] == report["by_confidence"]
    page = (tmp_path / "report.md").read_text()
    section = page.split("## Where the classifier is unsure\n")[1].split("\n## ")[0]
    unsure, sure = section.split("### Least sure third: 20 images, confidence 0.02 to 0.32\n")[1].split(
        "### The others: 41 images, confidence 0.34 to 0.98\n"
    )
    assert "| ttame | 20 | 0.50 (0.50 to 0.50) | 30.0 (30.0 to 30.0) |" in unsure
    assert "| gradcam | 20 | 0.40 (0.40 to 0.40) | **20.5** (" in unsure
    assert "#### Least sure third, on the images that every method saw\n" in unsure
    assert "| ttame | 10 | 0.50 (0.50 to 0.50) | 30.0 (30.0 to 30.0) |" in unsure
    assert "| AD soft 100 |  | gradcam | rise |" in unsure
    assert "| AD soft 100 | gradcam | rise |  |" in sure
    few = write_report(tmp_path, rows_by_confidence(59), methods, facts, {})
    assert "by_confidence" not in few
    assert "Where the classifier is unsure" not in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize("times", [(61.0,), (61.0, 62.0, 70.0), (30.0, 400.0), (0.01, 300_000.0), (20.0, 900_000.0)])
def test_times_stand_on_an_axis_that_can_be_read(times: tuple[float, ...]) -> None:
    from matplotlib.figure import Figure

    axis = Figure().subplots()
    axis.plot(times, [1.0] * len(times), "o")
    _log_milliseconds(axis)
    low, high = axis.get_xlim()
    assert low < min(times) <= max(times) < high
    axis.figure.draw_without_rendering()
    shown = [
        label.get_text()
        for label, place in zip(axis.get_xticklabels(), axis.get_xticks(), strict=True)
        if low <= place <= high
    ]
    assert 2 <= len(shown) <= 10
    assert all(re.fullmatch(r"[\d,]+|0\.\d+", text) for text in shown), shown  # plain numbers
    assert not any(label.get_text() for label in axis.get_xticklabels(minor=True))  # nothing printed upon them


def test_curves_are_of_the_images_that_all_methods_have() -> None:
    rows = {("image", n, "ttame"): {"insertion black": [0.0, float(n)]} for n in range(4)}
    rows |= {("image", n, "slow"): {"insertion black": [0.0, 5.0]} for n in range(1, 3)}
    rows |= {("image", n, "other"): {"p": 1.0} for n in range(4)}
    curves, shared = _curves(rows, ["ttame", "slow", "other"], "insertion black")
    assert shared == {1, 2}
    assert {name: curve.tolist() for name, curve in curves.items()} == {"ttame": [0.0, 1.5], "slow": [0.0, 5.0]}
    assert _curves(rows, ["other"], "insertion black") == ({}, set())


def test_the_report_says_again_what_all_methods_have_on_the_same_images(finished: tuple[Path, dict]) -> None:
    """Of six images Score-CAM saw three."""
    report = (finished[0] / "report.md").read_text()
    again = report.split("### Faithfulness, on the images that every method saw")[1].split("##")[0]
    lines = [line for line in again.splitlines() if line.startswith("| ")][1:]
    assert {line.split("|")[2].strip() for line in lines} == {"3"}
    entry = finished[1]["methods"]["gradcam"]["measures_common"]["AD soft 50"]
    assert f"{entry['mean']:.1f}" in again
    assert f"({entry['low']:.1f} to {entry['high']:.1f})" in again


def test_a_row_of_another_layer_is_another_method(
    pictures: Path, model: TTameModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = plan(pictures, methods=("gradcam",), metrics=("confidence",))
    compare(model, asked, tmp_path, progress=False)
    measured = []
    real = module.measure_batch
    monkeypatch.setattr(
        module, "measure_batch", lambda m, method, *rest: measured.append(method.name) or real(m, method, *rest)
    )
    compare(model, asked, tmp_path, progress=False)
    assert not measured
    rows = read_rows(tmp_path / "per_image.parquet")
    layer = rows["image", 0, "gradcam"]["layer"]
    assert "torch" in rows["image", 0, "gradcam"]["versions"]
    for key, row in rows.items():
        if key[2] == "gradcam":
            row["layer"] = "conv1"  # what it read when the default was another
        row["versions"] = "torch 1.0"
    write_rows(tmp_path / "per_image.parquet", rows)
    report = compare(model, asked, tmp_path, progress=False)
    assert set(measured) == {"gradcam"}
    assert read_rows(tmp_path / "per_image.parquet")["image", 0, "gradcam"]["layer"] == layer
    assert len(report["measured_with"]) == 2
    assert "Measured with several sets of versions: " in (tmp_path / "report.md").read_text()
    # What is measured later of the same image leaves the versions of what was there.
    more = plan(pictures, methods=("gradcam",), metrics=("confidence", "adcc"))
    assert compare(model, more, tmp_path, progress=False)["measured_with"] == report["measured_with"]
    kept = read_rows(tmp_path / "per_image.parquet")["image", 0, "ones"]
    assert versions_of(kept) == report["measured_with"]


def test_another_map_size_is_another_head(pictures: Path, model: TTameModel, tmp_path: Path) -> None:
    asked = plan(pictures, methods=("ones",), metrics=("confidence",))
    before = compare(model, asked, tmp_path, progress=False)
    other = copy.deepcopy(model)
    other.config.map_size = (4, 4)
    other.head.map_size = (4, 4)
    after = compare(other, asked, tmp_path, progress=False)
    assert before["head_fingerprint"] == after["head_fingerprint"]
    assert before["methods"]["ttame"]["measures"] != after["methods"]["ttame"]["measures"]
    assert before["methods"]["ones"]["measures"] == after["methods"]["ones"]["measures"]


def test_slow_methods_are_asked_for_coherency_on_request(pictures: Path, model: TTameModel, tmp_path: Path) -> None:
    asked = plan(pictures, methods=("scorecam",), metrics=("confidence", "adcc"), slow_adcc=2)
    report = compare(model, asked, tmp_path, progress=False)
    assert report["methods"]["scorecam"]["measures"]["ADCC"]["n"] == 2
    assert report["methods"]["scorecam"]["measures"]["AD soft 50"]["n"] == 3
    assert report["methods"]["ttame"]["measures"]["ADCC"]["n"] == 6


def test_the_sheet_shows_the_first_of_each_class_that_all_methods_saw() -> None:
    scanned = Scan(torch.arange(8), torch.tensor([0, 0, 1, 2, 3, 4, 5, 6]), *[torch.zeros(8)] * 4)
    assert list(module.sheet_images(scanned, None)) == [0, 2, 3, 4, 5, 6]
    assert list(module.sheet_images(scanned, 3)) == [0, 1, 2]


def test_nothing_is_checked_or_written_for_a_run_that_is_refused(
    pictures: Path, model: TTameModel, finished: tuple[Path, dict], tmp_path: Path
) -> None:
    called: list[str] = []

    def sanity(_: Plan) -> dict:
        called.append("sanity")
        return {}

    with pytest.raises(ValueError, match="method 'gradcamm' is unknown"):
        compare(model, plan(pictures, methods=("gradcamm",)), tmp_path / "out", progress=False, sanity=sanity)
    wrong = plan(pictures, methods=("gradcam@nolayer",))
    with pytest.raises(ValueError, match="nolayer"):
        compare(model, wrong, tmp_path / "out", progress=False, sanity=sanity)
    with pytest.raises(ValueError, match="seed"):
        compare(model, plan(pictures, seed=1), finished[0], progress=False, sanity=sanity)
    assert not called
    assert not (tmp_path / "out").exists()


def test_tensorfloat_is_off_in_float32_and_what_the_user_chose_comes_back(model: TTameModel) -> None:
    convolutions = torch.backends.cudnn.conv
    chosen = convolutions.fp32_precision
    for before in ("tf32", "ieee"):
        convolutions.fp32_precision = before
        try:
            with passes_in(model, "bfloat16"), in_float32(model):
                assert convolutions.fp32_precision == "ieee"
            with passes_in(model, "float32"):
                assert convolutions.fp32_precision == "ieee"
            assert convolutions.fp32_precision == before
        finally:
            convolutions.fp32_precision = chosen


def test_a_map_that_is_not_finite_is_told_with_its_method(
    pictures: Path, model: TTameModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def made(name: str, *rest) -> Method:
        method = make_method(name, *rest)
        if name != "gradcam":
            return method
        return replace(method, explain=lambda x, ids: torch.full((len(x), 4, 4), torch.nan))

    monkeypatch.setattr(module, "make_method", made)
    with pytest.raises(ValueError, match=r"gradcam gives a map that is not finite for image [01];"):
        compare(model, plan(pictures), tmp_path, progress=False)


def test_ablation_cam_stays_in_float32(model: TTameModel) -> None:
    x = torch.randn(2, 3, *model.config.image_size, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([0, 1])
    exact = {name: make_method(name, model).explain(x, ids) for name in ("ablationcam", "gradcam")}
    with passes_in(model, "bfloat16"):
        assert torch.equal(make_method("ablationcam", model).explain(x, ids), exact["ablationcam"])
        assert not torch.equal(make_method("gradcam", model).explain(x, ids), exact["gradcam"])
    assert "forward" not in model.backbone.__dict__
