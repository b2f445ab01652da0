"""Files that are whole or not there, and a full disk in words: which file could not be written, what to do."""

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_FULL = {number: os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)}
# What libraries say that do not pass the system's number on: safetensors, Pillow, NumPy, torch, Arrow.
_WORDS = re.compile(
    rf"(?:os error|errno) (?:{'|'.join(map(str, _FULL))})\b|encoder error|\d requested and \d+ written"
    "|PytorchStreamWriter|unexpected pos",
    re.IGNORECASE,
)


def full_disk(error: BaseException, path: str | os.PathLike | None = None) -> str | None:
    """What to say of an error that means a full disk; None of another.

    Args:
        error: as it was raised.
        path: the file; None: the one that the error names, if it does.
    """
    number = getattr(error, "errno", None)
    if number not in _FULL and not (number is None and _WORDS.search(str(error))):
        return None
    path = path or getattr(error, "filename", None)
    return f"{repr(os.fspath(path)) if path else 'a file'} cannot be written: {_FULL.get(number, 'disk full')}; " + (
        "make room" if number != errno.EFBIG else "make room, or raise the limit on the size of a file"
    )


@contextmanager
def writing(path: str | os.PathLike) -> Iterator[None]:
    """Raise OSError with the name of the file where the disk is full; other errors pass as they are."""
    try:
        yield
    except Exception as error:  # safetensors and torch raise their own
        if (text := full_disk(error, path)) is None:
            raise
        raise OSError(text) from error


@contextmanager
def whole(path: Path, part: Path | None = None) -> Iterator[Path]:
    """A file to write beside `path`, which takes its name when the block ends; after an error nothing is left of it.

    Args:
        path: what is to be written.
        part: where it is written; None: a hidden file of the same suffix, for one process at a time.

    Raises:
        OSError: the disk is full; the message names `path`.
    """
    part = part or path.with_name(f".{path.stem}.part{path.suffix}")
    try:
        with writing(path):
            yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
