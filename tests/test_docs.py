"""Every code block of README.md and docs/ is run as it is printed, and every link leads somewhere.

The blocks of a page run one after the other in a folder of their own, as a reader would run them in a clone; Python
keeps its names from block to block. A block of `text` is what the block of Python before it prints. What a page needs
stands ready: files, and on a Hub on loopback the repositories that it names (doc_stage.py); arguments are added to
make commands quick (ADDED of doc_reader.py). Commands are called in this process, where they need no Hub and serve
nothing. What is not run is named with its reason in docs/README.md, whose table is read here: such blocks are checked
as far as that goes (doc_checks.py), those that take long run with `-m slow`. Anything else fails.
"""

import functools
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import CompletedProcess

import pytest
from doc_blocks import blocks, broken_links, commands
from doc_checks import ROOT, begins, exceptions, packages
from doc_reader import Reader
from doc_stage import fill_hub, make_stage, put_stage
from hub_server import Hub, running_hub
from PIL import Image

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
EXCEPTIONS = exceptions(ROOT / "docs" / "README.md")


def named(page: Path) -> set[str]:
    """The entries of EXCEPTIONS that a page needs."""
    found = set()
    for block in blocks(page):
        words = commands(block) if block.language == "bash" else [[block.language]]
        words += [[name] for name in packages(block.text)] if block.language == "python" else []
        found |= {start for start in EXCEPTIONS for each in words if begins(_bare(each), start)}
    return found


def _bare(words: list[str]) -> list[str]:
    return _bare(words[1:]) if "=" in words[0] else words


SLOW_PAGES = [page for page in PAGES if any(EXCEPTIONS[start] == "slow" for start in named(page))]


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.fixture(scope="module")
def stage(photo: Callable[..., Image.Image], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("stage")
    make_stage(folder, photo)
    yield folder
    (folder / "T-TAME.ckpt").unlink()  # it is large


@pytest.fixture(scope="module")
def filled_hub(photo: Callable[..., Image.Image], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    with running_hub() as hub:
        fill_hub(hub, tmp_path_factory.mktemp("hub"), photo)
        yield hub


@pytest.fixture
def hub(filled_hub: Hub) -> Iterator[Hub]:
    """As it was filled: what a page has pushed is gone afterwards."""
    before = dict(filled_hub.repositories)
    yield filled_hub
    filled_hub.repositories = before


@pytest.fixture
def reader(
    ttame: Callable[..., CompletedProcess[str]],
    stage: Path,
    hub: Hub,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Reader]:
    from hf_ttame import sanity_checks

    put_stage(stage, tmp_path)
    monkeypatch.chdir(tmp_path)
    quick = functools.partial(sanity_checks.watermark, steps=4, size=64, side=24, images=4, batch_size=4)
    monkeypatch.setattr(sanity_checks, "watermark", quick)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    environment = dict(os.environ)
    yield Reader(ttame, monkeypatch, hub, EXCEPTIONS)
    os.environ.clear()
    os.environ.update(environment)
    for number, handler in handlers.items():
        signal.signal(number, handler)  # training takes them over


# The cats of the demo are of classes that did not occur in the training of the shipped head.
@pytest.mark.filterwarnings("default:the explainer was trained without:UserWarning")
@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_block_runs(page: Path, reader: Reader) -> None:
    reader.read(page)


@pytest.mark.slow
@pytest.mark.filterwarnings("default:the explainer was trained without:UserWarning")
@pytest.mark.parametrize("page", SLOW_PAGES, ids=name_of)
def test_every_block_runs_those_that_take_long_too(page: Path, reader: Reader) -> None:
    reader.slow = True
    reader.read(page)


def test_no_exception_is_named_in_vain() -> None:
    assert {start for page in PAGES for start in named(page)} == EXCEPTIONS.keys()
    assert {"never", "slow"} == set(EXCEPTIONS.values())


# The cats of the demo are of classes that did not occur in the training of the shipped head.
@pytest.mark.filterwarnings("default:the explainer was trained without:UserWarning")
@pytest.mark.parametrize("page", PAGES, ids=name_of)
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
        ("bash", "rm -r /", "neither run nor named"),
        ("bash", "ttame layers path/to/my-vit | sort", "write plain commands"),
        ("bash", "ttame layers path/to/nothing", "path/to/nothing"),
        ("bash", "ttame layers path/to/my-vit --depth 3", "No such option: --depth"),
        ("bash", "ttame push a me/b --secret", "No such option: --secret"),
        ("bash", "ttame train --backbone a --dataset b --output c --step_count 3", "step_count"),
        ("bash", "accelerate launch training/train.py --backbone a --dataset b --output c --stepz 3", "stepz"),
        ("bash", "torchrun --nproc_per_node 2 -m hf_ttame.cli compare a --dataset b --method c", "--method"),
        ("bash", 'pip install ".[everything]"', "no extra.*everything"),
        ("bash", "python spaces/ttame-web/build.py OUT --turns 3", "--turns"),
        ("bash", "python examples/serve_onnx.py nothing.onnx photo.jpg", "nothing.onnx cannot be opened"),
        ("json", "{}", "blocks of .json. are not known"),
        ("text", "anything", "must follow the block of Python"),
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
