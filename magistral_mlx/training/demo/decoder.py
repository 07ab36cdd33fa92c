"""Greedy decoding of many prompts side by side in NumPy, fast on a CPU and apart from the runtime.

Letters: B rows, T ids, S positions, H query heads, K key/value heads, G = H / K, d head size.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from magistral_mlx.checkpoint.folder import Checkpoint, open_checkpoint

Floats = NDArray[np.float32]
Ids = NDArray[np.int64]

ROWS = 256


def float_weights(checkpoint: Checkpoint) -> dict[str, Floats]:
    """Return a checkpoint's weights by their Hugging Face names, affine formats unpacked."""
    tensors = checkpoint.tensors()
    for module, quant in checkpoint.formats.items():
        if quant is not None:
            weight, *affine = (
                tensors.pop(f"{module}.{kind}") for kind in quant.packed_shapes((0, 0))
            )
            scales, biases = (array.astype(mx.float32) for array in affine)
            tensors[f"{module}.weight"] = mx.dequantize(
                weight, scales, biases, quant.group_size, quant.bits
            )
    return {name: np.array(array.astype(mx.float32)) for name, array in tensors.items()}


@dataclass(slots=True)
class _Rows:
    """Prompts that end at one position: their numbers, padding, and the cache of each layer."""

    numbers: list[int]
    padding: Ids  # [B], positions before each prompt
    caches: list[Floats]  # [2, B, K, S, d] a layer: keys and values
    length: int = 0

    def keep(self, places: list[int]) -> None:
        self.numbers = [self.numbers[place] for place in places]
        self.padding = self.padding[places]
        self.caches = [np.ascontiguousarray(cache[:, places]) for cache in self.caches]


class Decoder:
    """A checkpoint's weights in float32, and greedy decoding with them."""

    def __init__(self, folder: Path) -> None:
        checkpoint = open_checkpoint(folder)
        self.config = checkpoint.config
        self.weights = float_weights(checkpoint)

    def replies(
        self, prompts: Sequence[Sequence[int]], *, stop: int, max_tokens: int = 300
    ) -> list[list[int]]:
        """Return the ids that follow each prompt, up to ``stop``, which is left out."""
        found: list[list[int]] = [[] for _ in prompts]
        by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        for start in range(0, len(prompts), ROWS):
            numbers = by_length[start : start + ROWS]
            for number, token_id in self._decode(prompts, numbers, stop, max_tokens):
                found[number].append(token_id)
        return found

    def _decode(
        self, prompts: Sequence[Sequence[int]], numbers: list[int], stop: int, max_tokens: int
    ) -> Iterator[tuple[int, int]]:
        """Yield (number, id) of rows until each has ended."""
        config, longest = self.config, max(len(prompts[i]) for i in numbers)
        padding = np.array([longest - len(prompts[i]) for i in numbers])
        ids = np.array([[0] * n + list(prompts[i]) for n, i in zip(padding, numbers, strict=True)])
        shape = (2, len(ids), config.num_kv_heads, longest + max_tokens, config.head_dim)
        caches = [np.zeros(shape, np.float32) for _ in range(config.num_layers)]
        rows = _Rows(numbers, padding, caches)
        has_ended = np.zeros(len(ids), bool)
        for _ in range(max_tokens):
            drawn = self._forward(ids, rows).argmax(axis=-1)
            has_ended |= drawn == stop
            going = np.flatnonzero(~has_ended).tolist()
            yield from ((rows.numbers[i], int(drawn[i])) for i in going)
            if not going:
                return
            # To leave rows out copies the caches, so it waits until there are several.
            if len(going) < 0.8 * len(drawn):
                rows.keep(going)
                drawn, has_ended = drawn[going], has_ended[going]
            ids = drawn[:, None]

    def _forward(self, ids: Ids, rows: _Rows) -> Floats:
        """Append ids [B, T] to the rows and return the logits [B, V] after them."""
        weights, eps, d = self.weights, self.config.rms_norm_eps, self.config.head_dim
        start, rows.length = rows.length, rows.length + ids.shape[1]
        places = np.arange(start, rows.length)  # [T]
        positions = places - rows.padding[:, None]  # [B, T]
        angles = positions[:, None, :, None] * self.config.rope_theta ** (-np.arange(0, d, 2) / d)
        turns = (np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32))
        keys = np.arange(rows.length)  # [S]
        is_hidden = (keys > places[:, None]) | (keys < rows.padding[:, None, None])  # [B, T, S]
        bias = np.where(is_hidden, np.float32(-1e9), np.float32(0))

        def normalized(x: Floats, name: str) -> Floats:
            scale = np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps)
            return x / scale * weights[f"{name}.weight"]

        def linear(x: Floats, name: str) -> Floats:
            return x @ weights[f"{name}.weight"].T

        def heads(x: Floats) -> Floats:  # [B, T, n * d] -> [B, n, T, d]
            return x.reshape(*x.shape[:2], -1, d).swapaxes(1, 2)

        x = weights["model.embed_tokens.weight"][ids]  # [B, T, D]
        for i, cache in enumerate(rows.caches):
            path = f"model.layers.{i}"
            y = normalized(x, f"{path}.input_layernorm")
            q, k, v = (heads(linear(y, f"{path}.self_attn.{p}_proj")) for p in "qkv")
            cache[0, :, :, start : rows.length] = _rotated(k, *turns)
            cache[1, :, :, start : rows.length] = v
            o = _attend(_rotated(q, *turns), cache[:, :, :, : rows.length], bias)
            x = x + linear(o, f"{path}.self_attn.o_proj")
            y = normalized(x, f"{path}.post_attention_layernorm")
            gate, up = (linear(y, f"{path}.mlp.{p}_proj") for p in ("gate", "up"))
            x = x + linear(gate / (1 + np.exp(-gate)) * up, f"{path}.mlp.down_proj")
        return linear(normalized(x[:, -1], "model.norm"), "lm_head")


def _rotated(x: Floats, cos: Floats, sin: Floats) -> Floats:
    """Rotate heads [B, n, T, d] by their positions."""
    a, b = np.split(x, 2, axis=-1)
    return np.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)


def _attend(q: Floats, kv: Floats, bias: Floats) -> Floats:
    """Attend from q [B, H, T, d] to keys and values [2, B, K, S, d]: [B, T, H * d]."""
    (B, H, T, d), (keys, values), K = q.shape, kv, kv.shape[2]
    queries = q.reshape(B, K, -1, d)  # [B, K, G * T, d]
    scores = (queries @ keys.swapaxes(2, 3)).reshape(B, H, T, -1) * d**-0.5 + bias[:, None]
    shares = np.exp(scores - scores.max(axis=-1, keepdims=True))
    shares = (shares / shares.sum(axis=-1, keepdims=True)).reshape(B, K, -1, bias.shape[-1])
    return (shares @ values).reshape(B, H, T, d).swapaxes(1, 2).reshape(B, T, H * d)
