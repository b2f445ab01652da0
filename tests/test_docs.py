"""Every code block of README.md and docs/ is run as it is printed, and every link leads somewhere.

The blocks of a page run one after the other in a folder of their own, as a reader would run them; Python keeps its
names from block to block. A block of `text` right after one of Python is what that one prints. Commands are called in
this process. What a page needs is made beforehand (PREPARED); what cannot run here is named with its reason (NOT_RUN,
ELSEWHERE) and still parsed, so that an argument that was renamed is noticed. Anything else fails.
"""

import ast
import functools
import importlib
import importlib.util
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
import typer
import yaml
from conftest import make_vit, vit_processor
from doc_blocks import Block, blocks, broken_links, commands
from PIL import Image

from hf_ttame import TTameModel
from hf_ttame.cli import app
from hf_ttame.demo import EXPLAINER, PHOTOGRAPHS

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]

# Paths that the pages speak of, and what stands there.
PREPARED = {
    "photo.jpg": "photo.jpg",
    "other.jpg": "other.jpg",
    "a.jpg": "photo.jpg",
    "b.jpg": "other.jpg",
    "path/to/explainer": "explainer",
    "path/to/this/folder": "explainer",
    "runs/my-vit/explainer": "explainer",
    "path/to/my-vit": "backbone",
    "path/to/classifier": "backbone",
    "path/to/another-classifier": "backbone",
    "path/to/pictures": "pictures",
}
# Arguments that are added to a command to make it quick.
SMALLER = {
    "train": "--steps 2 --batch_size 4 --workers 0 --validation_size 4",
    "compare": "--metrics confidence --limit 3 --rise-masks 8 --slow-limit 1",
    "explain-dataset": "--workers 0 --batch-size 4",
    "evaluate": "--limit 3 --sanity-images 4 --sanity-steps 2 --mosaics 1 --curve-limit 1",
}
# Commands whose arguments are checked, and why they are not run.
NOT_RUN = {
    "ttame push": "needs the Hub and an account",
    "ttame push-space": "needs the Hub and an account",
    "ttame space": "serves until it is stopped",
    "ttame convert": "needs a checkpoint of hundreds of megabytes; tests/test_convert.py makes them",
    "pip install": "changes the environment",
    "pytest": "is what runs this",
    "accelerate launch": "starts processes, often on data of the Hub",
    "torchrun": "starts processes",
    "python": "a script of the repository that takes minutes, needs a network or serves until it is stopped",
}
# Packages of other people's machines: blocks that import one are compiled, and their imports from here resolved.
ELSEWHERE = {"ray": "an existing cluster", "pyspark": "an existing cluster"}


def _check_bibtex(text: str) -> None:
    doi = yaml.safe_load((ROOT / "CITATION.cff").read_text())["preferred-citation"]["doi"]
    assert text.count("{") == text.count("}"), "braces do not match"
    assert doi in text, f"the paper of CITATION.cff has the DOI {doi}"


# Languages that are not run: each is parsed. `text` that does not follow a block of Python may be anything.
PARSERS: dict[str, Callable[[str], Any]] = {
    "json": json.loads,
    "yaml": yaml.safe_load,
    "bibtex": _check_bibtex,
    "text": str,
}


@pytest.fixture(scope="module")
def stage(photo: Callable[..., Image.Image], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What PREPARED names: a tiny classifier of ImageNet's classes, its explainer, a few pictures."""
    folder = tmp_path_factory.mktemp("stage")
    labels = json.loads((EXPLAINER / "config.json").read_text())["id2label"]
    backbone = make_vit(classes=len(labels))
    backbone.config.id2label = {int(number): label for number, label in labels.items()}
    backbone.config.label2id = {label: int(number) for number, label in labels.items()}
    backbone.save_pretrained(folder / "backbone")
    vit_processor().save_pretrained(folder / "backbone")
    TTameModel.from_backbone(folder / "backbone").save_pretrained(folder / "explainer")
    (folder / "pictures").mkdir()
    for seed in range(6):
        photo(seed=seed).save(folder / "pictures" / f"{seed}.png")
    shutil.copy(PHOTOGRAPHS / "cat.jpg", folder / "photo.jpg")
    shutil.copy(PHOTOGRAPHS / "coffee.jpg", folder / "other.jpg")
    return folder


class Reader:
    """Someone who runs the blocks of one page, in a folder where PREPARED stands."""

    def __init__(self, ttame: Callable[..., CompletedProcess[str]], monkeypatch: pytest.MonkeyPatch):
        self.ttame, self.monkeypatch = ttame, monkeypatch
        self.names: dict[str, Any] = {"__name__": "page"}
        self.printed = ""

    def read(self, page: Path) -> None:
        for block in blocks(page):
            try:
                self.run(block)
            except (Exception, SystemExit) as error:
                raise AssertionError(f"{block.place}: {error!r}") from error

    def run(self, block: Block) -> None:
        if block.language == "python":
            self.run_python(block)
        elif block.language == "bash":
            self.printed = ""
            for words in commands(block):
                self.run_command(words)
        elif block.language in PARSERS:
            PARSERS[block.language](block.text)
            if block.language == "text" and block.follows and self.printed:
                assert block.text.splitlines() == self.printed.splitlines(), f"the block before prints {self.printed}"
        else:
            raise ValueError(f"blocks of {block.language or 'no language'!r} are not known: see tests/test_docs.py")

    def run_python(self, block: Block) -> None:
        lines = "\n" * (block.line - 1)  # so that a traceback names the line of the page
        code = compile(lines + block.text, block.page, "exec")
        imported = _imports(block.text)
        if {module.split(".")[0] for module, _ in imported} & ELSEWHERE.keys():
            for module, name in imported:
                if module.split(".")[0] == "hf_ttame":
                    found = importlib.import_module(module)
                    assert name is None or hasattr(found, name), f"{module} has no {name}"
            return
        with redirect_stdout(io.StringIO()) as out:
            exec(code, self.names)
        self.printed = out.getvalue()

    def run_command(self, words: list[str]) -> None:
        while re.match(r"[A-Z_]+=", words[0]):
            self.monkeypatch.setenv(*words[0].split("=", 1))
            words = words[1:]
        if words[:2] == ["python", "examples/serve_onnx.py"] and "--port" not in words:
            self.run_script(words[1:])
        elif any(words[: len(start.split())] == start.split() for start in NOT_RUN):
            self.check_command(words)
        else:
            assert words[0] == "ttame", f"{words} is neither run nor in NOT_RUN of tests/test_docs.py"
            self.run_ttame(words[1:])

    def run_script(self, words: list[str]) -> None:
        """A script that stands alone, in a process of its own."""
        command = [sys.executable, str(ROOT / words[0]), *words[1:]]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr

    def run_ttame(self, words: list[str]) -> None:
        arguments = [*words, *SMALLER.get(words[0], "").split()]
        if words[0] == "train":
            self.train(arguments[1:])
        else:
            done = self.ttame(*arguments)
            assert done.returncode == 0, done.stderr

    def train(self, arguments: list[str]) -> None:
        """In this process; that `ttame train` hands its arguments on is tested elsewhere."""
        from training import train

        self.monkeypatch.setattr(train, "keep_freed_memory", lambda: None)  # it would hold for the whole process
        output = Path(arguments[arguments.index("--output") + 1])
        shutil.rmtree(output, ignore_errors=True)  # prepared for the pages that only use it
        assert train.main(arguments) == 0

    def check_command(self, words: list[str]) -> None:
        if words[0] == "ttame":
            _check_ttame(words[1:])
        elif words[:2] == ["pip", "install"]:
            _check_packages(words[2:])
        elif words[:2] == ["accelerate", "launch"]:
            from accelerate.commands.launch import launch_command_parser

            _check_script(launch_command_parser().parse_args(words[2:]))
        elif words[0] == "torchrun":
            from torch.distributed.run import get_args_parser

            _check_script(get_args_parser().parse_args(words[1:]))
        elif words[0] == "python":
            script = (ROOT / words[1]).read_text()
            unknown = [word for word in words[2:] if word.startswith("--") and f'"{word}"' not in script]
            assert not unknown, f"{words[1]} does not know {unknown}"


def _imports(text: str) -> list[tuple[str, str | None]]:
    """(module, name) of every import of a block; name is None for a whole module."""
    found: list[tuple[str, str | None]] = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found += [(alias.name, None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [(node.module or "", alias.name) for alias in node.names]
    return found


def _check_ttame(words: list[str]) -> None:
    if words[0] == "train":
        _check_training(words[1:])
    else:
        group = typer.main.get_command(app)
        assert words[0] in group.commands, f"ttame has no command {words[0]!r}"  # type: ignore[attr-defined]
        group.commands[words[0]].make_context(words[0], words[1:])  # type: ignore[attr-defined]


def _check_training(arguments: list[str]) -> None:
    from transformers import HfArgumentParser

    from training.arguments import Arguments, check

    (parsed,) = HfArgumentParser(Arguments).parse_args_into_dataclasses(arguments)
    check(parsed)


def _check_script(launch: Any) -> None:
    """What a launcher would start."""
    if launch.training_script == "training/train.py":
        _check_training(launch.training_script_args)
    elif launch.module and launch.training_script == "hf_ttame.cli":
        _check_ttame(launch.training_script_args)
    elif launch.module and launch.training_script == "hf_ttame.explain_dataset":
        _check_ttame(["explain-dataset", *launch.training_script_args])
    else:
        raise ValueError(f"what {launch.training_script!r} takes is not known: see tests/test_docs.py")


def _check_packages(words: list[str]) -> None:
    known = {
        re.split(r"[^\w-]", entry)[0] for entries in [PROJECT["dependencies"], *EXTRAS.values()] for entry in entries
    }
    for word in words:
        if match := re.fullmatch(r"(?:\.|hf-ttame)(?:\[([\w,-]+)\])?", word):
            unknown = set((match[1] or "").split(",")) - EXTRAS.keys() - {""}
            assert not unknown, f"pyproject.toml has no extra {sorted(unknown)}"
        else:
            assert word in ("-e", "-U") or word in known, f"pip install {word}: not a package of pyproject.toml"


@pytest.fixture
def reader(
    ttame: Callable[..., CompletedProcess[str]], stage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Reader]:
    from hf_ttame import sanity_checks

    for name, source in PREPARED.items():
        copy = shutil.copytree if (stage / source).is_dir() else shutil.copy
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        copy(stage / source, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    quick = functools.partial(sanity_checks.watermark, steps=4, size=64, side=24, images=4, batch_size=4)
    monkeypatch.setattr(sanity_checks, "watermark", quick)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    environment = dict(os.environ)
    yield Reader(ttame, monkeypatch)
    os.environ.clear()
    os.environ.update(environment)
    for number, handler in handlers.items():
        signal.signal(number, handler)  # training takes them over


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_block_runs(page: Path, reader: Reader) -> None:
    reader.read(page)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_link_leads_somewhere(page: Path) -> None:
    assert broken_links(page) == []


def test_the_index_names_every_page() -> None:
    index = (ROOT / "docs" / "README.md").read_text()
    assert [page.name for page in PAGES if page.name != "README.md" and f"({page.name})" not in index] == []


# ---- the checks themselves can fail -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("language", "text", "message"),
    [
        ("python", "x = 1\nundefined", r"NameError"),
        ("", "ttame demo", "no language"),
        ("perl", "print 1", "perl"),
        ("bash", "rm -r /", "neither run nor in NOT_RUN"),
        ("bash", "ttame layers path/to/my-vit | sort", "write plain commands"),
        ("bash", "ttame layers path/to/nothing", "path/to/nothing"),
        ("bash", "ttame layers path/to/my-vit --depth 3", "No such option: --depth"),
        ("bash", "ttame push a me/b --secret", "No such option: --secret"),
        ("bash", "ttame train --backbone a --dataset b --output c --step_count 3", "step_count"),
        ("bash", "accelerate launch training/train.py --backbone a --dataset b --output c --stepz 3", "stepz"),
        ("bash", "torchrun --nproc_per_node 2 -m hf_ttame.cli compare a --dataset b --method c", "--method"),
        ("bash", 'pip install ".[everything]"', "no extra.*everything"),
        ("bash", "python benchmarks/inference.py --turns 3", "--turns"),
        ("bash", "python examples/serve_onnx.py nothing.onnx photo.jpg", "nothing.onnx cannot be opened"),
        ("json", "{", "JSONDecodeError"),
        ("bibtex", "@article{a, title={b}", "braces do not match"),
        ("bibtex", "@article{a, doi={10.1000/1}}", "has the DOI"),
    ],
)
def test_a_wrong_block_is_noticed(language: str, text: str, message: str, reader: Reader) -> None:
    page = Path("page.md")
    page.write_text(f"# Title\n\n```{language}\n{text}\n```\n")
    with pytest.raises(AssertionError, match=rf"(?s)page\.md:4: .*{message}"):
        reader.read(page)


def test_what_a_block_prints_is_compared(reader: Reader) -> None:
    page = Path("page.md")
    page.write_text("```python\nprint(6 * 7)\n```\n\n```text\n42\n```\n")
    reader.read(page)
    page.write_text("```python\nprint(6 * 7)\n```\n\n```text\n43\n```\n")
    with pytest.raises(AssertionError, match="the block before prints 42"):
        reader.read(page)


def test_blocks_and_links_are_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# One & two\n\n[a](#one--two) [b](other.md) ![c](https://x.org/y.png)\n\n[d](#three)\n")
    assert broken_links(page) == [f"{page}:3: other.md", f"{page}:5: #three"]
    page.write_text("text\n\n    indented\n")
    with pytest.raises(ValueError, match=r"page\.md:3: an indented block"):
        blocks(page)
    page.write_text("```python\n")
    with pytest.raises(ValueError, match="not closed"):
        blocks(page)
