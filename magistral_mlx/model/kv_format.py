"""Format of keys and values in a cache: the activations' type, or packed to 8 or 4 bits."""

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from magistral_mlx.errors import OptionError, named

FLOAT_BITS = 16  # --kv-bits 16 means the activations' type, of whatever width


@dataclass(frozen=True, slots=True)
class KVFormat:
    """Format of keys and values; by default they are not quantized.

    Attributes:
        bits: bits a value, or None for the activations' type.
        group_size: values that share a scale and a bias; 0 if nothing is packed.
    """

    bits: int | None = None
    group_size: int = 0

    @classmethod
    def of(cls, kv_bits: int | None, head_dim: int) -> "KVFormat":
        """Make the format for ``kv_bits``: 8 or 4, or None or 16 for the activations' type.

        Raises:
            OptionError: there is no such format for this head size.
        """
        if kv_bits in (None, FLOAT_BITS):
            return cls()
        if kv_bits not in (4, 8) or head_dim % 32:
            raise OptionError(
                f"{named('kv_bits')} is {kv_bits} with a head size of {head_dim}; use 8 or 4, "
                "where a head's size is a multiple of 32, or 16 for a cache that is not quantized"
            )
        return cls(kv_bits, 64 if head_dim % 64 == 0 else 32)

    @property
    def num_arrays(self) -> int:
        """Arrays a layer: keys and values in one, or their codes, scales and biases."""
        return 1 if self.bits is None else 3

    def row_bytes(self, head_dim: int, itemsize: int) -> int:
        """Return the bytes of one head's keys at one position.

        Scales and biases have the activations' type, of ``itemsize`` bytes.
        """
        if self.bits is None:
            return head_dim * itemsize
        return head_dim * self.bits // 8 + 2 * itemsize * (head_dim // self.group_size)

    def pack(self, kv: mx.array) -> Sequence[mx.array]:
        """Quantize keys and values, or leave them as they are: ``num_arrays`` arrays."""
        return [kv] if self.bits is None else mx.quantize(kv, self.group_size, self.bits)

    def unpack(self, arrays: Sequence[mx.array]) -> mx.array:
        """Return the keys and values that were packed."""
        if self.bits is None:
            return arrays[0]
        codes, scales, biases = arrays
        return mx.dequantize(codes, scales, biases, self.group_size, self.bits)

    def matmul(self, x: mx.array, y: Sequence[mx.array], *, transpose: bool) -> mx.array:
        """Return ``x @ y`` of packed ``y``, or ``x @ y.T`` if ``transpose``."""
        if self.bits is None:
            return x @ (y[0].swapaxes(-1, -2) if transpose else y[0])
        codes, scales, biases = y
        return mx.quantized_matmul(x, codes, scales, biases, transpose, self.group_size, self.bits)

    def gather_matmul(
        self, x: mx.array, y: Sequence[mx.array], index: mx.array, *, transpose: bool
    ) -> mx.array:
        """Multiply as ``matmul`` with some matrices of ``y``, and copy none.

        ``index`` [K, n] counts the matrices of ``y`` over all its batch axes.
        """
        if self.bits is None:
            matrices = y[0].swapaxes(-1, -2) if transpose else y[0]
            return mx.gather_mm(x, matrices, rhs_indices=index)
        codes, scales, biases = y
        return mx.gather_qmm(
            x, codes, scales, biases, None, index, transpose, self.group_size, self.bits
        )


UNQUANTIZED = KVFormat()
