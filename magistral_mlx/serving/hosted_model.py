"""A model that a host has open: the queue of its jobs, from any thread."""

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from magistral_mlx.engine.request import Request
from magistral_mlx.engine.worker import Worker
from magistral_mlx.model.load_options import LoadOptions
from magistral_mlx.serving.event_queue import EventQueue
from magistral_mlx.serving.events import never_started
from magistral_mlx.serving.failures import BusyError, ClosedError
from magistral_mlx.serving.job import Job, Steps
from magistral_mlx.serving.model_jobs import ModelJobs

# A host that starts more streams of one model has lost count of them.
MAX_WAITING = 16


class HostedModel:
    """One model of a host: its jobs, and the queue in which they run one after another."""

    def __init__(self, worker: Worker, name: str) -> None:
        self.name = name
        self.jobs = ModelJobs(worker.lock)
        self._worker = worker
        self._queue: deque[Job] = deque()
        self._is_closed = False

    @property
    def streams(self) -> int:
        """Jobs that run or wait."""
        return len(self._queue)

    def load(self, options: LoadOptions, others: Sequence[ModelJobs]) -> EventQueue:
        """Start to load the model beside other models; return the events."""
        return self._add(lambda queue: self.jobs.load(queue, self.name, options, others))

    def start(self, request: Request) -> tuple[EventQueue, int]:
        """Start a reply; return its events, and how many streams are before it."""
        with self._worker.lock:
            if (ahead := self.streams) > MAX_WAITING:
                raise BusyError(f"{ahead} streams of this model have not ended")
            return self._add(lambda queue: self.jobs.reply(queue, request)), ahead

    def save(self, path: str, *, overwrite: bool) -> dict[str, Any]:
        """Write the conversation of the last reply to a file."""
        return self._run_alone(lambda queue: self.jobs.save(queue, path, overwrite=overwrite))

    def resume(self, path: str) -> dict[str, Any]:
        """Read a saved conversation."""
        return self._run_alone(lambda queue: self.jobs.resume(queue, path))

    def close(self) -> dict[str, Any]:
        """Cancel what runs or waits and free the memory; return when that is done."""
        with self._worker.lock:
            if self._is_closed:
                raise ClosedError("this model is being closed by another thread")
            # A job that has not started can end without its turn.
            while len(self._queue) > 1:
                self._queue.pop().events.end(never_started())
            events = self._add(self.jobs.release)
            self._is_closed = True
            for job in self._queue:
                self.jobs.cancel(job.events)
        return _result(events)

    def _run_alone(self, work: Callable[[EventQueue], Steps]) -> dict[str, Any]:
        """Run a job that needs an idle model; replies that were cancelled may still be ending."""
        with self._worker.lock:
            if any(not job.events.is_cancelled for job in self._queue):
                raise BusyError("a stream of this model has not ended")
            events = self._add(work)
        return _result(events)

    def _add(self, work: Callable[[EventQueue], Steps]) -> EventQueue:
        events = EventQueue()
        with self._worker.lock:
            if self._is_closed:
                raise ClosedError("this model is closed")
            self._worker.add(self._queue, Job(work(events), events))
        return events


def _result(events: EventQueue) -> dict[str, Any]:
    """Wait for the one event of a job without a stream, with the GIL released, and return it."""
    event, _ = events.get(None)
    assert event is not None
    if event.pop("kind") == "error":
        return {"ok": False, "error": event}
    return event
