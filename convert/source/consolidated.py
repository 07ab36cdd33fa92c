"""Read Mistral's own layout: params.json and consolidated.safetensors, names and rows."""

import logging
import os
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from magistral_mlx.checkpoint.config import ModelConfig
from magistral_mlx.checkpoint.documents import parse_json, read_document
from magistral_mlx.checkpoint.folder import Shard
from magistral_mlx.checkpoint.multimodal import language_config
from magistral_mlx.checkpoint.quant_format import Shape
from magistral_mlx.checkpoint.safetensors_header import FLOATS, FP8, Entry
from magistral_mlx.errors import CheckpointError, quoted

log = logging.getLogger(__name__)

CONSOLIDATED, PARAMS = "consolidated.safetensors", "params.json"
# config.json's names -> params.json's.
NAMES = {
    "hidden_size": "dim",
    "num_hidden_layers": "n_layers",
    "head_dim": "head_dim",
    "intermediate_size": "hidden_dim",
    "num_attention_heads": "n_heads",
    "num_key_value_heads": "n_kv_heads",
    "rope_theta": "rope_theta",
    "rms_norm_eps": "norm_eps",
    "vocab_size": "vocab_size",
    "sliding_window": "sliding_window",
    "attention_bias": "use_biases",
    "tie_word_embeddings": "tied_embeddings",
}
# Keys that params.json may lack: tensor shapes imply them, or the model lacks the feature.
OPTIONAL = {"head_dim", "sliding_window", "use_biases", "tied_embeddings"}
VISION_ENCODER = "vision_encoder"
OTHER_MODELS = ("moe", "multimodal", "lora", "rope_scaling", "yarn")
# Hugging Face's module names -> Mistral's.
OUTER = {"model.embed_tokens": "tok_embeddings", "model.norm": "norm", "lm_head": "output"}
IN_LAYER = {
    "input_layernorm": "attention_norm",
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
}
# Prefixes of the tensors of Magistral Small 2509's image encoder.
VISION_PREFIXES = (
    "vision_encoder.",
    "vision_language_adapter.",
    "patch_merger.",
    "pre_mm_projector_norm.",
)
# RoPE rotates the outputs of these; the two layouts order their rows differently.
ROTATED = ("self_attn.q_proj", "self_attn.k_proj")


def open_consolidated(
    folder: Path, shard: Shard | None = None
) -> tuple[ModelConfig, dict[str, Any], tuple[Shard, ...], dict[str, Entry]]:
    """Check both files, and config.json if there is one; leave out an image encoder's tensors.

    Args:
        folder: of the checkpoint.
        shard: the weights, if their header is known already; the file may then be missing.

    Returns:
        The config; config.json parsed, or an empty dict; the weights with the tensors of the
        language model; the entries of these, by Mistral's names.

    Raises:
        CheckpointError: a file is missing, damaged, of another model or contradicts another.
    """
    for name in (CONSOLIDATED, PARAMS):
        if not (folder / name).is_file() and (shard is None or name != CONSOLIDATED):
            raise CheckpointError(
                f"{folder} has no {name}, which Mistral's own layout needs; fetch it as well"
            )
    if shard is None:
        shard = Shard.open(folder / CONSOLIDATED)
    params = parse_json(read_document(folder / PARAMS), folder / PARAMS)
    config_path = folder / "config.json"
    # A broken link counts as a config, so that reading it fails with its name.
    has_config = os.path.lexists(config_path)
    raw: dict[str, Any] = {}
    if has_config:
        raw = language_config(parse_json(read_document(config_path), config_path), config_path)
    if params.get(VISION_ENCODER):
        shard = _without_vision(shard)
    # A config is checked against these, by their Hugging Face names.
    shapes = {
        name: shard.header[native_name(name)].shape
        for name in ("model.layers.0.self_attn.q_proj.weight", "lm_head.weight")
        if native_name(name) in shard.header
    }
    config = _config(params, folder / PARAMS, shapes, raw)
    if has_config:
        _compare(config, ModelConfig.from_dict(raw, config_path, shapes), folder)
    _check_tensors(shard, config)
    return config, raw, (shard,), dict(shard.header)


def _without_vision(shard: Shard) -> Shard:
    header = {
        name: entry for name, entry in shard.header.items() if not name.startswith(VISION_PREFIXES)
    }
    if left_out := len(shard.header) - len(header):
        log.warning(
            "%s: the vision part, %d tensors, is left out; the model takes text only",
            shard.path,
            left_out,
        )
    return replace(shard, header=header)


def _config(
    params: Mapping[str, Any], path: Path, shapes: Mapping[str, Shape], published: Mapping[str, Any]
) -> ModelConfig:
    if (quantization := params.get("quantization")) is not None:
        raise CheckpointError(
            f"{path}: quantization is {quoted(quantization)}. Such weights are {FP8}; start from "
            "the bf16 checkpoint"
        )
    if other := [key for key in OTHER_MODELS if params.get(key)]:
        raise CheckpointError(
            f"{path} has {', '.join(other)}; name a checkpoint of Magistral's plain text model"
        )
    for native in NAMES.values():
        if native not in OPTIONAL and params.get(native) is None:
            raise CheckpointError(f"{path}: {native} is missing; download params.json again")
    raw: dict[str, Any] = {ours: params.get(native) for ours, native in NAMES.items()}
    # max_seq_len is the length that Mistral serves; config.json has the length of training.
    key = "max_position_embeddings"
    limits = (params.get(key), published.get(key), params.get("max_seq_len"))
    raw[key] = next((limit for limit in limits if limit is not None), None)
    if raw[key] is None:
        raise CheckpointError(
            f"{path}: max_position_embeddings and max_seq_len are missing; put config.json, which "
            "has the first, beside it"
        )
    return ModelConfig.from_dict(raw | {"model_type": "mistral"}, path, shapes)


def _compare(params: ModelConfig, published: ModelConfig, folder: Path) -> None:
    for field in fields(ModelConfig):
        ours, theirs = getattr(params, field.name), getattr(published, field.name)
        if ours != theirs:
            raise CheckpointError(
                f"{folder}: {field.name} is {ours} by {PARAMS} and {theirs} by config.json; "
                "they are not of the same model: download both again"
            )


def _check_tensors(shard: Shard, config: ModelConfig) -> None:
    # Before a table of that many layers is made.
    if config.num_layers > len(shard.header):
        raise CheckpointError(
            f"{shard.path}: {len(shard.header)} tensors, but {PARAMS} has {config.num_layers} "
            "layers; they are not of the same model: download both again"
        )
    expected = {native_name(name): shape for name, shape in config.shapes.items()}
    if missing := sorted(set(expected) - set(shard.header)):
        raise CheckpointError(
            f"{shard.path}: {len(missing)} tensors are missing, first {quoted(missing[0])}; the "
            "file is incomplete or of another model, fetch it again"
        )
    if extra := sorted(set(shard.header) - set(expected)):
        raise CheckpointError(
            f"{shard.path}: {len(extra)} tensors do not belong to this model, first "
            f"{quoted(extra[0])}; the weights are of another model than {PARAMS}: download both "
            "again"
        )
    for name, shape in expected.items():
        entry = shard.header[name]
        if entry.shape != shape or entry.dtype not in FLOATS:
            raise CheckpointError(
                f"{shard.path}: tensor {name!r} is {entry.dtype} {list(entry.shape)}, {PARAMS} "
                f"implies {' or '.join(sorted(FLOATS))} {list(shape)}; one is damaged or of "
                "another model, fetch both again"
            )


def native_name(name: str) -> str:
    """Return Mistral's name of a tensor.

    ``model.layers.3.self_attn.q_proj.weight`` -> ``layers.3.attention.wq.weight``.
    """
    module = name.removesuffix(".weight")
    if module in OUTER:
        return f"{OUTER[module]}.weight"
    layer, _, inner = module.removeprefix("model.layers.").partition(".")
    return f"layers.{layer}.{IN_LAYER[inner]}.weight"


def is_rotated(name: str) -> bool:
    """Tell whether RoPE rotates a tensor's outputs: the layouts order its rows differently."""
    return name.removesuffix(".weight").endswith(ROTATED)


def halves_from_pairs(rows: mx.array, head_dim: int) -> mx.array:
    """Reorder rows ``[n * d, columns]`` of whole heads from Mistral's order to Hugging Face's.

    Mistral rotates neighbours (0, 1), (2, 3), ...; Hugging Face rotates i with i + d / 2. Rows
    move as a whole, so this commutes with quantization.
    """
    heads = rows.reshape(-1, head_dim // 2, 2, rows.shape[-1])  # [n, d/2, 2, columns]
    return heads.swapaxes(1, 2).reshape(rows.shape)
