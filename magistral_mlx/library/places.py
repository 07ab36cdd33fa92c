"""Folders for what cannot be made again: the user's settings, and what is remembered."""

import os
import sys
from pathlib import Path

from magistral_mlx.files import as_path, expanded

NAME = "magistral-mlx"


def state_dir() -> Path:
    """Return the folder for what is remembered: the typed lines of chats, the known models.

    ``MAGISTRAL_MLX_STATE`` if it is set, else ``~/Library/Application Support/magistral-mlx`` on
    macOS, else ``magistral-mlx`` under ``XDG_STATE_HOME`` or ``~/.local/state``. The folder may not
    exist yet.
    Source: https://specifications.freedesktop.org/basedir-spec (ignore a relative XDG path).
    """
    if own := os.environ.get("MAGISTRAL_MLX_STATE"):
        return expanded(as_path(own, "MAGISTRAL_MLX_STATE")).absolute()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Application Support" / NAME
    return _xdg("XDG_STATE_HOME", ".local/state") / NAME


def settings_path() -> Path:
    """Return the path of the user's settings, on every platform.

    ``MAGISTRAL_CONFIG`` if it is set, else ``magistral-mlx/config.toml`` under ``XDG_CONFIG_HOME``
    or ``~/.config``. The file may not exist yet.
    """
    if own := os.environ.get("MAGISTRAL_CONFIG"):
        return expanded(as_path(own, "MAGISTRAL_CONFIG")).absolute()
    return _xdg("XDG_CONFIG_HOME", ".config") / NAME / "config.toml"


def _xdg(variable: str, under_home: str) -> Path:
    xdg = Path(os.environ.get(variable, ""))
    return xdg if xdg.is_absolute() else Path.home() / under_home
