"""The list of models, and one model's details, as a terminal shows them."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from magistral_mlx.errors import in_units, visible
from magistral_mlx.library.models import LocalModel

SHA256_DIGITS = 64


def model_table(models: Sequence[LocalModel]) -> str:
    """Return a table of models; a star marks the default, "-" what cannot be known."""
    rows = [("", "model", "bits", "on disk", "context here"), *map(_row, models)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        f"{mark:<{widths[0]}} {name:<{widths[1]}}  {bits:>{widths[2]}}  {size:>{widths[3]}}  "
        f"{context}".rstrip()
        for mark, name, bits, size, context in rows
    )


def in_words(found: dict[str, Any]) -> str:
    """Write what is known of a model, a line for each value."""
    context = "-" if found["context"] is None else f"{found['context']:,} tokens"
    lines = [
        ("folder", found["folder"]),
        ("release", found["release"] or "unknown"),
        ("tokenizer", f"tekken {found['tokenizer']}, traces as {found['reasoning_format']}"),
        ("on disk", in_units(found["disk_bytes"])),
        ("weights", f"{in_units(found['weights_bytes'])}, {found['bits']:.3g} bit"),
        ("context here", found["problem"] or context),
        ("default", "yes" if found["is_default"] else "no"),
        *((name.replace("_", " "), _number(value)) for name, value in found["config"].items()),
    ]
    lines += [
        ("matrices" if i == 0 else "", line.strip()) for i, line in enumerate(found["matrices"])
    ]
    for key in ("origin", "options"):
        for i, (name, value) in enumerate(_flat(found[key] or {})):
            lines.append((key if i == 0 else "", f"{name}: {value}"))
    if found["origin"] is None:
        lines.append(("origin", "not converted here: it has no magistral_mlx.json"))
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:<{width}}  {visible(text)}" for name, text in lines)


def _flat(values: Mapping[str, Any], parent: str = "") -> Iterator[tuple[str, str]]:
    """Yield the values of a manifest as texts, those of a nested object under ``parent.name``."""
    for name, value in values.items():
        if name == "files":
            yield f"{parent}{name}", str(len(value))
        elif isinstance(value, dict):
            yield from _flat(value, f"{parent}{name}.")
        elif isinstance(value, str):
            yield f"{parent}{name}", f"{value[:12]}..." if len(value) == SHA256_DIGITS else value
        elif value is None or isinstance(value, bool):
            yield f"{parent}{name}", {None: "none", True: "yes", False: "no"}[value]
        else:
            yield f"{parent}{name}", json.dumps(value)


def _number(value: float) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,.0f}" if value == int(value) else f"{value:,}"


def _row(model: LocalModel) -> tuple[str, str, str, str, str]:
    bits = "-" if model.bits is None else f"{model.bits:.3g}"
    context = "-" if model.context is None else f"{model.context:,}"
    mark = "*" if model.is_default else ""
    return mark, visible(model.name), bits, in_units(model.disk_bytes), context
