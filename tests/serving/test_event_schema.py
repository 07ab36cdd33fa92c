"""The schema file matches the event types, and refuses other values."""

import json

import jsonschema
import pytest

from magistral_mlx.errors import OptionError
from magistral_mlx.generation.reply import Reply, Usage
from magistral_mlx.serving import events
from magistral_mlx.serving.events import SCHEMA, event_schema
from magistral_mlx.streams import Progress
from magistral_mlx.tokenizer.segments import Text, ToolCall
from tests.support.hosting import VALIDATOR

REPLY = Reply("r", "a", (), "stop", None, Usage(1, 2, 3, 4, 5, 6.5, 7, 8, 9, 10))


def test_the_file_matches_the_types() -> None:
    assert json.loads(SCHEMA.read_text()) == event_schema(), (
        "python -m magistral_mlx.serving.events > the file"
    )
    jsonschema.Draft202012Validator.check_schema(event_schema())


@pytest.mark.parametrize(
    "event",
    [
        events.loaded(Progress(1, 2)),
        events.event_of(Progress(16, 49)),
        events.event_of(Text("reasoning", "r")),
        events.event_of(Text("answer", "a")),
        events.event_of(ToolCall("abcdefghi", "f", {"x": [1, "ü"]})),
        events.done(REPLY),
        events.never_started(),
        events.failed(OptionError("no")),
        events.failed(ValueError("half \ud800")),
    ],
    ids=lambda event: event["kind"],
)
def test_every_event_is_valid(event: events.Event) -> None:
    VALIDATOR.validate(event)
    json.dumps(event, ensure_ascii=False).encode()


def test_usage_is_the_reply_s() -> None:
    assert events.done(REPLY)["usage"] == {
        "prompt_tokens": 1,
        "completion_tokens": 2,
        "reasoning_tokens": 3,
        "cached_tokens": 4,
        "forward_passes": 5,
        "prefill_seconds": 6.5,
        "decode_seconds": 7,
        "peak_memory_bytes": 8,
        "max_tokens": 9,
        "seed": 10,
    }


@pytest.mark.parametrize(
    "wrong",
    [
        {},
        {"kind": "song"},
        {"kind": "answer"},
        {"kind": "answer", "text": 5},
        {"kind": "answer", "text": "a", "more": 1},
        {"kind": "progress", "phase": "lunch", "done": 1, "total": 2},
        {**events.never_started(), "finish_reason": "bored"},
    ],
)
def test_other_values_are_invalid(wrong: dict[str, object]) -> None:
    assert not VALIDATOR.is_valid(wrong)
