"""A test host: pull streams, check every event against the schema, list threads."""

import gc
import json
import threading
from collections.abc import Iterator
from typing import Any

import jsonschema

from magistral_mlx import bridge
from magistral_mlx.serving.events import SCHEMA

LAST = ("ready", "done", "error")
VALIDATOR = jsonschema.Draft202012Validator(json.loads(SCHEMA.read_text()))
PATIENCE_SECONDS = 30.0


def pulled(stream: int, seconds: float = 0.5) -> Iterator[dict[str, Any]]:
    """Yield the events of a stream to its last."""
    while True:
        pull = bridge.next_event(stream, seconds)
        assert pull["ok"], pull
        if (event := pull["event"]) is not None:
            VALIDATOR.validate(event)
            yield event
            if event["kind"] in LAST:
                return


def last_of(stream: int) -> dict[str, Any]:
    *_, last = pulled(stream)
    return last


def text_of(events: list[dict[str, Any]], kind: str) -> str:
    return "".join(event["text"] for event in events if event["kind"] == kind)


def opened(**options: Any) -> int:
    """Load the demo and return its handle."""
    loading = bridge.load("demo", **options)
    last = last_of(loading["stream"])
    assert last["kind"] == "ready", last
    return int(loading["handle"])


def threads() -> set[str]:
    """Return the names of all threads but the worker, which stays."""
    gc.collect()
    return {thread.name for thread in threading.enumerate()} - {"magistral-worker"}
