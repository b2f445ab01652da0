"""From an uploaded file to a picture: what is accepted, in words where not, and nothing stays on disk for long."""

import contextlib
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from ..image_processing import DECODER_ERRORS, MAX_PIXELS, load_image

MAX_BYTES = 30 << 20
WORKING_SIDE = 1280  # pixels of the longer side; larger pictures are scaled down before anything else
MIN_SIDE = 16
# What cameras and browsers make. Others that Pillow opens (EPS, PDF, ...) would start programs of their own.
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
_ANIMATED = ("GIF", "PNG", "WEBP", "AVIF")  # an MPO has several frames too, but they are previews
_SMALLER = "save the picture smaller"
LEFT_OVER = 300.0  # seconds after which an upload that nobody asked for is deleted
PREFIX = "ttame-space-"  # of the server's folder for uploads, among the temporary ones


def read_upload(path: Path, folder: Path) -> tuple[Image.Image, str]:
    """The picture in an uploaded file, at most WORKING_SIDE large, and a remark.

    Args:
        path: where the server put it.
        folder: the server's folder for uploads; nothing outside is ever opened.

    Raises:
        ValueError: it is no picture that can be explained; the message says why and what to do.
    """
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError("that file was not uploaded here; give a picture of your own")
    return open_picture(path)


def open_picture(path: Path) -> tuple[Image.Image, str]:
    """As `read_upload`, of any file."""
    if not path.is_file():
        raise ValueError("the upload did not arrive whole; give the picture again")
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"the file is larger than {MAX_BYTES >> 20} MB; {_SMALLER}")
    Image.init()
    try:
        with Image.open(path, formats=[name for name in FORMATS if name in Image.OPEN]) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(
                    f"the picture has {image.width} x {image.height} pixels, over {MAX_PIXELS:,d}; {_SMALLER}"
                )
            animated = image.format in _ANIMATED and getattr(image, "n_frames", 1) > 1
            if image.format == "JPEG":  # decoded at a half, a quarter or an eighth where that is more than enough
                image.draft(None, (2 * WORKING_SIDE, 2 * WORKING_SIDE))
            picture = load_image(image)
    except Image.DecompressionBombError as error:
        raise ValueError(f"the picture has more than {MAX_PIXELS:,d} pixels; {_SMALLER}") from error
    except UnidentifiedImageError as error:
        raise ValueError(
            "this is not a picture that can be opened, whatever its name says; give a JPEG, PNG, WebP, GIF, BMP, TIFF "
            "or AVIF"
        ) from error
    except DECODER_ERRORS as error:
        raise ValueError("the picture's file is damaged or cut off; save or send it again") from error
    if min(picture.size) < MIN_SIDE:
        raise ValueError(
            f"the picture is {picture.width} x {picture.height} pixels; each side needs at least {MIN_SIDE} to show "
            "where something is"
        )
    picture.thumbnail((WORKING_SIDE, WORKING_SIDE))
    return picture, "It is animated: its first frame is explained." if animated else ""


class Sweeper(threading.Thread):
    """Empties the folder of uploads.

    What was read is deleted a little later: the browser shows an upload for a moment, and the server puts the same
    picture of two visitors into the same place. What nobody asked for, such as an upload that was cut off, is deleted
    after LEFT_OVER seconds. The folder's own time is kept new, so that others see that its server is alive.

    Args:
        folder: the server's folder for uploads.
        also: done every second, too.
        after: seconds that a file stays after it was read.
    """

    def __init__(self, folder: Path, also: Callable[[], None] = lambda: None, after: float = 30.0):
        super().__init__(name="sweeper", daemon=True)
        self.folder = folder
        self.also = also
        self.after = after
        self.stopped = threading.Event()
        self._read: dict[tuple[Path, int], float] = {}

    def was_read(self, path: Path) -> None:
        """This upload is not needed any more; one that comes to the same place later is another."""
        with contextlib.suppress(OSError):
            self._read[path, path.stat().st_ino] = time.monotonic() + self.after

    def run(self) -> None:
        while not self.stopped.wait(1.0):
            now = time.monotonic()
            with contextlib.suppress(OSError):
                os.utime(self.folder)
            for path, node in [key for key, due in list(self._read.items()) if due <= now]:
                del self._read[path, node]
                with contextlib.suppress(OSError):  # gone, or its folder is not empty
                    if path.stat().st_ino == node:
                        path.unlink()
                        path.parent.rmdir()
            sweep(self.folder, LEFT_OVER)
            self.also()


def sweep(folder: Path, age: float) -> None:
    """Delete the files in `folder` that are older than `age` seconds, and the folders that are then empty."""
    for place, _, files in os.walk(folder, topdown=False):
        with contextlib.suppress(OSError):  # whoever asked for it was faster
            old = time.time() - os.stat(place).st_mtime > age
            for file in (Path(place, name) for name in files):
                if time.time() - file.stat().st_mtime > age:
                    file.unlink()
            if old and place != str(folder) and not os.listdir(place):
                os.rmdir(place)


def sweep_dead(place: Path | None = None) -> None:
    """Delete the folders for uploads that servers left behind which were killed.

    Args:
        place: where they lie; None: the folder for temporary files.
    """
    for folder in Path(place or tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):  # gone, or not ours
            facts = folder.lstat()
            ours = not hasattr(os, "getuid") or facts.st_uid == os.getuid()
            if ours and not folder.is_symlink() and time.time() - facts.st_mtime > LEFT_OVER:
                shutil.rmtree(folder, ignore_errors=True)
