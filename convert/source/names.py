"""Mistral's own tensor names and row order, and Hugging Face's."""

import mlx.core as mx

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
VISION = (
    "vision_encoder.",
    "vision_language_adapter.",
    "patch_merger.",
    "pre_mm_projector_norm.",
)  # 2509's
ROTATED = ("self_attn.q_proj", "self_attn.k_proj")


def native_name(name: str) -> str:
    """``model.layers.3.self_attn.q_proj.weight`` -> ``layers.3.attention.wq.weight``."""
    module = name.removesuffix(".weight")
    if module in OUTER:
        return f"{OUTER[module]}.weight"
    layer, _, inner = module.removeprefix("model.layers.").partition(".")
    return f"layers.{layer}.{IN_LAYER[inner]}.weight"


def is_rotated(name: str) -> bool:
    """Whether RoPE rotates what this tensor gives: then the two layouts order its rows differently."""
    return name.removesuffix(".weight").endswith(ROTATED)


def halves_from_pairs(rows: mx.array, head_dim: int) -> mx.array:
    """Reorder the rows of whole heads from Mistral's RoPE pairs (0, 1), (2, 3), ... to Hugging Face's halves.

    Args:
        rows: ``[n * head_dim, columns]``. Rows move as a whole, so this commutes with quantization.
    """
    heads = rows.reshape(-1, head_dim // 2, 2, rows.shape[-1])  # [n, d/2, 2, columns]
    return heads.swapaxes(1, 2).reshape(rows.shape)
