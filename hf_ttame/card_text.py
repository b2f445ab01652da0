"""Text of a card that may come from anybody: shown as it is written, and nothing more."""

import html
import math
import re
from typing import Any

from .saving import PATH_IN_TEXT, without_tokens

NOT_MEASURED = "not measured"
NOT_RECORDED = "not recorded"


def escape(value: Any) -> str:
    """Text for Markdown, on one line, without any power: no HTML, links, tables, headings or code."""
    text = html.escape(plain(value), quote=False)
    text = re.sub(r"([\\`*_{}\[\]#|~$!])", r"\\\1", text)
    return re.sub(r"(?i)(:(?=//)|www(?=\.)|(?<=\w)(?=@\w))", "\\1\u200b", text)  # what would become a link by itself


def code(value: Any) -> str:
    """A code span, on one line, that ends where it should, in a table too."""
    return "`" + plain(value).replace("`", "'").replace("|", "/") + "`"


def plain(value: Any) -> str:
    """One line of what can be seen: no control or direction characters, no access token, no local path."""
    return without_secrets(visible(" ".join(str(value).split())))


def visible(line: str) -> str:
    """The line without control and direction characters; a tab is four spaces."""
    return "".join(c for c in line.replace("\t", "    ") if c.isprintable())


def without_secrets(text: str) -> str:
    return PATH_IN_TEXT.sub("(local path)", without_tokens(text))


def number(value: Any, digits: int = 1) -> str:
    known = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return f"{value:.{digits}f}" if known else NOT_MEASURED
