"""Event queues: no event is lost, few wait, and no thread waits for ever."""

import random
import threading

import pytest

from magistral_mlx.serving.event_queue import EventQueue
from magistral_mlx.serving.failures import ClosedError


def drained(queue: EventQueue) -> list[dict[str, object]]:
    events = []
    while True:
        event, is_last = queue.get(0)
        assert event is not None
        events.append(event)
        if is_last:
            return events


@pytest.mark.parametrize("seed", range(20))
def test_text_is_kept_in_order_and_kinds_change_as_they_did(seed: int) -> None:
    chance, queue = random.Random(seed), EventQueue()
    put: list[tuple[str, str]] = []
    got: list[tuple[str, str]] = []
    for i in range(60):
        kind = chance.choice(["reasoning", "answer"])
        put.append((kind, f"{i} "))
        queue.put({"kind": kind, "text": f"{i} "})
        if chance.random() < 0.3:
            event, _ = queue.get(0)
            assert event is not None
            got.append((event["kind"], event["text"]))
    queue.end({"kind": "done"})
    *rest, last = drained(queue)
    got += [(str(event["kind"]), str(event["text"])) for event in rest]
    assert last == {"kind": "done"}
    for kind in ("reasoning", "answer"):
        assert "".join(t for k, t in got if k == kind) == "".join(t for k, t in put if k == kind)
    assert "".join(t for _, t in got) == "".join(t for _, t in put)


def test_the_queue_does_not_grow_with_the_reply() -> None:
    queue = EventQueue()
    for i in range(10_000):
        queue.put({"kind": "progress", "done": i})
    for _ in range(10_000):
        queue.put({"kind": "reasoning", "text": "ab"})
    queue.put({"kind": "tool_call", "id": "1"})
    queue.put({"kind": "tool_call", "id": "2"})
    queue.end({"kind": "done"})
    events = drained(queue)
    assert events[0] == {"kind": "progress", "done": 9_999}
    assert events[1] == {"kind": "reasoning", "text": "ab" * 10_000}
    assert [event.get("id") for event in events[2:]] == ["1", "2", None]


def test_the_first_end_is_the_end() -> None:
    queue = EventQueue()
    queue.end({"kind": "done"})
    queue.end({"kind": "error"})
    queue.abort()
    assert queue.get(0) == ({"kind": "done"}, True)
    with pytest.raises(ClosedError):
        queue.get(0)


def test_an_end_without_an_event_is_an_error() -> None:
    queue = EventQueue()
    queue.put({"kind": "answer", "text": "a"})
    queue.abort()
    first, last = drained(queue)
    assert (first["text"], last["kind"], last["code"]) == ("a", "error", "internal")


def test_every_waiting_thread_is_woken_by_the_end() -> None:
    queue, ended, begun = EventQueue(), [], threading.Barrier(5)

    def wait() -> None:
        begun.wait()
        try:
            ended.append(queue.get(None)[1])
        except ClosedError:
            ended.append(None)

    threads = [threading.Thread(target=wait) for _ in range(4)]
    for thread in threads:
        thread.start()
    begun.wait()
    queue.end({"kind": "done"})
    for thread in threads:
        thread.join()
    assert sorted(ended, key=str) == [None, None, None, True]
