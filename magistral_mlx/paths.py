"""Paths: those given to us, and where what we make ourselves is kept between runs."""

import os
import sys
from pathlib import Path

from magistral_mlx.errors import OptionError, shown


def as_path(value: str | Path, name: str) -> Path:
    """A path, as given. Raises OptionError where ``name`` is none."""
    if not isinstance(value, str | Path) or not str(value) or "\0" in str(value):
        raise OptionError(f"{name} is {shown(value)}; use the path of a file or folder")
    return Path(value)


def cache_dir() -> Path:
    """The folder for converted demos and other things that can be made again; it need not exist yet.

    ``MAGISTRAL_MLX_CACHE`` where it is set, else ``~/Library/Caches/magistral-mlx`` on macOS, else
    ``magistral-mlx`` under ``XDG_CACHE_HOME`` or ``~/.cache``.
    Source: https://specifications.freedesktop.org/basedir-spec (a relative XDG path is to be ignored).
    """
    if own := os.environ.get("MAGISTRAL_MLX_CACHE"):
        return Path(own).expanduser().absolute()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "magistral-mlx"
    xdg = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (xdg if xdg.is_absolute() else Path.home() / ".cache") / "magistral-mlx"
