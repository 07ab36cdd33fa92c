"""The language model of a multimodal checkpoint such as 2509: its config and tensor names."""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from magistral_mlx.checkpoint.safetensors import Shard
from magistral_mlx.errors import CheckpointError, quoted

log = logging.getLogger(__name__)

MODEL_TYPE = "mistral3"
# In files of transformers 5, and of transformers 4 and MLX.
PREFIXES = {"model.language_model.": "model.", "language_model.": ""}
VISION = (
    "vision_tower.",
    "multi_modal_projector.",
    "model.vision_tower.",
    "model.multi_modal_projector.",
)
EITHER_LEVEL = ("quantization", "quantization_config", "torch_dtype", "dtype")
# Without tie_word_embeddings: transformers 5 writes its default, true, beside an untied
# text_config.
TEXT_ONLY = (
    *("hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads"),
    *("head_dim", "vocab_size", "rms_norm_eps", "rope_theta", "rope_parameters", "rope_scaling"),
    *("max_position_embeddings", "sliding_window", "hidden_act", "attention_bias", "mlp_bias"),
)


def language_config(raw: Mapping[str, Any], source: Path) -> dict[str, Any]:
    """Return the config of the language model, in the form of a text model's config.json.

    The config of a text model is returned as it is. ``source`` is its path, for messages.

    Raises:
        CheckpointError: there is no text_config, or the outer config contradicts it.
    """
    if raw.get("model_type") != MODEL_TYPE:
        return dict(raw)
    text = raw.get("text_config")
    if not isinstance(text, dict):
        raise _refusal(source, f"model_type is {MODEL_TYPE!r}, but text_config is {quoted(text)}")
    # transformers' default for a text model.
    found: dict[str, Any] = {"model_type": "mistral", **text}
    for key in (*EITHER_LEVEL, *TEXT_ONLY):
        outer, inner = raw.get(key), text.get(key)
        if outer is None:
            continue
        if inner is None and key in EITHER_LEVEL:
            found[key] = outer
        elif outer != inner:
            raise _refusal(source, f"{key} is {quoted(outer)}, and {quoted(inner)} in text_config")
    for key in ("quantization", "quantization_config"):
        if isinstance(found.get(key), dict):
            found[key] = _by_text_names(found[key], f"{source}: {key}")
    return found


def text_name(stored: str) -> str | None:
    """Return the name of a tensor or module in a text model, or None for the vision part."""
    if stored.startswith(VISION):
        return None
    for prefix, plain in PREFIXES.items():
        if stored.startswith(prefix):
            return plain + stored.removeprefix(prefix)
    return stored


def text_shards(shards: Iterable[Shard], folder: Path) -> tuple[Shard, ...]:
    """Return the files that hold the language model, with only its tensors.

    The tensors have the names of a text model.

    Raises:
        CheckpointError: a tensor has two names.
    """
    found: list[Shard] = []
    names: set[str] = set()
    left_out = 0
    for shard in shards:
        header = _by_text_names(shard.header, f"{shard.path}: tensor")
        if twice := sorted(names & header.keys()):
            raise _refusal(shard.path, f"tensor {quoted(twice[0])} is there under two names")
        names |= header.keys()
        left_out += len(shard.header) - len(header)
        found += [replace(shard, header=header)] if header else []
    if left_out:
        log.warning(
            "%s: the vision part, %d tensors, is left out; the model takes text only",
            folder,
            left_out,
        )
    return tuple(found)


def _by_text_names(table: Mapping[str, Any], what: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for stored, value in table.items():
        name = text_name(stored)
        if name in found:
            raise CheckpointError(
                f"{what} {quoted(name)} is there under two names; fetch the checkpoint again"
            )
        if name is not None:
            found[name] = value
    return found


def _refusal(source: Path, what: str) -> CheckpointError:
    return CheckpointError(
        f"{source}: {what}; fetch the checkpoint again, or name a checkpoint of Magistral"
    )
