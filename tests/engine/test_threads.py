"""Any thread may call a model: replies come one at a time, in order of arrival, and are right."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from pathlib import Path
from queue import SimpleQueue

import mlx.core as mx
import pytest

import magistral_mlx as mm
from magistral_mlx.engine.line import Line, Turn
from magistral_mlx.engine.worker import EndingError, Worker
from magistral_mlx.streams import streamed, without_items

QUESTION, OTHER = "What is 48 + 76?", "How many r's are in strawberry?"
SHORT = mm.SamplingParams(seed=3, max_tokens=3)
LONG = mm.SamplingParams(temperature=9, top_p=1, seed=1, on_loop="ignore")


def said(reply: mm.Reply) -> tuple[str, str, str]:
    return reply.reasoning, reply.answer, reply.finish_reason


def arriving(monkeypatch: pytest.MonkeyPatch) -> "SimpleQueue[Turn]":
    """Return a queue that gets every turn as it joins a line."""
    joined: SimpleQueue[Turn] = SimpleQueue()
    join = Line.join

    def joining(self: Line, turn: Turn) -> None:
        join(self, turn)
        joined.put(turn)

    monkeypatch.setattr(Line, "join", joining)
    return joined


def check_threads(magistral: mm.Magistral, threads: int, asks: int) -> None:
    """Compare replies of several threads with those of one."""
    jobs = [(f"What is {i} + {k}?", 50 * i + k) for i in range(threads) for k in range(asks)]

    def ask(job: tuple[str, int]) -> tuple[str, str, str]:
        return said(magistral.ask(job[0], mm.SamplingParams(seed=job[1], max_tokens=3)))

    alone = list(map(ask, jobs))
    with ThreadPoolExecutor(threads) as pool:
        assert list(pool.map(ask, jobs)) == alone


def test_replies_of_several_threads_are_those_of_one(magistral: mm.Magistral) -> None:
    check_threads(magistral, threads=4, asks=1)


@pytest.mark.slow
def test_four_hundred_replies_of_eight_threads_are_those_of_one(magistral: mm.Magistral) -> None:
    check_threads(magistral, threads=8, asks=50)


def test_everything_may_be_called_at_once(magistral: mm.Magistral, tmp_path: Path) -> None:
    def converse(i: int) -> str:
        chat = magistral.chat()
        chat.ask(f"What is {i} + 2?", SHORT)
        chat.save(tmp_path / str(i), overwrite=True)
        return chat.messages[-1]["reasoning"] + str(magistral.resume(tmp_path / str(i)).messages)

    calls: list[Callable[[], object]] = [
        lambda: converse(1),
        lambda: converse(2),
        lambda: said(magistral.stream(QUESTION, SHORT).result()),
        lambda: [said(r) for r in magistral.sample(QUESTION, SHORT, n=2).replies],
        lambda: len(list(magistral.stream(OTHER, SHORT))) > 0,
    ]
    alone = [call() for call in calls]
    with ThreadPoolExecutor(5) as pool:
        assert [future.result() for future in [pool.submit(call) for call in calls]] == alone


def test_callers_are_served_in_the_order_in_which_they_came(
    magistral: mm.Magistral, monkeypatch: pytest.MonkeyPatch
) -> None:
    joined = arriving(monkeypatch)
    first = magistral.stream(QUESTION, SHORT)
    read = [next(first)]
    joined.get()
    order: list[int] = []

    def ask(number: int) -> None:
        magistral.stream(OTHER, SHORT).then(lambda _: order.append(number)).result()

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
        joined.get()
    read += first
    assert first.result().finish_reason == "length"
    for thread in threads:
        thread.join()
    assert order == [0, 1, 2, 3]


@pytest.mark.parametrize("how", ["cancel", "close"])
def test_a_reply_that_waits_in_line_can_be_ended(
    magistral: mm.Magistral, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    joined = arriving(monkeypatch)
    first = magistral.stream(QUESTION, SHORT)
    next(first)
    joined.get()
    waiting = magistral.stream(OTHER, SHORT)
    with ThreadPoolExecutor(1) as pool:
        reply = pool.submit(waiting.result)
        joined.get()
        getattr(waiting, how)()
        error = reply.exception(timeout=60)
    assert (type(error) is mm.CancelledError) == (how == "close")
    assert error is not None or reply.result().finish_reason == "cancelled"
    assert first.result().finish_reason == "length"


def test_an_error_in_one_thread_leaves_the_others(
    magistral: mm.Magistral, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits, failing = magistral.model.logits, iter([True, False])
    expected = said(magistral.ask(QUESTION, SHORT))

    def failing_once(x: mx.array) -> mx.array:
        if next(failing, False):
            raise RuntimeError("the device hung")
        return logits(x)

    monkeypatch.setattr(magistral.model, "logits", failing_once)

    def ask(_: int) -> object:
        try:
            return said(magistral.ask(QUESTION, SHORT))
        except RuntimeError as error:
            return str(error)

    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(ask, range(3)))
    assert sorted(found, key=str) == sorted(["the device hung", expected, expected], key=str)


def test_a_dropped_stream_lets_the_next_caller_in(magistral: mm.Magistral) -> None:
    for _ in magistral.stream(QUESTION, SHORT):
        break
    for _ in magistral.chat().stream(QUESTION, SHORT):
        break
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(magistral.ask, QUESTION, SHORT).result().finish_reason == "length"


def test_a_stream_may_be_pulled_by_any_thread_of_a_pool(magistral: mm.Magistral) -> None:
    """Web servers pull a stream in one call after another, each in a context of its own."""
    expected = said(magistral.ask(QUESTION, SHORT))
    with ThreadPoolExecutor(1) as first, ThreadPoolExecutor(2) as second:

        def lend(pool: ThreadPoolExecutor, call: Callable[[], object]) -> object:
            return pool.submit(copy_context().run, call).result()

        one, two = (magistral.stream(QUESTION, SHORT) for _ in range(2))
        assert lend(first, lambda: next(one))
        waiting = second.submit(copy_context().run, two.result)
        while lend(first, lambda: next(one, None)) is not None:
            pass
        assert said(one.result()) == said(waiting.result()) == expected


def test_a_thread_does_not_wait_for_its_own_open_stream() -> None:
    line = Line()
    turns = [Turn(line), Turn(line, replaces=False), Turn(line)]
    other = Turn(line)
    assert [turn.begin().done() for turn in turns[:2]] == [True, True]
    with ThreadPoolExecutor(1) as pool:
        assert not pool.submit(other.begin).result().done()
    assert turns[2].begin().done()
    turns[2].leave()
    assert other.begin().done()
    for turn in turns:
        turn.leave()
        turn.leave()


def interrupting(magistral: mm.Magistral, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    """Press Ctrl-C in the main thread while the worker is in a pass."""
    logits, passes = magistral.model.logits, iter(range(1, 9999))
    main = threading.main_thread().ident
    assert main is not None

    def pressed(x: mx.array) -> mx.array:
        if next(passes) == at:
            signal.pthread_kill(main, signal.SIGINT)
        return logits(x)

    monkeypatch.setattr(magistral.model, "logits", pressed)


@pytest.mark.parametrize(
    "begin",
    [
        lambda magistral, chat: magistral.ask(QUESTION, LONG),
        lambda magistral, chat: list(magistral.stream(QUESTION, LONG)),
        lambda magistral, chat: chat.ask(QUESTION, LONG),
    ],
    ids=["ask", "stream", "chat"],
)
def test_ctrl_c_ends_the_reply_and_goes_on(
    magistral: mm.Magistral,
    monkeypatch: pytest.MonkeyPatch,
    begin: Callable[[mm.Magistral, mm.Chat], object],
) -> None:
    expected = said(magistral.ask(QUESTION, SHORT))
    chat = magistral.chat()
    with monkeypatch.context() as patch:
        interrupting(magistral, patch, 3)
        with pytest.raises(KeyboardInterrupt):
            begin(magistral, chat)
    assert chat.messages == []
    assert magistral.prefix_cache.cache.length <= len(magistral.prefix_cache.ids)
    assert said(magistral.ask(QUESTION, SHORT)) == expected


def test_ctrl_c_gives_what_there_is_of_several_replies(
    magistral: mm.Magistral, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupting(magistral, monkeypatch, 4)
    found: list[mm.Reply] = []
    with pytest.raises(KeyboardInterrupt):
        found.extend(magistral.stream_samples(QUESTION, LONG, n=3))
    assert [reply.finish_reason for reply in found] == ["cancelled"] * 3


def test_ctrl_c_ends_a_load(monkeypatch: pytest.MonkeyPatch) -> None:
    main, ended = threading.main_thread().ident, threading.Event()
    assert main is not None

    @streamed
    def endless(_: object) -> Generator[mm.Progress, None, None]:
        try:
            for done in range(10**9):
                yield mm.Progress(done, 10**9)
                if done == 3:
                    signal.pthread_kill(main, signal.SIGINT)
        finally:
            ended.set()

    monkeypatch.setattr("magistral_mlx.engine.load.load_model", endless)
    with pytest.raises(KeyboardInterrupt):
        mm.load("demo")
    assert ended.is_set()


def test_a_forked_process_is_told_to_load_its_own_model(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = Worker()
    assert worker.submit(without_items(os.getpid)).result() == os.getpid()
    ended: list[bool] = []
    worker.at_exit(lambda: ended.append(True))
    monkeypatch.setattr("os.getpid", lambda: -1)
    worker._end()
    assert not ended
    with pytest.raises(EndingError, match="forked"):
        worker.submit(without_items(os.getpid))


OPEN_AT_ITS_END = """
import multiprocessing, threading
import magistral_mlx as mm

def ask(question):
    return mm.load("demo").ask(question, mm.SamplingParams(temperature=0)).answer

with multiprocessing.get_context("fork").Pool(1) as pool:
    assert "124" in pool.apply(ask, ["What is 48 + 76?"])
assert threading.active_count() == 1
magistral = mm.load("demo")
stream = magistral.stream("1 + 1", mm.SamplingParams(temperature=9, top_p=1, on_loop="ignore"))
next(stream)
waiting = threading.Thread(target=magistral.ask, args=["1 + 1"], daemon=True)
waiting.start()
print("open", flush=True)
"""


@pytest.mark.slow
def test_a_process_forks_before_a_load_and_ends_at_once_with_replies_open() -> None:
    done = subprocess.run(
        [sys.executable, "-c", OPEN_AT_ITS_END],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "open\n", "")
