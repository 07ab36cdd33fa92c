"""Keys and values of the positions seen so far, one buffer a layer, allocated ahead and written in place."""

import weakref
from collections.abc import Iterable, Sequence
from typing import Protocol

import mlx.core as mx

from magistral_mlx.checkpoint.config import ModelConfig
from magistral_mlx.errors import ContextError, OptionError

STEP = 256  # capacity grows in multiples of this
FEW = 8  # queries up to which each attends as it would alone: ids drafted and checked together are those of plain steps


class LayerCache(Protocol):
    """What attention needs of the past: how long it is, and attention over it."""

    @property
    def length(self) -> int: ...

    def attend(self, q: mx.array, kv: mx.array, scale: float) -> mx.array:
        """Append keys and below them values, kv [B, 2K, T, d]; attend q [B, H, T, d] causally: [B, H, T, d]."""
        ...


def _attention(q: mx.array, kv: mx.array, scale: float) -> mx.array:
    """Fused causal attention; the T queries are the last T of the S positions of kv [B, 2K, S, d]."""
    K = kv.shape[1] // 2
    mask = "causal" if q.shape[2] > 1 else None
    return mx.fast.scaled_dot_product_attention(q, kv[:, :K], kv[:, K:], scale=scale, mask=mask)


class Uncached:
    """No past: one forward pass over whole sequences, as in training."""

    length = 0

    def attend(self, q: mx.array, kv: mx.array, scale: float) -> mx.array:
        return _attention(q, kv, scale)


class _Buffer:
    """Arrays [B, 2K, capacity, *] that are written in place and grow on demand."""

    def __init__(self) -> None:
        self.arrays: list[mx.array] = []
        self.capacity = 0

    def write(self, parts: Sequence[mx.array], start: int, capacity: int) -> None:
        """Write ``parts`` [B, 2K, T, *] at ``start``; make room for ``capacity`` positions first."""
        if not self.arrays:
            self.arrays = [mx.zeros((*p.shape[:2], capacity, p.shape[3]), p.dtype) for p in parts]
        elif capacity > self.capacity:
            for i, old in enumerate(self.arrays):
                self.arrays[i] = mx.zeros((*old.shape[:2], capacity, old.shape[3]), old.dtype)
                self.arrays[i][:, :, :start] = old[:, :, :start]
                mx.eval(self.arrays[i])  # at once: in one pass all layers would be held twice
        self.capacity = max(self.capacity, capacity)
        stop = start + parts[0].shape[2]
        for array, part in zip(self.arrays, parts, strict=True):
            array[:, :, start:stop] = part

    def shrink(self, capacity: int) -> None:
        self.arrays = [mx.contiguous(a[:, :, :capacity]) for a in self.arrays]
        self.capacity = capacity
        mx.eval(self.arrays)

    def read(self, length: int) -> list[mx.array]:
        return [a[:, :, :length] for a in self.arrays]

    @property
    def nbytes(self) -> int:
        return sum(a.nbytes for a in self.arrays)


class FloatLayer:
    """One layer's keys and values in the type of the activations."""

    parts = 1  # arrays, each with the keys and below them the values: one write a token

    def __init__(self, owner: "KVCache") -> None:
        # No reference: in a cycle, gigabytes would stay until the garbage collector comes by.
        self.owner: KVCache = weakref.proxy(owner)
        self.length = 0
        self.buffer = _Buffer()

    def attend(self, q: mx.array, kv: mx.array, scale: float) -> mx.array:
        self.append(self.packed(kv))
        T, S = q.shape[2], self.length
        if T == 1 or T > FEW:
            return self.over(q, S, scale)
        rows = [self.over(q[:, :, i : i + 1], S - T + 1 + i, scale) for i in range(T)]
        return mx.concatenate(rows, axis=2)

    def packed(self, kv: mx.array) -> Sequence[mx.array]:
        return [kv]

    def over(self, q: mx.array, length: int, scale: float) -> mx.array:
        """Attention of the last queries [B, H, T, d] over the first ``length`` positions."""
        return _attention(q, self.buffer.read(length)[0], scale)

    def append(self, parts: Sequence[mx.array]) -> None:
        start, T = self.length, parts[0].shape[2]
        self.buffer.write(parts, start, self.owner.room_for(start + T, self.buffer.capacity))
        self.length = start + T


class QuantizedLayer(FloatLayer):
    """One layer's keys and values packed to 8 or 4 bit, quantized as they arrive.

    Many queries attend through the fused kernel on a view dequantized for this layer alone, so no
    score matrix is built beyond the kernel's own; a single query multiplies the packed arrays directly.
    """

    parts = 3  # packed, scales, biases

    def packed(self, kv: mx.array) -> Sequence[mx.array]:
        return mx.quantize(kv, self.owner.group_size, self.owner.bits)

    def over(self, q: mx.array, length: int, scale: float) -> mx.array:
        codes, scales, biases = arrays = self.buffer.read(length)
        if q.shape[2] > 1:
            return _attention(
                q,
                mx.dequantize(codes, scales, biases, self.owner.group_size, self.owner.bits),
                scale,
            )
        B, H, _, d = q.shape
        K = codes.shape[1] // 2
        keys, values = [a[:, :K] for a in arrays], [a[:, K:] for a in arrays]
        rows = (q * scale).reshape(B, K, H // K, d)  # [B, K, H/K, d]
        weights = mx.softmax(
            self._matmul(rows, keys, transpose=True), axis=-1, precise=True
        )  # [B, K, H/K, S]
        return self._matmul(weights, values, transpose=False).reshape(B, H, 1, d)

    def _matmul(self, x: mx.array, packed: list[mx.array], *, transpose: bool) -> mx.array:
        codes, scales, biases = packed
        return mx.quantized_matmul(
            x, codes, scales, biases, transpose, self.owner.group_size, self.owner.bits
        )


class KVCache:
    """The past of one sequence, for every layer.

    Capacity doubles in multiples of 256 up to ``limit`` positions, the planned context; ``reserve``
    allocates at once what a request is known to need. Never grows past ``limit``.
    """

    def __init__(self, config: ModelConfig, *, limit: int, bits: int | None = None) -> None:
        """``bits``: None for the activations' type, or 8 or 4. Raises OptionError for anything else."""
        if bits not in (None, 4, 8):
            raise OptionError(
                f"kv_bits is {bits}; use 8 or 4, or leave it out for an unquantized cache"
            )
        if bits is not None and config.head_dim % 32:
            raise OptionError(
                f"kv_bits needs a head size that is a multiple of 32; this model's is {config.head_dim}"
            )
        self.limit = limit
        self.bits = bits or 0
        self.group_size = 64 if config.head_dim % 64 == 0 else 32
        self.reserved = 0
        self.layers = [
            (QuantizedLayer if bits else FloatLayer)(self) for _ in range(config.num_layers)
        ]

    @property
    def length(self) -> int:
        """Positions held by every layer; an interrupted pass may have left some layers one step ahead."""
        return min(layer.length for layer in self.layers)

    @property
    def nbytes(self) -> int:
        """Bytes allocated, unused capacity included."""
        return sum(layer.buffer.nbytes for layer in self.layers)

    @property
    def arrays(self) -> list[mx.array]:
        """What to evaluate so that everything appended is in memory."""
        return [a for layer in self.layers for a in layer.buffer.arrays]

    def reserve(self, positions: int) -> None:
        """Allocate for ``positions`` at the next growth, instead of doubling up to them."""
        if positions > self.limit:
            raise ContextError(
                f"{positions} positions do not fit a cache planned for {self.limit}; load with a larger context"
            )
        self.reserved = positions

    def shrink(self) -> None:
        """Give back the capacity that is not used, a layer at a time; what is kept is copied."""
        capacity = min(self.limit, -(-self.length // STEP) * STEP)
        for layer in self.layers:
            if layer.buffer.capacity > capacity:
                layer.buffer.shrink(capacity)

    def room_for(self, positions: int, capacity: int) -> int:
        """The capacity to have when ``positions`` are needed and ``capacity`` are there."""
        if positions <= capacity:
            return capacity
        if positions > self.limit:
            raise ContextError(
                f"the context is full: {self.limit} positions are planned and {positions} are needed"
            )
        wanted = self.reserved if positions <= self.reserved else max(positions, 2 * capacity)
        return min(self.limit, -(-wanted // STEP) * STEP)

    def trim(self, count: int) -> None:
        """Forget the last ``count`` positions; what is appended next overwrites them."""
        if not 0 <= count <= self.length:
            raise OptionError(f"cannot trim {count} of {self.length} cached positions")
        length = self.length - count
        for layer in self.layers:
            layer.length = length

    def state(self, length: int | None = None) -> list[list[mx.array]]:
        """Each layer's arrays up to ``length``, by default all of it, for a file."""
        return [
            layer.buffer.read(self.length if length is None else length) for layer in self.layers
        ]

    def restore(self, state: Iterable[Sequence[mx.array]], length: int) -> None:
        """Copy what ``state`` returned, a layer at a time; raises ValueError where it does not fit this cache."""
        for layer, parts in zip(self.layers, state, strict=True):
            if len(parts) != layer.parts or any(p.ndim != 4 or p.shape[2] != length for p in parts):
                raise ValueError(f"its arrays are not {layer.parts} of {length} positions a layer")
            layer.length = 0
            layer.append(parts)
            mx.eval(layer.buffer.arrays)
