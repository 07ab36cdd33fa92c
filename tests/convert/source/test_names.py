"""Mistral's tensor names and row order against Hugging Face's."""

import mlx.core as mx
import numpy as np
import pytest

from magistral_mlx.checkpoint.quant_format import QuantFormat
from magistral_mlx.convert.packing import quantize
from magistral_mlx.convert.source.consolidated import halves_from_pairs, is_rotated, native_name
from tests.support.tiny import make_config

WIDE = make_config(hidden_size=128, intermediate_size=384, head_dim=64, vocab_size=1500)


def same(a: mx.array, b: mx.array) -> bool:
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and bool(mx.array_equal(a.view(mx.uint8), b.view(mx.uint8)))
    )


def test_native_names_are_mistrals() -> None:
    assert native_name("model.embed_tokens.weight") == "tok_embeddings.weight"
    assert native_name("model.layers.12.self_attn.o_proj.weight") == "layers.12.attention.wo.weight"
    assert native_name("model.layers.0.mlp.down_proj.weight") == "layers.0.feed_forward.w2.weight"
    names = list(WIDE.shapes)
    assert len({native_name(name) for name in names}) == len(names)
    assert sum(map(is_rotated, names)) == 2 * WIDE.num_layers


def test_reordering_rows_turns_mistrals_rope_into_hugging_faces() -> None:
    """Check by definition: both conventions rotate the same pair of channels by the same angle."""
    heads, d = 3, 8
    # Each row holds its own number in Mistral's order, where pair i is (2i, 2i + 1).
    rows = np.arange(heads * d)
    moved = np.array(halves_from_pairs(mx.array(rows)[:, None], d))[:, 0].reshape(heads, d)
    for head in range(heads):
        # Hugging Face's pair i is (i, i + d/2).
        for pair in range(d // 2):
            assert moved[head, pair] == head * d + 2 * pair
            assert moved[head, pair + d // 2] == head * d + 2 * pair + 1


@pytest.mark.parametrize(
    "quant", [QuantFormat(4, 32), QuantFormat(3, 64), QuantFormat(4, 16, "nvfp4")]
)
def test_reordering_rows_commutes_with_quantization(quant: QuantFormat) -> None:
    weight = mx.random.normal((4 * 32, 64), key=mx.random.key(0)).astype(mx.bfloat16)
    moved_first = quantize(halves_from_pairs(weight, 32), quant)
    moved_last = {
        kind: halves_from_pairs(part, 32) for kind, part in quantize(weight, quant).items()
    }
    assert moved_first.keys() == moved_last.keys()
    assert all(same(moved_first[kind], moved_last[kind]) for kind in moved_first)
