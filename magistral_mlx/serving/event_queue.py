"""Events on their way from the worker thread to a host."""

import threading
from collections import deque
from typing import Any

from magistral_mlx.serving.events import TEXT, failed
from magistral_mlx.serving.failures import BrokenError, ClosedError


class EventQueue:
    """Queue of the events of one stream.

    ``put`` never blocks, so that a host that stops pulling does not stop the model. The queue stays
    small without a limit: a piece of text joins the piece before it, and progress replaces the
    progress before it.

    Attributes:
        is_cancelled: the host wants no more events; the last one still comes.
    """

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._waiting: deque[dict[str, Any]] = deque()
        # The text of the newest event that waits, in pieces.
        self._pieces: list[str] = []
        self._has_ended = False
        self._is_aborted = False
        self._is_pulled = False
        self.is_cancelled = False

    def put(self, event: Any) -> None:
        """Add an event."""
        with self._condition:
            self._add(event)
            self._condition.notify_all()

    def end(self, event: Any) -> None:
        """Add the last event; drop a second one."""
        with self._condition:
            if not self._has_ended:
                self._add(event)
                self._has_ended = True
            self._condition.notify_all()

    def abort(self) -> None:
        """End without an event, for which there may be no memory; ``get`` makes it later."""
        with self._condition:
            self._is_aborted = self._is_aborted or not self._has_ended
            self._has_ended = True
            self._condition.notify_all()

    def get(self, seconds: float | None) -> tuple[dict[str, Any] | None, bool]:
        """Return the next event, and True if it is the last; wait with the GIL released.

        The event is None if there is none within ``seconds``.

        Raises:
            ClosedError: the last event was pulled.
        """
        with self._condition:
            self._condition.wait_for(lambda: self._waiting or self._has_ended, seconds)
            if self._is_pulled:
                raise ClosedError("this stream has ended: its last event was pulled")
            event: dict[str, Any] | None = None
            if self._waiting:
                event = self._waiting.popleft()
                if not self._waiting:
                    self._join_text(event)
            elif self._has_ended:
                broken = BrokenError("the worker thread could not say why the stream ended")
                event = {**failed(broken)}
                self._is_aborted = False
            self._is_pulled = self._has_ended and not self._waiting and not self._is_aborted
            return event, self._is_pulled

    def _add(self, event: dict[str, Any]) -> None:
        newest = self._waiting[-1] if self._waiting else None
        if newest is not None and newest["kind"] == event["kind"] and newest["kind"] in TEXT:
            self._pieces.append(event["text"])
            return
        if newest is not None:
            self._join_text(newest)
            if newest["kind"] == event["kind"] == "progress":
                self._waiting.pop()
        self._waiting.append(event)
        if event["kind"] in TEXT:
            self._pieces.append(event["text"])

    def _join_text(self, newest: dict[str, Any]) -> None:
        """Put the pieces of the newest event's text together."""
        if newest["kind"] in TEXT:
            newest["text"] = "".join(self._pieces)
            self._pieces.clear()
