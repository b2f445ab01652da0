"""Who looks at what: one analysis per visitor, in memory only, and not for long."""

import itertools
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from .analysis import Analysis
from .explainers import Explainer


@dataclass(eq=False)
class Session:
    """One visitor's picture.

    class_id: what is shown. pair: the two classes of the comparison. asked: classes that were typed, beside the top
    ones. rise_class: the class for which RISE was asked. stop: set to end a RISE that runs. used: when the visitor
    last asked for anything. left: when the connection ended, None while it stands.
    """

    analysis: Analysis
    class_id: int
    pair: tuple[int, int]
    asked: list[int] = field(default_factory=list)
    rise_class: int | None = None
    stop: threading.Event = field(default_factory=threading.Event)
    used: float = field(default_factory=time.monotonic)
    left: float | None = None


class Sessions:
    """The visitors that are remembered.

    Args:
        capacity: at most so many; the one that was longest silent is forgotten first.
        silent: seconds after which a visitor who asks for nothing is forgotten.
        gone: seconds after the connection ended: a phone ends it whenever another app is looked at.
    """

    def __init__(self, capacity: int = 64, silent: float = 1800.0, gone: float = 300.0):
        self.capacity = capacity
        self.silent = silent
        self.gone = gone
        self._by_visitor: OrderedDict[str, Session] = OrderedDict()
        self._numbers = itertools.count()
        self._newest: dict[str, int] = {}  # of the wishes for another picture
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._by_visitor)

    @contextmanager
    def wish(self, visitor: str) -> Iterator[Callable[[], bool]]:
        """While another picture is made for a visitor: whether it is still the last one that was asked for.

        What takes long can come after what was asked for later, and must not overwrite it.
        """
        with self._lock:
            number = self._newest[visitor] = next(self._numbers)
        try:
            yield lambda: self._newest.get(visitor) == number
        finally:
            with self._lock:
                if self._newest.get(visitor) == number:
                    del self._newest[visitor]

    def begin(self, visitor: str, analysis: Analysis) -> Session:
        """A new picture: the visitor's earlier one is forgotten, and whatever runs on it stops."""
        top = analysis.top
        session = Session(analysis, top[0], (top[0], top[min(1, len(top) - 1)]))
        self.end(visitor)
        with self._lock:
            self._by_visitor[visitor] = session
        self.forget()
        return session

    def end(self, visitor: str) -> None:
        with self._lock:
            session = self._by_visitor.pop(visitor, None)
        if session is not None:
            session.stop.set()

    def leave(self, visitor: str) -> None:
        """The connection ended: what runs stops, and without another word from this visitor the picture goes."""
        with self._lock:
            session = self._by_visitor.get(visitor)
        if session is not None:
            session.stop.set()
            session.left = time.monotonic()

    def find(self, visitor: str) -> Session:
        """Raises ValueError where there is no picture (any more)."""
        self.forget()
        with self._lock:
            if visitor not in self._by_visitor:
                raise ValueError("there is no picture here, or it was forgotten after a while; give one (again)")
            self._by_visitor.move_to_end(visitor)
            session = self._by_visitor[visitor]
        session.used, session.left = time.monotonic(), None
        return session

    def holds(self, visitor: str, session: Session) -> bool:
        """Whether this is still what the visitor looks at; asking is no sign of life."""
        with self._lock:
            return self._by_visitor.get(visitor) is session

    def by_token(self, token: str) -> Analysis | None:
        """The analysis of this name, for whoever knows it."""
        with self._lock:
            for session in self._by_visitor.values():
                if session.analysis.token == token:
                    return session.analysis
        return None

    def forget_explainer(self, explainer: Explainer) -> None:
        """Forget everybody who looks at this explainer, so that its memory can be used for another."""
        for visitor, session in list(self._by_visitor.items()):
            if session.analysis.explainer is explainer:
                self.end(visitor)

    def forget(self) -> None:
        """Let go of whoever is gone, silent for too long, or one too many."""
        now = time.monotonic()
        with self._lock:
            sessions = list(self._by_visitor.items())
        late = [visitor for visitor, session in sessions if now - session.used > self.silent]
        late += [visitor for visitor, session in sessions if session.left and now - session.left > self.gone]
        for visitor in late + [visitor for visitor, _ in sessions[: max(0, len(sessions) - self.capacity)]]:
            self.end(visitor)
