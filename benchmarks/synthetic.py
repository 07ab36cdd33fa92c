"""Random weights in the shapes of Magistral Small, to time without a model."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from magistral_mlx.checkpoint.config import ModelConfig
from magistral_mlx.checkpoint.quant_format import QuantFormat, Shape
from magistral_mlx.tokenizer.release import CARD_SYSTEM_PROMPT, SYSTEM_PROMPT_FILE

SCALE = 0.02  # of a source matrix's entries
FORMAT = QuantFormat(bits=4, group_size=64)
TRUE_WIDTH = ModelConfig(
    hidden_size=5120,
    intermediate_size=32768,
    num_layers=40,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    vocab_size=131072,
    rms_norm_eps=1e-5,
    rope_theta=1e9,
    max_positions=40960,
)
NARROW = replace(
    TRUE_WIDTH, hidden_size=320, intermediate_size=512, num_heads=4, num_kv_heads=2, vocab_size=2048
)


def write_slice(folder: Path, config: ModelConfig, seed: int = 0) -> None:
    """Write a 4-bit checkpoint of ``config`` in MLX layout, one shard a layer."""
    rng = np.random.default_rng(seed)
    _write(folder, config, lambda name, shape: _packed(name, shape, rng))
    quantization = {"group_size": FORMAT.group_size, "bits": FORMAT.bits, "mode": FORMAT.mode}
    blocks = {"quantization": quantization, "quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(raw_config(config) | blocks))


def write_source(folder: Path, config: ModelConfig, seed: int = 0) -> None:
    """Write a bf16 checkpoint of ``config`` as published, with 2506's tokenizer and prompt."""
    from tests.support.tekken import write_tekken  # it imports mistral_common

    keys = iter(mx.random.split(mx.random.key(seed), len(config.shapes)))

    def random(name: str, shape: Shape) -> dict[str, mx.array]:
        mean, scale = (1, 0.1) if len(shape) == 1 else (0, SCALE)
        values = mx.random.normal(shape, mx.bfloat16, loc=mean, scale=scale, key=next(keys))
        return {name: values}

    folder.mkdir()
    _write(folder, config, random)
    (folder / "config.json").write_text(json.dumps(raw_config(config)))
    write_tekken(folder, config.vocab_size)
    (folder / SYSTEM_PROMPT_FILE).write_text(CARD_SYSTEM_PROMPT)


def _write(
    folder: Path, config: ModelConfig, make: Callable[[str, Shape], dict[str, mx.array]]
) -> None:
    """Write shards and their index."""
    shapes = config.shapes
    shards: dict[str, list[str]] = {}
    for name in shapes:
        layer = name.split(".")[2] if name.startswith("model.layers.") else name
        shards.setdefault(layer, []).append(name)
    weight_map: dict[str, str] = {}
    total = 0
    for number, names in enumerate(shards.values(), start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        arrays: dict[str, mx.array] = {}
        for name in names:
            arrays |= make(name, shapes[name])
        mx.save_safetensors(str(folder / file), arrays, {"format": "mlx"})
        weight_map |= dict.fromkeys(arrays, file)
        total += sum(array.nbytes for array in arrays.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def raw_config(config: ModelConfig) -> dict[str, Any]:
    """Return the config.json of an unquantized checkpoint of ``config``."""
    return {
        "model_type": "mistral",
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "max_position_embeddings": config.max_positions,
        "tie_word_embeddings": config.tie_word_embeddings,
        "torch_dtype": "bfloat16",
    }


def _packed(name: str, shape: Shape, rng: np.random.Generator) -> dict[str, mx.array]:
    """Return a norm's weight, or a packed matrix that keeps the size of activations."""
    if len(shape) == 1:
        return {name: mx.ones(shape, mx.bfloat16)}
    shapes = FORMAT.packed_shapes(shape)
    levels = np.arange(2**FORMAT.bits)
    scales = mx.full(shapes["scales"], float(1 / (levels.std() * shape[1] ** 0.5)), mx.bfloat16)
    module = name.removesuffix(".weight")
    return {
        name: mx.array(rng.integers(0, 2**32, shapes["weight"], dtype=np.uint32)),
        f"{module}.scales": scales,
        f"{module}.biases": (-float(levels.mean()) * scales).astype(mx.bfloat16),
    }
