"""The static Space in a real browser: picture in, map out, and nothing leaves the machine."""

import base64
import io
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hf_ttame import TTameModel
from hf_ttame.hub import check_contents, files_to_push
from hf_ttame.image_processing import preprocess

sync_api = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
ROOT = Path(__file__).parents[1]
PHOTOGRAPHS = ROOT / "hf_ttame" / "assets" / "photographs"
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.skipif(BROWSER is None, reason="needs Chromium"),
    pytest.mark.skipif(shutil.which("npm") is None, reason="needs npm"),
]


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def site(lite_onnx: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of the complete Space."""
    folder = tmp_path_factory.mktemp("web")
    build = [
        sys.executable,
        str(ROOT / "spaces" / "ttame-web" / "build.py"),
        str(folder),
        "--explainer",
        str(lite_onnx),
    ]
    done = subprocess.run(build, capture_output=True, text=True, timeout=120)
    if "npm could not fetch" in done.stderr:
        pytest.skip(done.stderr)
    assert done.returncode == 0, done.stderr
    sent, left_out = files_to_push(folder, "space", include_examples=True)  # `ttame push` takes all of it
    check_contents(folder, sent, include_examples=True)
    assert [file.name for file in left_out] == []
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}/"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def context() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        sync_api.expect.set_options(timeout=30_000)  # a busy machine takes its time
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser.new_context(viewport={"width": 1200, "height": 900}, accept_downloads=True)
        browser.close()


@pytest.fixture(scope="module")
def page(site: str, context: Any) -> Any:
    """The page once its explainer is loaded; `page.asked` holds every address that it asked for."""
    page = context.new_page()
    page.asked, page.problems = [], []
    page.on("request", lambda request: page.asked.append(request.url))
    page.on("pageerror", lambda error: page.problems.append(str(error)))
    page.goto(site)
    page.wait_for_selector("body[data-ready]", timeout=60_000)
    return page


def give(page: Any, name: str, content: bytes, mime: str = "image/png") -> None:
    page.set_input_files("#file", {"name": name, "mimeType": mime, "buffer": content})


def shown(page: Any) -> np.ndarray:
    """The canvas as RGB."""
    data = page.evaluate("document.getElementById('canvas').toDataURL('image/png').split(',')[1]")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")).astype(int)


def png(picture: Image.Image) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, "png")
    return stream.getvalue()


def test_a_picture_gives_the_maps_of_the_package(page: Any, lite: TTameModel) -> None:
    picture = Image.open(PHOTOGRAPHS / "coffee.jpg").convert("RGB")
    give(page, "cup.png", png(picture))
    page.wait_for_selector("body[data-shown='967']")
    (expected,) = lite.explain(picture)
    assert expected.class_id == 967
    buttons = page.query_selector_all("#classes button")
    assert len(buttons) == 5
    assert buttons[0].inner_text().split() == ["espresso", f"{100 * expected.score:.1f}", "%"]
    difference = np.abs(shown(page) - np.asarray(expected.overlay()).astype(int))
    assert difference.max() <= 3  # of 255
    with page.expect_download() as download:
        page.click("#download")
    assert download.value.suggested_filename == "cup_espresso.png"
    assert Image.open(download.value.path()).size == picture.size


def test_pixels_are_those_of_the_processor(page: Any, lite: TTameModel) -> None:
    """The picture is resized as Pillow does it, to the last of the 256 levels."""
    picture = Image.open(PHOTOGRAPHS / "cat.jpg").convert("RGB")
    values = page.evaluate(
        """async (content) => {
          const { prepare } = await import("./explainer.js");
          const facts = await (await fetch("explainer.json")).json();
          const bytes = Uint8Array.from(atob(content), (c) => c.charCodeAt(0));
          const bitmap = await createImageBitmap(new Blob([bytes]));
          const context = new OffscreenCanvas(bitmap.width, bitmap.height).getContext("2d");
          context.drawImage(bitmap, 0, 0);
          const image = context.getImageData(0, 0, bitmap.width, bitmap.height);
          return Array.from(prepare(image, facts.preprocessing));
        }""",
        base64.b64encode(png(picture)).decode(),
    )
    expected = preprocess(lite.image_processor, [picture]).numpy().ravel()
    assert np.abs(np.array(values) - expected).max() < 1e-6


def test_classes_switch_without_another_pass_and_by_keyboard(page: Any) -> None:
    page.click("#examples button[data-name=rocket]")
    page.wait_for_selector("body[data-shown='657']")
    first, said = shown(page), page.inner_text("#status")
    page.focus("#classes button:nth-child(1)")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    assert page.get_attribute("#classes button:nth-child(2)", "aria-pressed") == "true"
    assert page.get_attribute("#classes button:nth-child(1)", "aria-pressed") == "false"
    assert np.abs(shown(page) - first).max() > 20
    assert page.inner_text("#status") == said  # it names the time of the one pass
    page.focus("#strength")
    page.keyboard.press("Home")
    photo = np.asarray(Image.open(PHOTOGRAPHS / "rocket.jpg").convert("RGB")).astype(int)
    middle = slice(40, 380), slice(200, 400)  # the crop cuts the borders away
    assert np.abs(shown(page) - photo)[middle].max() <= 3
    page.fill("#strength", "55")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("notes.txt", b"no picture at all", "not a picture"),
        ("half.png", png(Image.new("RGB", (300, 300)))[:80], "not a picture"),
        ("empty.jpg", b"", "is empty"),
        ("line.png", png(Image.new("L", (2000, 2))), "too thin"),
    ],
    ids=["text", "half", "empty", "line"],
)
def test_bad_files_get_words(page: Any, name: str, content: bytes, words: str) -> None:
    give(page, name, content)
    page.wait_for_function("words => document.getElementById('status').textContent.includes(words)", arg=words)
    assert "bad" in page.get_attribute("#status", "class")
    give(page, "fine.png", png(Image.new("RGB", (1, 1), "red")))  # tiny, and the page is still up
    page.wait_for_function("() => document.getElementById('status').textContent.startsWith('One pass')")


@pytest.mark.parametrize(
    ("broken", "answer", "words"),
    [
        (
            "explainer.onnx",
            {"status": 404},
            "explainer.onnx is missing (404); run build.py to make the complete folder",
        ),
        (
            "explainer.json",
            {"status": 503},
            "explainer.json is missing (503); run build.py to make the complete folder",
        ),
        ("explainer.onnx", {"status": 200, "body": b"no graph"}, "protobuf parsing failed"),
        ("explainer.onnx", None, "Failed to fetch"),
    ],
    ids=["missing", "facts", "garbage", "cut"],
)
def test_a_failed_load_is_said_and_said_again_for_a_picture(
    site: str, context: Any, broken: str, answer: dict[str, Any] | None, words: str
) -> None:
    page, problems = context.new_page(), []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.route(f"**/{broken}", lambda route: route.fulfill(**answer) if answer else route.abort())
    page.goto(site)
    status = page.locator("#status")
    sync_api.expect(status).to_contain_text("The explainer cannot be loaded: ")
    sync_api.expect(status).to_contain_text(words)
    said = status.inner_text()
    page.evaluate("() => { document.getElementById('status').textContent = ''; }")
    give(page, "fine.png", png(Image.new("RGB", (9, 9), "red")))
    sync_api.expect(status).to_have_text(said)
    assert "bad" in page.get_attribute("#status", "class")
    assert page.locator("#result").is_hidden()
    assert page.get_attribute("body", "data-ready") is None
    give(page, "notes.txt", b"no picture at all")  # a bad picture is still called one
    sync_api.expect(status).to_contain_text("not a picture")
    page.close()
    assert problems == []


def test_rotation_paste_and_drop(page: Any) -> None:
    stream = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    Image.new("RGB", (60, 40), "blue").save(stream, "jpeg", exif=exif)
    give(page, "turned.jpg", stream.getvalue(), "image/jpeg")
    page.wait_for_function("() => document.getElementById('canvas').height === 60")
    for event, field, width in (("paste", "clipboardData", 31), ("drop", "dataTransfer", 32)):
        page.evaluate(
            """([event, field, width, content]) => {
              const transfer = new DataTransfer();
              const bytes = Uint8Array.from(atob(content), (c) => c.charCodeAt(0));
              transfer.items.add(new File([bytes], "x.png", { type: "image/png" }));
              const Kind = event === "paste" ? ClipboardEvent : DragEvent;
              document.dispatchEvent(new Kind(event, { [field]: transfer, bubbles: true, cancelable: true }));
            }""",
            [event, field, width, base64.b64encode(png(Image.new("RGB", (width, 40), "green"))).decode()],
        )
        page.wait_for_function("width => document.getElementById('canvas').width === width", arg=width)


def test_phone_and_dark(page: Any) -> None:
    light = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.set_viewport_size({"width": 360, "height": 740})
    page.emulate_media(color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != light
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    assert page.evaluate("document.getElementById('canvas').getBoundingClientRect().width") <= 360
    page.set_viewport_size({"width": 1200, "height": 900})
    page.emulate_media(color_scheme="light")


def test_nothing_leaves_the_machine(page: Any, site: str) -> None:
    """After all of the above; and the page could not connect elsewhere if it tried."""
    foreign = [url for url in page.asked if not url.startswith((site, "blob:", "data:"))]
    assert foreign == []
    assert any(url.endswith("explainer.onnx") for url in page.asked)
    came: list[str] = []

    class Other(Quiet):
        def do_GET(self) -> None:
            came.append(self.path)
            self.send_response(200)
            self.send_header("Access-Control-Allow-Origin", "*")
            self.end_headers()

    other = ThreadingHTTPServer(("127.0.0.1", 0), Other)
    threading.Thread(target=other.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{other.server_address[1]}/"
    tried = page.evaluate(
        """async (address) => {
          const image = new Promise((resolve) => {
            const element = new Image();
            element.onload = () => resolve("loaded");
            element.onerror = () => resolve("refused");
            element.src = address + "image";
          });
          return [await fetch(address + "fetch").then(() => "loaded", () => "refused"), await image];
        }""",
        address,
    )
    other.shutdown()
    other.server_close()
    assert tried == ["refused", "refused"]
    assert came == []
    assert page.problems == []
