"""Bytes that weights, caches and one pass take, by their shapes."""

from collections import Counter
from math import prod

from magistral_mlx.checkpoint.config import ModelConfig
from magistral_mlx.checkpoint.folder import Checkpoint
from magistral_mlx.checkpoint.quant_format import QuantFormat, Shape
from magistral_mlx.checkpoint.safetensors_header import FLOATS, itemsize
from magistral_mlx.errors import OptionError
from magistral_mlx.model.kv_format import KVFormat

# Head sizes of MLX's attention kernel for Metal; for others it builds a score matrix.
FUSED_HEAD_DIMS = (64, 80, 128)


def kv_bytes(
    config: ModelConfig, tokens: int, *, kv_bits: int | None = None, itemsize: int = 2
) -> int:
    """Return the bytes that the KV cache holds for ``tokens`` positions.

    Keys and values are ``[L, K, tokens, d]``: 160 KiB a token for Magistral Small in bf16. Packed
    ones have a scale and a bias of ``itemsize`` bytes for each group.

    Raises:
        OptionError: ``tokens`` is over ``config.max_positions``, or ``kv_bits`` is impossible.

    Source: https://arxiv.org/abs/2305.13245 (grouped-query attention).
    """
    if tokens > config.max_positions:
        raise OptionError(f"{tokens} positions are asked for; the model has {config.max_positions}")
    row = KVFormat.of(kv_bits, config.head_dim).row_bytes(config.head_dim, itemsize)
    return 2 * config.num_layers * config.num_kv_heads * row * tokens


def workspace_bytes(
    config: ModelConfig,
    chunk: int,
    context: int,
    *,
    itemsize: int,
    on_gpu: bool,
    kv_bits: int | None = None,
) -> int:
    """Return the bytes that a pass of ``chunk`` ids needs beside weights and cache.

    The pass ends at ``context`` positions. MLX runs about ten operations ahead of the device, and
    their outputs are held together: most activations of one layer; almost two layers' keys and
    values, unpacked, of a packed cache; and float32 scores [H, chunk, context] if attention is not
    fused, as on a CPU. The share of each width was measured on a CPU, in models of four layers and
    more; with two layers it is less, as the last layer reads few positions.

    Sampling comes later and holds a few times the logits. A cache that grows holds one layer twice,
    between passes.
    """
    D, F, H, K, d = (
        config.hidden_size,
        config.intermediate_size,
        config.num_heads,
        config.num_kv_heads,
        config.head_dim,
    )
    activations = int(chunk * (7 * D + 3 * F + 7.4 * (H + K) * d) * itemsize)
    unpacked = 0 if kv_bits is None else int(1.85 * 2 * K * context * d * itemsize)
    is_fused = on_gpu and d in FUSED_HEAD_DIMS
    # Scores in fp32, and a mask of one byte.
    scores = 0 if is_fused else (4 * H + 1) * chunk * context
    logits = 48 * config.vocab_size
    layer = kv_bytes(config, context, kv_bits=kv_bits, itemsize=itemsize) // config.num_layers
    return max(activations + unpacked + scores, logits, layer)


def loaded_bytes(checkpoint: Checkpoint, *, on_gpu: bool) -> int:
    """Return the bytes of the loaded weights; on a CPU those not packed become float32."""
    return sum(
        entry.nbytes
        if on_gpu or entry.dtype not in FLOATS
        else entry.nbytes // itemsize(entry.dtype) * 4
        for shard in checkpoint.shards
        for entry in shard.header.values()
    )


def packed_bytes(config: ModelConfig, quant: QuantFormat | None) -> int:
    """Return the bytes of a checkpoint with all matrices packed as ``quant``, the rest in bf16.

    Without a format, all is in bf16.
    """
    # All layers have the same few shapes.
    counts = Counter(config.shapes.values())
    return sum(count * tensor_bytes(shape, quant) for shape, count in counts.items())


def tensor_bytes(shape: Shape, quant: QuantFormat | None) -> int:
    """Return the bytes of a tensor: a matrix that is packed as ``quant``, or bf16."""
    if quant is None or len(shape) == 1:
        return 2 * prod(shape)
    # Affine scales and biases are of 16 bits, the scales of other modes of 8.
    sizes = {"weight": 4, "scales": 2 if quant.mode == "affine" else 1, "biases": 2}
    return sum(sizes[kind] * prod(packed) for kind, packed in quant.packed_shapes(shape).items())


def bytes_per_token(checkpoint: Checkpoint) -> int:
    """Return the stored bytes of weights that one decoded id reads: all but the embedding."""
    if checkpoint.config.tie_word_embeddings:
        return checkpoint.nbytes
    return checkpoint.nbytes - sum(
        entry.nbytes
        for shard in checkpoint.shards
        for name, entry in shard.header.items()
        if name.startswith("model.embed_tokens.")
    )


def draft_bytes(draft: Checkpoint, tokens: int, *, on_gpu: bool) -> int:
    """Return the bytes of a draft model: its weights, and a cache for ``tokens`` positions.

    The cache is never longer than the draft model's own context.
    """
    positions = min(tokens, draft.config.max_positions)
    cache = kv_bytes(draft.config, positions, itemsize=activation_bytes(draft, on_gpu=on_gpu))
    return loaded_bytes(draft, on_gpu=on_gpu) + cache


def activation_bytes(checkpoint: Checkpoint, *, on_gpu: bool) -> int:
    """Return the bytes of one value of the activations' type."""
    stored = {entry.dtype for shard in checkpoint.shards for entry in shard.header.values()}
    return max(map(itemsize, stored & FLOATS)) if on_gpu else 4
