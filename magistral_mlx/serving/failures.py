"""Failures: an exception as plain values, with a code, a message and what to do. Never raises."""

from typing import Any, TypedDict

from magistral_mlx.engine.worker import EndingError
from magistral_mlx.errors import (
    CancelledError,
    CheckpointError,
    ContextError,
    ConversionError,
    HubError,
    MagistralError,
    MemoryLimitError,
    NumericsError,
    OptionError,
    TokenizerError,
)

MAX_CHARACTERS = 2000


class ClosedError(MagistralError):
    """A handle or a stream that has ended, or never was one."""


class BusyError(MagistralError):
    """A call that must wait until replies have ended."""


class BrokenError(Exception):
    """The end of a stream that the worker thread could not report."""


class Failure(TypedDict):
    """A failure as a host gets it."""

    code: str
    message: str
    what_to_do: str


# The first class that an exception is an instance of gives its code.
CODES: dict[type[BaseException], str] = {
    CheckpointError: "checkpoint",
    ContextError: "context",
    ConversionError: "conversion",
    HubError: "hub",
    MemoryLimitError: "memory",
    NumericsError: "numerics",
    OptionError: "option",
    TokenizerError: "tokenizer",
    ClosedError: "closed",
    EndingError: "closed",
    BusyError: "busy",
    CancelledError: "cancelled",
    MagistralError: "option",
    MemoryError: "memory",
    OSError: "file",
    KeyboardInterrupt: "interrupted",
    BaseException: "internal",
}
WHAT_TO_DO = {
    "busy": "Pull the open streams to their last event, or cancel them, then call again.",
    "cancelled": "Nothing is loaded; call load to begin again.",
    "checkpoint": "Check the folder, or download or convert the model again.",
    "closed": "Use a handle until it is closed and a stream until its last event; "
    "load or start a new one.",
    "context": "Shorten the conversation, ask for fewer max_tokens, or load with a larger "
    "max_kv_size.",
    "conversion": "Free what the message names, then load again.",
    "file": "Check that the path exists and that the app may read and write there.",
    "hub": "Check the network, or name a folder that holds the model.",
    "internal": "Please report this with its message; the model can be closed and loaded again.",
    "interrupted": "Call again if it was not meant.",
    "memory": "Load with a smaller max_kv_size or kv_bits=8, load a model of fewer bits, "
    "or close another model first.",
    "numerics": "The weights are damaged: download or convert the model again.",
    "option": "Correct the argument that the message names, and call again.",
    "tokenizer": "Correct the text that the message names, or download tekken.json again.",
}
# Made in advance, for when there is no memory or stack left to make a failure.
LAST_RESORT: dict[str, Any] = {
    "ok": False,
    "error": Failure(
        code="internal",
        message="an error could not be described",
        what_to_do="Close the model and load it again.",
    ),
}


def failure_of(error: BaseException) -> Failure:
    """Return an exception as plain values."""
    code = next(code for kind, code in CODES.items() if isinstance(error, kind))
    message = str(error) if isinstance(error, MagistralError) else _describe(error)
    # A host's strings are Unicode, which half a surrogate pair of an undecodable path is not.
    message = message[:MAX_CHARACTERS].encode(errors="backslashreplace").decode()
    return Failure(code=code, message=message, what_to_do=WHAT_TO_DO[code])


def refusal(error: BaseException) -> dict[str, Any]:
    """Return the result of a function that would raise this exception."""
    try:
        return {"ok": False, "error": failure_of(error)}
    except BaseException:
        return LAST_RESORT


def _describe(error: BaseException) -> str:
    """Return the type of an exception, its text, and the line that raised it."""
    try:
        text = str(error)
    except Exception:  # an exception whose own text cannot be made
        text = ""
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    where = (
        ""
        if place is None
        else f" ({place.tb_frame.f_code.co_filename.rsplit('/', 1)[-1]}:{place.tb_lineno})"
    )
    return f"{type(error).__name__}: {text}{where}"
