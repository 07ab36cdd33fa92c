"""Magistral for a host that is not Python: an app in Swift, or C, that embeds the interpreter.

Functions only. They take and give text, numbers, true and false, None, lists and dictionaries. Nothing is raised: each
returns a dictionary with ``ok``, and where that is false an ``error`` with code, message and what_to_do. There are no
callbacks: a host pulls events. Any thread that has the GIL may call; all work is done on a thread of the bridge's own,
which runs only while the GIL is free, as it is while a host waits in ``next_event``.

``version``, ``plan``, ``load``, ``start``, ``cancel`` and ``stats`` return at once; ``next_event`` within its timeout;
``ask``, ``save``, ``resume`` and ``close`` when they are done. What events hold is in bridge_events.schema.json.
"""

import sys
from dataclasses import asdict, replace
from typing import Any

import mlx.core as mx

from magistral_mlx import __version__
from magistral_mlx.demo import resolve_local
from magistral_mlx.errors import OptionError
from magistral_mlx.generation.params import SamplingParams
from magistral_mlx.model.load_options import LoadOptions
from magistral_mlx.model.memory import MemoryPlan
from magistral_mlx.serving.handles import Desk
from magistral_mlx.serving.hosted_model import Request, plan_local
from magistral_mlx.serving.plain_values import guarded, read_options

# Grows when a function or an event changes in a way that a host must know.
INTERFACE = 2
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
def plan(path: str, **options: Any) -> dict[str, Any]:
    """Return what a model in a folder needs here, in bytes, and the context that fits.

    Reads headers, no weights. The options are those of ``load``. A model that does not fit is an
    error with the code "memory", whose message names what would fit.
    """
    wanted = read_options(LoadOptions, options)
    if wanted.draft_model is not None:
        draft = resolve_local(str(wanted.draft_model), converts_demo=False)
        wanted = replace(wanted, draft_model=draft)
    return _as_dict(plan_local(resolve_local(path, converts_demo=False), wanted))


@guarded
def load(path: str, **options: Any) -> dict[str, Any]:
    """Begin to load a folder, or "demo". Returns ``handle`` and ``stream``.

    The events of the stream are progress, then ready or error. The options are the fields of
    ``LoadOptions``; None stands for the default. A model is planned for the memory that other open
    models leave, unless ``memory_gb`` is given. Replies may be started at once; they begin when
    the model is ready. Close a handle even if its load failed.
    """
    handle, stream = _desk.load(path, read_options(LoadOptions, options))
    return {"handle": handle, "stream": stream}


@guarded
def start(
    handle: int,
    messages: str | list[Any],
    *,
    tools: list[Any] | None = None,
    system_prompt_only: bool = False,
    **sampling: Any,
) -> dict[str, Any]:
    """Begin a reply. Returns ``stream``, and in ``ahead`` how many streams are before it.

    The events of the stream are progress, reasoning, answer and tool_call, then done or error. A
    model gives one reply at a time; at most 16 wait. ``messages``, ``tools`` and
    ``system_prompt_only`` are those of ``Magistral.ask``, the other keywords the fields of
    ``SamplingParams``; None stands for the default.
    """
    params = read_options(SamplingParams, sampling)
    stream, ahead = _desk.start(handle, Request(messages, params, tools, system_prompt_only))
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
def ask(handle: int, messages: str | list[Any], **keywords: Any) -> dict[str, Any]:
    """Return a whole reply: reasoning, answer, tool_calls, and the fields of the event done.

    The keywords are those of ``start``. To end a reply early, close the handle from another thread.
    """
    begun = start(handle, messages, **keywords)
    return _desk.whole(begun["stream"]) if begun["ok"] else begun


@guarded
def stats(handle: int) -> dict[str, Any]:
    """What a model is doing and holds: ``is_ready``, ``streams`` that have not ended, its plan in bytes, and figures.

    ``active_bytes``, ``peak_bytes`` and ``freed_bytes`` are MLX's, of the whole process, as the last reply left them.
    """
    hosted = _desk.model(handle)
    resident = hosted.resident
    return {
        "model": hosted.model,
        "is_ready": resident.is_ready,
        "streams": hosted.streams,
        "plan": None if resident.plan is None else _as_dict(resident.plan),
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


def _as_dict(plan: MemoryPlan) -> dict[str, Any]:
    return asdict(plan) | {"total_bytes": plan.total_bytes}
