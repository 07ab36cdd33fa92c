"""Compute statistics of a linear's inputs for quantizing; save and read them.

Letters: B sequences, T tokens in each, m columns (input channels) of the linear.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np

from magistral_mlx.checkpoint.safetensors import Shard
from magistral_mlx.checkpoint.safetensors_header import TYPE_NAMES, header_bytes, lay_out
from magistral_mlx.convert.calibration.host import matmul
from magistral_mlx.convert.source.source import Source
from magistral_mlx.errors import NumericsError, named

# Most columns that share one Hessian. A wider input gets a Hessian for every 4096 columns, a
# multiple of every group size: eight float64 factors of 4096 take an eighth of one of 32768.
MAX_HESSIAN_COLUMNS, RUN_COLUMNS = 6144, 4096
# Stored bytes per read: a few such blocks are in memory beside the activations.
PASS_BLOCK_BYTES = 16 * 2**20
# The linears of a layer that read the output of each norm.
READERS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}


def mean_squares(modules: Sequence[str], x: mx.array) -> mx.array:
    """Return E[x_j^2] ``[m]`` of inputs ``x`` ``[B, T, m]`` that some linears share.

    Raises:
        NumericsError: the inputs are not finite. The message names the modules.
    """
    total = mx.zeros(x.shape[-1])
    # One sequence at a time, so that memory never holds the squares of all of x.
    for sequence in x:
        total = total + mx.square(sequence.astype(mx.float32)).sum(axis=0)
        mx.eval(total)
    if not mx.isfinite(total).all().item():
        raise NumericsError(
            f"the calibration's input of {' and '.join(modules)} holds NaN or infinity: weights "
            "before it are damaged, or this model overflows float32; download the checkpoint "
            f"again, or use {named('q_method', 'round')}, which needs no forward pass"
        )
    found = total / (x.shape[0] * x.shape[1])
    # Other threads read the result, so it is computed here.
    mx.eval(found)
    return found


def runs(columns: int) -> list[slice]:
    """Return the runs of columns that share a Hessian."""
    if columns <= MAX_HESSIAN_COLUMNS:
        return [slice(0, columns)]
    starts = range(0, columns, RUN_COLUMNS)
    return [slice(start, min(start + RUN_COLUMNS, columns)) for start in starts]


def hessian(x: mx.array, run: slice) -> mx.array:
    """Return the mean over tokens of x_i x_j ``[r, r]`` for r columns of ``x`` ``[B, T, m]``."""
    total = mx.zeros((run.stop - run.start,) * 2)
    for sequence in x[..., run]:
        total = total + matmul(sequence.T, sequence)
        mx.eval(total)
    return total / (x.shape[0] * x.shape[1])


def outlier_ratio(squares: mx.array) -> float:
    """Return the largest E[x_j^2] over the mean: 1 if no channel stands out."""
    return float(squares.max() / mx.maximum(squares.mean(), 1e-37))


def column_weights(source: Source) -> mx.array:
    """Return a weight ``[D]`` float32 for each column of an embedding that has no inputs.

    It is the summed square by which an error in the column reaches the outputs of layer 0's
    linears: the norm's weight times each linear's weights. The norm's scale is left out because
    all columns share it. Measured on two models: where channels stand out, the KL divergence of a
    4-bit embedding is a sixth of that with equal weights; where none do, it is the same. The
    squares of the norm's weights alone lose on the latter.
    """
    total = mx.zeros(source.config.hidden_size)
    for norm, linears in READERS.items():
        scale = source.read(f"model.layers.0.{norm}.weight", slice(None)).astype(mx.float32)  # [D]
        for linear in linears:
            for _, rows in source.blocks(f"model.layers.0.{linear}.weight", PASS_BLOCK_BYTES):
                total = total + mx.square(rows.astype(mx.float32) * scale).sum(axis=0)
                mx.eval(total)
    return total


def to_bytes(arrays: Mapping[str, mx.array]) -> bytes:
    """Return the bytes of a safetensors file that depend on the arrays alone."""
    entries = lay_out(
        {name: (TYPE_NAMES[array.dtype], array.shape) for name, array in arrays.items()}
    )
    raw = (np.array(mx.contiguous(arrays[name]).view(mx.uint8)).tobytes() for name in entries)
    return b"".join([header_bytes(entries), *raw])


def from_file(path: Path) -> dict[str, mx.array]:
    """Read arrays from ``to_bytes``; raise CheckpointError if the file is damaged."""
    shard = Shard.open(path)
    return {name: shard.read(name) for name in shard.header}
