"""Any exception as a plain error: a code, what happened, what to do. Makes them, and never raises."""

from typing import Any, TypedDict

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

MOST_CHARACTERS = 2000


class ClosedError(MagistralError):
    """A handle or a stream that has ended, or never was one."""


class BusyError(MagistralError):
    """A call that must wait until replies have ended."""


class BrokenError(Exception):
    """What the owner thread could not even report."""


class Failure(TypedDict):
    """What went wrong, as a host gets it."""

    code: str
    message: str
    what_to_do: str


CODES: dict[type[BaseException], str] = {  # the first that fits
    CheckpointError: "checkpoint",
    ContextError: "context",
    ConversionError: "conversion",
    HubError: "hub",
    MemoryLimitError: "memory",
    NumericsError: "numerics",
    OptionError: "option",
    TokenizerError: "tokenizer",
    ClosedError: "closed",
    BusyError: "busy",
    CancelledError: "cancelled",
    MagistralError: "option",
    MemoryError: "memory",
    OSError: "file",
    KeyboardInterrupt: "interrupted",
    BaseException: "internal",
}
WHAT_TO_DO = {
    "busy": "Pull the streams under way to their last event, or cancel them, then call again.",
    "cancelled": "Nothing is loaded; call load to begin again.",
    "checkpoint": "Check the folder, or download or convert the model again.",
    "closed": "Use a handle until it is closed and a stream until its last event; load or start a new one.",
    "context": "Shorten the conversation, ask for fewer max_tokens, or load with a larger context.",
    "conversion": "Free what the message names, then load again.",
    "file": "Check that the path exists and that the app may read and write there.",
    "hub": "Check the network, or name a folder that holds the model.",
    "internal": "Please report this with its message; the model can be closed and loaded again.",
    "interrupted": "Call again if it was not meant.",
    "memory": "Load with a smaller context or kv_bits=8, a model of fewer bits, or close another model first.",
    "numerics": "The weights are damaged: download or convert the model again.",
    "option": "Correct the argument that the message names, and call again.",
    "tokenizer": "Correct the text that the message names, or download tekken.json again.",
}
LAST_RESORT: dict[
    str, Any
] = {  # made beforehand: for when there is no memory or stack left to make one
    "ok": False,
    "error": Failure(
        code="internal",
        message="an error could not be described",
        what_to_do="Close the model and load it again.",
    ),
}


def failure_of(error: BaseException) -> Failure:
    """The plain form of an exception."""
    code = next(code for kind, code in CODES.items() if isinstance(error, kind))
    message = str(error) if isinstance(error, MagistralError) else _described(error)
    # A host's strings are Unicode: half of a surrogate pair, as of an undecodable path, would not cross.
    message = message[:MOST_CHARACTERS].encode(errors="backslashreplace").decode()
    return Failure(code=code, message=message, what_to_do=WHAT_TO_DO[code])


def refusal(error: BaseException) -> dict[str, Any]:
    """What a function returns instead of raising this."""
    try:
        return {"ok": False, "error": failure_of(error)}
    except BaseException:
        return LAST_RESORT


def _described(error: BaseException) -> str:
    """The type, the text, and where it came from."""
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
