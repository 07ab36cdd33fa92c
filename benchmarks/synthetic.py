"""A few layers of Magistral Small at its true width, with random 4-bit weights: speed needs no meaning."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from magistral_mlx.checkpoint.config import ModelConfig
from magistral_mlx.checkpoint.quant_format import QuantFormat, Shape

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
    """Write a checkpoint of ``config`` as MLX stores them, one shard a layer, so that little is in memory at once."""
    rng = np.random.default_rng(seed)
    shards: dict[str, list[str]] = {}
    for name in config.shapes:
        layer = name.split(".")[2] if name.startswith("model.layers.") else name
        shards.setdefault(layer, []).append(name)
    weight_map: dict[str, str] = {}
    total = 0
    for number, names in enumerate(shards.values(), start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        arrays: dict[str, mx.array] = {}
        for name in names:
            arrays |= _random(name, config.shapes[name], rng)
        mx.save_safetensors(str(folder / file), arrays, {"format": "mlx"})
        weight_map |= dict.fromkeys(arrays, file)
        total += sum(array.nbytes for array in arrays.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    quantization = {"group_size": FORMAT.group_size, "bits": FORMAT.bits, "mode": FORMAT.mode}
    blocks = {"quantization": quantization, "quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(raw_config(config) | blocks))


def raw_config(config: ModelConfig) -> dict[str, Any]:
    """The config.json of an unquantized checkpoint of ``config``."""
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


def _random(name: str, shape: Shape, rng: np.random.Generator) -> dict[str, mx.array]:
    """A norm's weight, or a packed matrix whose entries are spread so that activations keep their size."""
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
