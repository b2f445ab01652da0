"""Saving, publishing and loading, against a Hub on loopback with the real clients in fresh processes."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from conftest import make_timm, make_vit, vit_processor
from hub_contents import Evil, fill
from hub_server import TOKEN, running_hub
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModel, ViTForImageClassification
from typer.testing import CliRunner

from hf_ttame import TTameModel
from hf_ttame.cards import render_card, write_card
from hf_ttame.cli import app
from hf_ttame.evaluation_plan import Plan
from hf_ttame.hub import check_contents, detect_kind, files_to_push, push_folder
from hf_ttame.paths import check_path
from hf_ttame.pictures import open_stream
from hf_ttame.records import fingerprint_of_folder
from hf_ttame.saving import is_local_path, patiently, without_paths

ROOT = Path(__file__).parents[1]
HOME = "/".join(("", "home", "me"))  # an invented home folder


# ---- in this process, without a Hub ---------------------------------------------------------------------------------


@pytest.fixture
def vit(vit_folder):
    return TTameModel.from_backbone(vit_folder)


@pytest.fixture(scope="module")
def saved_once(vit_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    TTameModel.from_backbone(vit_folder).save_pretrained(folder)
    write_card(folder)
    return folder


@pytest.fixture
def saved(saved_once, tmp_path):
    """An explainer's folder with its card, the test's own."""
    return Path(shutil.copytree(saved_once, tmp_path / "saved"))


def test_another_architecture_of_as_many_classes_is_refused(vit, tmp_path):
    vit.save_pretrained(tmp_path, include_backbone=False)
    wide = ViTForImageClassification(type(vit.backbone.config)(**{**vit.backbone.config.to_dict(), "hidden_size": 32}))
    with pytest.raises(ValueError, match=r"the head reads 24 channels on a grid of \(4, 4\).*this backbone gives 32"):
        TTameModel.from_pretrained(tmp_path, backbone=wide)
    fine = ViTForImageClassification(type(vit.backbone.config)(**{**vit.backbone.config.to_dict(), "patch_size": 8}))
    with pytest.raises(ValueError, match=r"grid of \(4, 4\).*gives 24 on \(8, 8\)"):
        TTameModel.from_pretrained(tmp_path, backbone=fine)
    grey = ViTForImageClassification(type(vit.backbone.config)(**{**vit.backbone.config.to_dict(), "num_channels": 1}))
    with pytest.raises(ValueError, match=r"cannot take the head's input of \(3, 64, 64\)"):
        TTameModel.from_pretrained(tmp_path, backbone=grey)


def test_saving_after_an_override_names_the_backbone_in_use(vit, vit_folder, tmp_path):
    vit.config.backbone, vit.config.backbone_revision = "org/first", "a" * 40
    vit.save_pretrained(tmp_path / "first", include_backbone=False)
    with pytest.warns(UserWarning, match="are not those the head was trained on"):
        other = TTameModel.from_pretrained(tmp_path / "first", backbone=make_vit(seed=1))
    assert other.config.backbone is None
    assert other.config.backbone_revision is None
    assert other.config.backbone_fingerprint != vit.config.backbone_fingerprint
    other.save_pretrained(tmp_path / "second")
    again = TTameModel.from_pretrained(tmp_path / "second", strict=True)  # included, and its own fingerprint
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(again(x).logits, other(x).logits)
    assert not torch.equal(again(x).logits, vit(x).logits)
    # The same weights from another place are still the recorded ones.
    same = TTameModel.from_pretrained(tmp_path / "first", backbone=vit_folder)
    assert (same.config.backbone, same.config.backbone_revision) == ("org/first", "a" * 40)


def test_strict_in_another_dtype_and_without_a_record(vit, vit_folder, tmp_path):
    vit.save_pretrained(tmp_path / "x", include_backbone=False)
    same = TTameModel.from_pretrained(tmp_path / "x", backbone=vit_folder, strict=True, dtype=torch.bfloat16)
    assert {p.dtype for p in same.parameters()} == {torch.bfloat16}
    make_vit(seed=1).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="are not those the head was trained on"):
        TTameModel.from_pretrained(tmp_path / "x", backbone=tmp_path / "other", strict=True, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="is not known"):
        TTameModel.from_pretrained(tmp_path / "x", backbone=make_vit().to(torch.bfloat16), strict=True)
    config = json.loads((tmp_path / "x/config.json").read_text())
    (tmp_path / "x/config.json").write_text(
        json.dumps({**config, "backbone_fingerprint": None, "backbone_values": None})
    )
    with pytest.raises(ValueError, match=r"is not known \(recorded: None\)"):
        TTameModel.from_pretrained(tmp_path / "x", backbone=make_vit(), strict=True)
    with pytest.warns(UserWarning, match=r"is not known \(recorded: None\)"):
        TTameModel.from_pretrained(tmp_path / "x", backbone=make_vit())


def test_a_config_names_no_folder_and_no_path_as_revision(vit, vit_folder, tmp_path, monkeypatch):
    vit.config.backbone, vit.config.backbone_revision = "org/vit", "a" * 40
    vit.save_pretrained(tmp_path / "x", include_backbone=False)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(vit_folder, tmp_path / "org" / "vit")
    with pytest.raises(ValueError, match=r"Hub id 'org/vit', but the working directory holds a path"):
        TTameModel.from_pretrained(tmp_path / "x")
    shutil.rmtree(tmp_path / "org")
    config = json.loads((tmp_path / "x/config.json").read_text())
    for revision in ("../../escaped", "main"):
        (tmp_path / "x/config.json").write_text(json.dumps({**config, "backbone_revision": revision}))
        with pytest.raises(ValueError, match="must be a commit of 40 hex digits"):
            TTameModel.from_pretrained(tmp_path / "x")


def test_a_processors_own_code_is_never_asked_for(saved, monkeypatch):
    facts = json.loads((saved / "preprocessor_config.json").read_text())
    facts |= {"image_processor_type": "Strange", "auto_map": {"AutoImageProcessor": "strange.Strange"}}
    (saved / "preprocessor_config.json").write_text(json.dumps(facts))
    (saved / "strange.py").write_text("raise SystemExit('it ran')\n")
    monkeypatch.setattr("builtins.input", lambda *text: pytest.fail("it asked whether to run foreign code"))
    with pytest.raises(ValueError, match="trust_remote_code"):
        TTameModel.from_pretrained(saved)


def test_auto_model_takes_a_backbone_too(vit, vit_folder, hf_vit, tmp_path):
    vit.save_pretrained(tmp_path, include_backbone=False)
    for backbone in (vit_folder, str(vit_folder), hf_vit):
        model = AutoModel.from_pretrained(tmp_path, backbone=backbone, strict=True)
        assert model.config.backbone is None
        assert torch.equal(model(torch.ones(1, 3, 64, 64)).logits, vit(torch.ones(1, 3, 64, 64)).logits)


def test_an_unknown_commit_is_never_saved(vit, tmp_path):
    vit.config.backbone, vit.config.backbone_revision = "org/first", "main"
    with pytest.raises(ValueError, match="the commit of 'org/first' is not known"):
        vit.save_pretrained(tmp_path / "x", include_backbone=False)
    assert not (tmp_path / "x").exists()
    vit.save_pretrained(tmp_path / "x")  # nothing trained is lost: the backbone is included instead
    assert TTameModel.from_pretrained(tmp_path / "x").config.backbone_included


def test_files_follow_the_umask(vit, tmp_path):
    before = os.umask(0o022)
    try:
        vit.save_pretrained(tmp_path / "open")
        os.umask(0o077)
        vit.save_pretrained(tmp_path / "closed")
    finally:
        os.umask(before)
    assert {f.stat().st_mode & 0o777 for f in (tmp_path / "open").rglob("*") if f.is_file()} == {0o644}
    assert {f.stat().st_mode & 0o777 for f in (tmp_path / "closed").rglob("*") if f.is_file()} == {0o600}


def test_no_local_path_in_configs_or_cards(tmp_path):
    module = make_timm("test_resnet", pretrained_cfg_overlay={"input_size": (3, 64, 64), "file": f"{HOME}/w.bin"})
    model = TTameModel.from_backbone(module)
    model.save_pretrained(tmp_path / "x")
    write_card(tmp_path / "x")
    for file in [tmp_path / "x" / "config.json", tmp_path / "x" / "README.md"]:
        assert HOME not in file.read_text()
        assert str(tmp_path) not in file.read_text()


def test_no_local_path_in_any_config_that_is_saved(vit_folder, tmp_path):
    """Wherever a library or a user left it: the explainer's config, the backbone's, the preprocessing's."""
    model = TTameModel.from_backbone(vit_folder)
    model.config.trained_in = f"{HOME}/runs/7"
    model.backbone.config.label_files = {"of": ["x", f"written to {HOME}/labels.txt"]}
    model.backbone.config._name_or_path = "patients/smith"
    model.image_processor.cache = f"{HOME}/cache"
    model.save_pretrained(tmp_path / "x", include_backbone=True)
    write_card(tmp_path / "x")
    files = [file for file in (tmp_path / "x").rglob("*.json") if "index" not in file.name]
    assert len(files) == 4
    for file in files:
        text = file.read_text()
        assert HOME not in text
        assert "smith" not in text
        assert str(tmp_path) not in text
    assert json.loads((tmp_path / "x/backbone/config.json").read_text())["label_files"] == {"of": ["x"]}
    check_contents(tmp_path / "x", files_to_push(tmp_path / "x", "model")[0])
    same = TTameModel.from_pretrained(tmp_path / "x", strict=True)
    assert same.config.id2label == model.config.id2label
    assert torch.equal(same(torch.ones(1, 3, 64, 64)).map_logits, model(torch.ones(1, 3, 64, 64)).map_logits)


def test_names_of_classes_may_look_like_paths(tmp_path):
    backbone = make_vit()
    backbone.config.id2label = {0: f"{HOME}/x", 1: "./b", **{i: f"class {i}" for i in range(2, 7)}}
    backbone.config.label2id = {label: i for i, label in backbone.config.id2label.items()}
    model = TTameModel.from_backbone(backbone, processor=vit_processor())
    model.save_pretrained(tmp_path)
    assert TTameModel.from_pretrained(tmp_path).config.id2label == backbone.config.id2label


def test_an_included_backbone_is_safetensors_in_a_folder_too(saved, vit):
    (saved / "backbone/model.safetensors").unlink()
    torch.save(vit.backbone.state_dict(), saved / "backbone/pytorch_model.bin")
    with pytest.raises(ValueError, match=r"cannot be loaded: .*model\.safetensors"):
        TTameModel.from_pretrained(saved)


def test_a_users_own_pickled_backbone_is_saved_as_safetensors(vit, vit_folder, tmp_path):
    folder = Path(shutil.copytree(vit_folder, tmp_path / "own"))
    (folder / "model.safetensors").unlink()
    torch.save(vit.backbone.state_dict(), folder / "pytorch_model.bin")
    TTameModel.from_backbone(folder).save_pretrained(tmp_path / "x")
    assert [f.suffix for f in (tmp_path / "x/backbone").glob("*model*")] == [".safetensors"]
    torch.save({**vit.backbone.state_dict(), "x": Evil(tmp_path / "was-run")}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="holds more than tensors and plain values"):
        TTameModel.from_backbone(folder)
    assert not (tmp_path / "was-run").exists()


def test_a_report_in_words_goes_with_its_figures_only(saved):
    (saved / "report.md").write_text("# good")
    assert "report.md" in {f.name for f in files_to_push(saved, "model")[1]}
    (saved / "report.json").write_text("{}")
    assert {"report.md", "report.json"} <= {f.name for f in files_to_push(saved, "model")[0]}


@pytest.mark.parametrize("path", [f"{HOME}/x", "~/x", "C:\\x", "c:/x", "file:///x", "./x", "../x", "\\\\host\\x"])
def test_local_paths(path):
    assert is_local_path(path)
    assert without_paths({"a": path, "b": [path, "c"], "d": {"e": path}}) == {"b": ["c"], "d": {}}


@pytest.mark.parametrize("text", ["timm/resnet50", "https://x.y/z", "a/b", "", "/", None, 3])
def test_no_local_paths(text):
    assert not is_local_path(text)


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("./my-modle", "my-model"),
        ("runs/x/besst", "runs/x/best"),
        ("runs/y/best", None),
        ("my-modle/best", "my-model"),
        ("runs/xx", "runs/x"),
        ("my-model/../runs/xx/", "my-model/../runs/x"),
        ("~/my-modle", None),
        ("nobody/here/at-all", None),
        (f"{HOME}/x", None),
    ],
)
def test_a_folder_that_is_not_there_is_refused_at_once(name, near, tmp_path, monkeypatch):
    (tmp_path / "runs" / "x" / "best").mkdir(parents=True)
    (tmp_path / "my-model").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "runs"))
    # Of the form of a Hub id.
    unasked = " here, and the Hub cannot be asked" if name in ("my-modle/best", "runs/xx") else ""
    for what, load in (
        ("explainer", TTameModel.from_pretrained),
        ("backbone", TTameModel.from_backbone),
        ("dataset", open_stream),
        ("dataset", Plan),
    ):
        end = f"nearest: '{near}'" if near else "give a path that does, or a Hub id of the form 'organisation/name'"
        with pytest.raises(ValueError, match=f"^the {what} {re.escape(repr(name))} does not exist{unasked}; {end}$"):
            load(name)


def test_what_may_be_on_the_hub_is_asked_for_there(tmp_path, monkeypatch):
    (tmp_path / "org").mkdir()
    monkeypatch.chdir(tmp_path)
    for name in ("org/my-model", "nobody/nothing", "beans", "hf://datasets/a/b"):
        check_path(name, "dataset", "dataset")


def test_timm_backbones_have_a_preprocessor_config(timm_cnn, photo, tmp_path):
    model = TTameModel.from_backbone(make_timm("test_resnet"))
    model.save_pretrained(tmp_path)
    processor = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    picture = photo()
    expected = model.image_processor(images=picture, return_tensors="pt")["pixel_values"]
    assert torch.equal(processor(images=picture, return_tensors="pt")["pixel_values"], expected)


def test_what_is_sent_and_what_stays(saved, photo):
    photo().save(saved / "patient_7.png")
    (saved / "examples").mkdir()
    photo().save(saved / "examples" / "x.jpg")
    (saved / "notes.txt").write_text("mine")
    (saved / ".env").write_text("secret")
    sent, left = files_to_push(saved, "model")
    names = {f.relative_to(saved).as_posix() for f in sent}
    assert names == {
        "README.md",
        "config.json",
        "hf_ttame_remote.py",
        "model.safetensors",
        "preprocessor_config.json",
        "backbone/config.json",
        "backbone/model.safetensors",
        "backbone/preprocessor_config.json",
    }
    assert {f.name for f in left} == {"patient_7.png", "x.jpg", "notes.txt", ".env"}
    with_examples = {f.name for f in files_to_push(saved, "model", include_examples=True)[0]}
    assert {"patient_7.png", "x.jpg"} <= with_examples
    assert not {"notes.txt", ".env"} & with_examples


@pytest.mark.parametrize("name", ["model.safetensors", "preprocessor_config.json", "backbone/model.safetensors"])
def test_an_incomplete_folder_is_not_sent(saved, name):
    (saved / name).unlink()
    with pytest.raises(ValueError, match=f"not complete: {name} missing"):
        push_folder(saved, "org/x", say=lambda line: None)


def test_every_shard_is_needed(vit, tmp_path):
    vit.save_pretrained(tmp_path / "x", include_backbone=False, max_shard_size="5KB")
    write_card(tmp_path / "x")
    shards = sorted((tmp_path / "x").glob("model-*.safetensors"))
    assert len(shards) > 1
    assert set(shards) <= set(files_to_push(tmp_path / "x", "model")[0])
    shards[0].unlink()
    with pytest.raises(ValueError, match=f"not complete: {shards[0].name} missing"):
        files_to_push(tmp_path / "x", "model")


def test_links_are_not_followed(saved, tmp_path):
    (tmp_path / "secret").write_text("secret")
    (saved / "report.json").symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match=r"'report.json' is a link"):
        files_to_push(saved, "model")


@pytest.mark.parametrize(
    ("file", "content", "message", "with_examples"),
    [
        ("report.json", {"images": [{"file": "Smith_John.JPG"}]}, "names picture files .*Smith_John", False),
        ("report.json", {"Smith_John.dcm.png": 1}, "names picture files", False),
        ("training.json", {"dataset": f"{HOME}/patients"}, f"local path '{HOME}/patients'", True),
        ("training.json", {"note": f"token {TOKEN}"}, "holds an access token", True),
        ("README.md", f"my {TOKEN}", "holds an access token", True),
        ("README.md", f"see {HOME}/x", f"local path '{HOME}/x'", True),
        ("README.md", "![x](patient.png)", r"names picture files \('patient.png'\)", False),
        ("README.md", "![x](latency.png)", r"README.md shows 'latency.png', which is not sent", False),
        ("report.md", "![x](patient)", r"report.md shows 'patient', which is not sent", False),
        ("report.md", "of Smith_John.nii.gz, 3 mm", r"names picture files \('Smith_John.nii.gz'\)", False),
        ("report.json", {"pictures": {"x": "Smith.png"}}, "names picture files .*Smith.png", False),
        ("training.json", {"note": "'Smith.HEIC' cannot be read"}, "names picture files .*Smith.HEIC", False),
        ("report.json", {"data": "data/patients/Smith test"}, "local path 'data/patients/Smith test'", True),
        ("training.json", {"arguments": {"dataset": "data\\Smith"}}, "local path 'data.*Smith'", True),
        ("report.md", "on /Volumes/P/x", "local path '/Volumes/P/x'", True),
        *(
            (name, f"t=hf_{kind}_" + "aZ9" * 8, "holds an access token", True)
            for name in ("LICENSE", "report.md")
            for kind in ("oauth", "jwt")
        ),
        ("report.md", "api_org_" + "a" * 30, "holds an access token", True),
    ],
)
def test_what_must_not_be_published_is_refused(saved, file, content, message, with_examples):
    (saved / "report.json").write_text("{}")  # report.md goes with it
    (saved / file).write_text(content if isinstance(content, str) else json.dumps(content))
    files = files_to_push(saved, "model")[0]
    with pytest.raises(ValueError, match=message):
        check_contents(saved, files)
    if with_examples:
        with pytest.raises(ValueError, match=message):
            check_contents(saved, files, include_examples=True)
    else:
        check_contents(saved, files, include_examples=True)


@pytest.mark.parametrize(
    ("columns", "refused"),
    [
        ({"id": [1], "map": [b"x"]}, None),
        ({"id": ["row-1"]}, None),
        ({"id": ["Smith_John.jpg"]}, "id"),
        ({"id": [1], "overlay": [b"x"]}, "overlay"),
        ({"id": [1], "file_name": ["x"]}, "file_name"),
        ({"Photo": [1]}, "Photo"),
        ({"x": [{"bytes": b"x", "path": None}]}, "x"),
        ({"x": [[{"img": 1}]]}, "x"),
        ({"map": [{"bytes": b"\x89PNG", "path": None}]}, None),
        ({"map": [{"bytes": b"\x89PNG", "path": "Smith.png"}]}, "map"),
        ({"scan": [b"\xff\xd8\xff\xe0"]}, "scan"),
        ({"scan": [b"0" * 128 + b"DICM"]}, "scan"),
        ({"map": [b"\x89PNG"], "score": [[0.5]]}, None),
        ({"x": [["a", "Smith.jpg"]]}, "x"),
        ({"x": pyarrow.array(["a", "Smith.jpg"]).dictionary_encode()}, "x"),
        ({"x": [{"y": [None, "Smith.dcm"]}]}, "x"),
    ],
)
def test_datasets_of_maps_without_names_of_pictures(tmp_path, columns, refused):
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "maps-00000.parquet")
    files = files_to_push(tmp_path, detect_kind(tmp_path))[0]
    check_contents(tmp_path, files, include_examples=True)
    if refused is None:
        check_contents(tmp_path, files)
    else:
        with pytest.raises(ValueError, match=rf"has the columns \['{refused}'\]"):
            check_contents(tmp_path, files)


def test_names_of_the_reports_own_plots_are_no_secret(saved):
    (saved / "report.json").write_text(json.dumps({"pictures": {"ROAD": "road.png"}}))
    check_contents(saved, files_to_push(saved, "model")[0])


def test_a_space_sends_its_code_and_no_files_of_users(tmp_path):
    (tmp_path / "README.md").write_text("---\nsdk: gradio\n---\n")
    (tmp_path / "app.py").write_text("")
    kept = ("x.dcm", "x.HEIC", "x.jfif", "x.avif", "x.nii.gz", "x.npz", "x.zip", "x.svg", "x.pkl", "x.ipynb", "x.csv")
    for name in (*kept, "requirements.txt"):
        (tmp_path / name).write_text("")
    sent, left = files_to_push(tmp_path, detect_kind(tmp_path))
    assert {f.name for f in sent} == {"README.md", "app.py", "requirements.txt"}
    assert {f.name for f in left} == set(kept)
    check_contents(tmp_path, sent)
    for name in ("app.py", "requirements.txt"):
        for text, message in (("open('Smith.jpg')", "Smith.jpg"), (f"{HOME}/x", HOME), (TOKEN, "token")):
            (tmp_path / name).write_text(text)
            with pytest.raises(ValueError, match=message):
                check_contents(tmp_path, sent)
        (tmp_path / name).write_text("")


def test_kinds(saved, tmp_path):
    assert detect_kind(saved) == "model"
    (tmp_path / "space").mkdir()
    (tmp_path / "space" / "README.md").write_text("---\nsdk: static\n---\n")
    assert detect_kind(tmp_path / "space") == "space"
    with pytest.raises(ValueError, match=r"not complete: app.py missing"):
        files_to_push(tmp_path / "space", "space")
    (tmp_path / "space" / "index.html").write_text("x")
    assert len(files_to_push(tmp_path / "space", "space")[0]) == 2
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="neither an explainer"):
        detect_kind(tmp_path / "empty")


@pytest.mark.parametrize("repo_id", ["../x", "a/b/c", "", "/etc/passwd", "org/a..b"])
def test_repository_names(saved, repo_id):
    with pytest.raises(ValueError, match=r"Repo id|repository id|Cannot have"):
        push_folder(saved, repo_id)


def test_a_push_that_fails_says_how_to_repeat(saved, vit):
    before = {f: f.read_bytes() for f in saved.rglob("*") if f.is_file() and f.name != "README.md"}
    options = ["--private", "--revision", "my branch", "--message", "My message"]
    done = CliRunner().invoke(app, ["push", str(saved), "org/x", *options])
    assert isinstance(done.exception, ConnectionError)  # tests are offline
    command = f"ttame push {saved} org/x --private --revision 'my branch' --message 'My message'"
    assert command in str(done.exception)
    assert "model.safetensors" in done.output  # listed before the first byte
    assert all(f.read_bytes() == content for f, content in before.items())
    with pytest.raises(ConnectionError, match="repeat with: ttame push") as caught:
        vit.push_to_hub("org/x", say=lambda line: None)
    kept = Path(str(caught.value).split("ttame push ")[1].split()[0])
    assert (kept / "model.safetensors").exists()  # what the message names is complete
    assert files_to_push(kept, "model")[0]
    shutil.rmtree(kept.parent)


def test_a_push_that_is_refused_leaves_no_folder(vit, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    vit.image_processor.token = TOKEN
    with pytest.raises(ValueError, match="holds an access token"):
        vit.push_to_hub("org/x", say=lambda line: None)
    assert list(tmp_path.iterdir()) == []


def test_an_overwrite_that_is_cut_short_does_not_load(saved, vit, tmp_path, monkeypatch):
    """Killed at any file: the folder has no config, so nobody loads an old one with new weights."""
    with torch.no_grad():
        vit.head.fuser.bias += 0.5
    real, left = os.replace, 0

    def killed(source, target):
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        real(source, target)

    files = len([file for file in saved.rglob("*") if file.is_file()])
    with monkeypatch.context() as patch:
        patch.setattr("hf_ttame.saving.os.replace", killed)
        for stop in range(files):
            left = stop + 1  # the first is the card's own
            with pytest.raises(KeyboardInterrupt):
                vit.save_pretrained(saved)
            assert not (saved / "config.json").exists()
    vit.save_pretrained(saved)
    assert torch.equal(TTameModel.from_pretrained(saved).head.fuser.bias, vit.head.fuser.bias)


def test_weights_that_are_not_the_configs_are_refused(saved, vit, tmp_path):
    config = (saved / "config.json").read_text()
    with torch.no_grad():
        vit.head.fuser.bias += 0.5
    vit.save_pretrained(saved)
    (saved / "config.json").write_text(config)
    with pytest.raises(ValueError, match=r"are not those that its config.json belongs to.*save or copy the whole"):
        TTameModel.from_pretrained(saved)
    (saved / "config.json").write_text(json.dumps({**json.loads(config), "head_fingerprint": None}))
    TTameModel.from_pretrained(saved)


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_head_is_its_own_in_every_dtype(vit, tmp_path, stored, dtype):
    vit.save_pretrained(tmp_path, head_dtype=stored)
    assert TTameModel.from_pretrained(tmp_path, torch_dtype=dtype).head.fuser.weight.dtype == dtype


def test_a_card_that_somebody_wrote_stays(saved):
    (saved / "README.md").write_text("# mine")
    with pytest.raises(ConnectionError):
        push_folder(saved, "org/x", say=lambda line: None)
    assert (saved / "README.md").read_text() == "# mine"


def test_saving_writes_the_card(vit, tmp_path):
    vit.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == render_card(tmp_path)
    (tmp_path / "README.md").write_text("# mine")
    vit.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "# mine"


def test_a_card_that_cannot_be_written_does_not_cost_the_weights(saved, tmp_path):
    (saved / "card.json").write_text(json.dumps({"unheard": "x"}))
    model = TTameModel.from_pretrained(saved)
    with pytest.warns(UserWarning, match="saved without a card: .*got 'unheard'"):
        model.save_pretrained(tmp_path / "new")
    assert torch.equal(TTameModel.from_pretrained(tmp_path / "new").head.fuser.weight, model.head.fuser.weight)


def test_the_command_card(saved):
    done = CliRunner().invoke(app, ["card", str(saved), "--repo-id", "org/x"])
    assert done.exit_code == 0
    assert (saved / "README.md").read_text() == render_card(saved, "org/x")


def test_the_documented_figures_are_the_measured_ones():
    measured = json.loads((ROOT / "benchmarks" / "hub.json").read_text())
    page = (ROOT / "docs" / "hub.md").read_text()
    names = {"vgg16": "VGG-16", "resnet50": "ResNet-50", "vit_base_patch16_224": "ViT-B/16"}
    for name, size in measured["repository MB"].items():
        row = (
            f"| {names.get(name, name)} | {size['classes']:,d} | {size['float32']:.1f} MB | {size['float16']:.1f} MB |"
        )
        assert row in page
    for case, found in measured["first map"].items():
        assert f"| {case} | {found['from_pretrained s']:.1f} s | {found['first map s']:.1f} s | yes |" in page
        assert found["equal to the bit"]
    rows = [row.strip("| ").split(" | ") for row in re.findall(r"^\| (?:load|push), .*$", page, re.MULTILINE)]
    for (what, fault, met, seconds, outcome), found in zip(rows, measured["faults"], strict=True):
        kind, times = found["fault"].split(" x ")
        assert what[:6] == found["where"][:6]
        assert (fault, met) == (f"{kind}, {'1 time' if times == '1' else 'always'}", str(found["faults met"]))
        assert seconds == f"{found['seconds']:.1f}"
        assert outcome[:4] == found["outcome"].replace("DamagedDownload", "ValueError")[:4]
        assert all(quoted in found["outcome"] for quoted in re.findall('"([^"]+)"', outcome))
    assert {row["the next one"] for row in measured["faults"]} == {"ok"}


# ---- with a Hub -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hub():
    with running_hub() as running:
        yield running


@pytest.fixture(scope="module")
def work(hub, vit_folder, tmp_path_factory) -> Path:
    """A folder for the clients, and a Hub with classifiers."""
    work = tmp_path_factory.mktemp("hub")
    fill(hub, work, vit_folder)
    return work


def client(hub, work: Path, task: str, **extra: str) -> dict[str, Any]:
    environment = hub.environment(work / f"home-{task}", HF_HUB_DOWNLOAD_TIMEOUT="1", PYTHONPATH=str(ROOT), **extra)
    command = [sys.executable, str(ROOT / "tests" / "hub_client.py"), task, str(work)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-4000:]
    assert TOKEN not in done.stdout + done.stderr
    return json.loads((work / f"{task}.json").read_text())


@pytest.fixture(scope="module")
def pushed(hub, work, training):
    return client(hub, work, "push")


def test_pushed_explainers_are_small_and_pinned(hub, work, pushed):
    for name, backbone in (("vit", "org/tiny-vit"), ("timm", "timm/tiny-resnet")):
        commit = hub.repository(backbone).branches["main"]
        assert pushed[f"revision {name}"] == commit
        files = hub.files(f"org/ttame-{name}")
        assert sorted(files) == [
            "README.md",
            "config.json",
            "hf_ttame_remote.py",
            "model.safetensors",
            "preprocessor_config.json",
        ]
        config = json.loads(files["config.json"])
        assert (config["backbone"], config["backbone_revision"]) == (backbone, commit)
        (work / "head.safetensors").write_bytes(files["model.safetensors"])
        assert all(key.startswith("head.") for key in load_file(work / "head.safetensors"))
        assert pushed[f"commit {name}"] in hub.repository(f"org/ttame-{name}").commits


def test_one_commit_with_the_card(hub, pushed):
    timm = hub.repository("org/ttame-timm")
    assert timm.messages == ["initial commit", "Upload model with hf-ttame"]
    assert timm.private
    assert not hub.repository("org/ttame-vit").private
    card = hub.files("org/ttame-timm")["README.md"].decode()
    assert 'AutoModel.from_pretrained("org/ttame-timm")' in card
    assert "base_model: timm/tiny-resnet" in card


def test_branches_pull_requests_and_the_command(hub, pushed):
    vit = hub.repository("org/ttame-vit")
    assert {"main", "v2", "refs/pr/1"} <= set(vit.branches)
    assert pushed["pr"].endswith("/discussions/1")
    assert pushed["no create"] == "ok"
    assert "was not pushed" in pushed["no repository"]
    code, output = pushed["command"]
    assert code == 0, output
    assert "published: http" in output
    assert hub.repository("org/by-command").private
    assert hub.repository("org/by-command").messages[-1] == "From the command"


def test_private_never_means_public(hub, pushed):
    assert pushed["private"].startswith("ValueError: 'org/public' exists already and is public, so nothing was sent")
    assert list(hub.files("org/public")) == ["x.txt"]


def test_weights_of_an_earlier_push_are_deleted(hub, pushed):
    assert sorted(hub.files("org/stale")) == sorted(hub.files("org/ttame-vit"))
    assert any("deleted  backbone/model.safetensors (of" in line for line in pushed["lines"])
    assert any("deleted  model-00001-of-" in line for line in pushed["lines"])
    assert len(hub.repository("org/stale").messages) == 3


def test_records_of_an_earlier_push_are_deleted(hub, pushed):
    """Measured, trained on, published again: nothing of the former head stays."""
    assert {"measured.json", "training.json", "card.json"} <= set(pushed["records before"])
    assert sorted(hub.files("org/records")) == sorted(hub.files("org/measured-other"))
    assert any("deleted  measured.json (of" in line for line in pushed["lines"])


def test_a_card_that_somebody_wrote_on_the_hub_stays(hub, pushed):
    assert hub.files("org/own-card")["README.md"] == b"# Mine\n"
    assert "model.safetensors" in hub.files("org/own-card")
    assert any("kept  README.md of the repository" in line for line in pushed["lines"])


def test_a_pull_request_is_opened_once(hub, pushed):
    assert "was not pushed" in pushed["pr, 500"]
    assert pushed["pr, 500 hits"] == 1


def test_a_server_at_fault_is_asked_again(pushed):
    assert [pushed[f"patient {n}"] for n in range(2)] == ["ok", "ok"]


@pytest.mark.parametrize(("asked", "waited"), [("7", 7.0), ("3600", 60.0), ("", 0.5), ("Wed, 21 Oct", 0.5)])
def test_the_servers_wait_is_kept(monkeypatch, asked, waited):
    waits: list[float] = []
    monkeypatch.setattr("hf_ttame.saving.time.sleep", waits.append)
    error = OSError("busy")
    error.response = SimpleNamespace(status_code=429, headers={"Retry-After": asked})
    with pytest.raises(OSError, match="busy"):
        patiently(lambda: (_ for _ in ()).throw(error))
    assert len(waits) == 3
    assert waits[0] == waited


def test_pushed_datasets_and_spaces(hub, pushed):
    assert list(hub.files("org/maps", "datasets")) == ["maps-00000.parquet"]
    assert sorted(hub.files("org/space", "spaces")) == ["README.md", "app.py"]


def test_every_file_is_listed(hub, pushed):
    for repo, kind in (("org/ttame-vit", "models"), ("org/maps", "datasets"), ("org/space", "spaces")):
        start = next(i for i, line in enumerate(pushed["lines"]) if f" {repo}:" in line)
        for name in hub.files(repo, kind):
            assert any(line.endswith(f"  {name}") for line in pushed["lines"][start:])


def test_the_token_reaches_the_hub_alone(hub, work, pushed):
    assert f"Bearer {TOKEN}" in hub.authorizations
    for repository in hub.repositories.values():
        for files in repository.commits.values():
            assert not any(TOKEN.encode() in content for content in files.values())
    assert not any(TOKEN in file.read_text(errors="replace") for file in work.glob("*/*.json"))


@pytest.fixture(scope="module")
def loaded(hub, work, pushed, vit_folder):
    """What one fresh process with an empty cache loads, wanted and unwanted."""
    explainer = hub.files("org/ttame-vit")
    config = json.loads(explainer["config.json"])
    hub.put("org/ttame-gated", {}, gated=True)
    hub.put("org/ttame-bare", {k: v for k, v in explainer.items() if k != "model.safetensors"})
    weights = {"weight_map": {"head.fuser.weight": "../../evil.safetensors"}, "metadata": {}}
    outside = {k: v for k, v in explainer.items() if k != "model.safetensors"}
    outside["model.safetensors.index.json"] = json.dumps(weights).encode()
    outside["../../evil.safetensors"] = explainer["model.safetensors"]
    hub.put("org/ttame-outside", outside)
    outside["model.safetensors.index.json"] = json.dumps(
        {**weights, "weight_map": {"head.fuser.weight": str(work / "evil.safetensors")}}
    ).encode()
    hub.put("org/ttame-absolute", outside)
    pickled = {k: v for k, v in explainer.items() if k != "model.safetensors"}
    torch.save({"x": torch.zeros(1)}, work / "pytorch_model.bin")
    pickled["pytorch_model.bin"] = (work / "pytorch_model.bin").read_bytes()
    hub.put("org/ttame-pickle", pickled)
    named = json.dumps({**config, "transformers_weights": "adapter_model.bin"}).encode()
    pickled |= {"config.json": named, "adapter_model.bin": pickled["pytorch_model.bin"]}
    hub.put("org/ttame-named-pickle", {**pickled, "model.safetensors": explainer["model.safetensors"]})
    ready = hub.files("org/ready")
    whole = {k: v for k, v in ready.items() if k != "backbone/model.safetensors"}
    evil = hub.files("org/evil-vit")["pytorch_model.bin"]
    hub.put("org/ttame-included-pickle", {**whole, "backbone/pytorch_model.bin": evil})
    index = {"weight_map": dict.fromkeys(load_file(vit_folder / "model.safetensors"), "../../evil.safetensors")}
    whole["backbone/model.safetensors.index.json"] = json.dumps({**index, "metadata": {}}).encode()
    hub.put("org/ttame-inside-out", {**whole, "evil.safetensors": ready["backbone/model.safetensors"]})
    backbone = {f.name: f.read_bytes() for f in vit_folder.iterdir()}
    remote = json.loads(backbone["config.json"])
    remote |= {
        "model_type": "strange",
        "auto_map": {"AutoConfig": "evil.C", "AutoModelForImageClassification": "evil.M"},
    }
    code = f"open({str(work / 'evil-was-run')!r}, 'w')\n"
    backbone |= {"config.json": json.dumps(remote).encode(), "evil.py": code.encode()}
    commit = hub.put("org/strange", backbone)
    strange = {**config, "backbone": "org/strange", "backbone_revision": commit}
    hub.put("org/ttame-remote", {**explainer, "config.json": json.dumps(strange).encode()})
    path = {**config, "backbone": "/etc/x", "backbone_revision": None}
    hub.put("org/ttame-path", {**explainer, "config.json": json.dumps(path).encode()})

    (work / "cards").mkdir()
    for card in ROOT.glob("model_cards/*/README.md"):
        shutil.copy(card, work / "cards" / f"{card.parent.name}.md")
    (work / "cards" / "pushed.md").write_bytes(explainer["README.md"])
    shutil.copytree(work / "vit", work / "path" / "to" / "this" / "folder")
    shutil.copytree(vit_folder, work / "path" / "to" / "the" / "classifier")
    return client(hub, work, "few")


def test_maps_are_equal_to_the_bit_in_a_fresh_process(loaded):
    assert loaded["equal vit"]
    assert loaded["equal timm"]
    assert 0 < loaded["close whole"] < 0.05  # a float16 head, in float32
    assert loaded["dtypes whole"] == ["torch.float32"]
    assert loaded["config"] == "org/tiny-vit"
    assert loaded["processor vit"].startswith("ViTImageProcessor")
    assert loaded["processor timm"].startswith("CLIPImageProcessor")


def test_ways_to_load(loaded):
    for way in ("offline", "offline mode", "branch", "commit", "cache_dir", "beside a folder"):
        assert loaded[way] == "ok", way
    assert loaded["offline mode, never seen"].startswith("OSError: We couldn't connect to")
    assert loaded["beside, nowhere"].endswith(
        "'org/ttame-cat' does not exist here, and the Hub does not know it; nearest: 'org/ttame-cit'"
    )
    assert loaded["bfloat16"] == "torch.bfloat16"
    assert loaded["in cache_dir"] == ["models--org--ttame-timm", "models--timm--tiny-resnet"]


def test_the_pipeline_by_its_hub_id(loaded):
    assert loaded["pipeline"] == ["ImageExplanationPipeline", "torch.float32"]
    assert loaded["explained"] == [[90, 70], [90, 70]]
    assert "needs an explainer, got ViTModel" in loaded["no explainer"]
    assert loaded["moved pipeline"] == ["cpu", "torch.bfloat16"]
    assert loaded["moved map"] == "float32"


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("nobody/nothing", "nobody/nothing is not a local folder and is not a valid model identifier"),
        ("no revision", "v9 is not a valid git identifier"),
        ("org/ttame-gated", "gated repo"),
        ("org/ttame-bare", "has no model.safetensors, and nothing else is opened"),
        ("org/ttame-pickle", "has no model.safetensors, and nothing else is opened"),
        ("org/ttame-named-pickle", "names a file of weights .*which could be a pickle"),
        ("org/ttame-included-pickle", "backbone 'org/ttame-included-pickle' cannot be loaded.*safetensors"),
        ("org/ttame-inside-out", r"evil\.safetensors': cannot contain a '\.\.'"),
        ("org/ttame-outside", r"evil\.safetensors': cannot contain a '\.\.'"),
        ("org/ttame-absolute", r"evil\.safetensors': cannot be an absolute"),
        ("remote backbone", "trust_remote_code"),
        ("path backbone", "Repo id must|'/etc/x'"),
    ],
)
def test_what_cannot_or_must_not_be_loaded(loaded, what, message):
    assert loaded[what] != "ok"
    assert re.search(message, loaded[what]), loaded[what]


def test_nothing_foreign_ran_or_left_the_cache(loaded, work):
    assert loaded["outside"] == []
    assert not (work / "evil-was-run").exists()
    cached = [path.relative_to(work).as_posix() for path in work.rglob("evil*")]
    assert [path for path in cached if "/snapshots/" not in path] == []
    assert [path for path in cached if "models--org--strange" not in path and "inside-out" not in path] == []


def test_code_of_cards_runs_as_printed(loaded):
    ran = {name for name, _ in loaded["cards"]}
    assert ran == {"pushed", "vgg16", "resnet50", "vit_b_16", "efficientnet_lite0", "dinov2_small"}
    assert [entry for entry in loaded["cards"] if entry[1] != "ok"] == []
    assert "photo_explained.png" in loaded["written"]


def test_without_the_import(pushed):
    """`trust_remote_code=True` finds the installed package; without it nothing runs and nothing loads."""
    assert "trust_remote_code=True" in pushed["not asked"]
    assert not pushed["imported"]
    assert pushed["processor, not imported"].startswith("ViTImageProcessor")
    assert pushed["remote config"] == "hf_ttame.configuration_ttame"
    assert pushed["remote classifier"]
    assert pushed["remote"] == ["hf_ttame.modeling_ttame", True]
    assert pushed["same class"]


def test_report_and_training_record_are_published_again(hub, pushed):
    files = hub.files("org/measured-again")
    assert {"report.json", "training.json", "card.json"} <= set(files)
    card = files["README.md"].decode()
    assert "20.2 / not measured" in card
    assert "steps 77" in card
    assert "license: mit" in card
    assert len(hub.repository("org/measured-again").messages) == 2  # with the weights, in one commit
    other = hub.files("org/measured-other")  # trained on: no longer the head that was measured
    assert not {"report.json", "training.json", "card.json"} & set(other)
    assert "20.2" not in other["README.md"].decode()


def test_a_pickled_backbone_is_published_as_safetensors(hub, work, pushed):
    assert "are a pickle" in pushed["pickled"][0]
    assert not [
        line for line in hub.requests if "pickled-vit" in line and "discussions" in line
    ]  # no conversion asked
    files = hub.files("org/ttame-of-pickled")
    assert "backbone/model.safetensors" in files
    assert not [name for name in files if name.endswith(".bin")]
    assert json.loads(files["config.json"])["backbone_included"]
    assert "holds more than tensors and plain values, and are not opened" in pushed["evil pickle"]
    assert not (work / "evil-pickle-was-run").exists()


def test_no_token_is_named_in_an_error(pushed):
    assert pushed["token with a line's end"] == ["ok", "ok", "ok"]
    assert all("token holds characters that no access token has" in text for text in pushed["token with a letter"])


def test_an_included_backbone_can_be_named_later(hub, pushed):
    assert pushed["named"] == ["org/tiny-vit", hub.repository("org/tiny-vit").branches["main"]]


@pytest.fixture(scope="module")
def fault_table(loaded):
    found = loaded["faults"]
    assert found["left"] == [
        "README.md",
        "config.json",
        "hf_ttame_remote.py",
        "model.safetensors",
        "preprocessor_config.json",
    ]
    return found["table"]


def test_faults_end_in_success_or_a_clear_error(fault_table):
    for where, fault, hits, _, first, then in fault_table:
        assert hits >= 1, f"{fault} on {where} never happened"
        assert then == "ok", f"after {fault} on {where}: {then}"
        assert first == "ok" or first.startswith(("ValueError: ", "ConnectionError: ", "DamagedDownload: ")), first
        if where.startswith("push") and first != "ok":
            assert "repeat with: ttame push" in first
    outcomes = {(where.split(", ")[0], fault): first for where, fault, _, _, first, _ in fault_table}
    for fault in ("500 x 1", "cut x 1", "429 x 1", "slow x 1"):
        assert outcomes[("load", fault)] == "ok"
    assert outcomes[("push", "500 x 1")] == "ok"
    assert "was not pushed" in outcomes[("push", "400 x 9")]
    damaged = [row[4] for row in fault_table if row[1].startswith("checksum")]
    assert len(damaged) == 5
    assert all("was damaged on its way" in text for text in damaged)


@pytest.fixture(scope="module")
def training(hub, work, photo):
    """A training that streams from the Hub, running while the other clients do; (process, fault, its output)."""
    pictures = datasets.Dataset.from_dict({"image": [photo(80, 70, seed) for seed in range(12)]})
    pictures.cast_column("image", datasets.Image()).to_parquet(str(work / "train.parquet"))
    hub.put("org/pictures", {"data/train-00000-of-00001.parquet": (work / "train.parquet").read_bytes()}, "datasets")
    fault = hub.fault("500", r"GET /datasets/org/pictures/resolve/.*parquet")
    command = [sys.executable, str(ROOT / "training" / "train.py"), "--backbone", "org/tiny-vit"]
    command += ["--dataset", "org/pictures", "--output", str(work / "run"), "--steps", "2", "--batch_size", "4"]
    command += ["--save_every", "1"]
    environment = training_environment(hub, work)
    log = work / "training.log"
    with (
        open(log, "w") as output,
        subprocess.Popen(
            [*command, "--workers", "0"], env=environment, stdout=output, stderr=output, cwd=work
        ) as process,
    ):
        yield process, fault, log
        process.kill()


def test_training_streams_its_pictures_from_the_hub(hub, work, training):
    process, fault, log = training
    assert process.wait(240) == 0, log.read_text()[-4000:]
    assert fault.hits == 1
    record = json.loads((work / "run" / "explainer" / "training.json").read_text())
    assert record["head_fingerprint"] == fingerprint_of_folder(work / "run" / "explainer")
    assert "steps 2" in (work / "run" / "explainer" / "README.md").read_text()
    given = record["arguments"]
    assert (given["dataset"], given["backbone"], record["steps"]) == ("org/pictures", "org/tiny-vit", 2)
    config = json.loads((work / "run" / "explainer" / "config.json").read_text())
    assert config["backbone_revision"] == hub.repository("org/tiny-vit").branches["main"]
    assert any(line.startswith("GET /datasets/org/pictures/resolve/") for line in hub.requests)
    card = render_card(work / "run" / "explainer")
    assert "- Data: org/pictures" in card
    assert np.isfinite(record["last"]["total"])


def test_a_resumed_training_streams_the_same_commit(hub, work, training, photo):
    """Killed after its first step, resumed after the dataset has changed."""
    process, _, log = training
    assert process.wait(240) == 0, log.read_text()[-4000:]
    commit = hub.repository("org/pictures", "datasets").branches["main"]
    steps = (work / "run" / "log.jsonl").read_text().splitlines()
    for part in ("explainer", "checkpoint-00000002"):
        shutil.rmtree(work / "run" / part)
    others = datasets.Dataset.from_dict({"image": [photo(80, 70, seed) for seed in range(50, 62)]})
    others.cast_column("image", datasets.Image()).to_parquet(str(work / "others.parquet"))
    files = {"data/train-00000-of-00001.parquet": (work / "others.parquet").read_bytes()}
    assert hub.put("org/pictures", files, "datasets") != commit
    before = len(hub.requests)
    done = subprocess.run([*process.args, "--resume"], env=training_environment(hub, work), cwd=work, timeout=240)
    assert done.returncode == 0
    read = [line for line in hub.requests[before:] if re.search(r"/datasets/org/pictures/resolve/.*parquet", line)]
    assert read
    assert all(commit in line for line in read)
    total = [[json.loads(line)["total"] for line in lines] for lines in (steps, (work / "run" / "log.jsonl").open())]
    assert total[0] == total[1]


def training_environment(hub, work):
    return hub.environment(work / "home-train", PYTHONPATH=str(ROOT), ACCELERATE_USE_CPU="true")
