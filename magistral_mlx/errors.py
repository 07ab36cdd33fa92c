"""Every error a user can cause. Each message names the thing, what is wrong with it, and the way out."""

import reprlib

_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxlist, _SHORT.maxdict = 3, 8, 4
_SHORT.maxstring = _SHORT.maxother = 100


def quoted(value: object) -> str:
    """A value of a file as a message quotes it: of a damaged file it may be endless, or nested without end."""
    return _SHORT.repr(value)


class MagistralError(Exception):
    """Something the user can change; command lines print it and exit with 2."""


class OptionError(MagistralError):
    """An option or argument outside what can be honoured."""


class CheckpointError(MagistralError):
    """A checkpoint, or a file of it, that is missing, damaged or of another model."""


class TokenizerError(MagistralError):
    """A tekken.json that cannot be used, or text that cannot be encoded."""


class ContextError(MagistralError):
    """A prompt or a reply that does not fit the context."""


class MemoryLimitError(MagistralError):
    """A plan that does not fit this machine's memory."""


class HubError(MagistralError):
    """The model hub could not be reached, or does not have what was asked for."""


class NumericsError(MagistralError):
    """The model produced NaN: its weights are damaged."""


class ConversionError(MagistralError):
    """A conversion that cannot start, or could not be finished."""


class CancelledError(MagistralError):
    """Work that was cancelled or closed before it had a result."""
