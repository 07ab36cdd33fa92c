"""Saving a conversation's cache and opening it again: bytes a second, against MLX's own writer and reader."""

import gc
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from benchmarks.macs.predict import Range
from benchmarks.measure import OURS, Comparison, Lap, Stopwatch, interleave
from benchmarks.synthetic import TRUE_WIDTH
from magistral_mlx.model.cache_file import HASHERS, load_cache, save_cache
from magistral_mlx.model.kv_cache import KVCache
from magistral_mlx.model.memory import kv_bytes

SAVE, OPEN, OPEN_COLD = "save", "open", "open, out of the file cache"
PEER = "mlx, no hash, no fsync"
TOKENS = 40_960

# What opening takes on a Mac: the drive reads, then MLX copies twice, while several cores hash. Drives from the
# smallest of an M2 Air to those of M4 Pro and Max, SHA-256 in hardware on one core, and copies on one core: as
# commonly published, or guessed from the memory's bandwidth; none of them measured by us.
DRIVE = Range(1.5e9, 6.0e9)
HASH = Range(2.0e9, 2.6e9)
COPY = Range(15e9, 40e9)
COPIES = 2
OPENED = Range(  # bytes a second
    *(
        min(1 / (1 / drive + COPIES / copy), HASHERS * sha256)
        for drive, sha256, copy in (
            (DRIVE.low, HASH.low, COPY.low),
            (DRIVE.high, HASH.high, COPY.high),
        )
    )
)


@dataclass(frozen=True, slots=True)
class Prediction:
    """Opening a cache of the 24B model on a Mac; measured on none."""

    tokens: int
    kv_bits: int | None
    file_bytes: int
    open_seconds: Range

    @classmethod
    def of(cls, tokens: int, kv_bits: int | None) -> "Prediction":
        size = kv_bytes(TRUE_WIDTH, tokens, kv_bits=kv_bits)
        return cls(tokens, kv_bits, size, Range(size / OPENED.high, size / OPENED.low))

    def as_dict(self) -> dict[str, Any]:
        assumed = {"drive": asdict(DRIVE), "sha256_a_core": asdict(HASH), "copy": asdict(COPY)}
        return asdict(self) | {"is_prediction": True, "assumed_bytes_per_second": assumed}


def filled(layers: int, tokens: int, kv_bits: int | None) -> KVCache:
    """Random keys and values of the true width in bf16."""
    config = replace(TRUE_WIDTH, num_layers=layers)
    cache = KVCache(config, limit=tokens, bits=kv_bits)
    cache.reserve(tokens)
    for i, layer in enumerate(cache.layers):
        shape = (1, 2 * config.num_kv_heads, tokens, config.head_dim)
        layer.append(layer.packed(mx.random.normal(shape, mx.bfloat16, key=mx.random.key(i))))
        mx.eval(layer.buffer.arrays)
        mx.clear_cache()
    return cache


def compare_files(
    layers: int,
    tokens: int,
    kv_bits: int | None,
    repeats: int,
    work: Path,
    *,
    report: Callable[[str], None],
) -> Comparison:
    """Save and open, ours and MLX's in turn, in a folder that goes away again."""
    title = f"{layers} layers, {tokens:,} positions, {f'{kv_bits} bit' if kv_bits else 'bf16'}"
    cache, ids = filled(layers, tokens, kv_bits), list(range(tokens))
    config = replace(TRUE_WIDTH, num_layers=layers)
    with tempfile.TemporaryDirectory(prefix="magistral-cache-", dir=work) as name:
        ours, theirs = Path(name, "ours"), Path(name, "theirs.safetensors")

        def save() -> None:
            save_cache(ours, cache, ids, fingerprint="f", dtype=mx.bfloat16)

        def load() -> None:
            load_cache(ours, config, limit=tokens, fingerprint="f", bits=kv_bits, dtype=mx.bfloat16)

        def save_theirs() -> None:
            arrays = {
                f"{i}.{j}": a for i, parts in enumerate(cache.state()) for j, a in enumerate(parts)
            }
            mx.save_safetensors(str(theirs), arrays)

        def load_theirs() -> None:
            mx.eval(mx.load(str(theirs)))

        def run(
            path: Path, write: Callable[[], None], read: Callable[[], None]
        ) -> Mapping[str, Lap]:
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

        contenders = {
            OURS: lambda: run(ours, save, load),
            PEER: lambda: run(theirs, save_theirs, load_theirs),
        }
        comparison = Comparison(title, {"positions": tokens, "layers": layers, "kv_bits": kv_bits})
        for repeat, contender, laps in interleave(contenders, repeats):
            speeds = ", ".join(
                f"{phase} {lap.per_second / 1e9:.2f} GB/s" for phase, lap in laps.items()
            )
            report(f"{title}: {contender}: {speeds}{'' if repeat else ' (warm-up)'}")
            if repeat:
                comparison.add(contender, laps)
        comparison.facts["file_bytes"] = ours.stat().st_size
    return comparison


def leave_file_cache(path: Path) -> bool:
    """Let the next reader find the file on the drive alone; whether the system can be told so."""
    if not hasattr(os, "posix_fadvise"):
        return False
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return True
