"""Read a user's recipe: a JSON file that gives patterns of module paths their bits."""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from magistral_mlx.checkpoint.quant_format import FP_FORMATS, QuantFormat
from magistral_mlx.errors import CheckpointError, OptionError, quoted

# Bits of a matrix that keeps the checkpoint's float type.
UNPACKED_BITS = 16
DEFAULT_GROUP_SIZE = 64
FORMAT_KEYS = ("bits", "group_size", "mode")
MAX_BYTES = 1_000_000


@dataclass(frozen=True, slots=True)
class Rule:
    """Format of the matrices whose module path matches a glob; None: they are not packed."""

    match: str
    quant: QuantFormat | None


@dataclass(frozen=True, slots=True)
class RecipeFile:
    """The content of a recipe file; of the rules that match a matrix, the last one applies.

    Example::

        {"default": {"bits": 4},
         "rules": [{"match": "*.v_proj", "bits": 6}, {"match": "lm_head", "bits": 16}]}

    A format has ``bits`` (16: not packed), ``group_size`` and ``mode``. Missing keys of the default
    become affine and groups of 64, or the mode's own values; missing keys of a rule are the
    default's.
    """

    path: Path
    default: QuantFormat | None
    rules: tuple[Rule, ...]

    @classmethod
    def read(cls, path: Path) -> "RecipeFile":
        """Read a file; raise OptionError if it is not a recipe."""
        raw = _document(path)
        if unknown := sorted(raw.keys() - {"default", "rules"}):
            raise _refusal(
                path, f"the key {quoted(unknown[0])} is unknown", "it has default and rules"
            )
        blocks = raw.get("rules", [])
        if not isinstance(raw.get("default"), dict) or not isinstance(blocks, list):
            raise _refusal(
                path,
                "default is not a table, or rules is not a list",
                'write {"default": {"bits": 4}, "rules": []}',
            )
        default = _format(path, "default", raw["default"], None)
        rules = [
            _rule(path, f"rule {i}", block, default) for i, block in enumerate(blocks, start=1)
        ]
        return cls(path, default, tuple(rules))

    def formats(self, modules: Iterable[str]) -> dict[str, QuantFormat | None]:
        """Return each matrix's format; raise OptionError if a rule matches none."""
        found: dict[str, QuantFormat | None] = dict.fromkeys(modules, self.default)
        for i, rule in enumerate(self.rules, start=1):
            matched = [module for module in found if fnmatchcase(module, rule.match)]
            if not matched:
                raise _refusal(
                    self.path,
                    f"rule {i} ({quoted(rule.match)}) matches no matrix",
                    "paths look like model.layers.0.mlp.down_proj, model.embed_tokens and lm_head",
                )
            found.update(dict.fromkeys(matched, rule.quant))
        return found

    def as_json(self) -> dict[str, Any]:
        """Return the content for the manifest, with missing values filled in."""
        rules = [{"match": rule.match, **format_as_json(rule.quant)} for rule in self.rules]
        return {"default": format_as_json(self.default), "rules": rules}


def format_as_json(quant: QuantFormat | None) -> dict[str, Any]:
    if quant is None:
        return {"bits": UNPACKED_BITS}
    return {"group_size": quant.group_size, "bits": quant.bits, "mode": quant.mode}


def _document(path: Path) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(table := dict(pairs)) < len(pairs):
            raise ValueError("a key occurs twice")
        return table

    try:
        if not path.is_file() or path.stat().st_size > MAX_BYTES:
            raise _refusal(
                path, f"it is no plain file of at most {MAX_BYTES} bytes", "name a JSON file"
            )
        raw = json.loads(path.read_bytes().decode(), object_pairs_hook=unique)
    except OSError as error:
        raise _refusal(path, f"it cannot be read ({error})", "check the file") from None
    except (ValueError, RecursionError) as error:
        raise _refusal(path, f"it is not JSON ({error})", "correct it") from None
    if not isinstance(raw, dict):
        raise _refusal(
            path, f"it holds a JSON {type(raw).__name__}", "write a table with default and rules"
        )
    return raw


def _rule(path: Path, where: str, block: Any, default: QuantFormat | None) -> Rule:
    if not isinstance(block, dict) or not isinstance(match := block.get("match"), str):
        raise _refusal(
            path, f"{where} is {quoted(block)}", 'write {"match": "*.v_proj", "bits": 6}'
        )
    where = f"{where} ({quoted(match)})"
    if not block.keys() - {"match"}:
        raise _refusal(path, f"{where} changes nothing", "give its bits, group_size or mode")
    return Rule(
        match, _format(path, where, {k: v for k, v in block.items() if k != "match"}, default)
    )


def _format(
    path: Path, where: str, block: Mapping[str, Any], base: QuantFormat | None
) -> QuantFormat | None:
    if unknown := sorted(block.keys() - set(FORMAT_KEYS)):
        raise _refusal(
            path,
            f"{where}: the key {quoted(unknown[0])} is unknown",
            f"known are {', '.join(FORMAT_KEYS)}",
        )
    for key in ("bits", "group_size"):
        if key in block and type(block[key]) is not int:
            raise _refusal(path, f"{where}: {key} is {quoted(block[key])}", "use a whole number")
    if block.get("bits") == UNPACKED_BITS:
        if len(block) > 1:
            raise _refusal(
                path, f"{where}: with {UNPACKED_BITS} bits nothing is packed", "leave the rest out"
            )
        return None
    mode = block.get("mode", "affine" if base is None else base.mode)
    bits, group_size = (
        FP_FORMATS.get(mode, (None, DEFAULT_GROUP_SIZE)) if isinstance(mode, str) else (None, 0)
    )
    if base is not None and base.mode == mode:
        bits, group_size = base.bits, base.group_size
    bits, group_size = block.get("bits", bits), block.get("group_size", group_size)
    if bits is None:
        raise _refusal(path, f"{where} has no bits", "add them")
    try:
        return QuantFormat(bits, group_size, mode)
    except CheckpointError as error:
        raise _refusal(path, f"{where}: {error}", None) from None


def _refusal(path: str | os.PathLike[str], what: str, remedy: str | None) -> OptionError:
    return OptionError(f"recipe {path}: {what}" + ("" if remedy is None else f"; {remedy}"))
