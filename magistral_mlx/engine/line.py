"""Turns: the order in which callers use one model."""

import sys
import threading
from collections import deque
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, eq=False)
class Caller:
    """Code that does one thing after another: a thread, a task, or a call lent to a thread."""

    place: tuple[int, int]


_CALLER: ContextVar[Caller | None] = ContextVar("caller", default=None)


def current_caller() -> Caller:
    """Return who is calling.

    A pool that runs each call in a context of its own, as web servers do, has a new caller for
    each call, also on the same thread. A context that another thread or task began is not ours.
    """
    place = threading.get_ident(), _current_task()
    caller = _CALLER.get()
    if caller is None or caller.place != place:
        caller = Caller(place)
        _CALLER.set(caller)
    return caller


def _current_task() -> int:
    """Return the id of the running task of asyncio, or 0; nobody has one who did not import it."""
    asyncio = sys.modules.get("asyncio")
    try:
        return 0 if asyncio is None else id(asyncio.current_task())
    except RuntimeError:  # no event loop runs in this thread
        return 0


class Line:
    """The callers of one model, who use it one at a time in the order in which they came.

    A caller who has a stream open does not wait for it, since it would wait for itself: its new
    turn begins beside the old one, or in its place.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._holding: list[Turn] = []
        self._waiting: deque[Turn] = deque()

    def join(self, turn: "Turn") -> None:
        """Give a turn its place."""
        with self._lock:
            if self._holding and self._holding[-1].caller is not turn.caller:
                self._waiting.append(turn)
                return
            if turn.replaces:
                self._holding.clear()
            self._holding.append(turn)
        turn.grant()

    def leave(self, turn: "Turn") -> None:
        """End a turn, or a wait for it; the next one begins."""
        with self._lock:
            for turns in (self._holding, self._waiting):
                if turn in turns:
                    turns.remove(turn)
            if self._holding or not self._waiting:
                return
            following = self._waiting.popleft()
            self._holding.append(following)
        following.grant()


class Turn:
    """A caller's turn on a model, from its beginning to its end.

    Attributes:
        caller: who began it; another thread may have made it.
        replaces: it ends an older turn of the same caller.
    """

    def __init__(self, line: Line, *, replaces: bool = True) -> None:
        self.line, self.replaces = line, replaces
        self.caller: Caller | None = None
        self._begun: Future[None] | None = None

    @property
    def has_begun(self) -> bool:
        """True from the wait on."""
        return self._begun is not None

    def begin(self) -> "Future[None]":
        """Take a place in the line; return what tells that the turn has come."""
        if self._begun is None:
            self.caller = current_caller()
            self._begun = Future()
            # A task of asyncio that is cancelled would otherwise cancel the future as well.
            self._begun.set_running_or_notify_cancel()
            self.line.join(self)
        return self._begun

    def grant(self) -> None:
        """Let the wait end, because the turn has come or is not wanted any more."""
        if self._begun is not None:
            with suppress(InvalidStateError):
                self._begun.set_result(None)

    def leave(self) -> None:
        """End the turn, or the wait for it. Has no effect before its beginning."""
        if self._begun is not None:
            self.line.leave(self)
            self.grant()
