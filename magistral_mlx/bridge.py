"""The bridge for a host that is not Python: an app in Swift, or C, that embeds the interpreter.

Functions only. They take and return text, numbers, booleans, None, lists and dictionaries. Nothing
is raised: each returns a dictionary with ``ok``, and if that is false, an ``error`` with a code, a
message and what_to_do. There are no callbacks: a host pulls events. Any thread that holds the GIL
may call. All work is done on one worker thread, which runs only while the GIL is free, as it is
while a host waits in ``next_event``.

``version``, ``plan``, ``load``, ``start``, ``cancel`` and ``stats`` return at once; ``next_event``
within its timeout; ``ask``, ``save``, ``resume`` and ``close`` when they are done. The fields of
events are in serving/bridge_events.schema.json.
"""

import sys
from dataclasses import asdict, replace
from typing import Any

import mlx.core as mx

from magistral_mlx import __version__
from magistral_mlx.demo import resolve_local
from magistral_mlx.engine.request import Request
from magistral_mlx.errors import OptionError
from magistral_mlx.generation.params import SamplingParams
from magistral_mlx.model.load_options import LoadOptions
from magistral_mlx.model.memory import MemoryPlan
from magistral_mlx.serving.handles import Handles
from magistral_mlx.serving.model_jobs import plan_local
from magistral_mlx.serving.plain_values import read_options, returns_errors

# Grows when a function or an event changes in a way that a host must know.
INTERFACE = 2
# A pull is short, so that a host sees its own cancellation between two pulls.
MAX_SECONDS = 1.0

_handles = Handles()


@returns_errors
def version() -> dict[str, Any]:
    """Return the versions of this package, of MLX and of Python, and of this interface."""
    return {
        "version": __version__,
        "interface": INTERFACE,
        "mlx": mx.__version__,  # type: ignore[attr-defined]
        "python": sys.version.split()[0],
    }


@returns_errors
def plan(path: str, **options: Any) -> dict[str, Any]:
    """Return what a model in a folder needs here, in bytes, and the context that fits.

    Reads headers, no weights. The options are those of ``load``. A model that does not fit is an
    error with the code "memory", whose message names what would fit.
    """
    wanted = _load_options(options)
    if wanted.draft_model is not None:
        draft = resolve_local(str(wanted.draft_model), converts_demo=False)
        wanted = replace(wanted, draft_model=draft)
    return _as_dict(plan_local(resolve_local(path, converts_demo=False), wanted))


@returns_errors
def load(path: str, **options: Any) -> dict[str, Any]:
    """Start to load a folder, or "demo". Returns ``handle`` and ``stream``.

    The events of the stream are progress, then ready or error. The options are the fields of
    ``LoadOptions``; None stands for the default. A model is planned for the memory that other open
    models leave, unless ``memory_gb`` is given. Replies may be started at once; they wait until
    the model is ready. Close a handle even if its load failed.
    """
    handle, stream = _handles.load(path, _load_options(options))
    return {"handle": handle, "stream": stream}


@returns_errors
def start(
    handle: int,
    messages: str | list[Any],
    *,
    tools: list[Any] | None = None,
    system_prompt_only: bool = False,
    **sampling: Any,
) -> dict[str, Any]:
    """Start a reply. Returns ``stream``, and in ``ahead`` how many streams are before it.

    The events of the stream are progress, reasoning, answer and tool_call, then done or error. A
    model gives one reply at a time; at most 16 wait. ``messages``, ``tools`` and
    ``system_prompt_only`` are those of ``Magistral.ask``, the other keywords the fields of
    ``SamplingParams``; None stands for the default.
    """
    params = read_options(SamplingParams, sampling)
    request = Request(messages, params, tools=tools, system_prompt_only=system_prompt_only)
    stream, ahead = _handles.start(handle, request)
    return {"stream": stream, "ahead": ahead}


@returns_errors
def next_event(stream: int, timeout_seconds: float = 0.05) -> dict[str, Any]:
    """Return the next ``event`` of a stream, or None if there is none within a second at most.

    Waits with the GIL released. Events wait until they are pulled, and the model goes on meanwhile:
    waiting pieces of text are joined, and only the newest progress is kept. A stream ends with the
    event done, ready or error; its number is then refused.
    """
    if not 0 <= timeout_seconds <= MAX_SECONDS:
        raise OptionError(
            f"timeout_seconds is {timeout_seconds}; use 0 to {MAX_SECONDS:g}, and call again"
        )
    return {"event": _handles.pull(stream, timeout_seconds)}


@returns_errors
def cancel(stream: int) -> dict[str, Any]:
    """End a stream early: after the current token or chunk of the prompt, or before it starts.

    Its last event still comes: done with the finish_reason "cancelled", or for a load error with
    the code "cancelled".
    """
    _handles.cancel(stream)
    return {}


@returns_errors
def ask(handle: int, messages: str | list[Any], **keywords: Any) -> dict[str, Any]:
    """Return a whole reply: reasoning, answer, tool_calls, and the fields of the event done.

    The keywords are those of ``start``. To end a reply early, close the handle from another thread.
    """
    begun = start(handle, messages, **keywords)
    return _handles.read_all(begun["stream"]) if begun["ok"] else begun


@returns_errors
def stats(handle: int) -> dict[str, Any]:
    """Return what a model does and holds.

    ``streams`` counts the streams that have not ended. ``active_bytes``, ``peak_bytes`` and
    ``freed_bytes`` are MLX's, of the whole process, as the last reply left them.
    """
    hosted = _handles.model(handle)
    jobs = hosted.jobs
    return {
        "model": hosted.name,
        "is_ready": jobs.is_ready,
        "streams": hosted.streams,
        "plan": None if jobs.plan is None else _as_dict(jobs.plan),
        **asdict(jobs.stats),
    }


@returns_errors
def save(handle: int, path: str, *, overwrite: bool = False) -> dict[str, Any]:
    """Write the conversation of the last reply, its trace included, and the cache to a file.

    A save is atomic. The file holds the conversation in the clear. A file that this handle has not
    saved or resumed is replaced only with ``overwrite``, and one that is no prompt cache never.
    While a stream has not ended, this is an error with the code "busy".
    """
    return _handles.model(handle).save(path, overwrite=overwrite)


@returns_errors
def resume(handle: int, path: str) -> dict[str, Any]:
    """Read what ``save`` wrote, with the same model. Returns messages, tools and cached_tokens.

    Go on with ``start(handle, [*messages, {"role": "user", "content": ...}])``, which does not read
    again what is cached.
    """
    return _handles.model(handle).resume(path)


@returns_errors
def close(handle: int) -> dict[str, Any]:
    """Close a model: cancel its streams, whose numbers are then refused, and free its memory.

    Returns when that is done, at most one pass of the model later. ``active_bytes`` is what MLX
    still holds.
    """
    return _handles.close(handle)


def _load_options(values: dict[str, Any]) -> LoadOptions:
    options = read_options(LoadOptions, values)
    if options.revision is not None:
        raise OptionError("a host loads folders, which have no revision; leave the revision out")
    return options


def _as_dict(plan: MemoryPlan) -> dict[str, Any]:
    return asdict(plan) | {"total_bytes": plan.total_bytes}
