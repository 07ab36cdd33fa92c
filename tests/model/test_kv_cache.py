"""Memory of a cache while it grows, is written and is read: itself, and one layer more."""

import gc
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest

from magistral_mlx.model.cache_file import load_cache, save_cache
from magistral_mlx.model.kv_cache import KVCache
from magistral_mlx.model.kv_format import KVFormat
from tests.support.tiny import make_config

LAYERS = 8
CONFIG = make_config(num_layers=LAYERS, num_kv_heads=2, head_dim=64)
SLACK = 40_000  # bytes: of a file's header, of Python's


def filled(length: int, bits: int | None, *, limit: int = 1024) -> KVCache:
    cache = KVCache(CONFIG, limit=limit, kv_format=KVFormat.of(bits, CONFIG.head_dim))
    append(cache, length)
    return cache


def append(cache: KVCache, count: int) -> None:
    for i, layer in enumerate(cache.layers):
        kv = mx.random.normal((1, 4, count, CONFIG.head_dim), key=mx.random.key(i))
        layer.append(layer.format.pack(kv))
    mx.eval(cache.arrays)


def peak_above(act: Callable[[], object]) -> int:
    """Return MLX's peak above what it held before."""
    gc.collect()
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    act()
    return mx.get_peak_memory() - before


@pytest.mark.parametrize("bits", [None, 8, 4])
def test_a_cache_grows_a_layer_at_a_time(bits: int | None) -> None:
    cache = filled(512, bits)
    expected = [[mx.array(a) for a in layer] for layer in cache.state()]
    mx.eval(expected)
    old = cache.nbytes
    peak = peak_above(lambda: append(cache, 1))
    assert cache.nbytes == 2 * old
    assert (
        old <= peak <= old + old / LAYERS + SLACK
    )  # the new one is there, and one old layer beside it
    cache.trim(1)
    pairs = zip(expected, cache.state(), strict=True)
    assert all(
        mx.array_equal(a, b) for before, after in pairs for a, b in zip(before, after, strict=True)
    )


@pytest.mark.parametrize("bits", [None, 8, 4])
def test_a_cache_is_written_and_read_a_layer_at_a_time(tmp_path: Path, bits: int | None) -> None:
    cache, file = filled(1000, bits), tmp_path / "cache"
    ids = [i % CONFIG.vocab_size for i in range(1000)]
    assert (
        peak_above(lambda: save_cache(file, cache, ids, fingerprint="f", dtype=mx.float32))
        <= cache.nbytes / LAYERS + SLACK
    )
    loaded: list[KVCache] = []

    def read() -> None:
        loaded.append(
            load_cache(
                file,
                CONFIG,
                limit=1024,
                fingerprint="f",
                kv_format=KVFormat.of(bits, CONFIG.head_dim),
                dtype=mx.float32,
            )[0]
        )

    assert peak_above(read) <= cache.nbytes * (1 + 2 / LAYERS) + SLACK
    assert loaded[0].nbytes == cache.nbytes
    pairs = zip(cache.state(), loaded[0].state(), strict=True)
    assert all(
        mx.array_equal(a, b) for before, after in pairs for a, b in zip(before, after, strict=True)
    )
    names = mx.load(str(file), format="safetensors")  # MLX's own reader finds the same
    assert isinstance(names, dict)
    assert mx.array_equal(names["layer.7.0"], cache.state()[7][0])
    assert names["ids"].tolist() == ids


@pytest.mark.parametrize("bits", [None, 8])
def test_a_cache_that_is_dropped_is_gone_at_once(bits: int | None) -> None:
    gc.collect()
    gc.disable()
    try:
        before = mx.get_active_memory()
        cache = filled(256, bits)
        assert mx.get_active_memory() - before >= cache.nbytes
        del cache
        assert mx.get_active_memory() == before
    finally:
        gc.enable()
