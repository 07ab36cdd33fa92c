"""Keys and values of the positions so far, one buffer a layer, written in place."""

import weakref
from collections.abc import Iterable, Sequence
from typing import Protocol

import mlx.core as mx

from magistral_mlx.checkpoint.config import ModelConfig
from magistral_mlx.errors import ContextError, OptionError
from magistral_mlx.model.kv_format import UNQUANTIZED, KVFormat

STEP = 256  # capacity grows in multiples of this
# Up to so many queries are computed one by one, so that ids that were drafted and are checked
# together are the ids of plain decoding.
MAX_SEPARATE_QUERIES = 8


class LayerCache(Protocol):
    """Interface between attention and a cache: its length, and attention over it."""

    @property
    def length(self) -> int: ...

    def attend(self, q: mx.array, kv: mx.array, scale: float) -> mx.array:
        """Append ``kv``, then attend to all positions causally.

        Queries ``q`` are [B, H, T, d], and so is the result. Keys and below them values are
        [B, 2K, T, d] in ``kv``.
        """
        ...


def causal_attention(q: mx.array, kv: mx.array, scale: float) -> mx.array:
    """Return fused causal attention of the last T of S positions.

    ``q`` is [B, H, T, d], ``kv`` is [B, 2K, S, d].
    """
    K = kv.shape[1] // 2
    mask = "causal" if q.shape[2] > 1 else None
    return mx.fast.scaled_dot_product_attention(q, kv[:, :K], kv[:, K:], scale=scale, mask=mask)


class Uncached:
    """Cache of nothing: one forward pass over whole sequences, as in training."""

    length = 0

    def attend(self, q: mx.array, kv: mx.array, scale: float) -> mx.array:
        return causal_attention(q, kv, scale)


class _Buffer:
    """Arrays [B, 2K, capacity, *] that are written in place and grow on demand."""

    def __init__(self) -> None:
        self.arrays: list[mx.array] = []
        self.capacity = 0

    def write(self, parts: Sequence[mx.array], start: int, capacity: int) -> None:
        """Grow to ``capacity`` positions, then write ``parts`` [B, 2K, T, *] at ``start``."""
        if not self.arrays:
            self.arrays = [mx.zeros((*p.shape[:2], capacity, p.shape[3]), p.dtype) for p in parts]
        elif capacity > self.capacity:
            for i, old in enumerate(self.arrays):
                self.arrays[i] = mx.zeros((*old.shape[:2], capacity, old.shape[3]), old.dtype)
                self.arrays[i][:, :, :start] = old[:, :, :start]
                # At once: evaluated in one pass, all layers would be held twice.
                mx.eval(self.arrays[i])
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
    """Keys and values of one layer, in the type of the activations."""

    def __init__(self, cache: "KVCache") -> None:
        # No reference: in a cycle, gigabytes would stay until the garbage collector runs.
        self.cache: KVCache = weakref.proxy(cache)
        self.format = cache.format
        self.length = 0
        self.buffer = _Buffer()

    def attend(self, q: mx.array, kv: mx.array, scale: float) -> mx.array:
        self.append(self.format.pack(kv))
        T, S = q.shape[2], self.length
        if T == 1 or T > MAX_SEPARATE_QUERIES:
            return self.attend_to(S, q, scale)
        rows = [self.attend_to(S - T + 1 + i, q[:, :, i : i + 1], scale) for i in range(T)]
        return mx.concatenate(rows, axis=2)

    def attend_to(self, length: int, q: mx.array, scale: float) -> mx.array:
        """Attend from the last queries [B, H, T, d] to the first ``length`` positions."""
        return causal_attention(q, self.buffer.read(length)[0], scale)

    def append(self, parts: Sequence[mx.array]) -> None:
        """Add positions, in the arrays that ``KVFormat.pack`` returns."""
        start, T = self.length, parts[0].shape[2]
        capacity = self.cache.capacity_for(start + T, self.buffer.capacity)
        self.buffer.write(parts, start, capacity)
        self.length = start + T


class QuantizedLayer(FloatLayer):
    """Keys and values of one layer, packed to 8 or 4 bits as they arrive.

    Many queries attend through the fused kernel to a view that is dequantized for this layer alone,
    so the only score matrix is the kernel's. A single query multiplies the packed arrays directly.
    """

    def attend_to(self, length: int, q: mx.array, scale: float) -> mx.array:
        arrays = self.buffer.read(length)
        if q.shape[2] > 1:
            return causal_attention(q, self.format.unpack(arrays), scale)
        B, H, _, d = q.shape
        K = arrays[0].shape[1] // 2
        keys, values = [a[:, :K] for a in arrays], [a[:, K:] for a in arrays]
        rows = (q * scale).reshape(B, K, H // K, d)  # [B, K, H/K, d]
        scores = self.format.matmul(rows, keys, transpose=True)  # [B, K, H/K, S]
        weights = mx.softmax(scores, axis=-1, precise=True)
        return self.format.matmul(weights, values, transpose=False).reshape(B, H, 1, d)


class KVCache:
    """Keys and values of one sequence, for every layer.

    Capacity doubles in multiples of 256 up to ``limit`` positions, the planned context. ``reserve``
    allocates at once what a request is known to need.
    """

    def __init__(
        self, config: ModelConfig, *, limit: int, kv_format: KVFormat = UNQUANTIZED
    ) -> None:
        """Make an empty cache for at most ``limit`` positions."""
        self.limit = limit
        self.format = kv_format
        self.reserved = 0
        layer = FloatLayer if kv_format.bits is None else QuantizedLayer
        self.layers = [layer(self) for _ in range(config.num_layers)]

    @property
    def length(self) -> int:
        """Positions that every layer holds; after an interrupted pass some layers hold one more."""
        return min(layer.length for layer in self.layers)

    @property
    def nbytes(self) -> int:
        """Bytes allocated, unused capacity included."""
        return sum(layer.buffer.nbytes for layer in self.layers)

    @property
    def arrays(self) -> list[mx.array]:
        """Arrays to evaluate so that everything appended is in memory."""
        return [a for layer in self.layers for a in layer.buffer.arrays]

    def reserve(self, positions: int) -> None:
        """Allocate for ``positions`` at the next growth, instead of doubling up to them."""
        if positions > self.limit:
            raise ContextError(
                f"{positions} positions do not fit a cache planned for {self.limit}; "
                "load with a larger context"
            )
        self.reserved = positions

    def shrink(self) -> None:
        """Free the capacity that is not used, a layer at a time; what stays is copied."""
        capacity = min(self.limit, -(-self.length // STEP) * STEP)
        for layer in self.layers:
            if layer.buffer.capacity > capacity:
                layer.buffer.shrink(capacity)

    def capacity_for(self, positions: int, capacity: int) -> int:
        """Return the capacity to allocate for ``positions``, given the present ``capacity``."""
        if positions <= capacity:
            return capacity
        if positions > self.limit:
            raise ContextError(
                f"the context is full: {self.limit} positions are planned and {positions} are "
                "needed"
            )
        wanted = self.reserved if positions <= self.reserved else max(positions, 2 * capacity)
        return min(self.limit, -(-wanted // STEP) * STEP)

    def trim(self, count: int) -> None:
        """Remove the last ``count`` positions; the next ones overwrite them."""
        if not 0 <= count <= self.length:
            raise OptionError(f"cannot trim {count} of {self.length} cached positions")
        length = self.length - count
        for layer in self.layers:
            layer.length = length

    def state(self, length: int | None = None) -> list[list[mx.array]]:
        """Return each layer's arrays up to ``length``, by default all of it, for a file."""
        return [
            layer.buffer.read(self.length if length is None else length) for layer in self.layers
        ]

    def restore(self, state: Iterable[Sequence[mx.array]], length: int) -> None:
        """Copy what ``state`` returned, a layer at a time.

        Raises:
            ValueError: it does not fit this cache.
        """
        expected = self.format.num_arrays
        for layer, parts in zip(self.layers, state, strict=True):
            if len(parts) != expected or any(p.ndim != 4 or p.shape[2] != length for p in parts):
                raise ValueError(f"its arrays are not {expected} of {length} positions a layer")
            layer.length = 0
            layer.append(parts)
            mx.eval(layer.buffer.arrays)
