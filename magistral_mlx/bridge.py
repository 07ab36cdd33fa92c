"""Magistral for a host that is not Python: an app in Swift, or C, that embeds the interpreter.

Functions only. They take and give text, numbers, true and false, None, lists and dictionaries. Nothing is raised: each
returns a dictionary with ``ok``, and where that is false an ``error`` with code, message and what_to_do. There are no
callbacks: a host pulls events. Any thread that has the GIL may call; all work is done on a thread of the bridge's own,
which runs only while the GIL is free, as it is while a host waits in ``next_event``.

``version``, ``plan``, ``load``, ``start``, ``cancel`` and ``stats`` return at once; ``next_event`` within its timeout;
``ask``, ``save``, ``resume`` and ``close`` when they are done. What events hold is in bridge_events.schema.json.
"""

import sys
from dataclasses import asdict
from typing import Any, get_args

import mlx.core as mx

from magistral_mlx import __version__
from magistral_mlx.checkpoint.folder import open_checkpoint
from magistral_mlx.checkpoint.manifest import ReasoningFormat
from magistral_mlx.errors import OptionError
from magistral_mlx.generation.params import SamplingParams
from magistral_mlx.model.memory import plan_for
from magistral_mlx.serving.handles import Desk
from magistral_mlx.serving.hosted_model import Loading, Request, existing
from magistral_mlx.serving.plain_values import guarded

INTERFACE = 1  # grows when a function or an event changes in a way that a host must know
LONGEST_SECONDS = 1.0  # a pull is short, so that a host sees its own cancellation between two

_desk = Desk()


@guarded
def version() -> dict[str, Any]:
    """The versions of this package, of MLX and of Python, and of this interface."""
    return {
        "version": __version__,
        "interface": INTERFACE,
        "mlx": mx.__version__,  # type: ignore[attr-defined]  # its stubs leave it out
        "python": sys.version.split()[0],
    }


@guarded
def plan(
    path: str,
    *,
    context: int | None = None,
    kv_bits: int | None = None,
    prefill_step_size: int | None = None,
    memory_gb: float | None = None,
    draft: str | None = None,
) -> dict[str, Any]:
    """What a model in a folder would need here, in bytes, and the context that fits. Reads headers, no weights.

    A model that does not fit is an error of code "memory", whose message names what would.
    """
    found = plan_for(
        open_checkpoint(existing(path)),
        context=context,
        kv_bits=kv_bits,
        prefill_chunk=prefill_step_size,
        memory_gb=memory_gb,
        draft=None if draft is None else open_checkpoint(existing(draft)),
        context_flag="context",
    )
    return asdict(found) | {"total_bytes": found.total_bytes}


@guarded
def load(
    path: str,
    *,
    context: int | None = None,
    kv_bits: int | None = None,
    prefill_step_size: int | None = None,
    memory_gb: float | None = None,
    wired: bool = False,
    draft: str | None = None,
    num_draft_tokens: int | None = None,
    reasoning_format: str | None = None,
) -> dict[str, Any]:
    """Begin to load a folder, or "demo". Gives ``handle``, and ``stream``: progress, then ready or error.

    Streams may be started at once; they begin when it is ready. Beside other open models, it is planned for the memory
    they leave unless ``memory_gb`` is given. Close a handle even if its load failed. The other arguments are those of
    ``magistral_mlx.load``.
    """
    if reasoning_format not in (None, *get_args(ReasoningFormat)):
        raise OptionError(
            f"reasoning_format is {reasoning_format!r}; use {' or '.join(get_args(ReasoningFormat))}"
        )
    handle, stream = _desk.load(
        Loading(
            model=path,
            context=context,
            kv_bits=kv_bits,
            prefill_step_size=prefill_step_size,
            memory_gb=memory_gb,
            wired=wired,
            draft=draft,
            num_draft_tokens=num_draft_tokens,
            reasoning_format=reasoning_format,  # type: ignore[arg-type]  # one of its values
        )
    )
    return {"handle": handle, "stream": stream}


@guarded
def start(
    handle: int,
    messages: str | list[Any],
    *,
    temperature: float | None = None,
    top_p: float | None = None,
    max_tokens: int | None = None,
    seed: int | None = None,
    stop: list[Any] | None = None,
    think_budget: int | None = None,
    think_budget_message: str | None = None,
    on_loop: str | None = None,
    tools: list[Any] | None = None,
    system_prompt_only: bool = False,
) -> dict[str, Any]:
    """Begin a reply. Gives ``stream``: progress, reasoning, answer and tool_call, then done or error.

    A model gives one reply at a time; the next begins when it has ended. ``ahead`` is how many streams are before this
    one, 16 at most. The arguments are those of ``magistral_mlx.SamplingParams`` and ``Magistral.ask``; None means the
    model card's value.
    """
    given = {
        "temperature": temperature,
        "top_p": top_p,
        "max_tokens": max_tokens,
        "seed": seed,
        "stop": None if stop is None else tuple(stop),
        "think_budget": think_budget,
        "think_budget_message": think_budget_message,
        "on_loop": on_loop,
    }
    sampling = SamplingParams(**{name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type]
    stream, ahead = _desk.start(handle, Request(messages, sampling, tools, system_prompt_only))
    return {"stream": stream, "ahead": ahead}


@guarded
def next_event(stream: int, timeout_seconds: float = 0.05) -> dict[str, Any]:
    """The next ``event`` of a stream, or None if there is none within ``timeout_seconds``, of 1 at most.

    Waits with the GIL released. Events wait until they are pulled, and the model goes on meanwhile: pieces of text that
    wait are joined, of progress the newest stays. After done, ready or error the stream has ended and is no more.
    """
    if not 0 <= timeout_seconds <= LONGEST_SECONDS:
        raise OptionError(
            f"timeout_seconds is {timeout_seconds}; use 0 to {LONGEST_SECONDS:g}, and call again"
        )
    return {"event": _desk.pull(stream, timeout_seconds)}


@guarded
def cancel(stream: int) -> dict[str, Any]:
    """End a stream early: after the token or the chunk of the prompt under way, or before it begins.

    Its last event still comes: done with finish_reason "cancelled", or of a load error with code "cancelled".
    """
    _desk.cancel(stream)
    return {}


@guarded
def ask(
    handle: int,
    messages: str | list[Any],
    *,
    temperature: float | None = None,
    top_p: float | None = None,
    max_tokens: int | None = None,
    seed: int | None = None,
    stop: list[Any] | None = None,
    think_budget: int | None = None,
    think_budget_message: str | None = None,
    on_loop: str | None = None,
    tools: list[Any] | None = None,
    system_prompt_only: bool = False,
) -> dict[str, Any]:
    """The whole reply at once, as ``start`` and its events: reasoning, answer, tool_calls, and what done holds.

    Returns when it has ended; to end it early, close the handle from another thread.
    """
    begun = start(
        handle,
        messages,
        temperature=temperature,
        top_p=top_p,
        max_tokens=max_tokens,
        seed=seed,
        stop=stop,
        think_budget=think_budget,
        think_budget_message=think_budget_message,
        on_loop=on_loop,
        tools=tools,
        system_prompt_only=system_prompt_only,
    )
    return _desk.whole(begun["stream"]) if begun["ok"] else begun


@guarded
def stats(handle: int) -> dict[str, Any]:
    """What a model is doing and holds: ``is_ready``, ``streams`` that have not ended, its plan in bytes, and figures.

    ``active_bytes``, ``peak_bytes`` and ``freed_bytes`` are MLX's, of the whole process, as the last reply left them.
    """
    hosted = _desk.model(handle)
    resident = hosted.resident
    found = resident.plan
    return {
        "model": hosted.model,
        "is_ready": resident.is_ready,
        "streams": hosted.streams,
        "plan": None if found is None else asdict(found) | {"total_bytes": found.total_bytes},
        **asdict(resident.figures),
    }


@guarded
def save(handle: int, path: str) -> dict[str, Any]:
    """Write the conversation of the last reply, its trace included, and the model's cache of it, to a file.

    The file is the old one or the new one, never half of one, and holds the conversation in the clear. While a stream
    has not ended it is an error of code "busy".
    """
    return _desk.model(handle).save(path)


@guarded
def resume(handle: int, path: str) -> dict[str, Any]:
    """Read what ``save`` wrote, with the same model. Gives ``messages``, ``tools`` and ``cached_tokens``.

    Go on with ``start(handle, [*messages, {"role": "user", "content": ...}])``: what is cached is not read again.
    """
    return _desk.model(handle).resume(path)


@guarded
def close(handle: int) -> dict[str, Any]:
    """End a model: cancel its streams, which are then no more, and give its memory back.

    Returns when that is done, at most one pass of the model later. ``active_bytes``: what MLX still holds.
    """
    return _desk.close(handle)
