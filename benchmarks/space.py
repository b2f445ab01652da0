"""The Space as its visitors meet it: first map, class switch, several at once, memory over many uploads.

    python benchmarks/space.py --output benchmarks/space.json

Needs the `test` extra and a Chromium. The server is `ttame space` with the shipped explainer, in a process of its own.
Times in the browser run from the wish (a file is chosen, a class is clicked) until the map's picture has been drawn.
Visitors at once and the many uploads come from gradio's own client, which does what the page does: it uploads, fetches
the map, has it measured (two masked passes and Grad-CAM) and fetches the pictures. There, too, a time ends with the
map's picture; "measured" ends with the pictures of the measurement.
Ends in one JSON line.
"""

import argparse
import json
import os
import platform
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from PIL import Image

ROOT = Path(__file__).parents[1]
PHOTOGRAPHS = sorted((ROOT / "hf_ttame" / "assets" / "photographs").glob("*.jpg"))
_DRAWN = """([part, before]) => {
  const layer = document.querySelector(part + " .tt-layer");
  return layer && layer.src !== before && layer.complete && layer.naturalWidth > 0;
}"""


@contextmanager
def served() -> Iterator[tuple[str, int]]:
    """(address, process id) of a `ttame space`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", "hf_ttame.cli", "space", "--port", str(port)]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(address, timeout=5).close()
                break
            except OSError:
                if process.poll() is not None:
                    assert process.stderr is not None
                    raise SystemExit(process.stderr.read().decode()) from None
                time.sleep(0.2)
        yield address, process.pid
    finally:
        process.terminate()
        process.wait(30)


def in_the_browser(address: str, large: Path, rounds: int) -> dict[str, Any]:
    """Milliseconds of first maps and class switches."""
    from playwright.sync_api import sync_playwright

    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        raise SystemExit("this benchmark needs a Chromium (Debian: apt install chromium)")
    times: dict[str, list[float]] = {"first_map": [], "first_map_12_megapixels": [], "class_switch": []}
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page()
        page.goto(address)
        page.wait_for_selector("#tt-methods .tt-layer")

        def timed(name: str, act: Any) -> None:
            before = page.get_attribute("#tt-stage .tt-layer", "src")
            before = page.evaluate("address => new URL(address, document.baseURI).href", before)
            began = time.perf_counter()
            act()
            page.wait_for_function(_DRAWN, arg=["#tt-stage", before])
            times[name].append(1000 * (time.perf_counter() - began))
            page.wait_for_timeout(500)  # the measurement that follows

        for number in range(rounds + 1):
            photograph = PHOTOGRAPHS[number % len(PHOTOGRAPHS)]
            timed("first_map", lambda file=photograph: page.set_input_files("#tt-picture input[type=file]", file))
            for bar in (1, 2, 0):
                timed("class_switch", lambda n=bar: page.locator(".tt-bar").nth(n).click())
            timed("first_map_12_megapixels", lambda: page.set_input_files("#tt-picture input[type=file]", large))
        browser.close()
    return {name: _spread(values[1:]) for name, values in times.items()}


class Visitor:
    """Does with gradio's client what the page does for an upload, in the same order."""

    def __init__(self, address: str):
        from gradio_client import Client

        self.address = address
        self.client = Client(address, verbose=False)

    def upload(self, file: Path) -> tuple[float, float]:
        """Milliseconds until the map's picture is there, and until the measurement is.

        Raises:
            RuntimeError: an answer holds no map.
        """
        from gradio_client import handle_file

        began = time.perf_counter()
        answer = self.client.predict(handle_file(file), "efficientnet-lite0", 55, "spectrum", api_name="/upload")
        others = self._fetch_map(answer)
        mapped = 1000 * (time.perf_counter() - began)
        answer = self.client.predict(50, "spectrum", api_name="/measure")
        others += self._fetch_map(answer)
        for picture in others:
            self._fetch(picture)
        return mapped, 1000 * (time.perf_counter() - began)

    def _fetch_map(self, answer: object) -> list[str]:
        """Fetch the first map that an answer shows; returns the other pictures, each once."""
        pictures = list(dict.fromkeys(re.findall(r'<img[^>]* src="(ttame/[^"]+)"', str(answer))))
        first = next((picture for picture in pictures if "/layer.png?" in picture), None)
        if first is None:
            raise RuntimeError(f"no map in the answer: {str(answer)[:200]}")
        self._fetch(first)
        return [picture for picture in pictures if picture != first]

    def _fetch(self, picture: str) -> None:
        with urllib.request.urlopen(f"{self.address}/{picture.replace('&amp;', '&')}", timeout=60) as answer:
            answer.read()


def at_once(address: str, visitors: int, uploads: int) -> dict[str, Any]:
    """Several visitors, each with its own session, uploading and measuring at the same time."""
    times: list[tuple[float, float]] = []
    errors: list[str] = []
    everybody = [Visitor(address) for _ in range(visitors)]
    start = threading.Barrier(visitors)

    def visit(number: int) -> None:
        start.wait()
        for turn in range(uploads):
            try:
                times.append(everybody[number].upload(PHOTOGRAPHS[(number + turn) % len(PHOTOGRAPHS)]))
            except Exception as error:  # counted: whatever it is, the visitor has no map
                errors.append(f"{type(error).__name__}: {error}")

    threads = [threading.Thread(target=visit, args=(number,)) for number in range(visitors)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    mapped, measured = [first for first, _ in times], [last for _, last in times]
    facts = {"visitors": visitors, "uploads": visitors * uploads, "errors": errors}
    return {**facts, **_spread(mapped), "measured": _spread(measured)}


def memory(address: str, process: int, uploads: int, warm_up: int) -> dict[str, Any]:
    """Megabytes of the server before and after many uploads, all measured, of different sizes, by eight visitors."""
    visitors = [Visitor(address) for _ in range(8)]
    sizes = ((640, 480), (1280, 960), (300, 700), (2000, 1500))
    with tempfile.TemporaryDirectory() as folder:
        files = []
        for number, size in enumerate(sizes):
            files.append(Path(folder, f"{number}.jpg"))
            Image.open(PHOTOGRAPHS[number % len(PHOTOGRAPHS)]).convert("RGB").resize(size).save(files[-1])
        found = []
        for number in range(warm_up + uploads):
            if number == warm_up:
                found.append(_resident(process))
            visitors[number % len(visitors)].upload(files[number % len(files)])
            if number > warm_up and (number - warm_up) % 50 == 0:
                found.append(_resident(process))
    found.append(_resident(process))
    return {
        "warm_up_uploads": warm_up,
        "uploads": uploads,
        "megabytes": found,
        "growth_megabytes": found[-1] - found[0],
    }


def _resident(process: int) -> int:
    """Megabytes that a process holds in memory (Linux)."""
    status = Path(f"/proc/{process}/status").read_text()
    found = re.search(r"VmRSS:\s+(\d+) kB", status)
    assert found is not None
    return round(int(found[1]) / 1024)


def _spread(values: list[float]) -> dict[str, Any]:
    if not values:
        return {"median_ms": None, "max_ms": None}
    return {"median_ms": round(statistics.median(values)), "max_ms": round(max(values)), "times": len(values)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12, help="in the browser: pictures, of each size")
    parser.add_argument("--visitors", type=int, default=8, help="at once")
    parser.add_argument("--uploads", type=int, default=200, help="for the memory")
    parser.add_argument("--warm-up", type=int, default=100, help="uploads before the memory is first read")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    if min(arguments.rounds, arguments.visitors, arguments.uploads, arguments.warm_up) < 1:
        parser.error("every number must be at least 1")
    with served() as (address, process), tempfile.TemporaryDirectory() as folder:
        large = Path(folder, "large.jpg")
        Image.open(PHOTOGRAPHS[0]).convert("RGB").resize((4000, 3000)).save(large, quality=90)
        report = {
            "machine": {"cores": os.cpu_count(), "processor": platform.machine()},
            "versions": {name: version(name) for name in ("hf-ttame", "torch", "gradio", "playwright")},
            "browser": in_the_browser(address, large, arguments.rounds),
            "at_once": at_once(address, arguments.visitors, uploads=3),
            "memory": memory(address, process, arguments.uploads, arguments.warm_up),
        }
    if arguments.output:
        arguments.output.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
