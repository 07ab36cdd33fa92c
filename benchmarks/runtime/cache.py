"""Saving a conversation's cache and opening it again, against MLX's own writer and reader."""

import gc
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import mlx.core as mx

from benchmarks.measure import OURS, Comparison, Lap, Run, Stopwatch
from benchmarks.synthetic import TRUE_WIDTH
from magistral_mlx.model.cache_file import load_cache, save_cache
from magistral_mlx.model.kv_cache import KVCache
from magistral_mlx.model.kv_format import KVFormat

SAVE, OPEN, OPEN_COLD = "save", "open", "open, out of the file cache"
PEER = "mlx, no hash, no fsync"
TOKENS = 40_960


def filled(layers: int, tokens: int, kv_bits: int | None) -> KVCache:
    """Return a cache of the true width with random keys and values in bf16."""
    config = replace(TRUE_WIDTH, num_layers=layers)
    kv_format = KVFormat.of(kv_bits, config.head_dim)
    cache = KVCache(config, limit=tokens, kv_format=kv_format)
    cache.reserve(tokens)
    for i, layer in enumerate(cache.layers):
        shape = (1, 2 * config.num_kv_heads, tokens, config.head_dim)
        values = mx.random.normal(shape, mx.bfloat16, key=mx.random.key(i))
        layer.append(layer.format.pack(values))
        mx.eval(layer.buffer.arrays)
        mx.clear_cache()
    return cache


def compare_files(
    layers: int, tokens: int, kv_bits: int | None, repeats: int, work: Path
) -> Comparison:
    """Save and open by ours and by MLX in turn, in a temporary folder below ``work``."""
    kv_format = KVFormat.of(kv_bits, TRUE_WIDTH.head_dim)
    cache, ids = filled(layers, tokens, kv_bits), list(range(tokens))
    config = replace(TRUE_WIDTH, num_layers=layers)
    with tempfile.TemporaryDirectory(prefix="magistral-cache-", dir=work) as name:
        ours, theirs = Path(name, "ours"), Path(name, "theirs.safetensors")

        def save() -> None:
            save_cache(ours, cache, ids, fingerprint="f", dtype=mx.bfloat16)

        def load() -> None:
            load_cache(
                ours, config, limit=tokens, fingerprint="f", kv_format=kv_format, dtype=mx.bfloat16
            )

        def save_theirs() -> None:
            state = enumerate(cache.state())
            arrays = {f"{i}.{j}": a for i, parts in state for j, a in enumerate(parts)}
            mx.save_safetensors(str(theirs), arrays)

        def load_theirs() -> None:
            mx.eval(mx.load(str(theirs)))

        title = f"{layers} layers, {tokens:,} positions, {f'{kv_bits} bit' if kv_bits else 'bf16'}"
        comparison = Comparison(title, {"positions": tokens, "layers": layers, "kv_bits": kv_bits})
        contenders = {OURS: _run(ours, save, load), PEER: _run(theirs, save_theirs, load_theirs)}
        comparison.run(contenders, repeats)
        comparison.facts["file_bytes"] = ours.stat().st_size
    return comparison


def _run(path: Path, write: Callable[[], None], read: Callable[[], None]) -> Run:
    def run() -> Mapping[str, Lap]:
        found = {}
        for phase, act in ((SAVE, write), (OPEN, read), (OPEN_COLD, read)):
            if phase == OPEN_COLD and not leave_file_cache(path):
                continue
            gc.collect()
            mx.clear_cache()
            watch = Stopwatch()
            act()
            found[phase] = watch.lap(path.stat().st_size)
        return found

    return run


def leave_file_cache(path: Path) -> bool:
    """Drop a file from the system's file cache; return False if the system cannot."""
    if not hasattr(os, "posix_fadvise"):
        return False
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return True
