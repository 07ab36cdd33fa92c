"""Handles: the numbers by which a host names its models and streams. Short calls, any thread."""

import itertools
from typing import Any

from magistral_mlx.engine.request import Request
from magistral_mlx.engine.worker import WORKER
from magistral_mlx.model.load_options import LoadOptions
from magistral_mlx.serving.event_queue import EventQueue
from magistral_mlx.serving.failures import ClosedError
from magistral_mlx.serving.hosted_model import HostedModel


class Handles:
    """Numbers for what a host has open. No number is used twice, so that an old one is refused."""

    def __init__(self) -> None:
        self._worker = WORKER
        self._worker.at_exit(self.close_all)
        self._numbers = itertools.count(1)
        self._models: dict[int, HostedModel] = {}
        # By its number, the handle of a stream's model, and its events.
        self._streams: dict[int, tuple[int, EventQueue]] = {}

    def load(self, model: str, options: LoadOptions) -> tuple[int, int]:
        """Start to load a model; return its handle and the number of its stream."""
        hosted = HostedModel(self._worker, model)
        with self._worker.lock:
            events = hosted.load(options, [other.jobs for other in self._models.values()])
            handle = next(self._numbers)
            self._models[handle] = hosted
            return handle, self._number(handle, events)

    def start(self, handle: int, request: Request) -> tuple[int, int]:
        """Start a reply; return the number of its stream, and how many streams are before it."""
        with self._worker.lock:
            events, ahead = self.model(handle).start(request)
            return self._number(handle, events), ahead

    def model(self, handle: int) -> HostedModel:
        """Return the model of a handle.

        Raises:
            ClosedError: there is none.
        """
        with self._worker.lock:
            if handle not in self._models:
                raise ClosedError(f"handle {handle} is closed, or was never given by load")
            return self._models[handle]

    def pull(self, stream: int, seconds: float | None) -> dict[str, Any] | None:
        """Return the next event of a stream, or None after ``seconds``; the last one ends it."""
        _, events = self._stream(stream)
        event, is_last = events.get(seconds)
        if is_last:
            with self._worker.lock:
                self._streams.pop(stream, None)
        return event

    def read_all(self, stream: int) -> dict[str, Any]:
        """Wait for a whole reply and return it."""
        reply: dict[str, Any] = {"reasoning": "", "answer": "", "tool_calls": []}
        while True:
            event = self.pull(stream, None)
            assert event is not None
            match event.pop("kind"):
                case "reasoning" | "answer" as kind:
                    reply[kind] += event["text"]
                case "tool_call":
                    reply["tool_calls"].append(event)
                case "error":
                    return {"ok": False, "error": event}
                case "done":
                    return reply | event

    def cancel(self, stream: int) -> None:
        """End a stream early; its last event still comes."""
        with self._worker.lock:
            handle, events = self._stream(stream)
            self._models[handle].jobs.cancel(events)

    def close(self, handle: int) -> dict[str, Any]:
        """Close a model and end the numbers of its streams."""
        with self._worker.lock:
            hosted = self.model(handle)
            del self._models[handle]
            self._streams = {
                number: entry for number, entry in self._streams.items() if entry[0] != handle
            }
        return hosted.close()

    def close_all(self) -> None:
        """Close every model."""
        for handle in list(self._models):
            self.close(handle)

    def _stream(self, stream: int) -> tuple[int, EventQueue]:
        with self._worker.lock:
            if stream not in self._streams:
                raise ClosedError(f"stream {stream} has ended, or was never given by load or start")
            return self._streams[stream]

    def _number(self, handle: int, events: EventQueue) -> int:
        number = next(self._numbers)
        self._streams[number] = handle, events
        return number
