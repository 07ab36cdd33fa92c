"""Run a forward pass over calibration ids that shows a visitor every linear's input.

It computes in float32, layer by layer, with the equations of ``magistral_mlx.model.transformer``.
Weights are read from the source as they are needed: memory holds the residual stream, the inputs
of one linear and a few blocks of its rows. Letters: B sequences, T tokens in each, D hidden,
F feed-forward, H query heads, K key/value heads, d head size, m columns and n rows of a linear.
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
    """Receives the input of each linear before its output is computed; supplies the weights."""

    def see(self, modules: Sequence[str], x: mx.array) -> None:
        """Take the input ``[B, T, m]`` of modules such as ``model.layers.3.mlp.down_proj``."""
        ...

    def rows(self, module: str) -> Iterator[tuple[int, mx.array]]:
        """Yield the weight that the pass multiplies with, as (first row, rows), in order."""
        ...


@dataclass(frozen=True, slots=True)
class PassState:
    """State of a pass between layers, to resume from.

    Attributes:
        layers: number of layers that are done.
        stream: ``[B, T, D]`` float32, the residual stream after them.
    """

    layers: int
    stream: mx.array


@dataclass(slots=True)
class MeanSquares:
    """A visitor that collects E[x_j^2] ``[m]`` of every linear, with the source's own weights.

    An embedding that is not lm_head has no inputs and gets ``column_weights`` instead.

    Attributes:
        squares: float32, by module path.
    """

    source: Source
    squares: dict[str, mx.array] = field(default_factory=dict)

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
    source: Source, ids: mx.array, visitor: Visitor, state: PassState | None = None
) -> Generator[PassState]:
    """Take ``ids`` ``[B, T]`` through the model; yield after the embedding and after each layer.

    The last visit shows lm_head's input. A tied embedding is visited there, under its own name.

    ``state`` is the last one of an earlier pass over the same ids.

    Raises:
        NumericsError: an input is not finite. The message names its linear.
    """
    config = source.config
    if state is None:
        state = PassState(0, _embedded(ids, visitor, config.hidden_size))
        yield state
    streams, first = [state.stream], state.layers
    # Only the current layer may hold its stream: 8,192 ids of the 24B model take 0.17 GB.
    del state
    for layer in range(first, config.num_layers):
        streams.append(_layer(source, visitor, layer, streams.pop()))
        yield PassState(layer + 1, streams[0])
    x = _normalized(source, "model.norm", streams.pop())
    visitor.see([EMBEDDING if config.tie_word_embeddings else "lm_head"], x)


def _embedded(ids: mx.array, visitor: Visitor, width: int) -> mx.array:
    """Look up ids ``[B, T]`` block by block: ``[B, T, D]``."""
    wanted = np.array(ids).reshape(-1)
    rows = np.empty((wanted.size, width), np.float32)
    for first, block in visitor.rows(EMBEDDING):
        here = (first <= wanted) & (wanted < first + len(block))
        if here.any():
            rows[here] = np.array(block[mx.array(wanted[here] - first)].astype(mx.float32))
    return mx.array(rows).reshape(*ids.shape, width)


def _layer(source: Source, visitor: Visitor, layer: int, x: mx.array) -> mx.array:
    """Take the residual stream ``[B, T, D]`` through one layer."""
    path = f"model.layers.{layer}"
    # Inputs and outputs of the parts have no names here, so that they can be freed early.
    x = x + _attention(source, visitor, path, _normalized(source, f"{path}.input_layernorm", x))
    h = _gated(visitor, path, _normalized(source, f"{path}.post_attention_layernorm", x))
    (down,) = _linears(visitor, [f"{path}.mlp.down_proj"], h)
    x = x + down
    mx.eval(x)
    return x


def _attention(source: Source, visitor: Visitor, path: str, h: mx.array) -> mx.array:
    """Attend from normalized inputs ``[B, T, D]``: ``[B, T, D]``."""
    config = source.config

    def heads(x: mx.array) -> mx.array:  # [B, T, n * d] -> [B, n, T, d]
        return mx.unflatten(x, -1, (-1, config.head_dim)).swapaxes(1, 2)

    def rope(x: mx.array) -> mx.array:
        return mx.fast.rope(
            x, config.head_dim, traditional=False, base=config.rope_theta, scale=1.0, offset=0
        )

    q, k, v = map(heads, _linears(visitor, [f"{path}.self_attn.{p}_proj" for p in "qkv"], h))
    q, k = rope(q), rope(k)  # [B, H, T, d], [B, K, T, d]
    attended = []
    # One sequence at a time: on a CPU its scores [H, T, T] are in memory.
    for i in range(len(h)):
        one = slice(i, i + 1)
        o = mx.fast.scaled_dot_product_attention(
            q[one], k[one], v[one], scale=config.head_dim**-0.5, mask="causal"
        )
        attended.append(o.swapaxes(1, 2).flatten(2))  # [1, T, H * d]
        mx.eval(attended)
    del q, k, v, h
    (o,) = _linears(visitor, [f"{path}.self_attn.o_proj"], mx.concatenate(attended))
    return o


def _normalized(source: Source, module: str, x: mx.array) -> mx.array:
    weight = source.read(f"{module}.weight", slice(None)).astype(mx.float32)
    x = mx.fast.rms_norm(x, weight, source.config.rms_norm_eps)
    mx.eval(x)
    return x


def _linears(visitor: Visitor, modules: Sequence[str], x: mx.array) -> list[mx.array]:
    """Show the input ``[B, T, m]`` that some linears share; return their outputs ``[B, T, n]``."""
    visitor.see(modules, x)
    return [_product(visitor, module, x) for module in modules]


def _gated(visitor: Visitor, path: str, x: mx.array) -> mx.array:
    """Return silu(gate) * up ``[B, T, F]`` of ``x`` ``[B, T, D]``, by rows to save memory."""
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
    """Yield the same rows of two equally shaped weights with different blocks."""
    left = right = None
    while True:
        left = next(one, (0, None))[1] if left is None or not len(left) else left
        right = next(other, (0, None))[1] if right is None or not len(right) else right
        if left is None or right is None:
            return
        count = min(len(left), len(right))
        yield left[:count], right[:count]
        left, right = left[count:], right[count:]


def _product(visitor: Visitor, module: str, x: mx.array) -> mx.array:
    """Multiply ``[B, T, m]`` by a weight, block by block: ``[B, T, n]``."""
    outputs = []
    for _, rows in visitor.rows(module):
        outputs.append(matmul(x, rows.astype(mx.float32).T))
        mx.eval(outputs[-1])
    return _joined(outputs)


def _joined(outputs: list[mx.array]) -> mx.array:
    whole = mx.concatenate(outputs, axis=-1)
    mx.eval(whole)
    return whole
