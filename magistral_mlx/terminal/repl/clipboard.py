"""Copy text: with a program of the system, or through the terminal (OSC 52)."""

import base64
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence

from magistral_mlx.errors import OptionError, in_units
from magistral_mlx.terminal.window import can_draw

# A program, and the variable of the environment without which it has nowhere to copy to.
PROGRAMS: Sequence[tuple[Sequence[str], str]] = (
    (("pbcopy",), ""),
    (("wl-copy",), "WAYLAND_DISPLAY"),
    (("xclip", "-selection", "clipboard"), "DISPLAY"),
    (("xsel", "--clipboard", "--input"), "DISPLAY"),
)
MAX_SECONDS = 5.0
# Terminals ignore longer sequences. Source: xterm's limit, which others took over.
MAX_TERMINAL_BYTES = 74_994


def copy_text(text: str) -> str:
    """Copy text to the clipboard and return in words how that was done.

    Over ssh the terminal is asked first, because the system's own clipboard is elsewhere.

    Raises:
        OptionError: there is no clipboard, or it does not take the text.
    """
    is_remote = bool(os.environ.get("SSH_CONNECTION") or os.environ.get("SSH_TTY"))
    terminal = can_draw(sys.stderr)
    program = _program()
    if program is not None and not (is_remote and terminal):
        _copy_with(program, text)
        return "copied"
    if not terminal:
        raise OptionError(
            "/copy: there is no clipboard; install xclip or wl-clipboard, or take the answer from "
            "stdout"
        )
    _copy_through_terminal(text)
    return "sent to the terminal, which copies it if it supports that (OSC 52)"


def _program() -> Sequence[str] | None:
    for command, variable in PROGRAMS:
        if (not variable or os.environ.get(variable)) and shutil.which(command[0]):
            return command
    return None


def _copy_with(command: Sequence[str], text: str) -> None:
    try:
        subprocess.run(
            command,
            input=text.encode(errors="replace"),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=MAX_SECONDS,
            check=True,
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise OptionError(
            f"/copy: {command[0]} failed ({error}); take the answer from stdout"
        ) from None


def _copy_through_terminal(text: str) -> None:
    encoded = base64.b64encode(text.encode(errors="replace"))
    if len(encoded) > MAX_TERMINAL_BYTES:
        raise OptionError(
            f"/copy: the answer takes {in_units(len(encoded))}, and a terminal copies "
            f"{in_units(MAX_TERMINAL_BYTES)} at most; take it from stdout"
        )
    sys.stderr.write(f"\x1b]52;c;{encoded.decode()}\x07")
    sys.stderr.flush()
