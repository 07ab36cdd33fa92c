"""A forward pass in float64 NumPy, written from the papers and not from the tested code.

Sources: RMSNorm https://arxiv.org/abs/1910.07467, RoPE https://arxiv.org/abs/2104.09864,
grouped-query attention https://arxiv.org/abs/2305.13245, SwiGLU https://arxiv.org/abs/2002.05202.
"""

import numpy as np
from numpy.typing import NDArray

from magistral_mlx.checkpoint.config import ModelConfig

Array = NDArray[np.float64]


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + eps) * weight


def rotate(x: Array, theta: float) -> Array:
    """Rotate x ``[heads, positions, d]``: dimension j turns together with j + d/2."""
    d = x.shape[-1]
    angles = np.arange(x.shape[1])[:, None] * theta ** (-np.arange(0, d, 2) / d)  # [positions, d/2]
    complex_form = (x[..., : d // 2] + 1j * x[..., d // 2 :]) * np.exp(1j * angles)
    return np.concatenate([complex_form.real, complex_form.imag], axis=-1)


def attention(q: Array, k: Array, v: Array) -> Array:
    """Attend from q ``[H, S, d]`` to k and v ``[K, S, d]``, one query and one head at a time."""
    H, S, d = q.shape
    out = np.zeros((S, H, d))
    for head in range(H):
        shared = head * k.shape[0] // H
        for i in range(S):
            scores = k[shared, : i + 1] @ q[head, i] / np.sqrt(d)
            weights = np.exp(scores - scores.max())
            out[i, head] = weights @ v[shared, : i + 1] / weights.sum()
    return out.reshape(S, H * d)


def forward(
    weights: dict[str, Array],
    config: ModelConfig,
    ids: list[int],
    inputs: dict[str, Array] | None = None,
) -> Array:
    """Return the logits ``[S, V]`` of one sequence.

    Args:
        weights: by their Hugging Face names.
        config: of the model.
        ids: ``[S]``.
        inputs: takes the input of each linear, ``[S, columns]``, by module path.
    """
    seen = {} if inputs is None else inputs

    def w(name: str) -> Array:
        return np.asarray(weights[f"{name}.weight"], dtype=np.float64)

    def linear(name: str, x: Array) -> Array:
        seen[name] = x
        return x @ w(name).T

    def heads(x: Array, n: int) -> Array:
        return x.reshape(len(ids), n, config.head_dim).transpose(1, 0, 2)

    x = w("model.embed_tokens")[ids]
    for i in range(config.num_layers):
        layer = f"model.layers.{i}"
        h = rms_norm(x, w(f"{layer}.input_layernorm"), config.rms_norm_eps)
        q = rotate(
            heads(linear(f"{layer}.self_attn.q_proj", h), config.num_heads), config.rope_theta
        )
        k = rotate(
            heads(linear(f"{layer}.self_attn.k_proj", h), config.num_kv_heads), config.rope_theta
        )
        v = heads(linear(f"{layer}.self_attn.v_proj", h), config.num_kv_heads)
        x = x + linear(f"{layer}.self_attn.o_proj", attention(q, k, v))
        h = rms_norm(x, w(f"{layer}.post_attention_layernorm"), config.rms_norm_eps)
        gate, up = linear(f"{layer}.mlp.gate_proj", h), linear(f"{layer}.mlp.up_proj", h)
        x = x + linear(f"{layer}.mlp.down_proj", gate / (1 + np.exp(-gate)) * up)
    x = rms_norm(x, w("model.norm"), config.rms_norm_eps)
    return linear("model.embed_tokens" if config.tie_word_embeddings else "lm_head", x)
