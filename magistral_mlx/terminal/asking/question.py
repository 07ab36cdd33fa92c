"""The question of a command line: from flags, from text files, and from stdin."""

import codecs
import os
import select
import stat
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from magistral_mlx.errors import OptionError, in_units, visible
from magistral_mlx.files import expanded
from magistral_mlx.options import FILE, option
from magistral_mlx.terminal.display import tell

# The longest context takes far less.
MAX_BYTES = 4_000_000
# Seconds without text on stdin after which a person is told what is waited for.
PATIENCE = 3.0
FENCE = "```"


@dataclass(frozen=True, slots=True, kw_only=True)
class SystemPrompt:
    """A system prompt: a text, or a file with one.

    Raises:
        OptionError: both are given.
    """

    system_prompt: str | None = option(
        None, "A system prompt, added to the checkpoint's own.", metavar="S"
    )
    system_prompt_file: str | None = option(
        None, "A text file with the system prompt.", metavar="F", completes=(FILE,)
    )

    def __post_init__(self) -> None:
        if self.system_prompt is not None and self.system_prompt_file is not None:
            raise OptionError(
                "--system-prompt and --system-prompt-file are two system prompts; keep one"
            )

    @property
    def text(self) -> str | None:
        """The system prompt; None without one. Reads the file, if there is one.

        Raises:
            OptionError: the file cannot be read, or is no text.
        """
        if self.system_prompt_file is not None:
            return read_file(self.system_prompt_file)
        return self.system_prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class Question(SystemPrompt):
    """The question and the system prompt of a command line.

    Raises:
        OptionError: two options contradict each other.
    """

    prompt: str | None = option(
        None,
        "The question. Text that is piped in follows it, or is the question without -p or with "
        "-p -.",
        metavar="P",
        aliases=("-p",),
    )
    file: tuple[str, ...] = option(
        (),
        "A text file to put under the question; may be repeated.",
        metavar="F",
        completes=(FILE,),
    )
    system_prompt_only: bool = option(
        False, "Use --system-prompt alone; the model may then stop reasoning."
    )

    def __post_init__(self) -> None:
        SystemPrompt.__post_init__(self)
        if self.system_prompt_only and self.system_prompt is self.system_prompt_file is None:
            raise OptionError(
                "--system-prompt-only needs a --system-prompt to use instead of the default"
            )

    @property
    def system_messages(self) -> list[dict[str, Any]]:
        """The message of the system prompt; none without one."""
        text = self.text
        return [] if text is None else [{"role": "system", "content": text}]

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The messages of a conversation that asks this question. Reads stdin where it has text.

        Raises:
            OptionError: there is no question, or a text cannot be read.
        """
        system = self.system_messages
        parts = [] if self.prompt in (None, "-") else [self.prompt or ""]
        files = [in_fence(name, read_file(name)) for name in self.file]
        if self.prompt == "-" or is_piped():
            parts.append(read_stdin())
        text = "\n\n".join(part for part in (*parts, *files) if part.strip())
        if not text:
            if self.prompt is None and not self.file and not parts:
                raise OptionError(
                    'the question is missing; give it with -p "What is 48 + 76?", as '
                    'magistral run "What is 48 + 76?", or pipe it in'
                )
            raise OptionError("the prompt is empty; give one with --prompt, or pipe it in")
        return [*system, {"role": "user", "content": text}]


def is_piped() -> bool:
    """Return True if stdin is a pipe or a file, so that it may have text; a terminal is neither."""
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (OSError, ValueError):  # closed, or not of the operating system
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode) or stat.S_ISSOCK(mode)


def read_stdin(patience: float = PATIENCE) -> str:
    """Return the text on stdin, without its last newline; "" if there is none.

    Raises:
        OptionError: it is too long or no text.
    """
    if is_piped() and not select.select([sys.stdin], [], [], patience)[0]:
        tell("waiting for text on stdin; if there is none to come, end it with </dev/null")
    return read_text(sys.stdin.buffer, "the text on stdin").removesuffix("\n")


def read_file(name: str) -> str:
    """Return the text of a file, without its last newline.

    Raises:
        OptionError: it cannot be read, is empty, too long or no text.
    """
    try:
        with expanded(Path(name)).open("rb") as file:
            text = read_text(file, visible(name))
    except OSError as error:
        raise OptionError(f"{visible(name)} cannot be read ({error.strerror})") from None
    if not text.strip():
        raise OptionError(f"{visible(name)} is empty; leave it out, or name another file")
    return text.removesuffix("\n")


def read_text(file: BinaryIO, name: str) -> str:
    """Return the UTF-8 text of an open file that messages call ``name``."""
    data = file.read(MAX_BYTES + 1)
    if b"\0" in data:
        raise OptionError(f"{name} is binary; give plain text, such as the output of pdftotext")
    if len(data) > MAX_BYTES:
        raise OptionError(
            f"{name} has over {in_units(MAX_BYTES)}, more than any context holds; give a part of it"
        )
    try:
        return data.removeprefix(codecs.BOM_UTF8).decode()
    except UnicodeDecodeError as error:
        raise OptionError(
            f"{name} is not UTF-8 ({error}); convert it, for example with iconv"
        ) from None


def in_fence(name: str, text: str) -> str:
    """Return a text under its file's name, between fences that it does not contain."""
    fence = FENCE
    while fence in text:
        fence += "`"
    return f"{visible(name)}:\n{fence}\n{text}\n{fence}"
