"""Errors that a user can cause, and the forms in which messages quote values and sizes.

Each message names the thing, what is wrong with it, and the way out.
"""

import re
import reprlib


class _Short(reprlib.Repr):
    """Representations of at most about 100 characters."""

    def repr_int(self, x: int, level: int) -> str:
        try:
            return super().repr_int(x, level)
        except ValueError:  # Python writes no number of more than 4,300 digits
            return "a number of more than 4,300 digits"


_SHORT = _Short()
_SHORT.maxlevel, _SHORT.maxlist, _SHORT.maxdict = 3, 8, 4
_SHORT.maxstring = _SHORT.maxother = 100

# Control characters but newline and tab, and characters that reorder the text after them: a
# terminal obeys them, or the eye does.
_HARMFUL = [*range(0x20), *range(0x7F, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)]
_VISIBLE = {
    c: f"\\x{c:02x}" if c < 0x100 else f"\\u{c:04x}" for c in _HARMFUL if c not in (0x09, 0x0A)
}
# Private-use characters around the name of an option.
_NAMED = re.compile("\ue000([^\ue001]*)\ue001")
# Flags whose name is not that of the keyword.
_FLAGS = {"n": "samples"}


def visible(text: str) -> str:
    r"""Write control characters and text-direction overrides as ``\x1b`` or ``\u202e``."""
    return text.translate(_VISIBLE)


def quoted(value: object) -> str:
    """Return a value as a message quotes it: short, even if it is endless or nested without end."""
    return _SHORT.repr(value)


def named(option: str, value: object = None) -> str:
    """Name an option, with a value if one is given, in the text of a MagistralError.

    The error's ``str`` spells it as a keyword (``kv_bits=8``). A command line spells it as a flag
    (``--kv-bits 8``), see ``as_flags``.
    """
    return f"\ue000{option}{'' if value is None else f'={value}'}\ue001"


def as_flags(error: BaseException) -> str:
    """Return an error's message as a command line shows it: options are flags."""

    def flag(found: re.Match[str]) -> str:
        name, _, value = found[1].partition("=")
        dashed = _FLAGS.get(name, name).replace("_", "-")
        if value == "False":
            return f"--no-{dashed}"
        return f"--{dashed}" if value in ("", "True") else f"--{dashed} {value}"

    message = error.template if isinstance(error, MagistralError) else str(error)
    return visible(_NAMED.sub(flag, message))


def in_units(nbytes: float) -> str:
    """Return a size as a message gives it: in GB (10^9 bytes), in MB, or below 1 MB in bytes."""
    if nbytes >= 1e8:
        return f"{nbytes / 1e9:.2f} GB"
    return f"{nbytes / 1e6:.1f} MB" if nbytes >= 1e6 else f"{nbytes:,.0f} bytes"


def counted(count: int, noun: str, plural: str = "") -> str:
    """Return a number of things as a message gives it, such as "1 reply" or "1,024 tokens"."""
    return f"{count:,} {noun if count == 1 else plural or noun + 's'}"


class MagistralError(Exception):
    """Base of errors that the user can mend; command lines print it and exit with 2.

    Control characters of the message, which may quote a file, are made visible.

    Attributes:
        template: the message, with options as ``named`` writes them.
    """

    def __init__(self, message: str = "") -> None:
        self.template = visible(message)
        super().__init__(_NAMED.sub(r"\1", self.template))


class OptionError(MagistralError):
    """Refused option or argument."""


class OverwriteError(OptionError):
    """File that is not written, because what it holds would be lost."""


class ForeignFileError(OverwriteError):
    """File that is no prompt cache, and so is never replaced by one."""


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
