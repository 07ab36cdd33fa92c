"""One past that several sequences share, read once for all of them, and what each has appended to it.

Letters as in model.py; N slots, n sequences still under way, G = H / K query heads a key/value head, P positions
shared, T positions that each sequence has of its own.
"""

import weakref
from collections.abc import Sequence

import mlx.core as mx

from magistral_mlx.model.kv_cache import STEP, FloatLayer, KVCache


class SharedLayer:
    """One layer: a cache that is read only, and a buffer with a slot for each sequence.

    The scores of the shared positions are one product of the keys with the queries of all sequences; those of
    a sequence's own positions are products with its slot alone; the softmax runs over both. The fused kernel
    could do neither: it gives no log-sum-exp to join two calls by, and over one buffer of everything, behind a
    mask, each sequence would be multiplied with all N continuations: at 16 sequences of 8,192 positions
    after 4,096, eleven times the products. The price is a score row [S] for each query, in the activations' type.
    """

    def __init__(self, prefix: FloatLayer, owner: "SharedCache") -> None:
        self.prefix = prefix
        self.owner: SharedCache = weakref.proxy(owner)  # as in FloatLayer
        self.steps = 0  # T
        self.capacity = 0
        self.arrays: list[mx.array] = []  # [2K, N, capacity, *]
        self.num_slots = owner.count
        self.slots = list(range(owner.count))  # of the sequences under way
        self._index: mx.array | None = None  # [K, n], where these lie among the K * N matrices

    @property
    def length(self) -> int:
        return self.owner.shared + self.steps

    @property
    def nbytes(self) -> int:
        return sum(a.nbytes for a in self.arrays)

    def attend(self, q: mx.array, kv: mx.array, scale: float) -> mx.array:
        """Append keys and below them values, kv [n, 2K, 1, d]; attend q [n, H, 1, d]: [n, H, 1, d]."""
        (n, H, _, d), K, P = q.shape, kv.shape[1] // 2, self.owner.shared
        self._append(kv.swapaxes(0, 1))
        shared = [a[0] for a in self.prefix.buffer.read(P)]  # [2K, P, *]
        own = [a[:, :, : self.steps] for a in self.arrays]  # [2K, N, T, *]
        if self._index is None:
            self._index = mx.array(
                [[k * self.num_slots + slot for slot in self.slots] for k in range(K)]
            )
        rows = (q * scale).reshape(n, K, H // K, d).swapaxes(0, 1)  # [K, n, G, d]
        scores = [
            self._matmul(rows.flatten(1, 2), [a[:K] for a in shared], transpose=True).reshape(
                K, n, H // K, P
            ),
            self._gather(rows, [a[:K] for a in own], transpose=True),
        ]
        weights = mx.softmax(
            mx.concatenate(scores, axis=-1), axis=-1, precise=True
        )  # [K, n, G, P + T]
        common = self._matmul(
            weights[..., :P].flatten(1, 2), [a[K:] for a in shared], transpose=False
        )
        private = self._gather(weights[..., P:], [a[K:] for a in own], transpose=False)
        o = common.reshape(private.shape) + private  # [K, n, G, d]
        return o.swapaxes(0, 1).reshape(n, H, 1, d)

    def keep(self, places: Sequence[int]) -> None:
        """Go on with the sequences at ``places`` among those under way; the others' slots are not read again."""
        self.slots, self._index = [self.slots[place] for place in places], None

    def _append(self, kv: mx.array) -> None:  # [2K, n, 1, d]
        parts = self.prefix.packed(kv)
        if self.steps == self.capacity:
            self._grow(parts)
        if (
            len(self.slots) < self.num_slots
        ):  # one write for all slots; what the left ones get is never read
            rows = {slot: row for row, slot in enumerate(self.slots)}
            spread = mx.array([rows.get(slot, 0) for slot in range(self.num_slots)])
            parts = [p[:, spread] for p in parts]
        for array, part in zip(self.arrays, parts, strict=True):
            array[:, :, self.steps : self.steps + 1] = part
        self.steps += 1

    def _grow(self, parts: Sequence[mx.array]) -> None:
        """By 256 positions, never by doubling: N of these are held. Slots left are dropped, as all is copied anyway."""
        capacity = min(self.owner.limit, self.capacity + STEP)
        room = [
            mx.zeros((*p.shape[:2], capacity - self.capacity, p.shape[3]), p.dtype) for p in parts
        ]
        if not self.arrays:
            self.arrays = room
        else:
            if len(self.slots) < self.num_slots:
                self.arrays = [a[:, mx.array(self.slots)] for a in self.arrays]
            self.arrays = [
                mx.concatenate([a, more], axis=2) for a, more in zip(self.arrays, room, strict=True)
            ]
        self.capacity = capacity
        self.num_slots = len(self.slots)
        self.slots, self._index = list(range(self.num_slots)), None

    def _matmul(self, x: mx.array, y: list[mx.array], *, transpose: bool) -> mx.array:
        if self.owner.bits:
            codes, scales, biases = y
            return mx.quantized_matmul(
                x, codes, scales, biases, transpose, self.owner.group_size, self.owner.bits
            )
        return x @ (y[0].swapaxes(-1, -2) if transpose else y[0])

    def _gather(self, x: mx.array, y: list[mx.array], *, transpose: bool) -> mx.array:
        """As ``_matmul``, of x [K, n, *, *] with the slots of y [K, N, *, *] that are under way, none copied."""
        if self.owner.bits:
            codes, scales, biases = y
            bits, group_size = self.owner.bits, self.owner.group_size
            return mx.gather_qmm(
                x, codes, scales, biases, None, self._index, transpose, group_size, bits
            )
        return mx.gather_mm(
            x, y[0].swapaxes(-1, -2) if transpose else y[0], rhs_indices=self._index
        )


class SharedCache:
    """The past of several sequences that go on from one: they are fed one id each at a time."""

    def __init__(self, prefix: KVCache, count: int, *, limit: int) -> None:
        """``prefix`` must not change meanwhile. ``limit``: positions each of the ``count`` sequences may append."""
        self.prefix, self.count, self.limit = prefix, count, limit
        self.shared = prefix.length
        self.bits, self.group_size = prefix.bits, prefix.group_size
        self.layers = [SharedLayer(layer, self) for layer in prefix.layers]

    @property
    def nbytes(self) -> int:
        """Bytes allocated: what is shared, once, and every sequence's own; unused capacity included."""
        return self.prefix.nbytes + sum(layer.nbytes for layer in self.layers)

    def keep(self, places: Sequence[int]) -> None:
        """Go on with the sequences at ``places`` among those under way. Nothing is copied."""
        for layer in self.layers:
            layer.keep(places)

    def trim(self) -> None:
        """Forget the last id of every sequence."""
        for layer in self.layers:
            layer.steps -= 1
