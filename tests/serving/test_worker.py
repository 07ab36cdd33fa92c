"""The worker thread: queues take turns, jobs of one queue follow each other, errors are events."""

import threading
from collections import deque
from collections.abc import Iterator

import pytest

from magistral_mlx.engine.worker import Worker
from magistral_mlx.serving.event_queue import EventQueue
from magistral_mlx.serving.job import Job

Log = list[tuple[str, int, str]]


@pytest.fixture
def worker() -> Worker:
    return Worker()


def job(log: Log, name: str, steps: int, raising: BaseException | None = None) -> Job:
    events = EventQueue()

    def work() -> Iterator[None]:
        for step in range(steps):
            log.append((name, step, threading.current_thread().name))
            yield
        if raising is not None:
            raise raising
        events.end({"kind": "done"})

    return Job(work(), events)


def test_queues_take_turns_and_jobs_of_one_queue_follow_each_other(worker: Worker) -> None:
    log: Log = []
    first: deque[Job] = deque()
    second: deque[Job] = deque()
    jobs = [job(log, "a", 3), job(log, "b", 2), job(log, "c", 4)]
    with worker.lock:  # all jobs are added before the first step
        worker.add(first, jobs[0])
        worker.add(first, jobs[1])
        worker.add(second, jobs[2])
    for each in jobs:
        assert each.events.get(None)[1]
    assert {thread for _, _, thread in log} == {"magistral-worker"}
    order = [name for name, _, _ in log]
    assert [name for name in order if name != "c"] == ["a"] * 3 + ["b"] * 2
    assert order[:6] == ["a", "c"] * 3
    assert not first
    assert not second


@pytest.mark.parametrize(
    "error", [ValueError, MemoryError, RecursionError, SystemExit, KeyboardInterrupt]
)
def test_whatever_a_job_raises_is_its_last_event(
    worker: Worker, error: type[BaseException]
) -> None:
    log: Log = []
    jobs: deque[Job] = deque()
    failing, next_one = job(log, "a", 1, error("no")), job(log, "b", 1)
    worker.add(jobs, failing)
    worker.add(jobs, next_one)
    event, is_last = failing.events.get(None)
    assert event is not None
    assert (event["kind"], is_last) == ("error", True)
    assert next_one.events.get(None) == ({"kind": "done"}, True)


def test_a_job_without_a_last_event_gets_one(worker: Worker) -> None:
    forgetful = Job(iter(()), EventQueue())  # type: ignore[arg-type]
    worker.add(deque(), forgetful)
    event, is_last = forgetful.events.get(None)
    assert event is not None
    assert (event["kind"], is_last) == ("error", True)
