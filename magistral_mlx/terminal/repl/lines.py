"""One typed or piped text: a command, or a message to the model."""

import re
import shlex
from difflib import get_close_matches
from pathlib import Path

from magistral_mlx.errors import OptionError, quoted
from magistral_mlx.files import as_path, expanded

# A word that may be meant as a command. A path has a second slash, and a comment a sign.
COMMAND = re.compile(r"/[A-Za-z?][A-Za-z-]*!?")
MAX_DIGITS = 18


def command_in(text: str) -> tuple[str, str] | None:
    """Return a command's name and what follows it, or None if the text is a message."""
    word, *rest = text.split(maxsplit=1)
    if text != "/" and not COMMAND.fullmatch(word):
        return None
    return word, rest[0].strip() if rest else ""


def message_in(text: str) -> str:
    """Return a message as the model gets it: two slashes before a word are sent as one."""
    is_escaped = text.startswith("//") and not text[2:3].isspace()
    return text[1:] if is_escaped and len(text) > 2 else text


def unknown_command(name: str, known: list[str]) -> OptionError:
    """Make the error for a command that is not there."""
    near = get_close_matches(name.lower(), known, n=1)
    hint = f"did you mean {near[0]}?" if near else "/help lists the commands."
    return OptionError(f"{name}: no such command; {hint} As a message, write it /{name}")


def path_in(command: str, text: str) -> Path:
    """Return the path after a command, which may be in quotes.

    Raises:
        OptionError: there is none, or it cannot be a path.
    """
    if not text:
        raise OptionError(f"{command} needs a file: {command} talk.cache")
    try:
        words = shlex.split(text)
    except ValueError:  # an apostrophe
        words = []
    # A name with spaces needs no quotes.
    return expanded(as_path(words[0] if len(words) == 1 else text, command))


def whole_number_in(command: str, text: str, or_else: str) -> int:
    """Return the number after a command.

    Raises:
        OptionError: it is none; the message also names ``or_else``, the other word to use.
    """
    if not text.isascii() or not text.isdecimal() or len(text) > MAX_DIGITS:
        raise OptionError(f"{command} {quoted(text)}: use a whole number, or {or_else}")
    return int(text)


def number_in(command: str, text: str) -> float:
    """Return the number after a command; raise OptionError if it is none."""
    try:
        return float(text)
    except ValueError:
        raise OptionError(f"{command} {quoted(text)}: use a number") from None


def on_or_off(command: str, text: str) -> bool:
    """Return True for "on" and False for "off"; raise OptionError for anything else."""
    if text not in ("on", "off"):
        raise OptionError(f"{command} {quoted(text)}: use on or off")
    return text == "on"
