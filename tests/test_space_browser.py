"""The Space in a real browser: Chromium, driven by Playwright, on a server of this process."""

import base64
import io
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from conftest import make_vit, vit_processor
from hub_server import running_hub
from PIL import Image

from hf_ttame import TTameModel

if TYPE_CHECKING:
    import gradio as gr

playwright_api = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium (Debian: apt install chromium)")
PRESSED = '.tt-bar[aria-pressed="true"] .tt-label'
ROOT = Path(__file__).parents[1]
PHOTOGRAPHS = ROOT / "hf_ttame" / "assets" / "photographs"
REPORT = ROOT / "model_cards" / "efficientnet_lite0" / "report.json"
PATIENCE = 30_000  # milliseconds: a busy machine takes its time
# Chromium's own camera: a green picture with a paler disc that turns.
CAMERA = ("--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream")


@pytest.fixture(scope="module")
def space() -> Iterator["gr.Blocks"]:
    from hf_ttame.space.serving import running

    with running() as page:
        yield page
        uploads = Path(os.environ["GRADIO_TEMP_DIR"])
        assert uploads.is_dir()
    assert not uploads.exists()


@pytest.fixture(scope="module")
def server(space: "gr.Blocks") -> str:
    return str(space.local_url)


@pytest.fixture(scope="module")
def browser() -> Iterator["playwright_api.Browser"]:
    with playwright_api.sync_playwright() as playwright:
        playwright_api.expect.set_options(timeout=PATIENCE)
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", *CAMERA])
        yield found
        found.close()


Visit = Callable[..., "playwright_api.Page"]


@pytest.fixture(scope="module")
def visit(browser: "playwright_api.Browser", server: str) -> Iterator[Visit]:
    """Opens the page as a new visitor; whatever the page asks for elsewhere, or any error in it, fails the test."""
    contexts, foreign, errors = [], [], []

    def watch(request: "playwright_api.Request") -> None:
        if not request.url.startswith((server, "data:", "blob:")):
            foreign.append(request.url)

    def new(**settings: object) -> "playwright_api.Page":
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 860}, **settings})
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(PATIENCE)
        page.on("request", watch)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(server)
        page.wait_for_selector("#tt-test .tt-chart")
        return page

    yield new
    for context in contexts:
        context.close()
    assert foreign == []
    assert errors == []


@pytest.fixture(scope="module")
def page(visit: Visit) -> "playwright_api.Page":
    """One visitor who stays: a page takes seconds to load."""
    return visit()


# A picture into the clipboard, as another program would put it there.
_COPY = """async data => {
  const bytes = Uint8Array.from(atob(data), c => c.charCodeAt(0));
  const picture = await createImageBitmap(new Blob([bytes], {type: "image/jpeg"}));
  const canvas = new OffscreenCanvas(picture.width, picture.height);
  canvas.getContext("2d").drawImage(picture, 0, 0);
  const png = await canvas.convertToBlob({type: "image/png"});
  await navigator.clipboard.write([new ClipboardItem({"image/png": png})]);
}"""


def upload(page: "playwright_api.Page", path: Path) -> None:
    page.set_input_files("#tt-picture input[type=file]", path)


def is_shown(page: "playwright_api.Page", label: str) -> None:
    playwright_api.expect(page.locator(PRESSED)).to_have_text(label)


def loaded(page: "playwright_api.Page", part: str) -> None:
    """Every picture in a part of the page has arrived."""
    page.wait_for_function(
        "part => { const all = [...document.querySelectorAll(part + ' img')];"
        " return all.length && all.every(image => image.complete && image.naturalWidth > 0); }",
        arg=part,
    )


def test_a_visit(page: "playwright_api.Page", tmp_path: Path) -> None:
    is_shown(page, "espresso")
    loaded(page, "#tt-stage")
    upload(page, PHOTOGRAPHS / "cat.jpg")
    is_shown(page, "tiger cat")
    playwright_api.expect(page.locator("#tt-stage")).to_contain_text("451 x 300")

    # Another class, by mouse and by keyboard: another map, and a measurement of it.
    before = page.get_attribute("#tt-stage .tt-layer", "src")
    page.locator(".tt-bar").nth(2).click()
    is_shown(page, "tabby")
    assert page.get_attribute("#tt-stage .tt-layer", "src") != before
    playwright_api.expect(page.locator("#tt-test")).to_contain_text("Confidence in tabby")
    page.locator(".tt-bar").nth(1).focus()
    page.keyboard.press("Enter")
    is_shown(page, "Egyptian cat")
    assert page.evaluate("document.activeElement.dataset.class") == page.locator(".tt-bar").nth(1).get_attribute(
        "data-class"
    )
    page.locator("#tt-other").get_by_role("textbox").fill("lynx, catamount")
    page.keyboard.press("Enter")
    is_shown(page, "lynx")

    # Sliders, by keyboard.
    kept = page.locator("#tt-test .tt-kept dd")
    at_50 = kept.inner_text()
    page.locator("#tt-keep input[type=range]").focus()
    for _ in range(3):
        page.keyboard.press("PageUp")
    playwright_api.expect(page.locator("#tt-test")).to_contain_text("Only the top 80 %")
    assert kept.inner_text() != at_50
    page.locator("#tt-strength input[type=range]").focus()
    page.keyboard.press("Home")
    page.wait_for_function("getComputedStyle(document.querySelector('#tt-stage .tt-layer')).opacity === '0'")
    page.get_by_label("viridis").click()
    page.wait_for_function("document.querySelector('#tt-stage .tt-layer').src.includes('viridis')")
    assert page.get_by_label("viridis").is_checked()

    # Downloads.
    with page.expect_download() as download:
        page.get_by_role("link", name="Map, NumPy").click()
    found = np.load(download.value.path())
    assert (found.shape, found.dtype) == ((300, 451), np.float32)
    with page.expect_download() as download:
        page.get_by_role("link", name="Overlay, PNG").click()
    assert re.fullmatch(r"overlay_\d+\.png", download.value.suggested_filename)
    download.value.save_as(tmp_path / "overlay.png")
    shown = np.asarray(Image.open(tmp_path / "overlay.png"))
    photograph = np.asarray(Image.open(PHOTOGRAPHS / "cat.jpg"))
    inside = (slice(100, 200), slice(150, 300))
    assert np.array_equal(shown[inside], photograph[inside])  # at strength 0, the picture itself
    is_shown(page, "lynx")  # and still on the page


def test_methods_pair_and_report(page: "playwright_api.Page") -> None:
    page.locator("[data-example=coffee]").click()
    is_shown(page, "espresso")
    methods = page.locator("#tt-methods figure")
    playwright_api.expect(methods.nth(1)).to_contain_text(re.compile(r"Grad-CAM\s*Kept: "))
    page.locator("#tt-run").click()
    playwright_api.expect(page.locator("#tt-methods .progress-level")).to_be_visible()
    page.locator("#tt-stop").click()
    playwright_api.expect(methods.nth(2)).to_contain_text(re.compile(r"RISE \d+ masks"), timeout=30_000)
    playwright_api.expect(page.locator("#tt-notice")).to_contain_text("of 500 masks")
    loaded(page, "#tt-methods")

    page.get_by_role("tab", name="Two classes").click()
    loaded(page, "#tt-pair")
    second = page.locator("#tt-second input")
    second.click()
    page.keyboard.press("Control+A")
    page.keyboard.type("tabby")
    page.keyboard.press("Enter")
    playwright_api.expect(page.locator("#tt-pair figure").nth(1)).to_contain_text("tabby")
    playwright_api.expect(page.locator("#tt-pair figure").nth(2)).to_contain_text("espresso or tabby stronger")
    loaded(page, "#tt-pair")

    page.get_by_role("tab", name="Report").click()
    measures = json.loads(REPORT.read_text())["methods"]["ttame"]["measures"]
    figures = " / ".join(f"{measures[name]['mean']:.1f}" for name in ("AD soft 100", "IC soft 100"))
    playwright_api.expect(page.locator("#tt-report")).to_contain_text(figures)


def test_bad_files_and_names_get_words(page: "playwright_api.Page", tmp_path: Path) -> None:
    notice = page.locator("#tt-notice")
    (tmp_path / "text.jpg").write_text("not a picture")
    Image.new("1", (20_000, 20_000)).save(tmp_path / "bomb.png")
    Image.new("RGB", (1, 1)).save(tmp_path / "tiny.png")
    (tmp_path / "cut.jpg").write_bytes((PHOTOGRAPHS / "cat.jpg").read_bytes()[:20_000])
    (tmp_path / "words.txt").write_text("not a picture")
    for name, words in {
        "text.jpg": "not a picture",
        "bomb.png": "pixels",
        "tiny.png": "1 x 1",
        "cut.jpg": "damaged",
    }.items():
        upload(page, tmp_path / name)
        playwright_api.expect(notice).to_contain_text(words)
    upload(page, tmp_path / "words.txt")
    playwright_api.expect(page.get_by_text("Only image/* allowed")).to_be_visible()
    frames = [Image.new("RGB", (90, 70), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    upload(page, tmp_path / "moving.gif")
    playwright_api.expect(notice).to_contain_text("first frame")

    # Another explainer: one that is none, and one in a folder, with its own classes.
    torch.manual_seed(0)
    TTameModel.from_backbone(make_vit(), processor=vit_processor()).save_pretrained(tmp_path / "vit")
    for name, words in {"abc": "form 'organisation/name'", str(tmp_path): "no explainer"}.items():
        page.locator("#tt-explainer input").fill(name)
        page.keyboard.press("Enter")
        playwright_api.expect(notice).to_contain_text(words)
    page.locator("#tt-explainer input").fill(str(tmp_path / "vit"))
    page.keyboard.press("Enter")
    playwright_api.expect(page.locator(".tt-bars")).to_contain_text("garbage truck")
    playwright_api.expect(notice).to_be_empty()


def test_an_upload_goes_from_the_disk(page: "playwright_api.Page", tmp_path: Path) -> None:
    from hf_ttame.space.uploads import Sweeper

    sweeper = next(thread for thread in threading.enumerate() if isinstance(thread, Sweeper))
    (tmp_path / "bad.jpg").write_text("not a picture")
    (tmp_path / "good.jpg").write_bytes((PHOTOGRAPHS / "cat.jpg").read_bytes())

    def there() -> set[str]:
        return {file.name for file in sweeper.folder.rglob("*.*")} & {"good.jpg", "bad.jpg"}

    upload(page, tmp_path / "bad.jpg")
    playwright_api.expect(page.locator("#tt-notice")).to_contain_text("not a picture")
    upload(page, tmp_path / "good.jpg")
    playwright_api.expect(page.locator("#tt-notice")).to_be_empty()
    assert there() == {"good.jpg", "bad.jpg"}  # in the server's own folder
    page.wait_for_timeout(500)  # the answer is on its way before the file is noted as read
    assert len(sweeper._read) >= 2
    for key in list(sweeper._read):
        sweeper._read[key] = 0.0  # as if half a minute had passed
    for _ in range(50):
        if not there():
            break
        page.wait_for_timeout(100)
    assert there() == set()


def test_two_visitors_at_once(page: "playwright_api.Page", visit: Visit) -> None:
    one, two = page, visit()
    one.locator("#tt-explainer input").fill("efficientnet-lite0")
    one.keyboard.press("Enter")
    playwright_api.expect(one.locator(".tt-bars")).not_to_contain_text("garbage truck")
    upload(one, PHOTOGRAPHS / "cat.jpg")
    upload(two, PHOTOGRAPHS / "rocket.jpg")
    is_shown(one, "tiger cat")
    is_shown(two, "missile")
    one.locator(".tt-bar").nth(1).click()
    two.locator(".tt-bar").nth(2).click()
    is_shown(one, "Egyptian cat")
    playwright_api.expect(two.locator(".tt-bar").nth(2)).to_have_attribute("aria-pressed", "true")
    loaded(one, "#tt-stage")
    loaded(two, "#tt-stage")


def test_quick_wishes_are_not_dropped(page: "playwright_api.Page", tmp_path: Path) -> None:
    stage = page.locator("#tt-stage")
    for name in ("rocket", "coffee"):
        page.locator(f"[data-example={name}]").click()
    is_shown(page, "espresso")
    page.wait_for_timeout(1000)
    is_shown(page, "espresso")  # and no rocket comes after it
    for number in (1, 2):
        page.locator(".tt-bar").nth(number).click()
    playwright_api.expect(page.locator(".tt-bar").nth(2)).to_have_attribute("aria-pressed", "true")
    playwright_api.expect(page.locator("#tt-test")).to_contain_text(page.locator(PRESSED).inner_text())
    Image.open(PHOTOGRAPHS / "rocket.jpg").resize((4000, 3000)).save(tmp_path / "slow.jpg")

    def wishes_for_it(request: "playwright_api.Request") -> bool:
        return "/queue/join" in request.url and "slow.jpg" in (request.post_data or "")

    with page.expect_request(wishes_for_it):  # what is clicked while the file still travels would come before it
        upload(page, tmp_path / "slow.jpg")
    page.locator("[data-example=coffee]").click()
    is_shown(
        page, "espresso"
    )  # by now the field has changed from uploading to its picture: it would lose another file
    upload(page, PHOTOGRAPHS / "cat.jpg")
    playwright_api.expect(stage).to_contain_text("451 x 300")
    page.wait_for_timeout(1500)
    playwright_api.expect(stage).to_contain_text("451 x 300")
    playwright_api.expect(page.locator("#tt-test")).to_contain_text("Confidence in tiger cat")


def test_on_a_phone_and_in_the_dark(visit: Visit) -> None:
    page = visit(viewport={"width": 390, "height": 844}, is_mobile=True, has_touch=True, color_scheme="dark")
    for tab in ("Two classes", "Report", "Explain"):
        page.get_by_role("tab", name=tab).tap()
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.locator(".tt-bar").nth(1).tap()
    is_shown(page, "cup")
    assert brightness(page, "backgroundColor") + 380 < brightness(page, "color")  # of 765: readable


def test_in_the_light(page: "playwright_api.Page") -> None:
    assert brightness(page, "backgroundColor") > brightness(page, "color") + 380
    assert page.evaluate("document.documentElement.scrollWidth") <= 1280


def test_paste(page: "playwright_api.Page") -> None:
    copy(page, "rocket")
    page.locator("#tt-picture button[aria-label*=lipboard]").click()
    is_shown(page, "missile")


def test_paste_by_keyboard(page: "playwright_api.Page") -> None:
    """Wherever the focus is, and after the button was used: gradio's field then has no input for files."""
    rocket = page.locator("[data-example=rocket]")
    for button in (False, True):
        rocket.click()
        is_shown(page, "missile")
        if button:
            copy(page, "coffee")
            page.locator("#tt-picture button[aria-label*=lipboard]").click()
            is_shown(page, "espresso")
        copy(page, "cat")
        page.locator("#tt-keep input[type=range]").focus()
        page.keyboard.press("Control+V")
        is_shown(page, "tiger cat")
    rocket.click()
    is_shown(page, "missile")
    # In a field for text, text stays text, also where a picture is beside it.
    other = page.locator("#tt-other").get_by_role("textbox")
    page.evaluate(
        """async () => {
          const [item] = await navigator.clipboard.read();
          const image = await item.getType("image/png"), text = new Blob(["lynx"], { type: "text/plain" });
          await navigator.clipboard.write([new ClipboardItem({ "image/png": image, "text/plain": text })]);
        }"""
    )
    other.focus()
    page.keyboard.press("Control+V")
    playwright_api.expect(other).to_have_value("lynx")
    page.wait_for_timeout(500)
    is_shown(page, "missile")
    other.fill("")


def test_webcam(page: "playwright_api.Page") -> None:
    page.context.grant_permissions(["camera"])
    page.evaluate(
        """() => {
          const media = navigator.mediaDevices, ask = media.getUserMedia.bind(media);
          window.tracks = [];
          media.getUserMedia = async (wish) => {
            const stream = await ask(wish);
            window.tracks.push(...stream.getTracks());
            return stream;
          };
        }"""
    )
    states = "window.tracks.map((track) => track.kind + ' ' + track.readyState)"
    page.locator("#tt-picture button[aria-label*=camera]").click()
    page.get_by_text("Click to Access Webcam").click()
    page.wait_for_function("document.querySelector('#tt-picture video')?.videoWidth > 0")
    assert page.evaluate(states) == ["video live"]  # and no microphone
    before = page.get_attribute("#tt-stage .tt-layer", "src")
    page.get_by_role("button", name="capture photo").click()
    playwright_api.expect(page.locator("#tt-stage .tt-layer")).not_to_have_attribute("src", before)
    loaded(page, "#tt-stage")
    assert page.locator(".tt-bar").count() == 5
    playwright_api.expect(page.locator("#tt-test")).to_contain_text(page.locator(PRESSED).inner_text())
    playwright_api.expect(page.locator("#tt-notice")).to_be_empty()
    assert page.evaluate(states) == ["video ended"]
    taken = page.request.get(page.locator("#tt-stage img").first.evaluate("image => image.src")).body()
    red, green, blue = np.asarray(Image.open(io.BytesIO(taken)).convert("RGB")).mean(axis=(0, 1))
    assert green > 100
    assert max(red, blue) < 50


def test_a_full_queue_gets_words(page: "playwright_api.Page", space: "gr.Blocks", monkeypatch) -> None:
    """While four passes do not end and one wish waits, the next is refused; then all goes on."""
    from hf_ttame.space.analysis import Analysis

    go_on, begun = threading.Event(), threading.Semaphore(0)
    made = Analysis.__init__

    def slow(*arguments: object) -> None:
        begun.release()
        assert go_on.wait(30)
        made(*arguments)

    page.locator("[data-example=coffee]").click()
    is_shown(page, "espresso")
    playwright_api.expect(page.locator("#tt-test")).to_contain_text("espresso")
    monkeypatch.setattr(Analysis, "__init__", slow)
    assert space._queue.max_size == 64  # as docs/space.md says
    monkeypatch.setattr(space._queue, "max_size", 1)
    rocket, words = page.locator("[data-example=rocket]"), page.get_by_text("currently busy. Please try again")
    try:
        for _ in range(4):
            rocket.click()
            assert begun.acquire(timeout=10)
        rocket.click()
        for _ in range(100):
            if len(space._queue):
                break
            page.wait_for_timeout(50)
        assert len(space._queue) == 1
        playwright_api.expect(words).to_have_count(0)
        rocket.click()
        playwright_api.expect(words).to_be_visible()
        is_shown(page, "espresso")
    finally:
        go_on.set()
    # The real size again: what follows a picture waits in the queue too, and one place would refuse the next wish.
    monkeypatch.setattr(space._queue, "max_size", 64)
    is_shown(page, "missile")
    page.locator("[data-example=cat]").click()
    is_shown(page, "tiger cat")


def test_an_explainer_of_the_hub(browser: "playwright_api.Browser", vit_folder: Path, tmp_path: Path) -> None:
    """Of `ttame space`, a process of its own: which Hub is asked is read at import."""
    torch.manual_seed(0)
    TTameModel.from_backbone(make_vit(), processor=vit_processor()).save_pretrained(tmp_path / "vit")
    with running_hub() as hub:
        hub.put("org/explainer", tmp_path / "vit")
        hub.put("org/classifier", vit_folder)
        with serving(hub.environment(tmp_path / "home", PYTHONPATH=str(ROOT)), tmp_path / "errors") as address:
            page = browser.new_page()
            page.set_default_timeout(PATIENCE)
            page.goto(address)
            is_shown(page, "espresso")
            notice = page.locator("#tt-notice")
            for name, words in {
                "org/nothing": "There is no explainer 'org/nothing' on the Hub",
                "org/classifier": "'org/classifier' is no explainer, but a model of type 'vit'",
            }.items():
                page.locator("#tt-explainer input").fill(name)
                page.keyboard.press("Enter")
                playwright_api.expect(notice).to_contain_text(words)
                playwright_api.expect(notice.get_by_role("alert")).to_be_visible()
                is_shown(page, "espresso")
            page.locator("#tt-explainer input").fill("org/explainer")
            page.keyboard.press("Enter")
            playwright_api.expect(page.locator(".tt-bars")).to_contain_text("garbage truck")
            playwright_api.expect(notice).to_be_empty()
            loaded(page, "#tt-stage")
            before = page.get_attribute("#tt-stage .tt-layer", "src")
            upload(page, PHOTOGRAPHS / "cat.jpg")
            playwright_api.expect(page.locator("#tt-stage")).to_contain_text("451 x 300")
            assert page.get_attribute("#tt-stage .tt-layer", "src") != before
            loaded(page, "#tt-stage")
            page.close()
        assert any("/org/explainer/" in line and "model.safetensors" in line for line in hub.requests)
    assert "Traceback" not in (tmp_path / "errors").read_text()


@contextmanager
def serving(environment: dict[str, str], errors: Path) -> Iterator[str]:
    """`ttame space` in a process of its own, ended in the end: its address."""
    command = [sys.executable, "-m", "hf_ttame.cli", "space"]
    with errors.open("w") as file:
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=file, text=True)
    try:
        assert process.stdout is not None
        said = process.stdout.readline()
        found = re.search(r"http://\S+?(?=;|\s)", said)
        assert found, errors.read_text()
        yield found[0]
        assert process.poll() is None
    finally:
        process.terminate()
        process.wait(20)
        process.stdout.close()


def copy(page: "playwright_api.Page", name: str) -> None:
    """An example into the clipboard."""
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.evaluate(_COPY, base64.b64encode((PHOTOGRAPHS / f"{name}.jpg").read_bytes()).decode())


def brightness(page: "playwright_api.Page", what: str) -> int:
    """Of a colour of the page: red + green + blue."""
    colour = page.evaluate(f"getComputedStyle(document.body).{what}")
    return sum(int(part) for part in re.findall(r"\d+", colour)[:3])
