"""Make and compare magistral_mlx.json: source, options and file hashes of a checkpoint.

It holds no time, host or path: the same source and options give the same bytes.
"""

import hashlib
from collections.abc import Mapping
from importlib.metadata import version
from itertools import zip_longest
from pathlib import Path
from typing import Any

from magistral_mlx.checkpoint.folder import open_checkpoint
from magistral_mlx.checkpoint.manifest import MANIFEST, Manifest
from magistral_mlx.errors import CheckpointError, named
from magistral_mlx.files import sha256_of

HASHES = ("sha256", "sample_sha256")
# Raised when the same source and options give other files.
FORMAT = 3


def make_manifest(*, source: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the manifest's entries that determine the bytes of the output."""
    versions = {"magistral_mlx": version("magistral-mlx"), "mlx": version("mlx")}
    return {"format": FORMAT, "source": source, "options": options, "versions": versions}


def entry_of(content: bytes) -> dict[str, Any]:
    """Return the size and SHA-256 of a file's content."""
    return {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def difference(
    target: Path, *, source: Mapping[str, Any], options: Mapping[str, Any]
) -> str | None:
    """Say why ``target`` is not the complete result of source and options; None if it is.

    Weights are compared by size and header, smaller files by hash.
    """
    try:
        manifest = Manifest.find(target)
        if manifest is None:
            return f"it has no {MANIFEST}, so it was not finished by this software"
        found = manifest.raw
        wanted = {"format": FORMAT, "source": source, "options": options}
        if (key := first_difference({key: found.get(key) for key in wanted}, wanted)) is not None:
            return f"it was made with another {key}"
        for name, entry in manifest.files.items():
            file = target / name
            if not file.is_file() or file.stat().st_size != entry.size:
                return f"its {name} is missing or has another size"
            if not name.endswith(".safetensors") and sha256_of(file) != entry.sha256:
                return f"its {name} was changed"
        open_checkpoint(target, compares_manifest=False)
    except (CheckpointError, OSError) as error:
        return f"it is damaged ({error})"
    return None


def first_difference(found: Any, wanted: Any, path: str = "") -> str | None:
    """Name the first value that differs, with both values if they are short; None if none does.

    A hash that only one side has is no difference: it depends on where the source was read from.
    """
    if isinstance(found, dict) and isinstance(wanted, dict):
        # Readers understand single values best, and hashes least.
        nested = {
            key
            for each in (found, wanted)
            for key, value in each.items()
            if isinstance(value, dict | list)
        }
        for key in sorted(
            found.keys() | wanted.keys(),
            key=lambda key: (key in nested, key.endswith("sha256"), key),
        ):
            if key in HASHES and (key not in found or key not in wanted):
                continue
            inner = first_difference(
                found.get(key), wanted.get(key), f"{path}.{key}" if path else key
            )
            if inner is not None:
                return inner
        return None
    if isinstance(found, list) and isinstance(wanted, list):
        each = enumerate(zip_longest(found, wanted))
        return next(
            (
                inner
                for i, two in each
                if (inner := first_difference(*two, f"{path}[{i}]")) is not None
            ),
            None,
        )
    if type(found) is type(wanted) and found == wanted:
        return None
    name = path.removeprefix("plan.")
    if name.startswith("options."):
        name = named(name.removeprefix("options.").removesuffix(".origin"))
    return f"{name}: {_short(found)}, now {_short(wanted)}"


def _short(value: Any) -> str:
    if isinstance(value, dict) and "origin" in value:
        value = value["origin"]
    text = "none" if value is None else str(value)
    return text if len(text) <= 40 else f"{text[:12]}..."
