"""A flat TOML file that a user and a program both edit: comments and other lines stay."""

import json
import os
import tomllib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from magistral_mlx.atomic_files import replacing
from magistral_mlx.checkpoint.documents import open_plain
from magistral_mlx.errors import OptionError
from magistral_mlx.files import write_all

MAX_BYTES = 100_000


def read_table(path: Path) -> dict[str, Any]:
    """Return the values of the file, or of none.

    Raises:
        OptionError: it cannot be read, or is not TOML.
    """
    text = _read_text(path)
    try:
        return tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise OptionError(f"{path} is not TOML ({error}); mend or delete the file") from None


def remove_keys(path: Path, names: Collection[str]) -> tuple[list[str], dict[str, Any]]:
    """Return the lines and the values of the file without some keys; the file stays as it is."""
    table = read_table(path)
    lines = [
        line
        for line in _read_text(path).splitlines()
        if not any(name in names for name in _keys_of(line))
    ]
    return lines, {name: value for name, value in table.items() if name not in names}


def write_lines(path: Path, lines: list[str], values: Mapping[str, Any]) -> None:
    """Replace the file by lines that must mean ``values``.

    Raises:
        OptionError: they mean something else, or the file cannot be written.
    """
    text = "".join(f"{line}\n" for line in lines)
    wanted = {name: list(v) if isinstance(v, tuple) else v for name, v in values.items()}
    try:
        is_right = tomllib.loads(text) == wanted
    except tomllib.TOMLDecodeError:
        is_right = False
    if not is_right:
        raise OptionError(
            f"{path} has values over several lines or in tables, which are not edited here; "
            "edit the file by hand"
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as descriptor:
            write_all(descriptor, memoryview(text.encode()))
    except OSError as error:
        raise OptionError(
            f"{path} cannot be written ({error.strerror or error}); let MAGISTRAL_CONFIG name a "
            "file that you can write"
        ) from None


def in_toml(value: Any) -> str:
    """Return a text, a number, a truth value or a list of them as TOML writes it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(in_toml, value))}]"
    if isinstance(value, str):
        # TOML has JSON's escapes, but for the delete character, which it wants escaped.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return repr(value)


def _read_text(path: Path) -> str:
    if str(path) == os.devnull:  # named to have no settings
        return ""
    try:
        with open_plain(path) as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise OptionError(f"{path} is far too large for settings; mend or delete the file")
        return content.decode()
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise OptionError(
            f"{path} cannot be read ({error.strerror or error}); mend the file, or let "
            "MAGISTRAL_CONFIG name another"
        ) from None
    except UnicodeDecodeError as error:
        raise OptionError(f"{path} is not UTF-8 ({error}); mend or delete the file") from None


def _keys_of(line: str) -> set[str]:
    try:
        return set(tomllib.loads(line))
    except tomllib.TOMLDecodeError:
        return set()
