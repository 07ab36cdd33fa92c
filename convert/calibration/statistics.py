"""What quantizing wants to know of a linear's inputs, and its file."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np

from magistral_mlx.checkpoint.safetensors import Shard
from magistral_mlx.checkpoint.safetensors_header import MLX_TYPES, header_bytes, lay_out
from magistral_mlx.convert.calibration.host import matmul
from magistral_mlx.convert.source.source import Source
from magistral_mlx.errors import NumericsError

WIDEST = 6144  # columns that share one Hessian: float64 factors of 8 blocks of 4096 are 1/8 of those of 32768
RUN = 4096  # columns of each Hessian of a wider input: a multiple of every group size
# Of a weight as it is stored: a few such blocks are in memory beside the activations.
PASS_BLOCK_BYTES = 16 * 2**20
SAFETENSORS_TYPES = {mx_type: name for name, mx_type in MLX_TYPES.items()}
READERS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}


def mean_squares(modules: Sequence[str], x: mx.array) -> mx.array:
    """E[x_j^2] ``[columns]`` of the inputs ``x`` ``[B, T, columns]`` that some linears share.

    Raises:
        NumericsError: they are not finite; names the modules.
    """
    total = mx.zeros(x.shape[-1])
    for sequence in x:  # so that no square of all of x is in memory
        total = total + mx.square(sequence.astype(mx.float32)).sum(axis=0)
        mx.eval(total)
    if not mx.isfinite(total).all().item():
        raise NumericsError(
            f"the calibration's input of {' and '.join(modules)} holds NaN or infinity: weights before it are damaged, "
            "or this model overflows float32; download the checkpoint again, or use --q-method round, which needs no "
            "forward pass"
        )
    found = total / (x.shape[0] * x.shape[1])
    mx.eval(found)  # on this thread: others read it
    return found


def runs(columns: int) -> list[slice]:
    """The columns that share a Hessian."""
    if columns <= WIDEST:
        return [slice(0, columns)]
    return [slice(start, min(start + RUN, columns)) for start in range(0, columns, RUN)]


def hessian(x: mx.array, run: slice) -> mx.array:
    """The mean over tokens of x_i x_j ``[columns of run, columns of run]``, of inputs ``[B, T, columns]``."""
    total = mx.zeros((run.stop - run.start,) * 2)
    for sequence in x[..., run]:
        total = total + matmul(sequence.T, sequence)
        mx.eval(total)
    return total / (x.shape[0] * x.shape[1])


def outlier_ratio(squares: mx.array) -> float:
    """Largest over mean of E[x_j^2]: what weighting by it can gain grows with this; 1 where no channel stands out."""
    return float(squares.max() / mx.maximum(squares.mean(), 1e-37))


def column_weights(source: Source) -> mx.array:
    """``[columns]`` float32: the summed squares by which an error in a column reaches the outputs of layer 0's linears.

    Those of the norm's weight times each linear's weights; its scale is all columns' alike. Where channels stand out,
    this and columns that count alike differ by a factor of six in the KL that a 4-bit embedding costs, and where none
    do, not at all: measured on a model of either kind. The squares of the norm's weights alone lose on the latter.
    """
    total = mx.zeros(source.config.hidden_size)
    for norm, linears in READERS.items():
        own = source.read(f"model.layers.0.{norm}.weight", slice(None)).astype(mx.float32)
        for linear in linears:
            for _, rows in source.blocks(f"model.layers.0.{linear}.weight", PASS_BLOCK_BYTES):
                total = total + mx.square(rows.astype(mx.float32) * own).sum(axis=0)
                mx.eval(total)
    return total


def to_bytes(arrays: Mapping[str, mx.array]) -> bytes:
    """A safetensors file; the same arrays give the same bytes."""
    entries = lay_out(
        {name: (SAFETENSORS_TYPES[array.dtype], array.shape) for name, array in arrays.items()}
    )
    raw = (np.array(mx.contiguous(arrays[name]).view(mx.uint8)).tobytes() for name in entries)
    return b"".join([header_bytes(entries), *raw])


def from_file(path: Path) -> dict[str, mx.array]:
    """What ``to_bytes`` wrote. Raises CheckpointError where the file is damaged."""
    shard = Shard.open(path)
    return {name: shard.read(name) for name in shard.header}
