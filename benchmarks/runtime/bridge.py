"""What a host feels: how long each call of the bridge takes, how soon events come, how long the GIL is held."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from magistral_mlx import bridge
from magistral_mlx.errors import OptionError

QUESTION = "What is 48 + 76?"
NAP_SECONDS = 0.0005


class Ticker:
    """A thread that naps and notes how late it gets the GIL back: what another thread of a host would wait."""

    def __init__(self) -> None:
        self.waits: list[float] = []
        self._is_ending = False
        self._thread = threading.Thread(target=self._tick)

    def __enter__(self) -> "Ticker":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_ending = True
        self._thread.join()

    def _tick(self) -> None:
        while not self._is_ending:
            began = time.perf_counter()
            time.sleep(NAP_SECONDS)
            self.waits.append(time.perf_counter() - began - NAP_SECONDS)


@dataclass(slots=True)
class Felt:
    """Times in seconds, and the longest wait for the GIL meanwhile, by what was done; one of each a repeat."""

    seconds: dict[str, list[float]] = field(default_factory=dict)
    waits: dict[str, list[float]] = field(default_factory=dict)

    def note(self, what: str, seconds: float) -> None:
        self.seconds.setdefault(what, []).append(seconds)

    def rows(self) -> Iterator[tuple[str, float, float, float | None, float | None]]:
        """(what, median seconds, longest, median of the longest waits, longest wait)."""
        for what in dict.fromkeys([*self.seconds, *self.waits]):
            times, waits = self.seconds.get(what, [0.0]), self.waits.get(what)
            wait = (None, None) if waits is None else (float(np.median(waits)), max(waits))
            yield what, float(np.median(times)), max(times), *wait

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class Host:
    """Calls the bridge as a host does, and times it."""

    def __init__(self) -> None:
        self.felt = Felt()

    @contextmanager
    def watched(self, what: str) -> Iterator[None]:
        """Note how long this takes, and the longest wait for the GIL meanwhile."""
        with Ticker() as ticker:
            began = time.perf_counter()
            yield
            self.felt.note(what, time.perf_counter() - began)
        self.felt.waits.setdefault(what, []).append(max(ticker.waits, default=0.0))

    def call(
        self, function: Callable[..., dict[str, Any]], *args: Any, **options: Any
    ) -> dict[str, Any]:
        began = time.perf_counter()
        result = function(*args, **options)
        self.felt.note(f"{function.__name__} returns", time.perf_counter() - began)
        if not result["ok"]:
            raise OptionError(result["error"]["message"])
        return result

    def start(self, handle: int, prompt: str, **options: Any) -> Iterator[dict[str, Any]]:
        """The events of a reply, of which the first is timed; ``prompt``: whether it is new or cached."""
        stream = self.call(bridge.start, handle, QUESTION, **options)["stream"]
        began = time.perf_counter()
        events = pulled(stream)
        first = next(events)
        self.felt.note(f"start to first event, prompt {prompt}", time.perf_counter() - began)
        yield first | {"stream": stream}
        yield from events


def pulled(stream: int) -> Iterator[dict[str, Any]]:
    while True:
        event = bridge.next_event(stream)["event"]
        if event is not None:
            yield event
            if event["kind"] == "error":
                raise OptionError(event["message"])
            if event["kind"] in ("ready", "done"):
                return


def feel(model: str, repeats: int, folder: Path, *, idle_seconds: float = 1.0) -> Felt:
    """Load, talk, cancel, save, resume and close, over and over; ``folder`` holds what is saved meanwhile."""
    host, path = Host(), str(folder / "talk")
    for repeat in range(repeats + 1):
        if repeat == 1:  # the first was the warm-up: imports, kernels
            host.felt = Felt()
        with host.watched("nothing"):
            time.sleep(idle_seconds)
        with host.watched("load to ready"):
            loading = host.call(bridge.load, model)
            list(pulled(loading["stream"]))
        handle = int(loading["handle"])
        host.call(bridge.plan, model)
        host.call(bridge.version)
        with host.watched("a reply in events"):
            events = host.start(handle, "new", temperature=0)
            next(events)
            host.call(bridge.stats, handle)
            list(events)
        with host.watched("ask"):
            host.call(bridge.ask, handle, QUESTION, temperature=0)
        with host.watched("cancel to done"):
            events = host.start(handle, "cached", temperature=9.0, top_p=1.0)
            host.call(bridge.cancel, next(events)["stream"])
            list(events)
        bridge.ask(handle, QUESTION, temperature=0)  # something whole to save
        with host.watched("save"):
            host.call(bridge.save, handle, path)
        with host.watched("resume"):
            host.call(bridge.resume, handle, path)
        next(host.start(handle, "cached", temperature=9.0, top_p=1.0))
        with host.watched("close amid a reply"):
            host.call(bridge.close, handle)
    return host.felt
