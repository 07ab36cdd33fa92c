"""Magistral Small: a decoder-only transformer with grouped-query attention, RoPE and SwiGLU.

Letters: B batch, T new tokens, S all positions, L layers, D hidden, F feed-forward, H query heads,
K key/value heads, d head size, V vocabulary.
"""

from collections.abc import Sequence
from functools import partial
from itertools import accumulate

import mlx.core as mx
from mlx import nn

from magistral_mlx.checkpoint.config import ModelConfig
from magistral_mlx.model.kv_cache import LayerCache, Uncached

# These three are compiled. MLX takes fused operations apart on a CPU, and compiled it runs 3
# primitives instead of 11, and 15 instead of 28, with the same bits. On a GPU the first two are one
# kernel anyway, and the third becomes one.


@partial(mx.compile, shapeless=True)
def normalize(x: mx.array, weight: mx.array, eps: float) -> mx.array:
    return mx.fast.rms_norm(x, weight, eps)


@mx.compile
def rotate_heads(x: mx.array, positions: mx.array, d: int, theta: float) -> mx.array:
    """Rotate each head [B, 1, n * d] by its own of ``positions`` [B * n]: [B, n, 1, d]."""
    rows = mx.fast.rope(
        x.reshape(-1, 1, 1, d), d, traditional=False, base=theta, scale=1.0, offset=positions
    )
    return rows.reshape(len(x), -1, 1, d)


@partial(mx.compile, shapeless=True)
def swiglu(gate: mx.array, up: mx.array) -> mx.array:
    return nn.silu(gate) * up


class RMSNorm(nn.RMSNorm):
    """Root mean square norm. Source: https://arxiv.org/abs/1910.07467."""

    def __call__(self, x: mx.array) -> mx.array:
        return normalize(x, self.weight, self.eps)


class FusedLinear(nn.Module):
    """Projections of one input, in as few matmuls as their formats allow.

    ``parts`` are linears whose rows are projections, one below the other. ``slices`` are the places
    of the projections, in the order of the output: (part, first row, end row).
    """

    def __init__(self, parts: list[nn.Module], slices: list[tuple[int, int, int]]) -> None:
        super().__init__()
        self.parts = parts
        self._slices = slices

    @classmethod
    def of(cls, width: int, rows: list[int]) -> "FusedLinear":
        """Make unquantized projections of an input of ``width``, with ``rows`` each."""
        ends = list(accumulate(rows))
        slices = [(0, end - count, end) for count, end in zip(rows, ends, strict=True)]
        return cls([nn.Linear(width, ends[-1], bias=False)], slices)

    def __call__(self, x: mx.array) -> mx.array:  # [B, T, D] -> [B, T, rows]
        outputs = [part(x) for part in self.parts]
        if len(outputs) == 1:
            return outputs[0]
        return mx.concatenate([outputs[i][..., a:b] for i, a, b in self._slices], axis=-1)

    def project(self, index: int, x: mx.array) -> mx.array:  # [B, T, D] -> [B, T, rows]
        """Compute one projection alone. Rows of a weight are a view of it, not a copy."""
        part, first, end = self._slices[index]
        linear, rows = self.parts[part], slice(first, end)
        if not isinstance(linear, nn.QuantizedLinear):
            return x @ linear["weight"][rows].T
        return mx.quantized_matmul(
            x,
            linear.weight[rows],
            linear.scales[rows],
            None if linear.biases is None else linear.biases[rows],
            transpose=True,
            group_size=linear.group_size,
            bits=linear.bits,
            mode=linear.mode,
        )


class Attention(nn.Module):
    """Grouped-query attention with rotary positions. Source: https://arxiv.org/abs/2305.13245."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        H, K, d = config.num_heads, config.num_kv_heads, config.head_dim
        self.qkv_proj = FusedLinear.of(config.hidden_size, [H * d, K * d, K * d])
        self.o_proj: nn.Module = nn.Linear(H * d, config.hidden_size, bias=False)
        self._H, self._K, self._d = H, K, d
        self._theta = config.rope_theta
        self._scale = d**-0.5

    def __call__(self, x: mx.array, cache: LayerCache, wanted: int) -> mx.array:
        """Attend from the last ``wanted`` positions of ``x`` [B, T, D]: [B, wanted, D]."""
        T = x.shape[1]
        if T == 1:
            q, kv = self.decode_heads(x, cache.length)
        elif wanted == T:
            q, kv = self.prefill_heads(x, cache.length)
        else:
            q, kv = self.last_heads(x, cache.length, wanted)
        o = cache.attend(q, kv, self._scale)  # [B, H, wanted, d]
        return self.o_proj(o.swapaxes(1, 2).flatten(2))

    def decode_heads(self, x: mx.array, position: int) -> tuple[mx.array, mx.array]:
        """Project one position: q [B, H, 1, d], kv [B, 2K, 1, d].

        One kernel rotates queries and keys, so that the cache takes one write. To it every head is
        a sequence of its own. Values are at position 0, which rotates nothing.
        """
        H, K = self._H, self._K
        positions = mx.array(len(x) * ((H + K) * [position] + K * [0]))  # [B * (H + 2K)]
        heads = rotate_heads(self.qkv_proj(x), positions, self._d, self._theta)
        return heads[:, :H], heads[:, H:]

    def prefill_heads(self, x: mx.array, position: int) -> tuple[mx.array, mx.array]:
        """Project T positions from ``position`` on: q [B, H, T, d], kv [B, 2K, T, d]."""
        H, K = self._H, self._K
        heads = self.split(self.qkv_proj(x))  # [B, H + 2K, T, d]
        qk = self.rope(heads[:, : H + K], position)
        return qk[:, :H], mx.concatenate([qk[:, H:], heads[:, H + K :]], axis=1)

    def last_heads(self, x: mx.array, position: int, wanted: int) -> tuple[mx.array, mx.array]:
        """Project as ``prefill_heads``, with queries of the last ``wanted`` positions only."""
        first = position + x.shape[1] - wanted
        q = self.split(self.qkv_proj.project(0, x[:, -wanted:]))  # [B, H, wanted, d]
        k, v = (self.split(self.qkv_proj.project(i, x)) for i in (1, 2))  # [B, K, T, d]
        return self.rope(q, first), mx.concatenate([self.rope(k, position), v], axis=1)

    def split(self, x: mx.array) -> mx.array:  # [B, T, n * d] -> [B, n, T, d]
        return mx.unflatten(x, -1, (-1, self._d)).swapaxes(1, 2)

    def rope(self, x: mx.array, offset: int) -> mx.array:
        return mx.fast.rope(
            x, self._d, traditional=False, base=self._theta, scale=1.0, offset=offset
        )


class MLP(nn.Module):
    """SwiGLU feed-forward. Source: https://arxiv.org/abs/2002.05202."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_up_proj = FusedLinear.of(config.hidden_size, 2 * [config.intermediate_size])
        self.down_proj: nn.Module = nn.Linear(
            config.intermediate_size, config.hidden_size, bias=False
        )

    def __call__(self, x: mx.array) -> mx.array:  # [B, T, D]
        gate, up = mx.split(self.gate_up_proj(x), 2, axis=-1)  # [B, T, F] each
        return self.down_proj(swiglu(gate, up))


class Block(nn.Module):
    """One layer: attention, then feed-forward, each on the normalized residual stream."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def __call__(self, x: mx.array, cache: LayerCache, wanted: int) -> mx.array:
        """Return the last ``wanted`` positions of the layer's output: [B, wanted, D]."""
        x = x[:, -wanted:] + self.self_attn(self.input_layernorm(x), cache, wanted)
        return x + self.mlp(self.post_attention_layernorm(x))


class Transformer(nn.Module):
    """Model from ids to logits. ``loader.load_model`` fills it with a checkpoint's weights."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens: nn.Module = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = [Block(config) for _ in range(config.num_layers)]
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.lm_head: nn.Module = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self._tied = config.tie_word_embeddings

    def __call__(self, ids: mx.array, cache: Sequence[LayerCache] | None = None) -> mx.array:
        """Append ids [B, T] to ``cache`` and return their logits [B, T, V]."""
        return self.logits(self.hidden(ids, cache))

    def hidden(
        self, ids: mx.array, cache: Sequence[LayerCache] | None = None, *, wanted: int | None = None
    ) -> mx.array:
        """Return the residual stream after the last layer, [B, T, D].

        With ``wanted``, only that many last positions: [B, wanted, D]. The last layer then computes
        only keys and values of the positions before them.
        """
        x = self.embed_tokens(ids)  # [B, T, D]
        caches = cache or [Uncached()] * len(self.layers)
        for layer, layer_cache in zip(self.layers[:-1], caches[:-1], strict=True):
            x = layer(x, layer_cache, ids.shape[1])
        return self.layers[-1](x, caches[-1], wanted or ids.shape[1])

    def logits(self, x: mx.array) -> mx.array:
        """Return the logits [B, T, V] of a residual stream [B, T, D]."""
        x = self.norm(x)
        return self.embed_tokens.as_linear(x) if self._tied else self.lm_head(x)
