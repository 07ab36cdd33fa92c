"""One prefix that several sequences share, and the positions that each of them has appended.

Letters as in transformer.py; N slots, n sequences that still run, G = H / K query heads a key/value
head, P shared positions, T positions that each sequence has appended.
"""

import weakref
from collections.abc import Sequence

import mlx.core as mx

from magistral_mlx.model.kv_cache import STEP, FloatLayer, KVCache


class SharedLayer:
    """One layer: a prefix that is only read, and a buffer with a slot for each sequence.

    The scores of the prefix are one product of its keys with the queries of all sequences. The
    scores of appended positions are products with one slot each. The softmax runs over both.

    The fused kernel cannot do this. It returns no log-sum-exp by which two calls could be joined.
    Over one buffer of everything, behind a mask, it would multiply each sequence with all N
    continuations: at 16 sequences of 8,192 positions after 4,096, eleven times the products. The
    price is a score row [S] for each query, in the activations' type.
    """

    def __init__(self, prefix: FloatLayer, cache: "SharedCache") -> None:
        self.prefix = prefix
        # A weak reference, as in FloatLayer.
        self.cache: SharedCache = weakref.proxy(cache)
        self.format = prefix.format
        self.steps = 0  # T
        self.capacity = 0
        self.arrays: list[mx.array] = []  # [2K, N, capacity, *]
        self.num_slots = cache.count
        # Indices of the sequences that still run.
        self.slots = list(range(cache.count))
        self._index: mx.array | None = None  # [K, n], their places among the K * N matrices

    @property
    def length(self) -> int:
        return self.cache.shared + self.steps

    @property
    def nbytes(self) -> int:
        return sum(a.nbytes for a in self.arrays)

    def attend(self, q: mx.array, kv: mx.array, scale: float) -> mx.array:
        """Append one position of each sequence, then attend to its positions.

        Queries ``q`` are [n, H, 1, d], and so is the result. Keys and below them values are
        [n, 2K, 1, d] in ``kv``.
        """
        (n, H, _, d), K, P = q.shape, kv.shape[1] // 2, self.cache.shared
        self._append(kv.swapaxes(0, 1))
        shared = [a[0] for a in self.prefix.buffer.read(P)]  # [2K, P, *]
        own = [a[:, :, : self.steps] for a in self.arrays]  # [2K, N, T, *]
        if self._index is None:
            self._index = mx.array(
                [[k * self.num_slots + slot for slot in self.slots] for k in range(K)]
            )
        matmul, gather_matmul = self.format.matmul, self.format.gather_matmul
        rows = (q * scale).reshape(n, K, H // K, d).swapaxes(0, 1)  # [K, n, G, d]
        shared_scores = matmul(rows.flatten(1, 2), [a[:K] for a in shared], transpose=True)
        own_scores = gather_matmul(rows, [a[:K] for a in own], self._index, transpose=True)
        scores = mx.concatenate([shared_scores.reshape(K, n, H // K, P), own_scores], axis=-1)
        weights = mx.softmax(scores, axis=-1, precise=True)  # [K, n, G, P + T]
        common = matmul(weights[..., :P].flatten(1, 2), [a[K:] for a in shared], transpose=False)
        private = gather_matmul(
            weights[..., P:], [a[K:] for a in own], self._index, transpose=False
        )
        o = common.reshape(private.shape) + private  # [K, n, G, d]
        return o.swapaxes(0, 1).reshape(n, H, 1, d)

    def keep(self, places: Sequence[int]) -> None:
        """Continue with the sequences at ``places`` among those that still run.

        The slots of the others are not read again.
        """
        self.slots, self._index = [self.slots[place] for place in places], None

    def _append(self, kv: mx.array) -> None:  # [2K, n, 1, d]
        parts = self.format.pack(kv)
        if self.steps == self.capacity:
            self._grow(parts)
        if len(self.slots) < self.num_slots:
            # One write for all slots; what a finished sequence's slot gets is never read.
            rows = {slot: row for row, slot in enumerate(self.slots)}
            spread = mx.array([rows.get(slot, 0) for slot in range(self.num_slots)])
            parts = [p[:, spread] for p in parts]
        for array, part in zip(self.arrays, parts, strict=True):
            array[:, :, self.steps : self.steps + 1] = part
        self.steps += 1

    def _grow(self, parts: Sequence[mx.array]) -> None:
        """Add 256 positions; doubling N buffers would take too much memory.

        Everything is copied, so the slots of finished sequences are dropped.
        """
        capacity = min(self.cache.limit, self.capacity + STEP)
        added = [
            mx.zeros((*p.shape[:2], capacity - self.capacity, p.shape[3]), p.dtype) for p in parts
        ]
        if not self.arrays:
            self.arrays = added
        else:
            if len(self.slots) < self.num_slots:
                self.arrays = [a[:, mx.array(self.slots)] for a in self.arrays]
            self.arrays = [
                mx.concatenate([a, more], axis=2)
                for a, more in zip(self.arrays, added, strict=True)
            ]
        self.capacity = capacity
        self.num_slots = len(self.slots)
        self.slots, self._index = list(range(self.num_slots)), None


class SharedCache:
    """Cache of several sequences that continue one prefix and are fed one id each at a time."""

    def __init__(self, prefix: KVCache, count: int, *, limit: int) -> None:
        """Share ``prefix`` among ``count`` sequences of at most ``limit`` further positions.

        ``prefix`` must not change meanwhile.
        """
        self.prefix, self.count, self.limit = prefix, count, limit
        self.shared = prefix.length
        self.layers = [SharedLayer(layer, self) for layer in prefix.layers]

    @property
    def nbytes(self) -> int:
        """Bytes allocated for prefix and sequences, unused capacity included."""
        return self.prefix.nbytes + sum(layer.nbytes for layer in self.layers)

    def keep(self, places: Sequence[int]) -> None:
        """Continue with the sequences at ``places`` among those that still run."""
        for layer in self.layers:
            layer.keep(places)

    def trim(self) -> None:
        """Remove the last id of every sequence."""
        for layer in self.layers:
            layer.steps -= 1
