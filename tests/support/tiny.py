"""Build tiny, awkward things: configs whose head size is not D / H, weights, folders."""

import json
from pathlib import Path

import mlx.core as mx

from magistral_mlx.checkpoint.config import ModelConfig
from magistral_mlx.checkpoint.quant_format import QuantFormat
from magistral_mlx.model.transformer import Transformer

DEMO = Path(__file__).parents[2] / "magistral_mlx" / "demo"


def make_config(**changes: object) -> ModelConfig:
    values: dict[str, object] = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_layers": 3,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 32,
        "vocab_size": 320,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e9,
        "max_positions": 4096,
    }
    return ModelConfig(**(values | changes))  # type: ignore[arg-type]


def raw_config(config: ModelConfig) -> dict[str, object]:
    """Return the config.json that a publisher would write."""
    return {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "hidden_act": "silu",
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


def make_weights(
    config: ModelConfig, dtype: mx.Dtype = mx.float32, seed: int = 0
) -> dict[str, mx.array]:
    """Draw weights by their Hugging Face names, scaled so that logits are of order 1."""
    key = mx.random.key(seed)
    weights = {}
    for name, shape in config.shapes.items():
        key, own = mx.random.split(key)
        noise = mx.random.normal(shape, key=own)
        weights[name] = (1 + 0.1 * noise if len(shape) == 1 else noise * shape[-1] ** -0.5).astype(
            dtype
        )
    return weights


def write_checkpoint(
    folder: Path,
    config: ModelConfig,
    weights: dict[str, mx.array],
    quantization: dict[str, object] | None = None,
) -> Path:
    """Write a folder in the published layout, without a tokenizer: two shards and an index."""
    folder.mkdir(parents=True, exist_ok=True)
    raw = raw_config(config) | ({} if quantization is None else {"quantization": quantization})
    (folder / "config.json").write_text(json.dumps(raw))
    names = sorted(weights)
    weight_map: dict[str, str] = {}
    for i, part in enumerate((names[::2], names[1::2]), start=1):
        shard = f"model-{i:05}-of-00002.safetensors"
        mx.save_safetensors(str(folder / shard), {n: weights[n] for n in part}, {"format": "pt"})
        weight_map |= dict.fromkeys(part, shard)
    total = sum(w.nbytes for w in weights.values())
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map})
    )
    return folder


def fill(model: Transformer, config: ModelConfig, weights: dict[str, mx.array]) -> Transformer:
    """Put Hugging Face weights into a model by hand, without the loader."""
    model.embed_tokens.weight = weights["model.embed_tokens.weight"]
    for i, layer in enumerate(model.layers):
        w = {
            n.removeprefix(f"model.layers.{i}."): x
            for n, x in weights.items()
            if n.startswith(f"model.layers.{i}.")
        }
        layer.self_attn.qkv_proj.parts[0].weight = mx.concatenate(
            [w[f"self_attn.{p}_proj.weight"] for p in "qkv"]
        )
        layer.mlp.gate_up_proj.parts[0].weight = mx.concatenate(
            [w["mlp.gate_proj.weight"], w["mlp.up_proj.weight"]]
        )
        layer.self_attn.o_proj.weight = w["self_attn.o_proj.weight"]
        layer.mlp.down_proj.weight = w["mlp.down_proj.weight"]
        layer.input_layernorm.weight = w["input_layernorm.weight"]
        layer.post_attention_layernorm.weight = w["post_attention_layernorm.weight"]
    model.norm.weight = weights["model.norm.weight"]
    if not config.tie_word_embeddings:
        model.lm_head.weight = weights["lm_head.weight"]
    return model


def quantize_weights(
    weights: dict[str, mx.array],
    default: QuantFormat,
    overrides: dict[str, QuantFormat | None] | None = None,
) -> tuple[dict[str, mx.array], dict[str, object]]:
    """Pack every matrix in the default format or its override (None: not packed).

    Returns:
        The tensors and the block of config.json.
    """

    def block(quant: QuantFormat) -> dict[str, object]:
        return {"group_size": quant.group_size, "bits": quant.bits, "mode": quant.mode}

    tensors: dict[str, mx.array] = {}
    for name, weight in weights.items():
        module = name.removesuffix(".weight")
        quant = (overrides or {}).get(module, default)
        if weight.ndim == 1 or quant is None:
            tensors[name] = weight
            continue
        packed = mx.quantize(weight, quant.group_size, quant.bits, quant.mode)
        tensors |= {
            f"{module}.{kind}": a
            for kind, a in zip(("weight", "scales", "biases"), packed, strict=False)
        }
    return tensors, block(default) | {
        m: block(q) if q else False for m, q in (overrides or {}).items()
    }
