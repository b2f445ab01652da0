"""What the page does when something is clicked: from a visitor's wish to new content, errors in words. No gradio."""

import contextlib
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from ..saving import HUB_ERRORS
from . import views
from .analysis import Analysis, Tested
from .explainers import Explainer, Explainers, is_memory_error
from .report import report
from .sessions import Session, Sessions
from .uploads import Sweeper, open_picture, read_upload

Content = dict[str, Any]
"""Name of a part of the page -> its new content; what is not named stays as it is."""

MAX_MASKS = 4000
_EXPECTED: tuple[type[Exception], ...] = (MemoryError, ModuleNotFoundError, ValueError, TypeError, *HUB_ERRORS)
_NO_MEMORY = (
    "the memory of this machine was not enough for that, and nothing was changed; give a smaller picture, choose a "
    "smaller explainer, or try again when fewer people are here"
)


def in_words(handler: Callable[..., Content]) -> Callable[..., Content]:
    """What can be expected to fail is said on the page; the process goes on."""

    @functools.wraps(handler)
    def answer(*args: Any, **kwargs: Any) -> Content:
        try:
            return handler(*args, **kwargs)
        except _EXPECTED as error:
            if is_memory_error(error):
                return {"notice": views.notice(_NO_MEMORY)}
            if type(error) is RuntimeError or isinstance(error, NotImplementedError):
                raise  # of torch, and nothing that a visitor could help
            return {"notice": views.notice(_short(str(error)))}

    return answer


class Handlers:
    """Every method is one wish of one visitor and gives the parts of the page that change.

    Args:
        explainers: by name.
        sessions: who looks at what.
        sweeper: of the server's folder for uploads.
        examples: name -> photograph.
    """

    def __init__(self, explainers: Explainers, sessions: Sessions, sweeper: Sweeper, examples: dict[str, Path]):
        self.explainers = explainers
        self.sessions = sessions
        self.sweeper = sweeper
        self.examples = examples

    def warm_up(self, explainer: str) -> None:
        """One example from beginning to end: the first pass of a process is slow, and nobody should wait for it."""
        picture, _ = open_picture(next(iter(self.examples.values())))
        analysis = Analysis(self.explainers.get(explainer), picture)
        analysis.placed_map("ttame", analysis.top[0])
        with contextlib.suppress(ModuleNotFoundError, ValueError):
            analysis.test("gradcam", analysis.top[0], 50)

    def upload(
        self, visitor: str, file: dict[str, Any] | None, explainer: str | None, strength: int, colours: str
    ) -> Content:
        """An upload, a paste or a photo of the webcam."""
        if not file or not file.get("path"):
            return {}
        path = Path(file["path"])
        try:
            return self._upload(visitor, lambda: read_upload(path, self.sweeper.folder), explainer, strength, colours)
        finally:
            if path.resolve().is_relative_to(self.sweeper.folder.resolve()):
                self.sweeper.was_read(path)

    def example(self, visitor: str, name: str, explainer: str | None, strength: int, colours: str) -> Content:
        """One of the photographs that are there."""
        return self._upload(visitor, lambda: self._example(name), explainer, strength, colours)

    def _example(self, name: str) -> tuple[Image.Image, str]:
        if name not in self.examples:
            raise ValueError(f"there is no example {name!r}; there are {', '.join(self.examples)}")
        return open_picture(self.examples[name])

    def _upload(
        self,
        visitor: str,
        read: Callable[[], tuple[Image.Image, str]],
        explainer: str | None,
        strength: int,
        colours: str,
    ) -> Content:
        def begin(newest: Callable[[], bool]) -> Content:
            picture, remark = read()
            chosen = self.explainers.get(explainer, wait=False)  # one that loads must not keep all pictures waiting
            return self._begin(visitor, chosen, picture, remark, strength, colours, newest)

        return self._last_wish(visitor, begin)

    def explainer(self, visitor: str, name: str | None, strength: int, colours: str) -> Content:
        """Another explainer, for the same picture where there is one."""

        def begin(newest: Callable[[], bool]) -> Content:
            chosen = self.explainers.get(name)
            try:
                picture = self.sessions.find(visitor).analysis.picture
            except ValueError:
                return {"notice": "", "report": report(chosen)}
            return {**self._begin(visitor, chosen, picture, "", strength, colours, newest), "report": report(chosen)}

        return self._last_wish(visitor, begin)

    def _last_wish(self, visitor: str, begin: Callable[[Callable[[], bool]], Content]) -> Content:
        """What the last wish for another picture shows, with the field for pictures emptied; of an older one nothing.

        Words about an older wish would be misread, and emptying the field could take the next picture out of it.
        """
        with self.sessions.wish(visitor) as newest:
            shown = in_words(begin)(newest)
            return {**shown, "picture": None} if newest() else {}

    def _begin(
        self,
        visitor: str,
        explainer: Explainer,
        picture: Image.Image,
        remark: str,
        strength: int,
        colours: str,
        newest: Callable[[], bool],
    ) -> Content:
        if not newest():
            return {}  # no pass for what nobody waits for
        analysis = Analysis(explainer, picture)
        if not newest():
            return {}
        session = self.sessions.begin(visitor, analysis)
        # The ids as numbers: text would be taken for a name, and a class may be called "1".
        choices = [(analysis.label(class_id), class_id) for class_id in analysis.top]
        return {
            **self._shown(session, strength, colours),
            "notice": views.notice(remark, "remark"),
            "pair": views.pair(session, colours),
            "first": (choices, session.pair[0]),
            "second": (choices, session.pair[1]),
        }

    def _shown(self, session: Session, strength: int, colours: str) -> Content:
        return {"notice": "", "bars": views.bars(session), "stage": views.stage(session, strength, colours)}

    @in_words
    def choose_class(self, visitor: str, class_id: Any, strength: int, colours: str) -> Content:
        """Show another class's map: no pass of the backbone."""
        session = self.sessions.find(visitor)
        if not isinstance(class_id, int) or not 0 <= class_id < len(session.analysis.scores):
            raise ValueError("there is no such class")
        session.class_id = class_id
        return self._shown(session, strength, colours)

    @in_words
    def ask_class(self, visitor: str, name: str, strength: int, colours: str) -> Content:
        """A class that was typed, by name or id."""
        if not name.strip():
            return {}
        session = self.sessions.find(visitor)
        session.class_id = self._resolve(session, name)
        if session.class_id not in [*session.analysis.top, *session.asked]:
            session.asked = [*session.asked, session.class_id][-3:]
        return {**self._shown(session, strength, colours), "other": ""}

    @staticmethod
    def _resolve(session: Session, name: str | int) -> int:
        wanted = name if isinstance(name, int) else str(name)[:200]
        return int(session.analysis.explainer.model.resolve_classes(wanted)[0])

    @in_words
    def measure(self, visitor: str, keep: float, colours: str) -> Content:
        """The test of the map and the comparison with Grad-CAM: real passes of the backbone."""
        try:
            session = self.sessions.find(visitor)
        except ValueError:
            return {}  # why there is no picture was said by what came before
        analysis, class_id, keep = session.analysis, session.class_id, _percent(keep)
        tested: dict[str, Tested | str] = {"ttame": analysis.test("ttame", class_id, keep)}
        try:
            tested["gradcam"] = analysis.test("gradcam", class_id, keep)
        except (ModuleNotFoundError, ValueError) as error:
            tested["gradcam"] = _short(str(error))
        tested["rise"] = (
            analysis.test("rise", class_id, keep)
            if analysis.has_map("rise", class_id)
            else "RISE takes one pass per mask: run it below"
        )
        if not self.sessions.holds(visitor, session) or session.class_id != class_id:
            return {}  # somebody was faster: what they asked for must not be overwritten
        of_ours = tested["ttame"]
        assert isinstance(of_ours, Tested)
        return {
            "test": views.test(session, keep, of_ours),
            "methods": views.methods(session, keep, colours, tested),
        }

    @in_words
    def recolour(self, visitor: str, keep: float, strength: int, colours: str) -> Content:
        """Other colours for every map."""
        session = self.sessions.find(visitor)
        stage, pair = views.stage(session, strength, colours), views.pair(session, colours)
        return {"stage": stage, "pair": pair, **self.measure(visitor, keep, colours)}

    @in_words
    def compare(self, visitor: str, first: str | int, second: str | int, colours: str) -> Content:
        """Two classes of the picture side by side, ids or names that were typed: no pass of the backbone."""
        session = self.sessions.find(visitor)
        session.pair = (self._resolve(session, first), self._resolve(session, second))
        return {"notice": "", "pair": views.pair(session, colours)}

    @in_words
    def rise(
        self, visitor: str, masks: float, keep: float, colours: str, progress: Callable[[int, int], None]
    ) -> Content:
        """RISE's map of the class for which it was asked; ends early where it is stopped or another picture comes."""
        session = self.sessions.find(visitor)
        if session.rise_class is None:
            return {}  # asked for on another picture
        masks = min(max(int(masks), 1), MAX_MASKS)
        done = session.analysis.run_rise(session.rise_class, masks, progress, session.stop.is_set)
        if not self.sessions.holds(visitor, session):
            return {}
        stopped = f"RISE was stopped after {done:,d} of {masks:,d} masks." if done < masks else ""
        return {"notice": views.notice(stopped, "remark"), **self.measure(visitor, keep, colours)}

    def arm_rise(self, visitor: str, stop: bool) -> None:
        """Before RISE is put in the queue: it may run, for the class that is shown. With `stop`: it may not."""
        with contextlib.suppress(ValueError):  # no picture, nothing runs
            session = self.sessions.find(visitor)
            if stop:
                session.stop.set()
            else:
                session.rise_class = session.class_id
                session.stop.clear()


def _percent(keep: float) -> int:
    return min(max(round(keep), 1), 100)


def _short(text: str, length: int = 300) -> str:
    text = " ".join(text.split())
    return text if len(text) <= length else text[: length - 1] + "…"
