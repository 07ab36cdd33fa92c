"""The bridge takes plain values, returns dictionaries, and leaves nothing behind."""

import inspect
import subprocess
import sys
import threading
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

import magistral_mlx as mm
from magistral_mlx import bridge
from magistral_mlx.engine.request import Request
from magistral_mlx.options import options_of
from magistral_mlx.serving import model_jobs
from magistral_mlx.serving.model_jobs import ModelJobs
from magistral_mlx.streams import streamed
from tests.support.hosting import LAST, last_of, opened, pulled, text_of, threads

QUESTION = "What is 48 + 76?"
LONG = {
    "temperature": 9.0,
    "top_p": 1.0,
    "seed": 3,
    "on_loop": "ignore",
}  # random ids continue to the end of the context
ADD = {
    "type": "function",
    "function": {"name": "add", "parameters": {"type": "object", "properties": {}}},
}


@pytest.fixture(scope="module")
def handle() -> Iterator[int]:
    handle = opened(max_kv_size=1024, prefill_step_size=16)
    yield handle
    bridge.close(handle)


def failure(result: dict[str, Any]) -> str:
    """Check that an error is complete, and return its code."""
    assert result["ok"] is False
    assert set(result) == {"ok", "error"}
    error = result["error"]
    assert set(error) - {"kind"} == {"code", "message", "what_to_do"}
    assert all(error.values())
    return str(error["code"])


def test_a_stream_is_the_library_s_reply(handle: int) -> None:
    events = list(pulled(bridge.start(handle, QUESTION, seed=5)["stream"]))
    reply = mm.load("demo", max_kv_size=1024, prefill_step_size=16).ask(
        QUESTION, mm.SamplingParams(seed=5)
    )
    assert text_of(events, "reasoning") == reply.reasoning
    assert text_of(events, "answer") == reply.answer
    last = events[-1]
    assert (last["kind"], last["finish_reason"], last["reasoning_closed_by"]) == (
        "done",
        "stop",
        "model",
    )
    assert last["usage"]["completion_tokens"] == reply.usage.completion_tokens
    assert last["usage"]["prompt_tokens"] == reply.usage.prompt_tokens
    assert [e["done"] for e in events if e["kind"] == "progress"] == [16, 32, 48]
    assert [e["kind"] in LAST for e in events].index(True) == len(events) - 1


def test_ask_returns_the_events_of_start_together(handle: int) -> None:
    whole = bridge.ask(handle, [{"role": "user", "content": QUESTION}], seed=5)
    events = list(pulled(bridge.start(handle, QUESTION, seed=5)["stream"]))
    assert whole["ok"]
    assert whole["reasoning"] == text_of(events, "reasoning")
    assert whole["answer"] == text_of(events, "answer")
    assert whole["finish_reason"] == events[-1]["finish_reason"]


def test_start_and_ask_take_every_sampling_option(handle: int) -> None:
    choices = [option.name for option in options_of(mm.SamplingParams)]
    assert "logprobs" not in choices  # which no event has
    defaults = dict.fromkeys(choices)
    for call in (bridge.start, bridge.ask):
        refused = call(handle, QUESTION, **defaults, tmperature=1)
        assert failure(refused) == "option"
        assert "did you mean temperature?" in refused["error"]["message"]
    assert bridge.ask(handle, QUESTION, **defaults | {"temperature": 0})["ok"]


def test_a_budget_s_message_is_the_trace_s_last_line(handle: int) -> None:
    whole = bridge.ask(
        handle, QUESTION, temperature=0, think_budget=5, think_budget_message="Out of time."
    )
    assert whole["reasoning"].endswith("\nOut of time.")
    assert whole["reasoning_closed_by"] == "budget"


def test_loading_reports_progress_and_ends_ready() -> None:
    loading = bridge.load("demo", max_kv_size=512)
    *progress, last = pulled(loading["stream"])
    assert [(e["phase"], e["total"]) for e in progress] == [("load", progress[0]["total"])] * len(
        progress
    )
    assert progress[-1]["done"] == progress[-1]["total"]
    assert (last["kind"], last["model"], last["context"]) == ("ready", "demo", 512)
    assert failure(bridge.next_event(loading["stream"])) == "closed"
    assert bridge.close(loading["handle"])["ok"]


def test_a_reply_may_be_started_before_the_model_is_ready() -> None:
    loading = bridge.load("demo")
    stream = bridge.start(loading["handle"], QUESTION, temperature=0)
    assert stream["ahead"] == 1
    assert last_of(stream["stream"])["finish_reason"] == "stop"
    assert bridge.close(loading["handle"])["ok"]


def test_a_model_that_is_missing_is_an_error_of_every_call() -> None:
    loading = bridge.load("/no/such/folder")
    waiting = bridge.start(loading["handle"], QUESTION)
    assert [last_of(stream)["code"] for stream in (loading["stream"], waiting["stream"])] == [
        "checkpoint"
    ] * 2
    handle = loading["handle"]
    assert failure(bridge.ask(handle, QUESTION)) == "checkpoint"
    assert failure(bridge.save(handle, "x")) == failure(bridge.resume(handle, "x")) == "checkpoint"
    assert bridge.stats(handle)["is_ready"] is False
    assert bridge.close(handle)["ok"]
    assert (
        failure(bridge.plan("/no/such/folder")) == failure(bridge.plan("org/name")) == "checkpoint"
    )


def test_a_load_can_be_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    begun, go_on = threading.Event(), threading.Event()
    loading = model_jobs.loading

    @streamed
    def held(*args: Any) -> Generator[mm.Progress, None, mm.Magistral]:
        steps = loading(*args)
        for step in steps:
            yield step
            begun.set()
            go_on.wait()
        return steps.result()

    monkeypatch.setattr(model_jobs, "loading", held)
    load = bridge.load("demo")
    begun.wait()
    assert bridge.cancel(load["stream"])["ok"]
    go_on.set()
    assert last_of(load["stream"])["code"] == "cancelled"
    assert last_of(bridge.start(load["handle"], QUESTION)["stream"])["code"] == "cancelled"
    assert bridge.close(load["handle"])["ok"]


def test_a_reply_is_cancelled_in_its_middle(handle: int) -> None:
    stream = bridge.start(handle, QUESTION, **LONG)["stream"]
    events = pulled(stream)
    while next(events)["kind"] == "progress":
        pass
    assert bridge.cancel(stream)["ok"]
    *_, last = events
    assert last["finish_reason"] == "cancelled"
    assert 0 < last["usage"]["completion_tokens"] < 900
    assert failure(bridge.cancel(stream)) == "closed"


def test_streams_of_one_model_follow_each_other_and_one_that_waits_can_be_cancelled(
    handle: int,
) -> None:
    first = bridge.start(handle, QUESTION, **LONG)
    second = bridge.start(handle, QUESTION, temperature=0)
    third = bridge.start(handle, QUESTION, temperature=0)
    assert [s["ahead"] for s in (first, second, third)] == [0, 1, 2]
    assert bridge.stats(handle)["streams"] == 3
    assert bridge.next_event(third["stream"], 0)["event"] is None
    for begun in (second, first):
        assert bridge.cancel(begun["stream"])["ok"]
    assert last_of(third["stream"])["finish_reason"] == "stop"
    never = last_of(second["stream"])
    assert (never["finish_reason"], never["usage"]["forward_passes"]) == ("cancelled", 0)
    assert last_of(first["stream"])["finish_reason"] == "cancelled"


def test_no_more_than_sixteen_wait(handle: int) -> None:
    begun = [bridge.start(handle, QUESTION, **LONG) for _ in range(17)]
    assert failure(bridge.start(handle, QUESTION)) == "busy"
    assert failure(bridge.save(handle, "x")) == "busy"
    assert all(bridge.cancel(stream["stream"])["ok"] for stream in begun)
    assert {last_of(stream["stream"])["finish_reason"] for stream in begun} == {"cancelled"}


def test_a_host_that_does_not_pull_does_not_stop_the_model(handle: int) -> None:
    bridge.ask(handle, QUESTION, seed=5)  # the prompt is cached now
    left = bridge.start(handle, QUESTION, seed=5)["stream"]
    assert last_of(bridge.start(handle, QUESTION, seed=5)["stream"])["kind"] == "done"
    events = list(pulled(left))
    assert [event["kind"] for event in events] == ["reasoning", "answer", "done"]
    assert text_of(events, "answer") == bridge.ask(handle, QUESTION, seed=5)["answer"]


@pytest.mark.slow
def test_two_models_reply_in_turn_and_each_is_planned_beside_the_other(handle: int) -> None:
    other = opened(max_kv_size=512, prefill_step_size=16)
    streams = [bridge.start(h, QUESTION, seed=5)["stream"] for h in (handle, other)]
    answers = [text_of(list(pulled(stream)), "answer") for stream in streams]
    assert answers[0] == answers[1] != ""
    plans = [bridge.stats(h)["plan"] for h in (handle, other)]
    assert plans[1]["budget_bytes"] == pytest.approx(
        plans[0]["budget_bytes"] - plans[0]["total_bytes"], rel=1e-9
    )
    small = bridge.load("demo", memory_gb=1e-3)
    assert last_of(small["stream"])["code"] == "memory"
    assert bridge.close(small["handle"])["ok"]
    assert bridge.close(other)["ok"]
    assert (
        last_of(bridge.start(handle, QUESTION, temperature=0)["stream"])["finish_reason"] == "stop"
    )


def test_a_closed_model_ends_its_streams_and_frees_its_memory() -> None:
    before = mx.get_active_memory()
    others = threads()
    handle = opened()
    streams = [bridge.start(handle, QUESTION, **LONG)["stream"] for _ in range(3)]
    while bridge.next_event(streams[0])["event"] is None:
        pass
    assert bridge.stats(handle)["active_bytes"] > before
    closed = bridge.close(handle)
    assert (
        closed["active_bytes"] - before <= 0.01 * 1_604_352
    )  # of the model; what was there before may go as well
    assert {failure(bridge.next_event(stream)) for stream in streams} == {"closed"}
    assert {failure(call(handle)) for call in (bridge.close, bridge.stats)} == {"closed"}
    assert (
        failure(bridge.start(handle, QUESTION)) == failure(bridge.ask(handle, QUESTION)) == "closed"
    )
    assert threads() == others


def test_close_does_not_wait_for_replies_that_have_not_started(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    begun: list[Request] = []
    reply = ModelJobs.reply

    def counted(self: ModelJobs, queue: Any, request: Request) -> Iterator[None]:
        begun.append(request)
        yield from reply(self, queue, request)

    monkeypatch.setattr(ModelJobs, "reply", counted)
    handle = opened()
    first = bridge.start(handle, QUESTION, **LONG)["stream"]
    while bridge.next_event(first)["event"] is None:
        pass
    assert all(bridge.start(handle, QUESTION, **LONG)["ok"] for _ in range(10))
    assert bridge.close(handle)["ok"]
    assert len(begun) == 1


def test_close_ends_an_ask_in_another_thread() -> None:
    handle = opened()
    replies: list[dict[str, Any]] = []
    asking = threading.Thread(target=lambda: replies.append(bridge.ask(handle, QUESTION, **LONG)))
    asking.start()
    while not bridge.stats(handle)["streams"] and asking.is_alive():
        pass
    assert bridge.close(handle)["ok"]
    asking.join()
    assert replies[0]["ok"] or failure(replies[0]) == "closed"


def test_a_saved_conversation_can_be_continued(handle: int, tmp_path: Path) -> None:
    path = str(tmp_path / "talk.cache")
    reply = bridge.ask(handle, QUESTION, seed=5)
    saved = bridge.save(handle, path)
    other = opened(max_kv_size=1024)
    assert failure(bridge.save(other, path + "2")) == "option"  # nothing was said
    resumed = bridge.resume(other, path)
    question, answer = resumed["messages"]
    assert question == {"role": "user", "content": QUESTION}
    assert (answer["content"], answer["reasoning"]) == (reply["answer"], reply["reasoning"])
    assert resumed["cached_tokens"] == saved["cached_tokens"] > reply["usage"]["prompt_tokens"]
    follow = [*resumed["messages"], {"role": "user", "content": "What is 7 * 8?"}]
    assert bridge.ask(other, follow)["usage"]["cached_tokens"] > reply["usage"]["prompt_tokens"]
    assert failure(bridge.resume(other, path + "3")) == "option"
    for wrong in ("/no/such/folder/talk", "/"):
        assert failure(bridge.save(other, wrong)) == "option"
    # This handle has resumed the file, so it may replace it, and the other one no more.
    assert bridge.save(other, path)["ok"]
    assert failure(bridge.save(handle, path)) == "option"
    assert bridge.save(handle, path, overwrite=True)["ok"]
    assert bridge.close(other)["ok"]


def test_tools_travel_there_and_back(handle: int) -> None:
    call = {"id": "abcdefghi", "type": "function", "function": {"name": "add", "arguments": "{}"}}
    asked = {"role": "user", "content": QUESTION}
    result = {"role": "tool", "tool_call_id": "abcdefghi", "content": "124"}
    turns: list[dict[str, Any]] = [asked, {"role": "assistant", "tool_calls": [call]}, result]
    assert bridge.ask(handle, turns, tools=[ADD], temperature=0)["ok"]


WRONG: list[tuple[str, dict[str, Any]]] = [
    ("start", {"messages": 5}),
    ("start", {"messages": [1, 2]}),
    ("start", {"messages": [{"role": "user"}]}),
    ("start", {"messages": ""}),
    ("start", {"messages": b"bytes"}),
    ("start", {"messages": "half \ud800"}),
    ("start", {"messages": [{"role": "user", 5: "key"}]}),
    ("start", {"messages": QUESTION, "temperature": -1}),
    ("start", {"messages": QUESTION, "temperature": float("nan")}),
    ("start", {"messages": QUESTION, "temperature": True}),
    ("start", {"messages": QUESTION, "max_tokens": 1.5}),
    ("start", {"messages": QUESTION, "max_tokens": 10**30}),
    ("start", {"messages": QUESTION, "seed": -1}),
    ("start", {"messages": QUESTION, "stop": "text"}),
    ("start", {"messages": QUESTION, "stop": [5]}),
    ("start", {"messages": QUESTION, "on_loop": "sing"}),
    ("start", {"messages": QUESTION, "tools": [5]}),
    ("start", {"messages": QUESTION, "tools": [{}]}),
    ("start", {"messages": QUESTION, "callback": print}),
    ("start", {}),
    ("ask", {"messages": QUESTION, "system_prompt_only": True}),
    ("next_event", {"stream": 1, "timeout_seconds": -1}),
    ("next_event", {"stream": 1, "timeout_seconds": 1e9}),
    ("next_event", {"stream": "1"}),
    ("cancel", {"stream": None}),
    ("save", {"path": 5}),
    ("save", {"path": Path("x")}),
    ("resume", {"path": None}),
    ("load", {"path": 5}),
    ("load", {"path": "demo", "max_kv_size": "much"}),
    ("load", {"path": "demo", "wired": 1}),
    ("plan", {"path": "demo", "memory_gb": -3}),
    ("plan", {"path": "demo", "max_kv_size": -3}),
    ("plan", {"path": "demo", "kv_bits": 5}),
    ("load", {"path": "demo", "max_kv_size": 10**9}),
    ("load", {"path": "demo", "reasoning_format": "loud"}),
    ("load", {"path": "demo", "num_draft_tokens": 99}),
    ("load", {"path": "demo", "kv_bits": 5}),
]


@pytest.mark.parametrize(("name", "arguments"), WRONG, ids=lambda value: str(value)[:60])
def test_wrong_arguments_are_refused(handle: int, name: str, arguments: dict[str, Any]) -> None:
    function = getattr(bridge, name)
    own = {"handle": handle} if name in ("start", "ask", "save", "resume") else {}
    result = function(**own, **arguments)
    if result["ok"]:  # checks that need the model report in its stream
        last = last_of(result["stream"])
        if name == "load":
            bridge.close(result["handle"])
        result = {"ok": False, "error": last}
    assert failure(result) == "option"


@pytest.mark.parametrize(
    "path", ["", "\0", "a\0b", "x" * 5000, "~nobody-here/model", "/dev/null", __file__]
)
def test_a_path_that_is_no_folder_is_refused(path: str) -> None:
    if path:
        assert failure(bridge.plan(path)) == "checkpoint"
    loading = bridge.load(path)
    assert last_of(loading["stream"])["code"] == "checkpoint"
    assert bridge.close(loading["handle"])["ok"]


@pytest.mark.parametrize(
    "error", [MemoryError, RecursionError, KeyboardInterrupt, SystemExit, GeneratorExit, OSError]
)
def test_every_exception_becomes_a_dictionary(
    handle: int, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    def raising(*_: Any, **__: Any) -> Any:
        raise error("no")

    with monkeypatch.context() as patched:
        patched.setattr(mm.Magistral, "stream", raising)
        assert failure(bridge.ask(handle, QUESTION)) in (
            "memory",
            "internal",
            "interrupted",
            "file",
        )
        patched.setattr(bridge, "plan_local", raising)
        assert failure(bridge.plan("demo")) in ("memory", "internal", "interrupted", "file")
    assert bridge.ask(handle, QUESTION, temperature=0)["ok"]


def test_an_error_that_cannot_be_described_is_one_all_the_same(
    handle: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Mute(Exception):
        def __str__(self) -> str:
            raise ValueError

    def raising(*_: Any, **__: Any) -> Any:
        raise Mute

    def out_of_memory(*_: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr(mm.Magistral, "stream", raising)
    assert failure(bridge.ask(handle, QUESTION)) == "internal"
    monkeypatch.setattr("magistral_mlx.serving.failures.failure_of", out_of_memory)
    monkeypatch.setattr("magistral_mlx.serving.job.failed", out_of_memory)
    assert failure(bridge.stats(-1)) == "internal"
    assert failure(bridge.ask(handle, QUESTION)) == "internal"


def test_a_call_deep_in_the_stack_is_a_dictionary(handle: int) -> None:
    def deep(levels: int) -> dict[str, Any]:
        return bridge.stats(handle) if levels == 0 else deep(levels - 1)

    room = sys.getrecursionlimit() - len(inspect.stack())
    results = [deep(room - margin) for margin in range(30, 15, -3)]
    assert all(set(result) >= {"ok"} for result in results)


def test_values_are_copied_so_that_a_host_may_change_its_own(handle: int) -> None:
    waiting = bridge.start(handle, QUESTION, **LONG)["stream"]
    messages = [{"role": "user", "content": QUESTION}]
    stream = bridge.start(handle, messages, seed=5)["stream"]
    messages[0]["content"] = "What is 7 * 8?"
    bridge.cancel(waiting)
    assert text_of(list(pulled(stream)), "answer") == bridge.ask(handle, QUESTION, seed=5)["answer"]


def test_plan_equals_the_plan_of_a_load(handle: int) -> None:
    plan = bridge.plan("demo", max_kv_size=1024, prefill_step_size=16)
    assert plan.pop("ok")
    assert plan == bridge.stats(handle)["plan"]
    assert failure(bridge.plan("demo", memory_gb=1e-3)) == "memory"


def test_version_names_the_versions() -> None:
    version = bridge.version()
    assert version == {
        "ok": True,
        "version": mm.__version__,
        "interface": 2,
        "mlx": mx.__version__,
    } | {"python": sys.version.split()[0]}


ENDINGS = """
import os, signal, sys
import mlx.core as mx
forbidden = {"subprocess.Popen", "os.fork", "os.exec", "os.posix_spawn", "os.system"}
forbidden.add("socket.connect")
seen = []
sys.addaudithook(lambda event, _: seen.append(event) if event in forbidden else None)
numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGPIPE)
handlers = [signal.getsignal(number) for number in numbers]
from magistral_mlx import bridge
if os.environ.get("MAGISTRAL_TEST_DEVICE") == "cpu":
    mx.set_default_device(mx.cpu)
loading = bridge.load("demo")
while (event := bridge.next_event(loading["stream"])["event"]) is None or event["kind"] != "ready":
    pass
bridge.ask(loading["handle"], "1 + 1", temperature=0)
assert seen == [], seen
assert handlers == [signal.getsignal(number) for number in numbers]
bridge.start(loading["handle"], "1 + 1", temperature=9, top_p=1, on_loop="ignore")
bridge.load("demo")
sys.stdout.write("open")
"""


@pytest.mark.slow
def test_a_host_s_process_is_left_alone_and_ends_at_once_with_models_open() -> None:
    done = subprocess.run(
        [sys.executable, "-c", ENDINGS], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "open", "")


def test_a_revision_is_refused_at_once() -> None:
    for answer in (bridge.load("demo", revision="main"), bridge.plan("demo", revision="main")):
        assert not answer["ok"]
        assert "revision" in answer["error"]["message"]
