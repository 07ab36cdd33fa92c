"""The forward pass against float64 NumPy, and the laws of the cache."""

import mlx.core as mx
import numpy as np
import pytest

from magistral_mlx.checkpoint.config import ModelConfig
from magistral_mlx.errors import ContextError, OptionError
from magistral_mlx.model.kv_cache import KVCache
from magistral_mlx.model.kv_format import KVFormat
from magistral_mlx.model.transformer import Transformer
from tests.support.reference import forward
from tests.support.tiny import fill, make_config, make_weights

AWKWARD = {
    "d above D / H": make_config(),
    "d below D / H": make_config(hidden_size=128, head_dim=16, num_heads=6, num_kv_heads=3),
    "one head": make_config(num_heads=1, num_kv_heads=1, head_dim=64, num_layers=1),
    "one kv head, tied": make_config(num_kv_heads=1, tie_word_embeddings=True),
    "small theta": make_config(rope_theta=10_000.0, vocab_size=257),
}


def relative_error(ours: mx.array, reference: np.ndarray) -> float:
    return float(
        np.linalg.norm(np.array(ours, dtype=np.float64) - reference) / np.linalg.norm(reference)
    )


@pytest.mark.parametrize("config", AWKWARD.values(), ids=AWKWARD.keys())
def test_logits_equal_the_float64_forward_pass(config: ModelConfig) -> None:
    weights = make_weights(config)
    model = fill(Transformer(config), config, weights)
    ids = [1, 17, 256, 3, 3, 90, 255, 8, 11]
    reference = forward({n: np.array(w) for n, w in weights.items()}, config, ids)
    assert relative_error(model(mx.array([ids]))[0], reference) <= 1e-5


@pytest.mark.slow
def test_logits_at_true_width_equal_the_float64_forward_pass() -> None:
    config = make_config(
        hidden_size=5120,
        intermediate_size=32768,
        num_layers=2,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        vocab_size=512,
    )
    weights = make_weights(config)
    model = fill(Transformer(config), config, weights)
    reference = forward({n: np.array(w) for n, w in weights.items()}, config, [1, 500, 3, 77, 4])
    assert relative_error(model(mx.array([[1, 500, 3, 77, 4]]))[0], reference) <= 1e-5


@pytest.fixture
def model(tiny_config: ModelConfig) -> Transformer:
    return fill(Transformer(tiny_config), tiny_config, make_weights(tiny_config))


IDS = mx.array([[5, 6, 7, 300, 9, 10, 11, 12, 5, 5, 201]])


@pytest.mark.parametrize("split", [1, 5, 10])
@pytest.mark.parametrize(("bits", "tolerance"), [(None, 1e-5), (8, 0.05), (4, 0.8)])
def test_a_cached_pass_equals_a_pass_at_once(
    model: Transformer, tiny_config: ModelConfig, split: int, bits: int | None, tolerance: float
) -> None:
    cache = KVCache(tiny_config, limit=11, kv_format=KVFormat.of(bits, tiny_config.head_dim))
    parts = [model(IDS[:, :split], cache.layers), model(IDS[:, split:], cache.layers)]
    assert mx.abs(mx.concatenate(parts, axis=1) - model(IDS)).max() <= tolerance


@pytest.mark.parametrize("bits", [8, 4])
def test_a_single_query_on_packed_keys_equals_the_dequantized_view(
    model: Transformer, tiny_config: ModelConfig, bits: int
) -> None:
    """One query multiplies packed arrays, two attend to a dequantized view: the same numbers."""
    one, two = (
        KVCache(tiny_config, limit=11, kv_format=KVFormat.of(bits, tiny_config.head_dim))
        for _ in range(2)
    )
    model(IDS[:, :9], one.layers)
    single = [model(IDS[:, 9:10], one.layers), model(IDS[:, 10:], one.layers)]
    model(IDS[:, :9], two.layers)
    assert mx.allclose(mx.concatenate(single, axis=1), model(IDS[:, 9:], two.layers), atol=1e-4)


@pytest.mark.parametrize("bits", [None, 8, 4])
def test_trim_then_append_equals_fresh(
    model: Transformer, tiny_config: ModelConfig, bits: int | None
) -> None:
    used, fresh = (
        KVCache(tiny_config, limit=300, kv_format=KVFormat.of(bits, tiny_config.head_dim))
        for _ in range(2)
    )
    for ids in (IDS[:, :4], mx.array([[1, 2, 3]])):
        model(ids, used.layers)
    used.trim(3)
    model(IDS[:, :4], fresh.layers)
    assert mx.array_equal(model(IDS[:, 4:], used.layers), model(IDS[:, 4:], fresh.layers))
    assert used.length == fresh.length == 11


def test_capacity_doubles_in_multiples_of_256_up_to_the_limit(tiny_config: ModelConfig) -> None:
    cache = KVCache(tiny_config, limit=1000)
    growth = [(1, 0), (257, 256), (513, 512), (900, 512), (3, 256)]
    assert [cache.capacity_for(n, c) for n, c in growth] == [
        256, 512, 1000, 1000, 256,
    ]  # fmt: skip
    with pytest.raises(ContextError, match="1001"):
        cache.capacity_for(1001, 512)


def test_reserve_allocates_at_once_and_growth_keeps_what_is_there(
    model: Transformer, tiny_config: ModelConfig
) -> None:
    cache, reserved = KVCache(tiny_config, limit=700), KVCache(tiny_config, limit=700)
    reserved.reserve(600)
    long = mx.random.randint(0, 320, (1, 520), key=mx.random.key(1))
    for start in range(0, 520, 200):
        model(long[:, start : start + 200], cache.layers)
    model(long[:, :3], reserved.layers)
    position_bytes = 2 * 3 * 2 * 32 * 4
    assert reserved.nbytes == 700 * position_bytes
    assert cache.nbytes == 700 * position_bytes
    assert mx.allclose(
        model(mx.array([[4]]), cache.layers)[0, 0],
        model(mx.concatenate([long, mx.array([[4]])], 1))[0, -1],
        atol=1e-4,
    )
    with pytest.raises(ContextError, match="701"):
        cache.reserve(701)


def test_options_of_the_cache_are_checked(tiny_config: ModelConfig) -> None:
    with pytest.raises(OptionError, match="kv_bits is 3"):
        KVCache(tiny_config, limit=10, kv_format=KVFormat.of(3, tiny_config.head_dim))
    with pytest.raises(OptionError, match="cannot trim 1 of 0"):
        KVCache(tiny_config, limit=10).trim(1)


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize("position", [0, 1, 4095])
def test_the_heads_of_one_position_are_the_same_bits_in_decode_and_prefill(
    model: Transformer, dtype: mx.Dtype, position: int
) -> None:
    attention = model.layers[0].self_attn
    attention.set_dtype(dtype)
    width = attention.qkv_proj.parts[0].weight.shape[1]
    x = mx.random.normal((2, 1, width), key=mx.random.key(1)).astype(dtype)
    decoded, prefilled = attention.decode_heads(x, position), attention.prefill_heads(x, position)
    assert decoded[0].dtype == dtype
    for one, other in zip(decoded, prefilled, strict=True):
        assert mx.array_equal(one, other)
