"""Pages of documentation as data: their code blocks, the commands in these, and their links."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

_FENCE = re.compile(r" *(`{3,})(\w*)[^`]*$")
_LINK = re.compile(r"!?\[[^\]]*\]\(<?([^)>\s]+)>?(?: \"[^\"]*\")?\)|(?:src|href)=\"([^\"]+)\"")


@dataclass(frozen=True)
class Block:
    """A fenced block: its page, the number of its first line, its language, its text."""

    page: str
    line: int
    language: str
    text: str
    follows: bool = False  # nothing but empty lines stands between it and the block before

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"


def _split(page: Path) -> tuple[list[Block], list[str]]:
    """The blocks of a page, and its other lines; those of blocks are empty there."""
    found: list[Block] = []
    lines = page.read_text().splitlines()
    outside: list[str] = []
    fence, first, last, language = "", 0, 0, ""
    for number, line in enumerate(lines, 1):
        match = _FENCE.match(line)
        if not fence and match:
            fence, language, first = match[1], match[2], number + 1
        elif fence and line.strip() == fence:
            text = "\n".join(lines[first - 1 : number - 1]) + "\n"
            follows = bool(found) and not any(lines[last : first - 2])
            found.append(Block(str(page), first, language, text, follows))
            fence, last = "", number
        elif not fence:
            outside.append(line)
            continue
        outside.append("")
    if fence:
        raise ValueError(f"{page}:{first}: the block is not closed")
    return found, outside


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page, from its beginning to its end.

    Raises:
        ValueError: a block is not closed, or stands indented without a fence, where no language is named.
    """
    found, outside = _split(page)
    for number, (before, line) in enumerate(zip(["", *outside], outside, strict=False), 1):
        if line.startswith("    ") and not before.strip() and not re.match(r" *([-*]|\d+\.) ", line):
            raise ValueError(f"{page}:{number}: an indented block; put it between fences and name its language")
    return found


def commands(block: Block) -> list[list[str]]:
    """The words of each command of a shell block, without comments; `&&` separates commands.

    Raises:
        ValueError: a line holds another operator of the shell, such as a pipe.
    """
    found: list[list[str]] = []
    for line in block.text.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="();<>|&")
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, "&&"]:
            if word == "&&":
                found += [words] if words else []
                words = []
            elif re.fullmatch(r"[();<>|&]+", word):
                raise ValueError(f"{block.place}: {word!r} in {line!r} is not understood here; write plain commands")
            else:
                words.append(word)
    return found


def anchors(page: Path) -> set[str]:
    """The names by which a page's headings can be linked to, as GitHub makes them."""
    headings = [line.lstrip("# ") for line in _split(page)[1] if re.match(r"#+ ", line)]
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(page: Path) -> list[str]:
    """Relative links of a page that lead to no file or to no heading."""
    broken = []
    for number, line in enumerate(_split(page)[1], 1):
        for match in _LINK.finditer(line):
            target, _, anchor = (match[1] or match[2]).partition("#")
            if ":" in target:  # https:, mailto:
                continue
            file = page.parent / target if target else page
            if not file.exists() or (anchor and anchor not in anchors(file)):
                broken.append(f"{page}:{number}: {match[1] or match[2]}")
    return broken
