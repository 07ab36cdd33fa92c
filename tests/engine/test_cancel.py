"""Replies that are ended early, at any point and from any thread, leave nothing behind."""

import gc
import random
import signal
import subprocess
import sys
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import mlx.core as mx
import pytest

import magistral_mlx as mm
from magistral_mlx.engine import worker_stream

GREEDY = mm.SamplingParams(temperature=0)
QUESTIONS = ("What is 48 + 76?", "How many r's are in strawberry?", "What is 7 * 8?")
CHUNK = 16


@pytest.fixture(scope="module")
def loaded() -> mm.Magistral:
    return mm.load("demo", prefill_step_size=CHUNK, max_kv_size=1024)


def cancel_elsewhere(magistral: mm.Magistral) -> None:
    """Cancel from another thread, between two segments."""
    thread = threading.Thread(target=magistral.cancel)
    thread.start()
    thread.join()


def cancelled_after(
    magistral: mm.Magistral, segments: int, question: str = QUESTIONS[0]
) -> tuple[str, mm.Reply]:
    """Return the text of a reply that is cancelled after some segments, and the reply."""
    stream = magistral.stream(question, GREEDY)
    read = [next(stream) for _ in range(segments)]
    cancel_elsewhere(magistral)
    read += stream
    return "".join(s.text for s in read if isinstance(s, mm.Text)), stream.result()


def test_a_prompt_is_read_no_further_than_its_chunk(magistral: mm.Magistral) -> None:
    text, reply = cancelled_after(magistral, 2)
    assert (text, reply.reasoning, reply.answer, reply.finish_reason) == ("", "", "", "cancelled")
    assert (reply.usage.forward_passes, reply.usage.completion_tokens) == (2, 0)
    assert reply.usage.prefill_seconds > 0
    assert magistral.prefix_cache.cache.length == len(magistral.prefix_cache.ids) == 2 * CHUNK
    again = magistral.ask(QUESTIONS[0], GREEDY)
    assert again.usage.cached_tokens == 2 * CHUNK
    magistral.prefix_cache.clear()
    assert magistral.ask(QUESTIONS[0], GREEDY).reasoning == again.reasoning


def test_a_reply_can_be_cancelled_before_it_begins(magistral: mm.Magistral) -> None:
    text, reply = cancelled_after(magistral, 0)
    assert (text, reply.finish_reason, reply.usage.forward_passes) == ("", "cancelled", 0)
    assert magistral.prefix_cache.cache.length == 0


def test_a_stream_cancelled_before_its_first_step_leaves_the_cache_alone(
    magistral: mm.Magistral, tmp_path: Path
) -> None:
    magistral.ask(QUESTIONS[0], GREEDY)
    ids, length = list(magistral.prefix_cache.ids), magistral.prefix_cache.cache.length
    streams = [
        magistral.stream(QUESTIONS[1], GREEDY),
        magistral.stream_samples(QUESTIONS[1], GREEDY, n=2),
        magistral.chat().stream(QUESTIONS[1], GREEDY),
    ]
    for stream in streams:
        stream.cancel()
        stream.result()
    assert (magistral.prefix_cache.ids, magistral.prefix_cache.cache.length) == (ids, length)
    file = magistral.stream(QUESTIONS[1], GREEDY, prompt_cache_file=tmp_path / "cache")
    file.cancel()
    assert file.result().finish_reason == "cancelled"
    assert not (tmp_path / "cache").exists()


def test_each_stream_is_cancelled_by_itself(magistral: mm.Magistral) -> None:
    first, second = (magistral.stream(question, GREEDY) for question in QUESTIONS[:2])
    first.cancel()
    assert second.result().finish_reason == "stop"
    assert first.result().finish_reason == "cancelled"
    chat = magistral.chat()
    turn = chat.stream(QUESTIONS[0], GREEDY)
    while isinstance(next(turn), mm.Progress):
        pass
    turn.cancel()
    assert turn.result().finish_reason == "cancelled"
    assert len(chat.messages) == 2
    samples = magistral.stream_samples(QUESTIONS[0], GREEDY, n=2)
    samples.cancel()
    found = samples.result()
    assert [reply.finish_reason for reply in found.replies] == ["cancelled"] * 2
    assert (found.votes, found.forward_passes) == ({}, 0)


@pytest.mark.slow
@pytest.mark.parametrize("segments", [10, 11, 30])
def test_no_token_follows_a_cancelling_between_two(magistral: mm.Magistral, segments: int) -> None:
    whole = magistral.ask(QUESTIONS[0], GREEDY)
    stream = magistral.stream(QUESTIONS[0], GREEDY)
    read = "".join(getattr(next(stream), "text", "") for _ in range(segments))
    before = list(magistral.prefix_cache.ids)
    cancel_elsewhere(magistral)
    reply = stream.result()
    assert magistral.prefix_cache.ids == before[: magistral.prefix_cache.cache.length]
    assert len(before) - magistral.prefix_cache.cache.length in (0, 1)
    assert reply.usage.completion_tokens == len(before) - reply.usage.prompt_tokens
    assert reply.finish_reason == "cancelled"
    said = reply.reasoning + reply.answer
    assert said.startswith(read)
    assert (whole.reasoning + whole.answer).startswith(said)
    assert magistral.ask(QUESTIONS[0], GREEDY).answer == whole.answer


def test_no_pass_follows_the_one_in_which_a_reply_is_cancelled(
    magistral: mm.Magistral, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits, passes = magistral.model.logits, iter(range(1, 100))

    def cancelling(x: mx.array) -> mx.array:
        if next(passes) == 5:
            cancel_elsewhere(magistral)
        return logits(x)

    monkeypatch.setattr(magistral.model, "logits", cancelling)
    reply = magistral.ask(QUESTIONS[0], GREEDY)
    assert (reply.finish_reason, next(passes)) == ("cancelled", 6)
    # The prompt's pass gives an id and so does each pass but the last, which was queued ahead.
    assert reply.usage.completion_tokens == 4


def test_cancelling_when_nothing_runs_does_nothing(magistral: mm.Magistral) -> None:
    for _ in range(2):
        magistral.cancel()
        assert magistral.ask(QUESTIONS[0], GREEDY).finish_reason == "stop"


def test_a_cancelled_turn_is_kept_with_what_there_is(magistral: mm.Magistral) -> None:
    chat = magistral.chat()
    stream = chat.stream(QUESTIONS[0], GREEDY)
    while isinstance(next(stream), mm.Progress):
        pass
    cancel_elsewhere(magistral)
    reply = stream.result()
    assert chat.messages[-1]["reasoning"] == reply.reasoning != ""
    assert chat.ask(QUESTIONS[2], GREEDY).finish_reason == "stop"


def run_cycles(magistral: mm.Magistral, count: int) -> None:
    """End replies at random points: from a thread, between segments or in a pass, or by close."""
    chance = random.Random(1)
    for _ in range(count):
        stream = magistral.stream(
            chance.choice(QUESTIONS), mm.SamplingParams(seed=chance.randrange(99))
        )
        for _ in range(chance.randrange(10)):
            next(stream)
        match chance.randrange(3):
            case 0:
                stream.close()
            case 1:
                cancel_elsewhere(magistral)
                assert stream.result().finish_reason == "cancelled"
            case 2:
                thread = threading.Thread(target=magistral.cancel)
                thread.start()
                assert stream.result().finish_reason == "cancelled"
                thread.join()
        assert magistral.prefix_cache.cache.length <= len(magistral.prefix_cache.ids)


def native_threads() -> int:
    tasks = Path("/proc/self/task")
    return len(list(tasks.iterdir())) if tasks.exists() else threading.active_count()


def check_that_nothing_stays(magistral: mm.Magistral, cycles: int) -> None:
    """Compare memory and threads before and after many cancelled replies, without a cache."""
    expected = [magistral.ask(question, GREEDY).answer for question in QUESTIONS]
    run_cycles(magistral, 5)
    magistral.prefix_cache.clear()
    gc.collect()
    mx.synchronize()
    memory, threads = mx.get_active_memory(), (threading.active_count(), native_threads())
    run_cycles(magistral, cycles)
    assert [magistral.ask(question, GREEDY).answer for question in QUESTIONS] == expected
    magistral.prefix_cache.clear()
    gc.collect()
    mx.synchronize()
    assert abs(mx.get_active_memory() - memory) <= 0.01 * memory
    assert (threading.active_count(), native_threads()) == threads


@pytest.mark.slow
def test_cancelled_replies_leave_nothing_behind(magistral: mm.Magistral) -> None:
    check_that_nothing_stays(magistral, 4)


@pytest.mark.slow
def test_a_thousand_cancelled_replies_leave_nothing_behind(magistral: mm.Magistral) -> None:
    check_that_nothing_stays(magistral, 1000)


@pytest.mark.slow
def test_ctrl_c_prints_what_there_is_and_exits_130() -> None:
    """Send a real signal to a process in the middle of a reply that random ids keep going."""
    # A process that a shell runs in the background ignores Ctrl-C from its start.
    listening = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
    program = f"{listening}from magistral_mlx.generate import main; sys.exit(main())"
    command = [sys.executable, "-c", program, "--model", "demo", "--temp", "9", "--top-p", "1"]
    with subprocess.Popen(
        [*command, "-p", "1 + 1"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as process:
        assert process.stdout is not None
        begun = process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        rest, _ = process.communicate()
    assert begun
    assert process.returncode == 130
    assert rest.endswith(b"\n")
    assert b"Traceback" not in rest


def test_a_prompt_that_is_half_read_can_be_asked_again(magistral: mm.Magistral) -> None:
    question = "What is 4 + 5? " * 20
    paused = magistral.stream(question, GREEDY)
    next(paused)
    half = magistral.ask(question, GREEDY)
    assert half.usage.cached_tokens == CHUNK
    magistral.prefix_cache.clear()
    assert magistral.ask(question, GREEDY).answer == half.answer


def test_a_refused_request_leaves_the_running_reply_the_newest(
    magistral: mm.Magistral, tmp_path: Path
) -> None:
    running = magistral.stream(QUESTIONS[0], GREEDY)
    next(running)
    with pytest.raises(mm.OptionError):
        magistral.stream(QUESTIONS[1], prompt_cache_file=tmp_path / "none" / "cache")
    magistral.cancel()
    assert running.result().finish_reason == "cancelled"


def ask_elsewhere(magistral: mm.Magistral) -> str:
    """Return how a short reply to another thread ends; it waits for any turn that nobody ended."""
    with ThreadPoolExecutor(1) as pool:
        reply = pool.submit(magistral.ask, QUESTIONS[0], max_tokens=3)
        return reply.result(timeout=60).finish_reason


def test_a_stream_in_a_cycle_is_closed_by_the_worker(
    magistral: mm.Magistral, monkeypatch: pytest.MonkeyPatch
) -> None:
    closing: list[str] = []
    monkeypatch.setattr(
        magistral.prefix_cache, "sync", lambda _: closing.append(threading.current_thread().name)
    )
    holder: dict[str, object] = {"stream": magistral.stream(QUESTIONS[0], GREEDY)}
    holder["itself"] = holder
    next(holder["stream"])  # type: ignore[call-overload]
    del holder
    gc.collect()
    assert ask_elsewhere(magistral) == "length"
    assert set(closing) == {"magistral-worker"}


def test_ctrl_c_just_after_a_step_ends_the_turn(
    magistral: mm.Magistral, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(_: object) -> None:
        raise KeyboardInterrupt

    stream = magistral.stream(QUESTIONS[0], GREEDY)
    next(stream)
    with monkeypatch.context() as patch:
        patch.setattr(Future, "result", interrupted)
        with pytest.raises(KeyboardInterrupt):
            next(stream)
    assert ask_elsewhere(magistral) == "length"


def test_the_end_of_the_program_cancels_what_has_begun(magistral: mm.Magistral) -> None:
    stream = magistral.stream(QUESTIONS[0], GREEDY)
    next(stream)
    worker_stream._cancel_all()
    assert stream.result().finish_reason == "cancelled"
