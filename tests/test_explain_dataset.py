"""Whole datasets: equal to the model's own maps, killed, resumed, by two processes, to and from a Hub, on bad input.

Runs that are killed or talk to a Hub are processes forked from a server that has imported everything once.
"""

import io
import json
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pyarrow
import pyarrow.parquet
import pytest
import torch
from conftest import make_timm
from hub_server import Hub, running_hub
from PIL import Image

from hf_ttame import TTameModel
from hf_ttame.dataset_input import UNKNOWN_ROWS, Unit, open_input
from hf_ttame.explain_dataset import MapPlan, explain_batch, explain_dataset
from hf_ttame.hub import check_contents, detect_kind, files_to_push
from hf_ttame.image_processing import preprocess

ROOT = Path(__file__).parents[1]
FILES = (21, 4, 35)  # rows
BROKEN = {3: "cut off", 30: "no picture"}
PICTURES = sum(FILES)


def picture(seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((90 - seed % 5, 70), Image.Resampling.BICUBIC)


def encoded(seed: int) -> bytes:
    file = io.BytesIO()
    picture(seed).save(file, "PNG")
    return {"cut off": file.getvalue()[:900], "no picture": b"words"}.get(BROKEN.get(seed, ""), file.getvalue())


@pytest.fixture(scope="module")
def explainer(vit_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("explainers") / "vit"
    TTameModel.from_backbone(vit_folder).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(explainer: Path) -> TTameModel:
    return TTameModel.from_pretrained(explainer).to(memory_format=torch.channels_last)


@pytest.fixture(scope="module")
def parquet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three files of unequal length, with two broken pictures."""
    folder = tmp_path_factory.mktemp("parquet")
    kinds = datasets.Features(
        image=datasets.Image(), label=datasets.ClassLabel(names=["a", "b"]), key=datasets.Value("string")
    )
    start = 0
    for number, rows in enumerate(FILES):
        seeds = range(start, start + rows)
        cells = {"image": [{"bytes": encoded(seed), "path": None} for seed in seeds], "label": [s % 2 for s in seeds]}
        part = datasets.Dataset.from_dict({**cells, "key": [f"k{seed}" for seed in seeds]}, features=kinds)
        part.to_parquet(str(folder / f"train-{number}.parquet"), batch_size=10)
        start += rows
    return folder


SMALL = {"rows_per_file": 8, "batch_size": 3, "workers": 0}


@pytest.fixture(scope="module")
def whole(model: TTameModel, parquet: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of one process, its pictures prepared by two workers."""
    out = tmp_path_factory.mktemp("maps") / "whole"
    plan = MapPlan(str(parquet), id_column="key", keep_columns=("label",), **{**SMALL, "workers": 2})
    assert explain_dataset(model, plan, out, progress=False)
    return out


def rows(out: Path) -> list[dict[str, Any]]:
    """All rows in the order of the files; no id twice."""
    files = sorted((out / "data").glob("*.parquet"))
    found = [row for file in files for row in pyarrow.parquet.read_table(file).to_pylist()]
    assert len({(row["id"], row["class_id"]) for row in found}) == len(found)
    return found


def assert_same(a: Path, b: Path) -> None:
    assert rows(a) == rows(b)
    assert {file.name for file in (a / "data").iterdir()} == {file.name for file in (b / "data").iterdir()}
    one, other = (json.loads((out / "report.json").read_text()) for out in (a, b))
    assert one == {**other, "bytes": one["bytes"]}


def own(model: TTameModel, seed: int, class_ids: Any = None) -> tuple[Any, np.ndarray]:
    with torch.no_grad():
        output = model(preprocess(model.image_processor, [picture(seed)]), class_ids)
    maps = model.scale_maps(output.map_logits) * 255
    return output, maps[0].numpy()


# ---- what is written ------------------------------------------------------------------------------------------------


def test_maps_are_the_models_own(model: TTameModel, whole: Path) -> None:
    found = rows(whole)
    assert [row["id"] for row in found] == [seed for seed in range(PICTURES) if seed not in BROKEN]
    assert len({row["class_id"] for row in found}) > 1
    for row in found:
        output, maps = own(model, row["id"])
        class_id = int(output.class_ids)
        assert (row["class_id"], row["predicted"], row["label"]) == (
            class_id,
            class_id,
            model.config.id2label[class_id],
        )
        assert row["score"] == pytest.approx(float(output.logits.softmax(dim=1).max()), abs=1e-5)
        assert np.abs(np.array(row["map"]) - maps[0]).max() <= 0.51
        assert (row["key"], row["input_label"]) == (f"k{row['id']}", row["id"] % 2)


def test_bad_pictures_are_counted_and_listed(whole: Path) -> None:
    report = json.loads((whole / "report.json").read_text())
    assert (report["pictures"], report["rows"], report["unreadable"]) == (PICTURES - 2, PICTURES - 2, 2)
    assert [(entry["id"], entry["key"]) for entry in report["unreadable_pictures"]] == [(3, "k3"), (30, "k30")]
    assert report["unreadable_pictures"][1]["reason"] == "picture of 5 bytes cannot be read: no picture format"
    # 21, 4 and 35 rows in files of 8; the last one of each input file says so.
    assert sorted(file.name for file in (whole / "data").iterdir()) == [
        *("maps-00000-00000.parquet", "maps-00000-00001.parquet", "maps-00000-00002-end.parquet"),
        "maps-00001-00000-end.parquet",
        *(f"maps-00002-0000{block}.parquet" for block in range(4)),
        "maps-00002-00004-end.parquet",
    ]


def test_datasets_and_pandas_read_it_back(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    expected = np.array([row["map"] for row in rows(whole)])
    files = str(whole / "data" / "*.parquet")
    loaded = datasets.load_dataset("parquet", data_files=files, split="train")
    assert loaded.features["map"] == datasets.Array2D((4, 4), "uint8")
    assert loaded.features["input_label"].names == ["a", "b"]
    numpy = loaded.with_format("numpy")
    assert isinstance(numpy[0]["map"], np.ndarray)
    assert np.array_equal(numpy[:]["map"], expected)
    by_card = datasets.load_dataset(str(whole), split="train", streaming=True).with_format("numpy")
    assert np.array_equal([row["map"] for row in by_card], expected)
    frame = pd.read_parquet(whole / "data", columns=["id", "label", "map"])
    assert np.array_equal([np.stack(maps) for maps in frame["map"]], expected)


def test_chosen_classes_and_overlays(model: TTameModel, parquet: Path, tmp_path: Path) -> None:
    file = str(parquet / "train-1.parquet")
    explain_dataset(model, MapPlan(file, top_k=2, overlays=True, **SMALL), tmp_path / "two", progress=False)
    explain_dataset(model, MapPlan(file, class_ids=("church", 0), **SMALL), tmp_path / "asked", progress=False)
    two = rows(tmp_path / "two")
    assert [row["id"] for row in two] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert all(first["score"] >= second["score"] for first, second in zip(two[::2], two[1::2], strict=True))
    assert all(first["class_id"] == row["predicted"] for first in two[::2] for row in two if row["id"] == first["id"])
    for row in two:
        with Image.open(io.BytesIO(row["overlay"]["bytes"])) as image:
            assert image.size == (64, 64)
    output, maps = own(model, FILES[0], torch.tensor([[3, 0]]))
    asked = rows(tmp_path / "asked")
    assert [row["class_id"] for row in asked] == [3, 0] * 4
    assert np.abs(np.array([row["map"] for row in asked[:2]]) - maps).max() <= 0.51
    assert asked[0]["score"] == pytest.approx(float(output.logits.softmax(dim=1)[0, 3]), abs=1e-5)


def test_every_positive_class_of_a_multi_label_classifier(tmp_path: Path) -> None:
    model = TTameModel.from_backbone(make_timm("test_resnet"), outputs="sigmoid")
    columns, _ = explain_batch(model, [picture(seed) for seed in range(6)])
    expected = model.explain([picture(seed) for seed in range(6)])
    assert [(e.image_index, e.class_id) for e in expected] == list(
        zip(columns["id"], columns["class_id"].tolist(), strict=True)
    )
    assert len(expected) > 6
    assert columns["map"].shape == (len(expected), *model.config.map_size)


def test_one_batch_for_an_engine_of_your_own(model: TTameModel, whole: Path) -> None:
    images: list[Any] = [encoded(0), encoded(3), {"bytes": encoded(1), "path": None}, picture(2)]
    columns, unreadable = explain_batch(model, images, ids=["a", "b", "c", "d"], overlays=True)
    expected = rows(whole)[:3]
    assert columns["id"] == ["a", "c", "d"]
    assert columns["label"] == [row["label"] for row in expected]
    assert columns["map"].dtype == np.uint8
    assert np.abs(columns["map"] - np.array([row["map"] for row in expected], dtype=float)).max() <= 1
    assert columns["score"].tolist() == pytest.approx([row["score"] for row in expected], abs=1e-5)
    assert [len(columns[name]) for name in ("predicted", "class_id", "overlay")] == [3, 3, 3]
    assert [(entry.id, "cannot be read" in entry.reason) for entry in unreadable] == [("b", True)]
    nothing, unreadable = explain_batch(model, [b"words"])
    assert (nothing["map"].shape, nothing["id"], len(unreadable)) == ((0, 4, 4), [], 1)
    with pytest.raises(ValueError, match="one id per image"):
        explain_batch(model, images, ids=[1])


def test_half_precision(explainer: Path, model: TTameModel) -> None:
    half = TTameModel.from_pretrained(explainer).to(torch.bfloat16)
    images = [picture(seed) for seed in range(4)]
    found, _ = explain_batch(half, images, class_ids=3)
    expected, _ = explain_batch(model, images, class_ids=3)
    assert found["score"] == pytest.approx(expected["score"], abs=0.05)
    assert np.abs(found["map"].astype(int) - expected["map"]).mean() < 12


# ---- sources --------------------------------------------------------------------------------------------------------


def test_folders_of_pictures_saved_datasets_and_tar_files(model: TTameModel, parquet: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    for seed, name in ((5, "b/two.png"), (3, "b/broken.png"), (4, "a/one.png"), (6, "c.png")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(encoded(seed))
    report = explain_dataset(
        model, MapPlan(str(folder), **{**SMALL, "rows_per_file": 2}), tmp_path / "a", progress=False
    )
    found = rows(tmp_path / "a")
    assert [(row["id"], row["file_name"]) for row in found] == [(0, "a/one.png"), (2, "b/two.png"), (3, "c.png")]
    assert np.abs(np.array(found[0]["map"]) - own(model, 4)[1][0]).max() <= 0.51
    assert report
    assert report["unreadable_pictures"][0]["key"] == "b/broken.png"
    assert str(tmp_path) not in json.dumps(report)
    unnamed = MapPlan(str(folder), id_column="", **SMALL)
    explain_dataset(model, unnamed, tmp_path / "unnamed", progress=False)
    assert "file_name" not in rows(tmp_path / "unnamed")[0]
    fewer = MapPlan(str(folder), **{**SMALL, "rows_per_file": 3})  # of pictures this changes the shards too
    with pytest.raises(ValueError, match=r"different: rows_per_file \(2 there, 3 here\); choose"):
        explain_dataset(model, fewer, tmp_path / "a", progress=False)

    saved = datasets.Dataset.from_parquet(str(parquet / "train-1.parquet"), cache_dir=str(tmp_path / "cache"))
    saved.save_to_disk(str(tmp_path / "saved"))
    explain_dataset(model, MapPlan(str(tmp_path / "saved"), **SMALL), tmp_path / "b", progress=False)
    assert [row["id"] for row in rows(tmp_path / "b")] == [0, 1, 2, 3]

    for number in range(2):
        with tarfile.open(tmp_path / f"train-{number}.tar", "w") as tar:
            for seed in range(3 + number):
                header = tarfile.TarInfo(f"{number}{seed}.png")
                content = encoded(10 * number + seed)
                header.size = len(content)
                tar.addfile(header, io.BytesIO(content))
    tars = tmp_path / "tars"
    tars.mkdir()
    for file in tmp_path.glob("*.tar"):
        file.rename(tars / file.name)
    plan = MapPlan(str(tars), id_column="__key__", **{**SMALL, "rows_per_file": 3})
    assert open_input(str(tars)).rows_of(0, 1) is None  # only reading tells
    explain_dataset(model, plan, tmp_path / "c", progress=False)
    found = rows(tmp_path / "c")
    assert [row["__key__"] for row in found] == ["00", "01", "02", "10", "11", "12", "13"]
    assert [row["id"] for row in found] == [0, 1, 2, *(UNKNOWN_ROWS + row for row in range(4))]


def test_processes_share_the_units_without_gap_or_overlap(parquet: Path) -> None:
    source = open_input(str(parquet), rows_per_file=8)
    everything = {batch.unit for batch in source.batches(3, 0, 1, set(), {})}
    for world in (2, 3, 4, 7):
        shares = [list(source.batches(3, rank, world, set(), {})) for rank in range(world)]
        units = [{batch.unit for batch in share} for share in shares]
        assert sum(map(len, units)) == len(everything)
        assert set().union(*units) == everything
        ids = sorted(i for share in shares for batch in share for i in batch.ids)
        assert ids == list(range(PICTURES))
        for rank, share in enumerate(shares):
            assert sum(batch.rows for batch in share) == source.rows_of(rank, world)
    done = {Unit(0, 0), Unit(0, 1), Unit(0, 2), Unit(2, 1)}
    left = list(source.batches(3, 0, 1, done, {0: 2}))
    assert {batch.unit for batch in left} == everything - done
    assert sum(batch.rows for batch in left) == source.rows_of(0, 1, done) == PICTURES - 21 - 8
    assert [batch.rows for batch in left if batch.unit == Unit(2, 4)] == [3]
    assert [(batch.closes, batch.ends_shard) for batch in left if batch.unit == Unit(2, 0)] == [
        (False, False),
        (False, False),
        (True, False),
    ]


# ---- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"rows_per_file": 9}, r"another run; different: rows_per_file \(8 there, 9 here\)"),
        ({"top_k": 2}, r"top_k \(None there, 2 here\)"),
        ({"class_ids": ("church",)}, r"class_ids \(None there, \[3\] here\)"),
        ({"keep_columns": ()}, "keep_columns"),
        ({"overlays": True}, "overlays"),
    ],
)
def test_a_resume_with_other_settings_is_refused(
    model: TTameModel, parquet: Path, whole: Path, changed: dict[str, Any], words: str
) -> None:
    before = rows(whole)
    settings = {**SMALL, "id_column": "key", "keep_columns": ("label",), **changed}
    with pytest.raises(ValueError, match=words):
        explain_dataset(model, MapPlan(str(parquet), **settings), whole, progress=False)
    assert rows(whole) == before


def test_another_explainer_or_dataset_is_refused(
    model: TTameModel, parquet: Path, whole: Path, tmp_path: Path, hf_vit: torch.nn.Module
) -> None:
    plan = MapPlan(str(parquet), id_column="key", keep_columns=("label",), **SMALL)
    other = TTameModel.from_pretrained(model.name_or_path)
    with torch.no_grad():
        other.head.fuser.bias.add_(1)
    with pytest.raises(ValueError, match="head_fingerprint"):
        explain_dataset(other, plan, whole, progress=False)
    grown = tmp_path / parquet.name
    grown.mkdir()
    for file in parquet.iterdir():
        (grown / file.name).write_bytes(file.read_bytes())
    (grown / "train-9.parquet").write_bytes((grown / "train-1.parquet").read_bytes())
    plan = MapPlan(str(grown), id_column="key", keep_columns=("label",), **SMALL)
    with pytest.raises(ValueError, match=r"rows \(60 there, 64 here\)"):
        explain_dataset(model, plan, whole, progress=False)


def test_a_changed_backbone_preprocessing_or_label_is_refused(model: TTameModel, parquet: Path, whole: Path) -> None:
    plan = MapPlan(str(parquet), id_column="key", keep_columns=("label",), **SMALL)

    def refused(change: Any, words: str) -> None:
        other = TTameModel.from_pretrained(model.name_or_path)
        change(other)
        with pytest.raises(ValueError, match=rf"another run; different: {words} \("):
            explain_dataset(other, plan, whole, progress=False)

    with torch.no_grad():
        refused(lambda other: next(other.backbone.parameters()).mul_(1.01), "backbone_fingerprint")
    refused(lambda other: setattr(other.image_processor, "resample", 0), "preprocessing")
    refused(lambda other: other.config.id2label.update({0: "another"}), "labels")
    explain_dataset(model, plan, whole, progress=False)  # and the same one is not


def test_a_replaced_picture_is_refused(model: TTameModel, tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for seed in range(2):
        (folder / f"{seed}.png").write_bytes(encoded(seed))
    explain_dataset(model, MapPlan(str(folder), **SMALL), tmp_path / "maps", progress=False)
    (folder / "1.png").write_bytes(encoded(8))
    with pytest.raises(ValueError, match=r"another run; different: files \("):
        explain_dataset(model, MapPlan(str(folder), **SMALL), tmp_path / "maps", progress=False)


def test_maps_never_land_among_the_pictures(model: TTameModel, tmp_path: Path) -> None:
    folder = tmp_path / "all" / "pictures"
    folder.mkdir(parents=True)
    (folder / "1.png").write_bytes(encoded(1))
    for out in (folder, folder / "maps", folder.parent):
        with pytest.raises(ValueError, match=r"overlap.*choose a folder for --out"):
            explain_dataset(model, MapPlan(str(folder), **SMALL), out, progress=False)
    assert [path.name for path in (tmp_path / "all").rglob("*")] == ["pictures", "1.png"]


def test_a_class_named_twice_is_explained_once(model: TTameModel) -> None:
    columns, _ = explain_batch(model, [picture(0)], class_ids=[3, 0, "church", "3"])
    assert columns["class_id"].tolist() == [3, 0]


def test_columns_that_would_get_one_name_are_refused(model: TTameModel, tmp_path: Path) -> None:
    cells = {"image": [encoded(0)], "label": [1], "input_label": [2]}
    pyarrow.parquet.write_table(pyarrow.table(cells), tmp_path / "x.parquet")
    plan = MapPlan(str(tmp_path / "x.parquet"), keep_columns=("label", "input_label"), **SMALL)
    with pytest.raises(ValueError, match="label, input_label would be named input_label"):
        explain_dataset(model, plan, tmp_path / "maps", progress=False)
    assert not (tmp_path / "maps").exists()


def test_a_damaged_or_short_file_is_named_and_made_again(model: TTameModel, parquet: Path, tmp_path: Path) -> None:
    plan = MapPlan(str(parquet / "train-0.parquet"), **SMALL)
    out = tmp_path / "maps"
    report = explain_dataset(model, plan, out, progress=False)
    (out / "report.json").unlink()
    file = out / "data" / "maps-00000-00001.parquet"
    whole = file.read_bytes()
    table = pyarrow.parquet.read_table(file)
    for content, words in ((b"", "damaged.*0 bytes"), (whole[:-9], "is damaged"), (None, "3 of 8 rows")):
        if content is None:
            footer = {**(table.schema.metadata or {}), b"ttame": b'{"read": 3, "unreadable": []}'}
            pyarrow.parquet.write_table(table.slice(0, 3).replace_schema_metadata(footer), file)
        else:
            file.write_bytes(content)
        with pytest.raises(ValueError, match=rf"(?s)maps-00000-00001.parquet' .*{words}.*delete it and run"):
            explain_dataset(model, plan, out, progress=False)
        assert not (out / "report.json").exists()
    file.unlink()
    assert explain_dataset(model, plan, out, progress=False) == report
    last = out / "data" / "maps-00000-00002-end.parquet"
    last.unlink()
    file.rename(file.with_name("maps-00000-00001-end.parquet"))  # the shard seems to end there
    with pytest.raises(ValueError, match="8 of 13 rows"):
        explain_dataset(model, plan, out, progress=False)


def test_bad_input_is_said_in_words(model: TTameModel, parquet: Path, tmp_path: Path) -> None:
    def run(
        error: type[Exception], words: str, dataset: Path = parquet, out: Path = tmp_path / "x", **more: Any
    ) -> None:
        with pytest.raises(error, match=words):
            explain_dataset(model, MapPlan(str(dataset), **{**SMALL, **more}), out, progress=False)
        assert not (out / "report.json").exists() if out.is_dir() else True

    run(ValueError, "image column 'photo' is not in the dataset; its columns: image, label, key", image_column="photo")
    run(ValueError, "the column 'label' holds int64, not pictures", image_column="label")
    run(ValueError, "no column nothing in the dataset", keep_columns=("nothing",))
    run(ValueError, "none of the 60 pictures could be read.*is 'key' the column", image_column="key")
    run(ValueError, "class 'church bell' is neither a label nor an id", class_ids=("church bell",))
    run(ValueError, r"top_k must lie in 1..7, got 8", top_k=8)
    run(ValueError, "the dataset '.*/missing' does not exist", dataset=tmp_path / "missing")
    (tmp_path / "empty").mkdir()
    run(ValueError, "holds neither", dataset=tmp_path / "empty")
    pyarrow.parquet.write_table(pyarrow.table({"image": pyarrow.array([], "binary")}), tmp_path / "none.parquet")
    run(ValueError, "is empty", dataset=tmp_path / "none.parquet")
    (tmp_path / "file").write_text("x")
    run(OSError, "cannot be written: .*; choose another --out", out=tmp_path / "file")
    for wrong in ({"batch_size": 0}, {"rows_per_file": 0}, {"workers": -1}, {"top_k": 1, "class_ids": (1,)}):
        with pytest.raises(ValueError, match=r"at least 1|not be negative|not both"):
            MapPlan("x", **wrong)


# ---- killed, resumed, to and from a Hub -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hub(parquet: Path) -> Iterator[Hub]:
    with running_hub() as running:
        running.put("org/pictures", {f"data/{f.name}": f.read_bytes() for f in sorted(parquet.iterdir())}, "datasets")
        folder = {f"train/{seed}.png": encoded(seed) for seed in range(4)}
        running.put("org/folder", folder, "datasets")
        yield running


@pytest.fixture(scope="module")
def server(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    before = dict(os.environ)
    forkserver._forkserver._stop()  # there is one per test process; this one has the Hub's address
    os.environ.clear()
    os.environ.update(hub.environment(tmp_path_factory.mktemp("home")))
    os.environ.update(ACCELERATE_USE_CPU="true", OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["hf_ttame.explain_dataset", "hf_ttame.hub", "accelerate"])
    yield context
    os.environ.clear()
    os.environ.update(before)
    forkserver._forkserver._stop()


def child(arguments: list[str], output: str, largest_file: int | None) -> None:
    from hf_ttame.cli import main

    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    if largest_file is not None:  # what a full disk does: writing fails in the middle of a file
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it for what it starts in the background
    torch.set_num_threads(1)
    sys.argv = ["ttame", *arguments]
    try:
        main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    else:
        code = 0
    sys.stdout.flush()
    os._exit(code)


def run(server: Any, out: Path, *arguments: object, largest_file: int | None = None) -> tuple[Any, Path]:
    text = out.with_suffix(".txt")
    process = server.Process(target=child, args=([str(a) for a in arguments], str(text), largest_file))
    process.start()
    return process, text


def finish(started: tuple[Any, Path], expect: int = 0) -> str:
    process, text = started
    process.join(120)
    assert process.exitcode == expect, text.read_text()
    return text.read_text()


def command(explainer: Path, parquet: Path, out: Path, *more: object) -> list[object]:
    small = ("--rows-per-file", 8, "--batch-size", 3, "--id-column", "key", "--keep-columns", "label")
    return ["explain-dataset", parquet, "--model", explainer, "--out", out, *small, *more]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)])
def test_stopped_in_the_middle_and_resumed(
    server: Any, explainer: Path, parquet: Path, whole: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    out = tmp_path / "maps"
    argv = command(explainer, parquet, out, "--workers", 1)
    started = run(server, out, *argv)
    deadline = time.monotonic() + 60
    while len(list(out.glob("data/maps-*.parquet"))) < 2:
        assert time.monotonic() < deadline
        assert started[0].is_alive(), started[1].read_text()
        time.sleep(0.001)
    os.kill(started[0].pid, number)
    text = finish(started, code)
    if number == signal.SIGINT:
        assert "interrupted; what is complete stands in" in text
    complete = {file.name: file.stat().st_mtime_ns for file in out.glob("data/maps-*.parquet")}
    assert 2 <= len(complete) < 9
    assert not (out / "report.json").exists()
    (out / "data" / ".maps-00002-00003.parquet.elsewhere-1.part").write_bytes(b"PAR1half a file")

    text = finish(run(server, out, *argv))
    assert f"{len(complete)} files are complete already" in text
    assert {name: (out / "data" / name).stat().st_mtime_ns for name in complete} == complete  # not done again
    assert_same(out, whole)


def test_a_full_disk_and_then_two_processes(
    server: Any, explainer: Path, parquet: Path, whole: Path, tmp_path: Path
) -> None:
    """Two processes of a real launch finish what one process began before the disk was full."""
    out = tmp_path / "maps"
    argv = command(explainer, parquet, out, "--workers", 0)
    largest = min(file.stat().st_size for file in (whole / "data").iterdir()) - 1
    text = finish(run(server, out, *argv, largest_file=largest), 1)
    assert "0 files are complete: make room and run the same command again" in text
    assert "Traceback" not in text
    assert list((out / "data").iterdir()) == []
    sizes = [file.stat().st_size for file in sorted((whole / "data").iterdir())]
    if sizes[0] < max(sizes):
        assert "make room" in finish(run(server, out, *argv, largest_file=max(sizes) - 1), 1)

    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*launch, "hf_ttame.explain_dataset", *map(str, argv[1:])],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert_same(out, whole)
    assert "this process has done its share" in done.stdout
    assert "58 pictures explained, 2 unreadable" in done.stdout


def test_from_a_hub_and_back(
    server: Any, hub: Hub, model: TTameModel, explainer: Path, whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "maps"
    text = finish(run(server, out, *command(explainer, Path("org/pictures"), out, "--workers", 1)))
    assert "58 pictures explained" in text
    settings = json.loads((out / "settings.json").read_text())
    assert settings["dataset"] == "org/pictures"
    assert settings["revision"] == hub.repository("org/pictures", "datasets").branches["main"]
    expected = [{**row, "id": None} for row in rows(whole)]
    assert [{**row, "id": None} for row in rows(out)] == expected
    assert rows(out)[21 - 1]["id"] == UNKNOWN_ROWS  # row 21, the first of the second file; row 3 is broken

    folder = tmp_path / "folder"
    finish(run(server, folder, "explain-dataset", "org/folder", "--model", explainer, "--out", folder, "--workers", 1))
    assert [row["map"] for row in rows(folder)] == [row["map"] for row in rows(whole)[:3]]
    fault = hub.fault("403", "GET /datasets/org/folder/resolve/.*png", times=99)
    lost = run(
        server, tmp_path / "lost", "explain-dataset", "org/folder", "--model", explainer, "--out", tmp_path / "lost"
    )
    text = finish(lost, 1)
    hub.reset()
    assert fault.hits
    assert "the dataset cannot be read on: " in text
    assert "Traceback" not in text
    assert not list((tmp_path / "lost" / "data").iterdir())  # pictures that could not be fetched are not bad ones

    text = finish(run(server, tmp_path / "push", "push", out, "org/maps"))
    sent = hub.files("org/maps", "datasets")
    assert sorted(sent) == sorted(
        ["README.md", "report.json", "settings.json", *(f"data/{f.name}" for f in (out / "data").iterdir())]
    )
    assert sent["data/maps-00001-00000-end.parquet"] == (out / "data" / "maps-00001-00000-end.parquet").read_bytes()


def test_pictures_and_their_names_are_not_pushed(model: TTameModel, parquet: Path, tmp_path: Path) -> None:
    plan = MapPlan(str(parquet / "train-1.parquet"), overlays=True, **SMALL)
    explain_dataset(model, plan, tmp_path / "overlays", progress=False)
    picture(1).save(tmp_path / "Smith.png")
    (tmp_path / "photos").mkdir()
    (tmp_path / "Smith.png").rename(tmp_path / "photos" / "Smith.png")
    explain_dataset(model, MapPlan(str(tmp_path / "photos"), **SMALL), tmp_path / "names", progress=False)
    for name, column in (("overlays", "overlay"), ("names", "file_name")):
        folder = tmp_path / name
        sent, _ = files_to_push(folder, detect_kind(folder))
        with pytest.raises(ValueError, match=rf"has the columns \['{column}'\]"):
            check_contents(folder, sent)
        check_contents(folder, sent, include_examples=True)
