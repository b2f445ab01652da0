"""What docs/README.md says is not run, and the checks of such blocks: of what a command is given, of what a block
imports, of the reference to the paper.
"""

import ast
import importlib
import re
import tomllib
from pathlib import Path
from typing import Any

import typer
import yaml

from hf_ttame.cli import app

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]


def exceptions(index: Path) -> dict[str, str]:
    """The table of docs/README.md: {how a command begins, a package, or a language: "never" or "slow"}."""
    rows = re.findall(r"^\| `(.+?)` \| (never|`pytest -m slow`.*?) \| .+ \|$", index.read_text(), re.MULTILINE)
    return {start: "never" if when == "never" else "slow" for start, when in rows}


def begins(words: list[str], start: str) -> bool:
    return words[: len(start.split())] == start.split()


def imports(text: str) -> list[tuple[str, str | None]]:
    """(module, name) of every import of a block of Python; name is None for a whole module."""
    found: list[tuple[str, str | None]] = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found += [(alias.name, None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [(node.module or "", alias.name) for alias in node.names]
    return found


def packages(text: str) -> set[str]:
    """The packages from which a block of Python imports."""
    return {module.split(".")[0] for module, _ in imports(text)}


def check_python(text: str) -> None:
    """It compiles, and what it imports from here exists."""
    for module, name in imports(text):
        if module.split(".")[0] == "hf_ttame":
            found = importlib.import_module(module)
            assert name is None or hasattr(found, name), f"{module} has no {name}"


def check_bibtex(text: str) -> None:
    doi = yaml.safe_load((ROOT / "CITATION.cff").read_text())["preferred-citation"]["doi"]
    assert text.count("{") == text.count("}"), "braces do not match"
    assert doi in text, f"the paper of CITATION.cff has the DOI {doi}"


def check_command(words: list[str]) -> None:
    """A command's arguments are known to what it would start."""
    if begins(words, "pip install"):
        _check_packages(words[2:])
    elif begins(words, "accelerate launch"):
        from accelerate.commands.launch import launch_command_parser

        _check_script(launch_command_parser().parse_args(words[2:]))
    elif words[0] == "torchrun":
        from torch.distributed.run import get_args_parser

        _check_script(get_args_parser().parse_args(words[1:]))
    elif words[0] == "python":
        script = (ROOT / words[1]).read_text()
        unknown = [word for word in words[2:] if word.startswith("--") and f'"{word}"' not in script]
        assert not unknown, f"{words[1]} does not know {unknown}"
    else:
        assert words == ["pytest"], f"what {words[0]!r} takes is not known: see tests/doc_checks.py"


def _check_ttame(words: list[str]) -> None:
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
        raise ValueError(f"what {launch.training_script!r} takes is not known: see tests/doc_checks.py")


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
