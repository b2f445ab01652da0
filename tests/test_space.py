"""The Space without a browser: uploads, explainers, what costs a pass, words instead of errors."""

import html
import io
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import make_vit, vit_processor
from hub_server import TOKEN, running_hub
from PIL import Image
from starlette.applications import Starlette
from starlette.testclient import TestClient

from hf_ttame import TTameModel
from hf_ttame.baselines import MethodSettings, make_method
from hf_ttame.baselines.counting import Cost
from hf_ttame.space import explainers as explainers_module
from hf_ttame.space import views
from hf_ttame.space.analysis import Analysis
from hf_ttame.space.explainers import Explainer, Explainers, is_memory_error
from hf_ttame.space.handlers import Handlers
from hf_ttame.space.report import report
from hf_ttame.space.routes import picture_routes
from hf_ttame.space.sessions import Sessions
from hf_ttame.space.uploads import (
    LEFT_OVER,
    MAX_BYTES,
    WORKING_SIDE,
    Sweeper,
    open_picture,
    read_upload,
    sweep,
    sweep_dead,
)

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved explainer with its backbone."""
    torch.manual_seed(0)
    model = TTameModel.from_backbone(make_vit(), processor=vit_processor())
    target = tmp_path_factory.mktemp("explainers") / "vit"
    model.save_pretrained(target)
    return target


@pytest.fixture(scope="module")
def explainer(folder: Path) -> Explainer:
    return Explainers(at_home=True).get(str(folder))


@pytest.fixture
def analysis(explainer: Explainer, photo: Callable[..., Image.Image]) -> Analysis:
    return Analysis(explainer, photo(90, 70))


@pytest.fixture
def handlers(folder: Path, tmp_path: Path, photo: Callable[..., Image.Image]) -> Handlers:
    uploads = tmp_path / "uploads"
    uploads.mkdir()
    photo(90, 70).save(tmp_path / "example.png")
    return Handlers(Explainers(True), Sessions(), Sweeper(uploads), {"example": tmp_path / "example.png"})


def saved(picture: Image.Image, path: Path, **settings: object) -> Path:
    picture.save(path, **settings)
    return path


# ---- uploads ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("text.jpg", b"not a picture", "not a picture that can be opened"),
        ("empty.png", b"", "not a picture that can be opened"),
        ("page.jpg", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 90 90\n", "not a picture that can be opened"),
        ("cut.jpg", "JPEG", "damaged"),
        ("cut.png", "PNG", "damaged"),
    ],
)
def test_what_is_no_picture_is_refused_in_words(tmp_path, photo, name, content, words):
    if isinstance(content, str):
        buffer = io.BytesIO()
        photo(300, 200).save(buffer, content)
        content = buffer.getvalue()[: len(buffer.getvalue()) // 2]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=words):
        open_picture(tmp_path / name)


def test_sizes_that_are_refused(tmp_path):
    sizes = {(1, 1): "at least 16", (3000, 10): "over 100 times", (3000, 15): "over 100 times", (100, 15): "at least"}
    sizes |= {(11000, 10000): "11000 x 10000 pixels", (20000, 20000): "100,000,000"}
    for size, words in sizes.items():
        with pytest.raises(ValueError, match=words):
            open_picture(saved(Image.new("1", size), tmp_path / "size.png"))
    with open(tmp_path / "large.png", "wb") as file:
        file.truncate(MAX_BYTES + 1)
    with pytest.raises(ValueError, match="30 MB"):
        open_picture(tmp_path / "large.png")
    with pytest.raises(ValueError, match="did not arrive"):
        open_picture(tmp_path / "missing.png")


def test_pictures_that_are_accepted(tmp_path, photo):
    frames = [photo(90, 70, seed) for seed in range(3)]
    moving = saved(frames[0], tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    picture, remark = open_picture(moving)
    assert (picture.size, picture.mode) == ((90, 70), "RGB")
    assert "first frame" in remark
    exif = Image.Exif()
    exif[274] = 6  # lying on its side
    picture, remark = open_picture(saved(photo(90, 70), tmp_path / "turned.jpg", exif=exif))
    assert (picture.size, remark) == ((70, 90), "")
    large, _ = open_picture(saved(photo(4 * WORKING_SIDE, 2 * WORKING_SIDE), tmp_path / "large.jpg"))
    assert large.size == (WORKING_SIDE, WORKING_SIDE // 2)
    assert open_picture(saved(photo(), tmp_path / "named.txt", format="PNG"))[0].size == (90, 70)


def test_damaged_avif_is_refused_in_words(damaged_avifs):
    refused = 0
    for path in damaged_avifs(100):
        try:
            open_picture(path)
        except ValueError:
            refused += 1
    assert refused > 10


def test_what_killed_servers_left_is_deleted(tmp_path):
    for name, age in {"ttame-space-dead": 2 * LEFT_OVER, "ttame-space-young": 0, "other": 2 * LEFT_OVER}.items():
        (tmp_path / name / "hash").mkdir(parents=True)
        (tmp_path / name / "hash" / "a.png").write_bytes(b"a picture")
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    alive = tmp_path / "ttame-space-alive"
    alive.mkdir()
    os.utime(alive, (0, 0))
    sweeper = Sweeper(alive)
    sweeper.start()
    time.sleep(1.2)
    sweep_dead(tmp_path)
    sweeper.stopped.set()
    assert {folder.name for folder in tmp_path.iterdir()} == {"ttame-space-young", "ttame-space-alive", "other"}


def test_only_the_folder_of_uploads_is_opened_and_emptied(tmp_path, photo):
    uploads = tmp_path / "uploads"
    (uploads / "hash").mkdir(parents=True)
    outside = saved(photo(), tmp_path / "mine.png")
    (uploads / "link.png").symlink_to(outside)
    for path in (outside, uploads / ".." / "mine.png", uploads / "link.png"):
        with pytest.raises(ValueError, match="not uploaded here"):
            read_upload(path, uploads)
    (uploads / "link.png").unlink()
    inside = saved(photo(), uploads / "hash" / "a.png")
    left = saved(photo(), uploads / "left.part", format="PNG")
    os.utime(left, (0, time.time() - LEFT_OVER - 9))
    calls = []
    sweeper = Sweeper(uploads, also=lambda: calls.append(1), after=0.5)
    assert read_upload(inside, uploads)[0].size == (90, 70)
    sweeper.was_read(inside)
    assert inside.exists()  # the browser shows it for a moment
    again = saved(photo(), uploads / "hash" / "again.png")
    again.replace(inside)  # the same picture of somebody else
    sweeper.start()
    time.sleep(1.5)
    assert inside.exists()
    sweeper.was_read(inside)
    deadline = time.monotonic() + 10
    while list(uploads.iterdir()) and time.monotonic() < deadline:
        time.sleep(0.1)
    sweeper.stopped.set()
    assert list(uploads.iterdir()) == []
    assert outside.exists()
    assert calls
    young = saved(photo(), uploads / "young.png")
    sweep(uploads, 60)
    assert young.exists()


# ---- one pass -------------------------------------------------------------------------------------------------------


def test_another_class_costs_no_pass_of_the_backbone(explainer, photo):
    picture = photo(90, 70)
    with Cost(explainer.model.backbone) as cost:
        analysis = Analysis(explainer, picture)
    assert cost.forward == 1
    with Cost(explainer.model.backbone) as cost:
        maps = {class_id: analysis.placed_map("ttame", class_id) for class_id in range(len(analysis.scores))}
    assert (cost.forward, cost.backward) == (0, 0)
    for explanation in explainer.model.explain(picture, class_ids=list(maps)):
        placed, seen = maps[explanation.class_id]
        np.testing.assert_allclose(placed, explanation.map, atol=1e-6)
        assert np.array_equal(seen, explanation.seen)
        assert analysis.score(explanation.class_id) == pytest.approx(explanation.score, abs=1e-6)
    assert analysis.top == sorted(maps, key=analysis.score, reverse=True)[:5]


@pytest.mark.parametrize("method", ["ttame", "gradcam"])
def test_confidence_on_what_is_kept_is_that_of_a_hand_made_picture(analysis, method):
    model, class_id = analysis.explainer.model, analysis.top[1]
    tested = analysis.test(method, class_id, 30)
    small = analysis.map_of(method, class_id)
    large = torch.nn.functional.interpolate(small[None, None], size=(64, 64), mode="bilinear")[0, 0]
    order = large.flatten().argsort(descending=True)
    kept = torch.zeros(64 * 64)
    kept[order[: round(0.3 * 64 * 64)]] = 1
    assert torch.equal(kept.reshape(64, 64), analysis.kept(method, class_id, 30))
    # The processor's (x - 0.5) / 0.5, undone and done again around the black of pixel space.
    pixels = (analysis.pixel_values[0] + 1) / 2
    for mask, found in ((kept, tested.kept), (1 - kept, tested.hidden)):
        by_hand = (pixels * mask.reshape(1, 64, 64) - 0.5) / 0.5
        with torch.no_grad():
            p = model.backbone(pixel_values=by_hand[None]).logits.softmax(dim=1)[0, class_id]
        assert found == pytest.approx(float(p), abs=1e-5)
    with Cost(model.backbone) as cost:
        assert analysis.test(method, class_id, 30) == tested
    assert cost.forward == 0  # asked before
    placed, seen = analysis.placed_kept(method, class_id, 30)
    assert placed.shape == seen.shape == (70, 90)


def test_gradcam_and_rise_are_those_of_the_comparison(analysis):
    model, ids = analysis.explainer.model, torch.tensor([analysis.top[0]])
    assert not analysis.has_map("gradcam", analysis.top[0])
    expected = make_method("gradcam", model).explain(analysis.pixel_values, ids)[0]
    torch.testing.assert_close(analysis.map_of("gradcam", analysis.top[0]), expected, atol=1e-5, rtol=0)
    told = []
    with Cost(model.backbone) as cost:
        done = analysis.run_rise(analysis.top[0], 40, lambda *step: told.append(step), lambda: False)
    assert (done, cost.forward, told) == (40, 40, [(32, 40), (40, 40)])
    expected = make_method("rise", model, MethodSettings(rise_masks=40)).explain(analysis.pixel_values, ids)[0]
    expected = (expected - expected.min()) / (expected.max() - expected.min())
    torch.testing.assert_close(analysis.map_of("rise", analysis.top[0]), expected, atol=1e-4, rtol=0)
    with pytest.raises(KeyError):
        analysis.map_of("rise", analysis.top[1])


def test_rise_stops_when_it_is_told_to(analysis):
    stop = threading.Event()
    done = analysis.run_rise(analysis.top[0], 1000, lambda *_: stop.set(), stop.is_set)
    assert done == analysis.rise_masks[analysis.top[0]] == 32
    first = analysis.test("rise", analysis.top[0], 50)
    analysis.run_rise(analysis.top[0], 96, lambda *_: None, lambda: False)
    assert analysis.test("rise", analysis.top[0], 50) != first  # of the new map
    assert analysis.run_rise(analysis.top[1], 96, lambda *_: None, lambda: True) == 0


def test_passes_are_served_one_by_one_in_order(explainer):
    order: list[str] = []
    asked = threading.Event()

    def step(name: str) -> None:
        if not order:
            asked.wait()  # the other one stands in line by then
        order.append(name)

    def many() -> None:
        for _ in range(3):
            explainer.alone(lambda: step("many"))

    def one() -> None:
        explainer.alone(lambda: step("one"))

    threads = [threading.Thread(target=target) for target in (many, one)]
    for thread in threads:
        thread.start()
        time.sleep(0.1)
    asked.set()
    for thread in threads:
        thread.join()
    assert order == ["many", "one", "many", "many"]


# ---- explainers and sessions ----------------------------------------------------------------------------------------


def test_names_that_are_no_explainer(folder, vit_folder, tmp_path):
    home, public = Explainers(at_home=True), Explainers(at_home=False)
    with pytest.raises(ValueError, match="no explainer, but a model of type 'vit'"):
        home.get(str(vit_folder))
    with pytest.raises(ValueError, match="no explainer"):
        home.get(str(tmp_path))
    with pytest.raises(ValueError, match="folders of this machine are not opened"):
        public.get(str(folder))
    for name in ("abc", "", "a/b/c", "../..", "a b/c"):
        with pytest.raises(ValueError, match=r"Hub id|not opened"):
            public.get(name)
    with pytest.raises(ValueError, match="there is no explainer 'nobody/nothing'"):
        public.get("nobody/nothing")
    assert public.get(str(folder), trusted=True).model.config.num_labels == 7
    assert public.get(f" {folder} ") is public.get(str(folder))  # named by who started the Space


def test_weights_that_do_not_fit_are_not_loaded(folder, tmp_path):
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with open(tmp_path / "model.safetensors", "wb") as file:
        file.truncate(1 << 42)  # sparse
    left = explainers_module.memory_left()
    if left is None:
        pytest.skip("this system does not tell how much memory is left")
    with pytest.raises(ValueError, match=r"needs 4398\.0 GB"):
        Explainers(True).get(str(tmp_path))


def test_the_explainer_that_was_longest_unused_is_let_go(folder, tmp_path, photo):
    names = []
    for number in range(4):
        names.append(tmp_path / str(number))
        names[-1].symlink_to(folder)
    sessions = Sessions()
    explainers = Explainers(True, forgotten=sessions.forget_explainer)
    for name in names[:3]:
        sessions.begin(str(name), Analysis(explainers.get(str(name)), photo()))
    explainers.get(str(names[0]))
    explainers.get(str(names[3]))
    assert len(sessions) == 2
    with pytest.raises(ValueError, match="no picture"):
        sessions.find(str(names[1]))


def test_who_mistypes_a_name_evicts_nobody_and_the_owners_explainer_stays(folder, tmp_path):
    names = [str(tmp_path / str(number)) for number in range(5)]
    for name in names:
        Path(name).symlink_to(folder)
    gone: list[Explainer] = []
    explainers = Explainers(True, forgotten=gone.append)
    explainers.get(names[0], trusted=True)
    for name in names[1:3]:
        explainers.get(name)
    for wrong, words in {"abc": "Hub id", "nobody/nothing": "no explainer", str(tmp_path): "no explainer"}.items():
        with pytest.raises(ValueError, match=words):
            explainers.get(wrong)
    assert gone == []
    for name in names[3:]:
        explainers.get(name)
    assert [explainer.name for explainer in gone] == names[1:3]


def test_who_gives_a_picture_does_not_wait_for_an_explainer_that_loads(handlers, folder):
    handlers.explainers.get(str(folder))
    with handlers.explainers._loading:
        assert "stage" in handlers.example("me", "example", str(folder), 55, "spectrum")
        answer = handlers.example("me", "example", f"{folder}/.", 55, "spectrum")
    assert "being loaded; try again" in answer["notice"]


_FROM_THE_HUB = """
from hf_ttame.space.explainers import Explainers

home, public = Explainers(True), Explainers(False)
print(public.get("org/open").model.config.num_labels, flush=True)
input()
print(home.get("org/closed").model.config.num_labels)
try:
    public.get("org/closed")
except ValueError as error:
    print(error)
print(public.get("org/closed", trusted=True).model.config.num_labels)
"""


def test_explainers_of_the_hub_and_whose_token_is_sent(folder, tmp_path):
    with running_hub() as hub:
        hub.put("org/open", folder)
        hub.put("org/closed", folder, private=True)
        process = subprocess.Popen(
            [sys.executable, "-c", _FROM_THE_HUB],
            env=hub.environment(tmp_path / "home", PYTHONPATH=str(ROOT)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        first = process.stdout.readline()
        sent = set(hub.authorizations)
        rest, errors = process.communicate("\n", timeout=120)
        assert process.returncode == 0, errors
        assert first == "7\n"
        assert sent == {""}  # what a stranger typed is asked for without the owner's token
        home, refused, trusted = rest.splitlines()
        assert home == trusted == "7"
        assert hub.authorizations == {"", f"Bearer {TOKEN}"}
        assert "there is no explainer 'org/closed'" in refused  # though the owner's copy lies in the cache


def test_sessions_end_by_number_silence_and_leaving(analysis):
    sessions = Sessions(capacity=2, silent=0.5, gone=0.05)
    first = sessions.begin("a", analysis)
    assert sessions.by_token(analysis.token) is analysis
    assert first.pair == tuple(analysis.top[:2])
    sessions.begin("b", analysis)
    sessions.find("a")
    sessions.begin("c", analysis)
    assert {visitor for visitor in "abc" if visitor in sessions._by_visitor} == {"a", "c"}
    sessions.leave("a")
    assert first.stop.is_set()
    sessions.find("a")  # came back
    sessions.leave("c")
    time.sleep(0.1)
    sessions.forget()
    assert list(sessions._by_visitor) == ["a"]
    time.sleep(0.5)
    sessions.forget()
    assert len(sessions) == 0
    assert sessions.by_token(analysis.token) is None
    sessions.leave("a")  # nobody


def test_report_says_what_was_not_measured(explainer, folder):
    text = report(explainer)
    assert "not measured" in text
    assert "| classes | 7 |" in text
    assert "![" not in text
    shipped = Explainer("x", explainer.model, ROOT / "model_cards" / "efficientnet_lite0", ("a <b>remark</b>",))
    text = report(shipped)
    own = json.loads((shipped.folder / "report.json").read_text())["methods"]["ttame"]["measures"]
    assert f"{own['AD binary 50']['mean']:.1f} / {own['IC binary 50']['mean']:.1f}" in text
    assert "<b>" not in text
    assert "cannot be read" in report(Explainer("x", explainer.model, ROOT / "docs"))


# ---- wishes, in words -----------------------------------------------------------------------------------------------


def test_a_visit(handlers, folder, photo):
    name = str(folder)
    shown = handlers.example("me", "example", name, 55, "spectrum")
    session = handlers.sessions.find("me")
    assert set(shown) == {"picture", "bars", "stage", "notice", "pair", "first", "second"}
    assert shown["picture"] is None  # the field is free for the next
    assert shown["bars"].count('aria-pressed="true"') == 1
    assert shown["first"] == ([(session.analysis.label(i), i) for i in session.analysis.top], shown["first"][1])
    measured = handlers.measure("me", 30, "spectrum")
    assert "Only the top 30 %" in measured["test"]
    assert "RISE takes one pass per mask" in measured["methods"]

    other = session.analysis.top[3]
    shown = handlers.choose_class("me", other, 40, "viridis")
    assert f'data-class="{other}" aria-pressed="true"' in shown["bars"]
    assert "colours=viridis" in shown["stage"]
    assert "strength=40" in shown["stage"]
    shown = handlers.ask_class("me", "church", 40, "viridis")
    assert session.class_id == 3
    assert shown["other"] == ""
    assert handlers.ask_class("me", "  ", 40, "viridis") == {}
    assert "nearest labels: 'church'" in html.unescape(handlers.ask_class("me", "churc", 40, "viridis")["notice"])
    assert "class=3" in handlers.compare("me", "church", "0", "grey")["pair"]
    assert session.pair == (3, 0)
    recoloured = handlers.recolour("me", 30, 40, "inferno")
    assert set(recoloured) == {"stage", "pair", "test", "methods"}
    assert all("colours=inferno" in recoloured[part] for part in ("stage", "pair", "methods"))

    handlers.arm_rise("me", stop=False)
    ran = handlers.rise("me", 64, 30, "spectrum", lambda *_: None)
    assert "64 masks" in ran["methods"]
    handlers.arm_rise("me", stop=True)
    assert "stopped after 0 of 64" in handlers.rise("me", 64, 30, "spectrum", lambda *_: None)["notice"]

    path = saved(photo(80, 60, seed=5), handlers.sweeper.folder / "u.png")
    shown = handlers.upload("me", {"path": str(path)}, name, 55, "spectrum")
    assert shown["picture"] is None
    assert handlers.sessions.find("me") is not session
    assert session.stop.is_set()
    again = handlers.explainer("me", name, 55, "spectrum")
    assert "T-TAME explainer" in again["report"]
    assert "stage" in again
    assert set(handlers.explainer("somebody", name, 55, "spectrum")) == {"picture", "notice", "report"}


def test_bad_wishes_are_answered_in_words(handlers, folder, tmp_path):
    name, look = str(folder), (55, "spectrum")
    bad = handlers.sweeper.folder / "bad.jpg"
    bad.write_text("<script>")
    answers = {
        "not a picture": handlers.upload("me", {"path": str(bad)}, name, *look),
        "not uploaded here": handlers.upload("me", {"path": str(tmp_path / "example.png")}, name, *look),
        "no example": handlers.example("me", "<b>", name, *look),
        "Hub id": handlers.example("me", "example", "abc", *look),
        "no picture here": handlers.choose_class("me", 1, *look),
    }
    for words, answer in answers.items():
        assert words in answer["notice"]
        assert 'role="alert"' in answer["notice"]
        assert "<b>" not in answer["notice"]
        assert "Traceback" not in answer["notice"]
        assert answer.get("picture") is None
    assert (tmp_path / "example.png").exists()
    assert "Hub id" in handlers.example("me", "example", None, *look)["notice"]  # the field was emptied
    assert handlers.upload("me", None, name, *look) == {}
    assert handlers.measure("me", 50, "spectrum") == {}
    handlers.arm_rise("me", stop=True)
    handlers.example("me", "example", name, *look)
    for class_id in (-1, 7, None, "1"):
        assert "no such class" in handlers.choose_class("me", class_id, *look)["notice"]


def test_no_memory_is_said_and_the_next_wish_is_answered(handlers, folder):
    explainer = handlers.explainers.get(str(folder))
    errors: list[BaseException] = []

    def allocate(*_: object) -> None:
        try:
            torch.empty(1 << 60, dtype=torch.uint8)  # more than any machine has
        except RuntimeError as error:
            errors.append(error)
            raise

    handle = explainer.model.backbone.register_forward_pre_hook(allocate)
    try:
        answer = handlers.example("me", "example", str(folder), 55, "spectrum")
    finally:
        handle.remove()
    assert "memory of this machine was not enough" in answer["notice"]
    assert is_memory_error(errors[0])
    assert not is_memory_error(ValueError("memory"))
    assert "stage" in handlers.example("me", "example", str(folder), 55, "spectrum")


def test_what_comes_late_does_not_overwrite_what_is_shown(handlers, folder):
    handlers.example("me", "example", str(folder), 55, "spectrum")
    session = handlers.sessions.find("me")
    analysis, class_id = session.analysis, session.class_id
    known = analysis.test

    def slow(*arguments: object) -> object:
        session.class_id = analysis.top[1]  # a click, meanwhile
        return known(*arguments)

    analysis.test = slow
    assert handlers.measure("me", 50, "spectrum") == {}
    session.class_id = class_id
    analysis.test = known
    assert handlers.measure("me", 50, "spectrum")


def test_a_late_picture_does_not_overwrite_a_newer_one(handlers, folder, tmp_path, photo):
    look = (str(folder), 55, "spectrum")
    handlers.examples["other"] = saved(photo(60, 50, seed=3), tmp_path / "other.png")
    explainer = handlers.explainers.get(str(folder))
    begun, go_on = threading.Event(), threading.Event()
    answers: dict[str, object] = {}

    def wait(*_: object) -> None:
        begun.set()
        go_on.wait(20)

    handle = explainer.model.backbone.register_forward_pre_hook(wait)
    old = threading.Thread(target=lambda: answers.update(old=handlers.example("me", "example", *look)))
    new = threading.Thread(target=lambda: answers.update(new=handlers.example("me", "other", *look)))
    old.start()
    begun.wait(20)
    handle.remove()
    new.start()
    while len(handlers.sessions._newest) != 1 or handlers.sessions._newest["me"] == 0:
        time.sleep(0.01)  # until the second wish has come
    go_on.set()
    old.join()
    new.join()
    assert answers["old"] == {}
    assert "60 x 50" in answers["new"]["stage"]
    assert handlers.sessions.find("me").analysis.picture.size == (60, 50)
    assert handlers.sessions._newest == {}  # nothing is kept of who is gone


def test_rise_is_of_the_class_for_which_it_was_asked(handlers, folder):
    handlers.example("me", "example", str(folder), 55, "spectrum")
    analysis = handlers.sessions.find("me").analysis
    handlers.arm_rise("me", stop=False)
    handlers.choose_class("me", analysis.top[2], 55, "spectrum")  # while RISE waits for its turn
    handlers.rise("me", 32, 50, "spectrum", lambda *_: None)
    assert analysis.rise_masks == {analysis.top[0]: 32}
    handlers.arm_rise("me", stop=False)
    handlers.example("me", "example", str(folder), 55, "spectrum")
    assert handlers.rise("me", 32, 50, "spectrum", lambda *_: None) == {}  # asked for on the picture before


def test_classes_by_number_and_names_that_look_alike(handlers, folder):
    explainer = handlers.explainers.get(str(folder))
    labels = explainer.model.config.id2label
    labels |= {0: "1", 1: "0", 2: "Adenoma, tubular", 3: "Adenoma, villous", 4: "Cyst, large"}
    shown = handlers.example("me", "example", str(folder), 55, "spectrum")
    session = handlers.sessions.find("me")
    handlers.compare("me", *(class_id for _, class_id in shown["first"][0][:2]), "grey")
    assert session.pair == tuple(session.analysis.top[:2])
    handlers.compare("me", 0, "0", "grey")
    assert session.pair == (0, 1)  # chosen by its number; typed, a label
    assert [explainer.labels[i] for i in range(5)] == ["1", "0", "Adenoma, tubular", "Adenoma, villous", "Cyst"]
    assert "no such class" not in handlers.compare("me", 0, 1, "grey")["notice"]
    assert "neither a label nor an id" in handlers.compare("me", 0, 7, "grey")["notice"]


def test_labels_have_no_power(handlers, folder):
    labels = handlers.explainers.get(str(folder)).model.config.id2label
    for class_id in labels:
        labels[class_id] = f'<img src=x onerror="alert({class_id})">'
    shown = handlers.example("me", "example", str(folder), 55, "spectrum")
    parts = [shown["bars"], shown["stage"], shown["pair"], *handlers.measure("me", 50, "grey").values()]
    assert all("&lt;img src=x" in part for part in parts[:4])
    assert not any("<img src=x" in part or 'onerror="' in part for part in parts)


def test_probabilities_as_they_are_read():
    assert [views.percent(p) for p in (0.9312, 0.99999, 1.0, 0.0, 0.0001)] == [
        "93.1 %",
        "> 99.9 %",
        "100.0 %",
        "0.0 %",
        "< 0.1 %",
    ]


# ---- pictures by address --------------------------------------------------------------------------------------------


def test_pictures_are_made_for_who_knows_the_token(analysis):
    sessions = Sessions()
    session = sessions.begin("me", analysis)
    client = TestClient(Starlette(routes=picture_routes(sessions)))
    html = views.stage(session, 55, "spectrum") + views.pair(session, "spectrum")
    html += views.test(session, 50, analysis.test("ttame", session.class_id, 50))
    addresses = set(re.findall(r'(?:src|href)="([^"]+)"', html.replace("&amp;", "&")))
    kinds = {
        "picture.jpg",
        "ground.jpg",
        "layer.png",
        "change.png",
        "kept.jpg",
        "hidden.jpg",
        "overlay.png",
        "map.npy",
    }
    assert {re.split(r"[/?]", address)[2] for address in addresses} == kinds
    for address in addresses:
        assert not address.startswith(("/", "http"))
        answer = client.get(f"/{address}")
        assert answer.status_code == 200
        assert "no-store" in answer.headers["cache-control"]
        assert ("attachment" in answer.headers.get("content-disposition", "")) == ("download" in address)
        if ".npy" in address:
            found = np.load(io.BytesIO(answer.content), allow_pickle=False)
            assert np.array_equal(found, analysis.placed_map("ttame", session.class_id)[0])
        else:
            assert Image.open(io.BytesIO(answer.content)).size == (90, 70)
    base = f"/ttame/{analysis.token}"
    with Cost(analysis.explainer.model.backbone) as cost:
        for bad in (
            *("layer.png", "layer.png?class=99", "layer.png?class=x", "layer.png?class=1&colours=x"),
            *("layer.png?class=1&method=gradcam", "layer.png?class=1&method=rise", "kept.jpg?class=1&percent=0"),
        ):
            assert client.get(f"{base}/{bad}").status_code == 400
    assert cost.forward == 0  # nobody can make the server work past its queue
    assert client.get("/ttame/guessed/picture.jpg").status_code == 404
    assert client.get(f"{base}/config.json").status_code == 404


def test_what_is_kept_and_hidden_add_up_to_the_picture(analysis):
    from hf_ttame.space.rendering import masked, photograph

    kept, hidden, whole = (
        np.asarray(Image.open(io.BytesIO(content))).astype(int)
        for content in (
            masked(analysis, "ttame", 1, 40, hidden=False),
            masked(analysis, "ttame", 1, 40, hidden=True),
            photograph(analysis),
        )
    )
    assert np.abs(kept + hidden - whole).mean() < 6  # JPEG
    share = (kept.sum(axis=-1) > 60).mean()
    assert 0.3 < share < 0.5


# ---- the folder that is pushed --------------------------------------------------------------------------------------


def test_the_space_folder():
    space = ROOT / "spaces" / "ttame-demo"
    header = yaml.safe_load((space / "README.md").read_text().split("---")[1])
    needed = {"title", "emoji", "colorFrom", "colorTo", "sdk", "sdk_version", "python_version", "app_file", "models"}
    assert needed | {"license"} <= header.keys()
    assert header["sdk"] == "gradio"
    assert (space / header["app_file"]).is_file()
    assert len(header["short_description"]) <= 60
    app = (space / "app.py").read_text()
    assert "from hf_ttame.space.serving import launch" in app
    assert len(app.splitlines()) < 12


def test_push_space_publishes_that_folder(tmp_path):
    with running_hub() as hub:
        done = subprocess.run(
            [sys.executable, "-m", "hf_ttame.cli", "push-space", "org/demo", "--private"],
            env=hub.environment(tmp_path / "home", PYTHONPATH=str(ROOT)),
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        assert "space org/demo: 3 files" in done.stdout
        assert "published: " in done.stdout
        pushed = hub.files("org/demo", "spaces")
        space = ROOT / "spaces" / "ttame-demo"
        assert {name: content.decode() for name, content in pushed.items() if name != ".gitattributes"} == {
            file.name: file.read_text() for file in space.iterdir() if file.is_file()
        }
        assert hub.repositories["spaces", "org/demo"].private
