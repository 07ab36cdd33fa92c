"""Events: what a host is told while a model loads or replies, as dictionaries with a ``kind``.

The JSON Schema beside this file is made from the types here. To write it anew, run
``python -m magistral_mlx.serving.events > magistral_mlx/serving/bridge_events.schema.json``.
"""

import json
import sys
import types
from dataclasses import MISSING, fields
from pathlib import Path
from typing import (
    Annotated,
    Any,
    Literal,
    TypedDict,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)

from magistral_mlx import streams
from magistral_mlx.generation.reply import ClosedBy, FinishReason, Reply, Usage
from magistral_mlx.model.memory import MemoryPlan
from magistral_mlx.serving.failures import failure_of
from magistral_mlx.tokenizer.segments import Segment, Text, ToolCall
from magistral_mlx.tokenizer.tool_calls import json_text

SCHEMA = Path(__file__).with_name("bridge_events.schema.json")
JSON_TYPES = {str: "string", int: "integer", float: "number", bool: "boolean", type(None): "null"}
# The fields of Usage without a default; those with one belong to a conversation, not to a reply.
USAGE_TYPES: dict[str, type] = {
    field.name: get_type_hints(Usage)[field.name]
    for field in fields(Usage)
    if field.default is MISSING
}
UsageFigures = Annotated[dict[str, int | float], Usage]


class Progress(TypedDict):
    """Progress of the load (bytes), or of reading the prompt (tokens)."""

    kind: Literal["progress"]
    phase: Literal["load", "prompt"]
    done: int
    total: int


class Ready(TypedDict):
    """The model is loaded: the last event of a load that succeeded."""

    kind: Literal["ready"]
    model: str
    context: int
    kv_bits: int | None
    weights_bytes: int
    total_bytes: int
    budget_bytes: int


class Reasoning(TypedDict):
    """The next piece of the trace."""

    kind: Literal["reasoning"]
    text: str


class Answer(TypedDict):
    """The next piece of the answer."""

    kind: Literal["answer"]
    text: str


class Called(TypedDict):
    """A function that the model asks to be called; ``arguments`` is the text of a JSON object."""

    kind: Literal["tool_call"]
    id: str
    name: str
    arguments: str


class Done(TypedDict):
    """The reply has ended: the last event of a stream that succeeded, or was cancelled."""

    kind: Literal["done"]
    finish_reason: FinishReason
    reasoning_closed_by: ClosedBy | None
    usage: UsageFigures


class Failed(TypedDict):
    """The last event of a stream that failed, or of a load that failed or was cancelled."""

    kind: Literal["error"]
    code: str
    message: str
    what_to_do: str


Event = Progress | Ready | Reasoning | Answer | Called | Done | Failed
TEXT = ("reasoning", "answer")  # the kinds whose pieces can be joined


def loaded(progress: streams.Progress) -> Progress:
    """Make the event of the bytes loaded so far."""
    return Progress(kind="progress", phase="load", done=progress.done, total=progress.total)


def ready(model: str, plan: MemoryPlan) -> Ready:
    """Make the last event of a load that succeeded."""
    return Ready(
        kind="ready",
        model=model,
        context=plan.context,
        kv_bits=plan.kv_bits,
        weights_bytes=plan.weights_bytes,
        total_bytes=plan.total_bytes,
        budget_bytes=plan.budget_bytes,
    )


def event_of(segment: Segment) -> Event:
    """Return a segment of a reply as an event."""
    match segment:
        case streams.Progress(done, total):
            return Progress(kind="progress", phase="prompt", done=done, total=total)
        case ToolCall(identity, name, arguments):
            return Called(kind="tool_call", id=identity, name=name, arguments=json_text(arguments))
        case Text("reasoning", text):
            return Reasoning(kind="reasoning", text=text)
        case Text(text=text):
            return Answer(kind="answer", text=text)


def done(reply: Reply) -> Done:
    """Make the last event of a reply."""
    return Done(
        kind="done",
        finish_reason=reply.finish_reason,
        reasoning_closed_by=reply.reasoning_closed_by,
        usage={name: getattr(reply.usage, name) for name in USAGE_TYPES},
    )


def never_started() -> Done:
    """Make the last event of a reply that was cancelled while it waited."""
    return Done(
        kind="done",
        finish_reason="cancelled",
        reasoning_closed_by=None,
        usage={name: kind(0) for name, kind in USAGE_TYPES.items()},
    )


def failed(error: BaseException) -> Failed:
    """Make the last event of a stream that failed."""
    return Failed(kind="error", **failure_of(error))


def event_schema() -> dict[str, Any]:
    """Make the JSON Schema of an event: one of the definitions, by its ``kind``."""
    events = get_args(Event)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Event of magistral_mlx.bridge",
        "oneOf": [{"$ref": f"#/$defs/{event.__name__}"} for event in events],
        "$defs": {event.__name__: _schema_of(event) for event in events},
    }


def _schema_of(annotation: Any) -> dict[str, Any]:
    if is_typeddict(annotation):
        hints = get_type_hints(annotation, include_extras=True)
        return _object_schema(annotation.__doc__ or "", hints)
    if get_origin(annotation) is Annotated:
        return _object_schema("The cost of a reply; see reply.Usage.", USAGE_TYPES)
    if get_origin(annotation) is Literal:
        return {"enum": list(get_args(annotation))}
    if isinstance(annotation, types.UnionType) or get_origin(annotation) is not None:
        return {"anyOf": [_schema_of(choice) for choice in get_args(annotation)]}
    return {"type": JSON_TYPES[annotation]}


def _object_schema(description: str, hints: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "description": description.strip(),
        "properties": {name: _schema_of(hint) for name, hint in hints.items()},
        "required": list(hints),
        "additionalProperties": False,
    }


if __name__ == "__main__":
    sys.stdout.write(json.dumps(event_schema(), indent=2) + "\n")
