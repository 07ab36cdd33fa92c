"""Events on their way from the owner thread to a host."""

import threading
from collections import deque
from typing import Any

from magistral_mlx.serving.events import TEXT, failed
from magistral_mlx.serving.failures import BrokenError, ClosedError


class Channel:
    """What waits to be pulled. Who puts never waits: a host that stops pulling does not stop the model.

    What waits stays small all the same, without a limit: pieces of text join the piece before them, and progress
    replaces the progress before it, so that there are as many events as there are changes of kind.

    Attributes:
        is_cancelled: the host wants no more; the last event still comes.
    """

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._waiting: deque[dict[str, Any]] = deque()
        self._pieces: list[str] = []  # of the newest event that waits, if that is text
        self._has_ended = False
        self._is_broken = False  # the last event is still to be made
        self._is_pulled = False  # the last event is
        self.is_cancelled = False

    def put(self, event: Any) -> None:
        """Add an event."""
        with self._condition:
            self._add(event)
            self._condition.notify_all()

    def end(self, event: Any) -> None:
        """Add the last event; a second one is dropped."""
        with self._condition:
            if not self._has_ended:
                self._add(event)
                self._has_ended = True
            self._condition.notify_all()

    def break_off(self) -> None:
        """End without an event, which there may be no memory for; ``get`` makes it."""
        with self._condition:
            self._is_broken = self._is_broken or not self._has_ended
            self._has_ended = True
            self._condition.notify_all()

    def get(self, seconds: float | None) -> tuple[dict[str, Any] | None, bool]:
        """The next event, waited for with the GIL released, or None after ``seconds``; and whether it was the last.

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
                    self._settle(event)
            elif self._has_ended:
                event = {
                    **failed(BrokenError("the owner thread could not say why the stream ended"))
                }
                self._is_broken = False
            self._is_pulled = self._has_ended and not self._waiting and not self._is_broken
            return event, self._is_pulled

    def _add(self, event: dict[str, Any]) -> None:
        newest = self._waiting[-1] if self._waiting else None
        if newest is not None and newest["kind"] == event["kind"] and newest["kind"] in TEXT:
            self._pieces.append(event["text"])
            return
        if newest is not None:
            self._settle(newest)
            if newest["kind"] == event["kind"] == "progress":
                self._waiting.pop()
        self._waiting.append(event)
        if event["kind"] in TEXT:
            self._pieces.append(event["text"])

    def _settle(self, newest: dict[str, Any]) -> None:
        """Put the newest event's text together."""
        if newest["kind"] in TEXT:
            newest["text"] = "".join(self._pieces)
            self._pieces.clear()
