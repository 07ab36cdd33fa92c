"""The bridge under long and wrong use: every call returns, every stream ends, nothing leaks."""

import gc
import json
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from magistral_mlx import bridge
from tests.support.hosting import LAST, last_of, opened, pulled, text_of, threads

QUESTIONS = ("What is 48 + 76?", "How many r's are in strawberry?", "What is 7 * 8?")
MODEL_BYTES = 1_604_352  # of the demo in 4 bit
HANGS_SECONDS = (
    60.0  # on a machine that others use as well; what was measured on a quiet one is far under 2
)
FUNCTIONS = (
    "version",
    "plan",
    "load",
    "ask",
    "start",
    "next_event",
    "cancel",
    "stats",
    "save",
    "resume",
    "close",
)
CYCLE: list[Any] = []
CYCLE.append(CYCLE)
ODD = (
    None,
    True,
    False,
    0,
    -1,
    1,
    5,
    10**30,
    2.5,
    float("nan"),
    float("inf"),
    "",
    "demo",
    "\0",
    "half \ud800",
)
ODD += (
    [],
    [1],
    {},
    {"role": "user"},
    [{"role": "user", "content": "1 + 1"}],
    b"x",
    (),
    object(),
    CYCLE,
    "x" * 9000,
)


def native_threads() -> int:
    tasks = Path("/proc/self/task")
    return len(list(tasks.iterdir())) if tasks.exists() else threading.active_count()


def settled() -> tuple[int, set[str], int]:
    """Return MLX's memory and the threads after a model was loaded, used and closed."""
    handle = opened()
    assert bridge.ask(handle, QUESTIONS[0], temperature=0)["ok"]
    assert bridge.close(handle)["ok"]
    gc.collect()
    return mx.get_active_memory(), threads(), native_threads()


class Fuzz:
    """Make random calls, right and wrong, by several threads on the same models and streams."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.handles: list[int] = []
        self.streams: list[int] = []
        self.codes: dict[str, int] = {}
        self.longest: dict[str, float] = {}

    def run(self, calls: int, seed: int, workers: int = 4) -> None:
        pool = [
            threading.Thread(target=self._work, args=(calls // workers, random.Random(seed + i)))
            for i in range(workers)
        ]
        for worker in pool:
            worker.start()
        for worker in pool:
            worker.join()
        for handle in self.handles:
            bridge.close(handle)

    def _work(self, calls: int, chance: random.Random) -> None:
        for _ in range(calls):
            name = chance.choice(FUNCTIONS)
            if name == "load" and len(self.handles) > 3:
                name = "close"
            arguments = self._arguments(name, chance)
            for key in list(arguments):
                if chance.random() < 0.15:
                    arguments[key] = chance.choice(ODD)
            if chance.random() < 0.05:
                arguments["mistaken"] = 1
            self._take(name, self._timed(name, arguments), arguments)

    def _arguments(self, name: str, chance: random.Random) -> dict[str, Any]:
        handle = chance.choice([*self.handles, 10**6])
        stream = chance.choice([*self.streams[-8:], handle, 10**6])
        messages: Any = chance.choice([*QUESTIONS, [{"role": "user", "content": QUESTIONS[0]}]])
        asked = {"handle": handle, "messages": messages, "max_tokens": chance.randrange(1, 12)}
        file = str(self.folder / chance.choice("ab"))
        return {
            "version": {},
            "plan": {
                "path": chance.choice(["demo", "/nowhere"]),
                "context": chance.choice([512, 10**9]),
            },
            "load": {"path": chance.choice(["demo", "demo", "/nowhere"]), "context": 512},
            "ask": asked,
            "start": asked | {"temperature": chance.choice([0, 9])},
            "next_event": {"stream": stream, "timeout_seconds": chance.choice([0, 0.02])},
            "cancel": {"stream": stream},
            "stats": {"handle": handle},
            "save": {"handle": handle, "path": file},
            "resume": {"handle": handle, "path": file},
            "close": {"handle": handle},
        }[name]

    def _timed(self, name: str, arguments: dict[str, Any]) -> dict[str, Any]:
        function: Callable[..., dict[str, Any]] = getattr(bridge, name)
        began = time.perf_counter()
        result = function(**arguments)  # what is raised ends this worker, and is pytest's to report
        self.longest[name] = max(self.longest.get(name, 0.0), time.perf_counter() - began)
        return result

    def _take(self, name: str, result: dict[str, Any], arguments: dict[str, Any]) -> None:
        assert isinstance(result["ok"], bool)
        json.dumps(result, ensure_ascii=False, allow_nan=False).encode()  # plain, and Unicode
        code = "ok" if result["ok"] else result["error"]["code"]
        self.codes[code] = self.codes.get(code, 0) + 1
        assert code != "internal", (name, arguments, result)
        event = result.get("event")
        assert not event or event["kind"] != "error" or event["code"] != "internal", event
        if result["ok"] and name == "load":
            self.handles.append(result["handle"])
        if result["ok"] and name in ("load", "start"):
            self.streams.append(result["stream"])
        if result["ok"] and name == "close" and arguments["handle"] in self.handles:
            self.handles.remove(arguments["handle"])


def check_fuzz(calls: int, folder: Path) -> None:
    crossed: list[Any] = []
    memory, others, native = settled()
    fuzz = Fuzz(folder)
    hook, threading.excepthook = threading.excepthook, crossed.append
    try:
        fuzz.run(calls, seed=calls)
    finally:
        threading.excepthook = hook
    gc.collect()
    print(f"{calls} calls: {fuzz.codes}, longest in seconds {fuzz.longest}")
    assert crossed == []
    assert max(fuzz.longest.values()) < HANGS_SECONDS
    assert {"ok", "option", "closed"} <= set(fuzz.codes)
    assert threads() == others
    assert native_threads() <= native
    assert abs(mx.get_active_memory() - memory) <= 0.01 * MODEL_BYTES


def check_soak(count: int) -> None:
    """Run streams, and cancel one in ten at some point from another thread."""
    memory, others, native = settled()
    handle = opened()
    expected = {
        question: bridge.ask(handle, question, temperature=0)["answer"] for question in QUESTIONS
    }
    chance, reasons = random.Random(count), {"stop": 0, "cancelled": 0}
    for i in range(count):
        question = chance.choice(QUESTIONS)
        stream = bridge.start(handle, question, temperature=0)["stream"]
        if i % 10 != 9:
            events = list(pulled(stream))
            assert text_of(events, "answer") == expected[question]
        else:
            after = chance.randrange(12)
            events = []
            for event in pulled(stream):
                events.append(event)
                if len(events) == after or event["kind"] in LAST:
                    break
            canceller = threading.Thread(target=bridge.cancel, args=(stream,))
            canceller.start()
            if events[-1]["kind"] not in LAST:
                events += pulled(stream)
            canceller.join()
        reasons[events[-1]["finish_reason"]] += 1
    assert sum(reasons.values()) == count
    assert reasons["cancelled"] > 0
    print(reasons)
    assert (
        last_of(bridge.start(handle, QUESTIONS[0], temperature=0)["stream"])["finish_reason"]
        == "stop"
    )
    assert bridge.close(handle)["ok"]
    gc.collect()
    assert (threads(), native_threads()) == (others, native)
    assert abs(mx.get_active_memory() - memory) <= 0.01 * MODEL_BYTES


@pytest.mark.slow
def test_wrong_calls_are_answered(tmp_path: Path) -> None:
    check_fuzz(50, tmp_path)


@pytest.mark.slow
def test_streams_end_and_leave_nothing() -> None:
    check_soak(10)


@pytest.mark.slow
def test_five_thousand_wrong_calls_are_answered(tmp_path: Path) -> None:
    check_fuzz(5000, tmp_path)


@pytest.mark.slow
def test_four_hundred_streams_end_and_leave_nothing() -> None:
    check_soak(400)
