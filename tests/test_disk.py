"""Files that are whole or not there."""

import errno
from pathlib import Path

import pytest

from hf_ttame.disk import whole


def test_a_file_takes_its_name_when_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("old")
    with whole(path) as part:
        assert part.suffix == ".json"  # writers go by it
        part.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device"),
            r"a\.json' cannot be written: No space left on device; make room$",
        ),
        (ValueError("something else"), "^something else$"),
        (KeyboardInterrupt(), ""),
    ],
)
def test_after_an_error_the_earlier_file_stands_alone(tmp_path: Path, error: BaseException, said: str) -> None:
    path = tmp_path / "a.json"
    path.write_text("old")

    def write_half() -> None:
        with whole(path) as part:
            part.write_text("half")
            raise error

    with pytest.raises(type(error), match=said):
        write_half()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
