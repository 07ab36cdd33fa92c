"""The owner thread: lines take turns, jobs of a line follow each other, and nothing that is raised ends it."""

import threading
from collections.abc import Iterator

import pytest

from magistral_mlx.serving.event_queue import Channel
from magistral_mlx.serving.worker import Job, Line, Owner

Log = list[tuple[str, int, str]]


@pytest.fixture
def owner() -> Owner:
    return Owner(at_exit=lambda: None)


def job(log: Log, name: str, steps: int, raising: BaseException | None = None) -> Job:
    channel = Channel()

    def work() -> Iterator[None]:
        for step in range(steps):
            log.append((name, step, threading.current_thread().name))
            yield
        if raising is not None:
            raise raising
        channel.end({"kind": "done"})

    return Job(work(), channel)


def test_lines_take_turns_and_jobs_of_one_follow_each_other(owner: Owner) -> None:
    log: Log = []
    first, second = Line(), Line()
    jobs = [job(log, "a", 3), job(log, "b", 2), job(log, "c", 4)]
    with owner.lock:  # all of them are there before the first step
        owner.add(first, jobs[0])
        owner.add(first, jobs[1])
        owner.add(second, jobs[2])
    for each in jobs:
        assert each.channel.get(None)[1]
    assert {thread for _, _, thread in log} == {"magistral-owner"}
    order = [name for name, _, _ in log]
    assert [name for name in order if name != "c"] == ["a"] * 3 + ["b"] * 2
    assert order[:6] == ["a", "c"] * 3
    assert not first
    assert not second


@pytest.mark.parametrize(
    "error", [ValueError, MemoryError, RecursionError, SystemExit, KeyboardInterrupt]
)
def test_whatever_a_job_raises_is_its_last_event(owner: Owner, error: type[BaseException]) -> None:
    log: Log = []
    line = Line()
    failing, next_one = job(log, "a", 1, error("no")), job(log, "b", 1)
    owner.add(line, failing)
    owner.add(line, next_one)
    event, is_last = failing.channel.get(None)
    assert event is not None
    assert (event["kind"], is_last) == ("error", True)
    assert next_one.channel.get(None) == ({"kind": "done"}, True)


def test_a_job_that_forgets_its_last_event_has_one(owner: Owner) -> None:
    forgetful = Job(iter(()), Channel())  # type: ignore[arg-type]
    owner.add(Line(), forgetful)
    event, is_last = forgetful.channel.get(None)
    assert event is not None
    assert (event["kind"], is_last) == ("error", True)
