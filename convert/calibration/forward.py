"""One forward pass over some ids, a layer at a time, that shows a visitor what comes into every linear.

In float32, by the equations of ``magistral_mlx.model.transformer``, with the weights read from the source as they are wanted: in
memory are the residual stream, the inputs of one linear and a few blocks of its rows. Letters as in
``magistral_mlx.model.transformer``: B sequences, T tokens in each, D hidden, H query heads, K key/value heads, d head size.
"""

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import mlx.core as mx
import numpy as np
from mlx import nn

from magistral_mlx.convert.calibration.host import matmul
from magistral_mlx.convert.calibration.statistics import (
    PASS_BLOCK_BYTES,
    column_weights,
    mean_squares,
)
from magistral_mlx.convert.packing import check_finite
from magistral_mlx.convert.source.source import Source

EMBEDDING = "model.embed_tokens"


class Visitor(Protocol):
    """Sees all inputs of linears before their outputs are computed, and says by which weights they are."""

    def see(self, modules: Sequence[str], x: mx.array) -> None:
        """``x`` ``[B, T, columns]`` comes into ``modules``, such as ``model.layers.3.mlp.down_proj``."""
        ...

    def rows(self, module: str) -> Iterator[tuple[int, mx.array]]:
        """The weight from here on: (first row, rows), in order."""
        ...


@dataclass(frozen=True, slots=True)
class PassState:
    """How far a pass is; together with the visitor's results all that resuming it takes."""

    layers: int  # that are done
    stream: mx.array  # [B, T, D] float32, the residual stream after them


@dataclass(slots=True)
class MeanSquares:
    """Collects E[x_j^2] of every linear; the weights are the source's. An embedding of its own has no inputs, and
    ``column_weights`` instead."""

    source: Source
    squares: dict[str, mx.array] = field(default_factory=dict)  # [columns] float32, by module path

    def see(self, modules: Sequence[str], x: mx.array) -> None:
        self.squares |= dict.fromkeys(modules, mean_squares(modules, x))

    def rows(self, module: str) -> Iterator[tuple[int, mx.array]]:
        name = f"{module}.weight"
        if module == EMBEDDING and not self.source.config.tie_word_embeddings:
            self.squares[EMBEDDING] = column_weights(self.source)
        for row, block in self.source.blocks(name, PASS_BLOCK_BYTES):
            check_finite(name, block)
            yield row, block


def visit_linears(
    source: Source, ids: mx.array, visitor: Visitor, stage: PassState | None = None
) -> Generator[PassState]:
    """Take ``ids`` ``[B, T]`` through the model; yields after the embedding and after each layer.

    The last visit is that of lm_head's input, under the name of the embedding where this serves both ends.

    Args:
        stage: where an earlier pass of the same ids ended.
    Raises:
        NumericsError: an input is not finite; names its linear.
    """
    config = source.config
    if stage is None:
        stage = PassState(0, _embedded(ids, visitor, config.hidden_size))
        yield stage
    streams, first = [stage.stream], stage.layers
    del (
        stage
    )  # only a layer at work holds its stream: each is 0.17 GB of 8,192 ids at the true width
    for layer in range(first, config.num_layers):
        streams.append(_layer(source, visitor, layer, streams.pop()))
        yield PassState(layer + 1, streams[0])
    x = _normalized(source, "model.norm", streams.pop())
    visitor.see([EMBEDDING if config.tie_word_embeddings else "lm_head"], x)


def _embedded(ids: mx.array, visitor: Visitor, width: int) -> mx.array:  # [B, T] -> [B, T, D]
    wanted = np.array(ids).reshape(-1)
    rows = np.empty((wanted.size, width), np.float32)
    for first, block in visitor.rows(EMBEDDING):
        here = (first <= wanted) & (wanted < first + len(block))
        if here.any():
            rows[here] = np.array(block[mx.array(wanted[here] - first)].astype(mx.float32))
    return mx.array(rows).reshape(*ids.shape, width)


def _layer(source: Source, visitor: Visitor, layer: int, x: mx.array) -> mx.array:  # [B, T, D]
    config, path = source.config, f"model.layers.{layer}"

    def linear(names: Sequence[str], x: mx.array) -> list[mx.array]:
        modules = [f"{path}.{name}" for name in names]
        visitor.see(modules, x)
        return [_product(visitor, module, x) for module in modules]

    def heads(x: mx.array) -> mx.array:  # [B, T, n * d] -> [B, n, T, d]
        return mx.unflatten(x, -1, (-1, config.head_dim)).swapaxes(1, 2)

    def rope(x: mx.array) -> mx.array:
        return mx.fast.rope(
            x, config.head_dim, traditional=False, base=config.rope_theta, scale=1.0, offset=0
        )

    h = _normalized(source, f"{path}.input_layernorm", x)
    q, k, v = map(heads, linear([f"self_attn.{p}_proj" for p in "qkv"], h))
    q, k = rope(q), rope(k)
    attended = []
    for i in range(len(x)):  # a sequence at a time: on a CPU its scores [H, T, T] are in memory
        one = slice(i, i + 1)
        o = mx.fast.scaled_dot_product_attention(
            q[one], k[one], v[one], scale=config.head_dim**-0.5, mask="causal"
        )
        attended.append(o.swapaxes(1, 2).flatten(2))  # [1, T, H * d]
        mx.eval(attended)
    del q, k, v, h
    (o,) = linear(["self_attn.o_proj"], mx.concatenate(attended))
    x = x + o
    del attended, o
    h = _gated(visitor, path, _normalized(source, f"{path}.post_attention_layernorm", x))
    (down,) = linear(["mlp.down_proj"], h)
    x = x + down
    mx.eval(x)
    return x


def _normalized(source: Source, module: str, x: mx.array) -> mx.array:
    weight = source.read(f"{module}.weight", slice(None)).astype(mx.float32)
    x = mx.fast.rms_norm(x, weight, source.config.rms_norm_eps)
    mx.eval(x)
    return x


def _gated(visitor: Visitor, path: str, x: mx.array) -> mx.array:  # [B, T, D] -> [B, T, F]
    """Gate and up together, by the same rows of both: neither is ever whole in memory."""
    modules = [f"{path}.mlp.gate_proj", f"{path}.mlp.up_proj"]
    visitor.see(modules, x)
    outputs = []
    for gate, up in _side_by_side(*map(visitor.rows, modules)):
        outputs.append(
            nn.silu(matmul(x, gate.astype(mx.float32).T)) * matmul(x, up.astype(mx.float32).T)
        )
        mx.eval(outputs[-1])
    return _joined(outputs)


def _side_by_side(
    one: Iterator[tuple[int, mx.array]], other: Iterator[tuple[int, mx.array]]
) -> Iterator[tuple[mx.array, mx.array]]:
    """The same rows of two weights of one shape, however each is cut."""
    left = right = None
    while True:
        left = next(one, (0, None))[1] if left is None or not len(left) else left
        right = next(other, (0, None))[1] if right is None or not len(right) else right
        if left is None or right is None:
            return
        count = min(len(left), len(right))
        yield left[:count], right[:count]
        left, right = left[count:], right[count:]


def _joined(outputs: list[mx.array]) -> mx.array:
    whole = mx.concatenate(outputs, axis=-1)
    mx.eval(whole)
    return whole


def _product(
    visitor: Visitor, module: str, x: mx.array
) -> mx.array:  # [B, T, columns] -> [B, T, rows]
    outputs = []
    for _, rows in visitor.rows(module):
        outputs.append(matmul(x, rows.astype(mx.float32).T))
        mx.eval(outputs[-1])
    return _joined(outputs)
