"""What a host has open: models and streams under numbers, each model's work in its order. Short, from any thread."""

import itertools
from collections.abc import Callable
from typing import Any

from magistral_mlx.model.load_options import LoadOptions
from magistral_mlx.serving.event_queue import Channel
from magistral_mlx.serving.events import never_begun
from magistral_mlx.serving.failures import BusyError, ClosedError
from magistral_mlx.serving.hosted_model import Request, Resident, Steps
from magistral_mlx.serving.worker import Job, Line, Owner

MOST_WAITING = 16  # streams of one model: a host that starts more has lost count of them


class Hosted:
    """One model of a host: a resident, and the line of its jobs."""

    def __init__(self, owner: Owner, model: str) -> None:
        self.model = model
        self.resident = Resident(owner.lock)
        self._owner = owner
        self._line = Line()
        self._is_closed = False

    @property
    def streams(self) -> int:
        """Jobs under way and waiting."""
        return len(self._line)

    def load(self, options: LoadOptions, others: list[Resident]) -> Channel:
        return self._add(lambda channel: self.resident.load(channel, self.model, options, others))

    def start(self, request: Request) -> tuple[Channel, int]:
        """The stream of a reply, and how many are before it."""
        with self._owner.lock:
            if (ahead := self.streams) > MOST_WAITING:
                raise BusyError(f"{ahead} streams of this model have not ended")
            return self._add(lambda channel: self.resident.reply(channel, request)), ahead

    def save(self, path: str) -> dict[str, Any]:
        return self._alone(lambda channel: self.resident.save(channel, path))

    def resume(self, path: str) -> dict[str, Any]:
        return self._alone(lambda channel: self.resident.resume(channel, path))

    def close(self) -> dict[str, Any]:
        """Cancel what is under way or waits, and give the memory back; returns when that is done."""
        with self._owner.lock:
            if self._is_closed:
                raise ClosedError("this model is being closed by another thread")
            while len(self._line) > 1:  # what has not begun need not have its turn to end
                self._line.pop().channel.end(never_begun())
            channel = self._add(self.resident.release)
            self._is_closed = True
            for job in self._line:
                self.resident.cancel(job.channel)
        return _result(channel)

    def _alone(self, work: Callable[[Channel], Steps]) -> dict[str, Any]:
        """Do something that needs the model to rest; replies that were cancelled may still be ending."""
        with self._owner.lock:
            if any(not job.channel.is_cancelled for job in self._line):
                raise BusyError("a stream of this model has not ended")
            channel = self._add(work)
        return _result(channel)

    def _add(self, work: Callable[[Channel], Steps]) -> Channel:
        channel = Channel()
        with self._owner.lock:
            if self._is_closed:
                raise ClosedError("this model is closed")
            self._owner.add(self._line, Job(work(channel), channel))
        return channel


def _result(channel: Channel) -> dict[str, Any]:
    """What a job without a stream brings; waits for it with the GIL released."""
    event, _ = channel.get(None)
    assert event is not None
    if event.pop("kind") == "error":
        return {"ok": False, "error": event}
    return event


class Desk:
    """Numbers for what is open: never used twice, so that an old one is recognized."""

    def __init__(self) -> None:
        self._owner = Owner(at_exit=self.close_all)
        self._numbers = itertools.count(1)
        self._models: dict[int, Hosted] = {}
        self._streams: dict[int, tuple[int, Channel]] = {}  # and the number of their model

    def load(self, model: str, options: LoadOptions) -> tuple[int, int]:
        """Begin to load a model; return its handle and the number of its stream."""
        hosted = Hosted(self._owner, model)
        with self._owner.lock:
            channel = hosted.load(options, [other.resident for other in self._models.values()])
            handle = next(self._numbers)
            self._models[handle] = hosted
            return handle, self._numbered(handle, channel)

    def start(self, handle: int, request: Request) -> tuple[int, int]:
        """Begin a reply; the number of its stream, and how many streams are before it."""
        with self._owner.lock:
            channel, ahead = self.model(handle).start(request)
            return self._numbered(handle, channel), ahead

    def model(self, handle: int) -> Hosted:
        with self._owner.lock:
            if handle not in self._models:
                raise ClosedError(f"handle {handle} is closed, or was never given by load")
            return self._models[handle]

    def pull(self, stream: int, seconds: float | None) -> dict[str, Any] | None:
        """The next event of a stream, or None after ``seconds``; the last one ends its number."""
        _, channel = self._stream(stream)
        event, is_last = channel.get(seconds)
        if is_last:
            with self._owner.lock:
                self._streams.pop(stream, None)
        return event

    def whole(self, stream: int) -> dict[str, Any]:
        """All of a reply, waited for."""
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
        with self._owner.lock:
            handle, channel = self._stream(stream)
            self._models[handle].resident.cancel(channel)

    def close(self, handle: int) -> dict[str, Any]:
        """Close a model and end the numbers of its streams."""
        with self._owner.lock:
            hosted = self.model(handle)
            del self._models[handle]
            self._streams = {
                number: entry for number, entry in self._streams.items() if entry[0] != handle
            }
        return hosted.close()

    def close_all(self) -> None:
        for handle in list(self._models):
            self.close(handle)

    def _stream(self, stream: int) -> tuple[int, Channel]:
        with self._owner.lock:
            if stream not in self._streams:
                raise ClosedError(f"stream {stream} has ended, or was never given by load or start")
            return self._streams[stream]

    def _numbered(self, handle: int, channel: Channel) -> int:
        number = next(self._numbers)
        self._streams[number] = handle, channel
        return number
