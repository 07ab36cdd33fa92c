"""What a host is told while a model loads or replies: events, each a plain dictionary with a ``kind``.

This is the one place that says what they hold; event_schema makes the JSON Schema of it.
"""

from typing import Literal, TypedDict

from magistral_mlx import streams
from magistral_mlx.generation.reply import ClosedBy, FinishReason, Reply, Usage
from magistral_mlx.model.memory import MemoryPlan
from magistral_mlx.serving.failures import failure_of
from magistral_mlx.tokenizer.segments import Segment, Text, ToolCall
from magistral_mlx.tokenizer.tool_calls import json_text


class Figures(TypedDict):
    """What a reply cost; see reply.Usage."""

    prompt_tokens: int
    completion_tokens: int
    reasoning_tokens: int
    cached_tokens: int
    forward_passes: int
    prefill_seconds: float
    decode_seconds: float
    peak_memory_bytes: int
    max_tokens: int
    seed: int


class Progress(TypedDict):
    """How far the model is loaded (bytes), or the prompt read (tokens)."""

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
    usage: Figures


class Failed(TypedDict):
    """Something went wrong: the last event of a stream that failed, or of a load that failed or was cancelled."""

    kind: Literal["error"]
    code: str
    message: str
    what_to_do: str


Event = Progress | Ready | Reasoning | Answer | Called | Done | Failed
TEXT = ("reasoning", "answer")  # kinds whose pieces can be joined


def figures_of(usage: Usage) -> Figures:
    return Figures(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        reasoning_tokens=usage.reasoning_tokens,
        cached_tokens=usage.cached_tokens,
        forward_passes=usage.forward_passes,
        prefill_seconds=usage.prefill_seconds,
        decode_seconds=usage.decode_seconds,
        peak_memory_bytes=usage.peak_memory_bytes,
        max_tokens=usage.max_tokens,
        seed=usage.seed,
    )


NOTHING_USED = Figures(
    prompt_tokens=0,
    completion_tokens=0,
    reasoning_tokens=0,
    cached_tokens=0,
    forward_passes=0,
    prefill_seconds=0.0,
    decode_seconds=0.0,
    peak_memory_bytes=0,
    max_tokens=0,
    seed=0,
)


def loaded(done: int, total: int) -> Progress:
    return Progress(kind="progress", phase="load", done=done, total=total)


def ready(model: str, plan: MemoryPlan) -> Ready:
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
    return Done(
        kind="done",
        finish_reason=reply.finish_reason,
        reasoning_closed_by=reply.reasoning_closed_by,
        usage=figures_of(reply.usage),
    )


def never_begun() -> Done:
    """The end of a reply that was cancelled while it waited."""
    return Done(
        kind="done", finish_reason="cancelled", reasoning_closed_by=None, usage=NOTHING_USED
    )


def failed(error: BaseException) -> Failed:
    return Failed(kind="error", **failure_of(error))
