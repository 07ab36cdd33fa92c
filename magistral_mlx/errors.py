"""Errors that a user can cause, and the forms in which messages quote values and sizes.

Each message names the thing, what is wrong with it, and the way out.
"""

import reprlib

_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxlist, _SHORT.maxdict = 3, 8, 4
_SHORT.maxstring = _SHORT.maxother = 100


def quoted(value: object) -> str:
    """Return a value as a message quotes it: short, even if it is endless or nested without end."""
    return _SHORT.repr(value)


def in_units(nbytes: float) -> str:
    """Return a size as a message gives it: in GB (10^9 bytes), in MB, or below 1 MB in bytes."""
    if nbytes >= 1e8:
        return f"{nbytes / 1e9:.2f} GB"
    return f"{nbytes / 1e6:.1f} MB" if nbytes >= 1e6 else f"{nbytes:,.0f} bytes"


class MagistralError(Exception):
    """Base of errors that the user can mend; command lines print it and exit with 2."""


class OptionError(MagistralError):
    """Refused option or argument."""


class CheckpointError(MagistralError):
    """Checkpoint, or a file of it, that is missing, damaged or of another model."""


class TokenizerError(MagistralError):
    """Unusable tekken.json, or an id that is not in the vocabulary."""


class ContextError(MagistralError):
    """Prompt or reply that does not fit the context."""


class MemoryLimitError(MagistralError):
    """Plan that does not fit this machine's memory."""


class HubError(MagistralError):
    """Hub that cannot be reached, or does not have what was asked for."""


class NumericsError(MagistralError):
    """Logits that are NaN, because the weights are damaged."""


class ConversionError(MagistralError):
    """Conversion that cannot start, or could not be finished."""


class CancelledError(MagistralError):
    """Work that was cancelled or closed before it had a result."""
