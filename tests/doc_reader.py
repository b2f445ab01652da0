"""Someone who runs the blocks of a page of documentation, as they are printed."""

import importlib.util
import io
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
from doc_blocks import Block, blocks, commands
from doc_checks import ROOT, begins, check_bibtex, check_command, check_python, packages
from hub_server import Hub

# Commands that are run; any other must be named in docs/README.md.
PROGRAMS = ("ttame", "python", "accelerate launch", "torchrun")
# Of these, the ones for which the test's own process will not do: they talk to the Hub, or serve.
APART = ("push", "push-space", "space")
# Arguments that are added to make a command quick, by the word that says what is started.
ADDED = {
    "train": "--steps 2 --batch_size 4 --workers 0 --validation_size 4",
    "training/train.py": "--steps 2 --batch_size 4 --workers 0 --validation_size 4",
    "compare": "--metrics confidence --limit 3 --rise-masks 8 --slow-limit 1",
    "explain-dataset": "--workers 0 --batch-size 4",
    "hf_ttame.explain_dataset": "--workers 0 --batch-size 4",
    "evaluate": "--limit 3 --sanity-images 4 --sanity-steps 2 --mosaics 1 --curve-limit 1",
    "spaces/ttame-web/build.py": "--explainer explainer.onnx",
}
# A block of Python that names a repository of the Hub; `organisation/name` stands in comments only.
ON_THE_HUB = re.compile(r'"(?:me|timm|ILSVRC)/[\w.-]+"')
PATIENCE = 300  # seconds


class Reader:
    """Runs the blocks of one page in the current folder; Python keeps its names from block to block.

    Args:
        ttame: the command, in this process.
        monkeypatch: takes back what is changed in this process.
        hub: the Hub, for processes of their own.
        exceptions: what is not run, as `doc_checks.exceptions` gives it.
        slow: run what takes long, too.
    """

    def __init__(
        self,
        ttame: Callable[..., CompletedProcess[str]],
        monkeypatch: pytest.MonkeyPatch,
        hub: Hub,
        exceptions: dict[str, str],
        slow: bool = False,
    ):
        self.ttame, self.monkeypatch, self.hub = ttame, monkeypatch, hub
        self.exceptions, self.slow = exceptions, slow
        self.names: dict[str, Any] = {"__name__": "page"}
        self.source = ""  # of the blocks of Python so far
        self.printed: str | None = None  # by the block before, if it is of Python

    def read(self, page: Path) -> None:
        for block in blocks(page):
            try:
                self.run(block)
            except (Exception, SystemExit) as error:
                raise AssertionError(f"{block.place}: {error!r}") from error

    def run(self, block: Block) -> None:
        before, self.printed = self.printed, None
        if block.language == "python":
            self.run_python(block)
        elif block.language == "bash":
            for words in commands(block):
                self.run_command(words)
        elif block.language == "text":
            assert block.follows, "a block of text must follow the block of Python that prints it"
            assert before is not None, "a block of text must follow the block of Python that prints it"
            assert block.text.splitlines() == before.splitlines(), f"the block before prints {before}"
        elif block.language == "bibtex" and "bibtex" in self.exceptions:
            check_bibtex(block.text)
        else:
            raise ValueError(f"blocks of {block.language or 'no language'!r} are not known: see tests/doc_reader.py")

    def left_out(self, start: str) -> bool:
        return self.exceptions[start] == "never" or not self.slow

    # ---- Python -----------------------------------------------------------------------------------------------------

    def run_python(self, block: Block) -> None:
        lines = "\n" * (block.line - 1)  # so that a traceback names the line of the page
        code = compile(lines + block.text, block.page, "exec")
        elsewhere = packages(block.text) & self.exceptions.keys()
        if elsewhere:
            check_python(block.text)
            if not any(self.left_out(name) or importlib.util.find_spec(name) is None for name in elsewhere):
                self.run_apart(block.text)
        elif ON_THE_HUB.search(block.text):
            self.run_apart(self.source + block.text)
        else:
            with redirect_stdout(io.StringIO()) as out:
                exec(code, self.names)
            self.printed = out.getvalue()
            self.source += block.text

    def run_apart(self, source: str) -> None:
        """In a process of its own: `source` is a program."""
        with tempfile.TemporaryDirectory() as folder:
            program = Path(folder, "page.py")
            program.write_text(source)
            self.run_program([sys.executable, str(program)])

    # ---- commands ---------------------------------------------------------------------------------------------------

    def run_command(self, words: list[str]) -> None:
        settings: dict[str, str] = {}
        while re.match(r"[A-Z_]+=", words[0]):
            settings |= [words[0].split("=", 1)]
            words = words[1:]
        named = next((start for start in self.exceptions if begins(words, start)), None)
        if named and self.left_out(named):
            check_command(words)
            return
        assert any(begins(words, start) for start in PROGRAMS), f"{words} is neither run nor named in docs/README.md"
        words = [*words, *next((ADDED[word] for word in words if word in ADDED), "").split()]
        if begins(words, "ttame space") or "--port" in words:
            self.serve(words, settings)
        elif words[0] != "ttame" or words[1] in APART or settings:
            self.run_program(words, settings)
            arrived = {name for _, name in self.hub.repositories} & set(words)
            assert arrived or words[1] not in ("push", "push-space"), "nothing arrived on the Hub"
        elif words[1] == "train":
            self.train(words[2:])
        else:
            done = self.ttame(*words[1:])
            assert done.returncode == 0, done.stderr

    def environment(self, settings: dict[str, str]) -> dict[str, str]:
        """The installed commands with this code, the Hub on loopback, an empty cache, no GPU."""
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
        above = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        own = {"PATH": path, "PYTHONPATH": above, "CUDA_VISIBLE_DEVICES": ""}
        return self.hub.environment(Path("home").resolve(), **{**own, **settings})

    def run_program(self, words: list[str], settings: dict[str, str] | None = None) -> None:
        done = subprocess.run(
            words, env=self.environment(settings or {}), capture_output=True, text=True, timeout=PATIENCE
        )
        assert done.returncode == 0, done.stderr[-4000:]

    def serve(self, words: list[str], settings: dict[str, str]) -> None:
        """Start it on a free port, ask it at the address that it prints, end it."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        url = f"http://127.0.0.1:{port}"
        body = None if words[0] == "ttame" else Path("photo.jpg").read_bytes()
        log = Path("served.log")
        with log.open("w") as output:
            command = [*words, "--port", str(port)]
            process = subprocess.Popen(command, env=self.environment(settings), stdout=output, stderr=output)
        try:
            end = time.monotonic() + PATIENCE
            while url not in log.read_text():
                assert process.poll() is None, log.read_text()[-4000:]
                assert time.monotonic() < end, f"no {url} was printed: {log.read_text()[-4000:]}"
                time.sleep(0.1)
            with urllib.request.urlopen(url, body, timeout=60) as response:
                answer = response.read()
            assert (b'content="T-TAME"' in answer) if body is None else (b"overlay_png" in answer), answer[:2000]
        finally:
            process.terminate()
            process.wait(60)

    def train(self, arguments: list[str]) -> None:
        """In this process; that `ttame train` hands its arguments on is tested elsewhere."""
        from training import train

        self.monkeypatch.setattr(train, "keep_freed_memory", lambda: None)  # it would hold for the whole process
        output = Path(arguments[arguments.index("--output") + 1])
        shutil.rmtree(output, ignore_errors=True)  # prepared for the pages that only use it
        assert train.main(arguments) == 0
