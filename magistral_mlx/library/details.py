"""Everything that the files of a model tell about it, without its weights."""

import dataclasses
from collections import Counter
from collections.abc import Mapping
from typing import Any

from magistral_mlx.checkpoint.folder import open_checkpoint
from magistral_mlx.checkpoint.manifest import Manifest
from magistral_mlx.checkpoint.quant_format import QuantFormat
from magistral_mlx.library.models import LocalModel
from magistral_mlx.tokenizer.tekken import Tokenizer

# By the version of tekken.json and the form of the traces.
RELEASES = {("v7", "text"): "2506", ("v11", "text"): "2506", ("v13", "control"): "2507 or 2509"}


def details(model: LocalModel) -> dict[str, Any]:
    """Return all that is known of a model, as JSON-compatible data.

    Raises:
        CheckpointError: it cannot be opened.
        TokenizerError: its tokenizer cannot be used.
    """
    checkpoint = open_checkpoint(model.folder)
    config = checkpoint.config
    tokenizer = Tokenizer.of_model(model.folder, config.vocab_size)
    manifest = Manifest.find(model.folder)
    found = dataclasses.asdict(model) | {"folder": str(model.folder)}
    return found | {
        "config": {
            field.name: getattr(config, field.name)
            for field in dataclasses.fields(config)
            if isinstance(getattr(config, field.name), int | float | bool)
        },
        "release": RELEASES.get((tokenizer.version, tokenizer.reasoning_format)),
        "tokenizer": tokenizer.version,
        "reasoning_format": tokenizer.reasoning_format,
        "weights_bytes": checkpoint.nbytes,
        "matrices": by_kind(checkpoint.formats, config.num_layers),
        "origin": None if manifest is None else manifest.source,
        "options": None if manifest is None else manifest.options,
    }


def by_kind(formats: Mapping[str, QuantFormat | None], layers: int) -> list[str]:
    """Write a line for each kind of matrix: its formats and their number of layers."""
    kinds: dict[str, Counter[str]] = {}
    for path, quant in formats.items():
        kinds.setdefault(path.rpartition(".")[2], Counter())[_named(quant)] += 1
    lines = []
    for kind, counts in kinds.items():
        shares = (f"{name} in {n} of {layers} layers" for name, n in sorted(counts.items()))
        lines.append(f"  {kind:<14}{', '.join(counts if len(counts) == 1 else shares)}")
    return lines


def _named(quant: QuantFormat | None) -> str:
    if quant is None:
        return "16 bit"
    return f"{quant.bits} bit" if quant.mode == "affine" else quant.mode
