"""Costs of passes over several rows, in plain passes: measured once a checkpoint and device.

A plain pass has one row and is queued before the id of the pass before it is read.
"""

import hashlib
import json
import math
import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib import metadata

import mlx.core as mx
import numpy as np

from magistral_mlx.checkpoint.config import ModelConfig
from magistral_mlx.files import cache_dir
from magistral_mlx.generation.decoding import Stepper
from magistral_mlx.generation.drafting import MAX_ROWS
from magistral_mlx.generation.params import SamplingParams
from magistral_mlx.generation.sampling import Sampler
from magistral_mlx.model.kv_cache import KVCache
from magistral_mlx.model.transformer import Transformer

# Numbers of rows that are measured; the costs between them are interpolated.
ROWS = (1, 2, 3, 4, 6, 8)
ROUNDS = 3
# Plain passes in a row, each queued before the one before it is read.
PLAIN_PASSES = 4
# No further round begins after this.
SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class RowCosts:
    """Costs of passes that are waited for, in plain passes.

    Attributes:
        plain_seconds: duration of a plain pass; 0 if it was not measured.
        passes: the cost of M rows at M - 1.
    """

    plain_seconds: float
    passes: tuple[float, ...]

    @classmethod
    def from_json(cls, text: str) -> "RowCosts":
        """Read costs from JSON.

        Raises:
            ValueError: the text is no JSON, or no table of costs.
            KeyError: a field is missing.
            TypeError: a field has another type.
        """
        found = json.loads(text)
        costs = cls(float(found["plain_seconds"]), tuple(float(cost) for cost in found["passes"]))
        numbers = (costs.plain_seconds, *costs.passes)
        if (
            len(costs.passes) != MAX_ROWS
            or not all(math.isfinite(x) for x in numbers)
            or min(numbers) <= 0
        ):
            raise ValueError(f"{text} is no table of row costs")
        return costs


# A CPU takes the rows of a matmul one after the other. It is not timed: the time that a small model
# loses between its kernels would make a second row look cheap, and the machine's load would decide
# whether ids are guessed.
LINEAR = RowCosts(0.0, tuple(float(rows) for rows in range(1, MAX_ROWS + 1)))


def row_costs(model: Transformer, config: ModelConfig, fingerprint: str) -> RowCosts:
    """Return the costs for this device, version of MLX and checkpoint.

    They come from the cache folder, or are measured and kept there.
    """
    if mx.default_device().type == mx.DeviceType.cpu:
        return LINEAR
    info = mx.device_info()
    key = [fingerprint, metadata.version("mlx"), *(f"{name} {info[name]}" for name in sorted(info))]
    return remembered(key, lambda: measure(model, config))


def remembered(key: list[str], make: Callable[[], RowCosts]) -> RowCosts:
    """Return the costs kept under ``key``; make and keep them if there are none to read."""
    name = hashlib.sha256("\n".join(key).encode()).hexdigest()[:32]
    file = cache_dir() / "row-costs" / f"{name}.json"
    with suppress(OSError, ValueError, KeyError, TypeError):
        return RowCosts.from_json(file.read_text("utf-8"))
    costs = make()
    # Without a cache folder the costs are measured again the next time.
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps(asdict(costs)) + "\n", "utf-8")
        partial.replace(file)
    return costs


def measure(
    model: Transformer, config: ModelConfig, *, clock: Callable[[], float] = time.perf_counter
) -> RowCosts:
    """Time a few passes of every kind, sampling included; the fastest of each kind counts.

    A round has about 25 passes, and one round compiles kernels: 2 to 4 seconds on a Mac for the 24B
    model in 4 bit.
    """
    step = Stepper(model, KVCache(config, limit=min(config.max_positions, 256)))
    sampler = Sampler(SamplingParams(), 0)

    def draw(rows: int) -> mx.array:
        return sampler.draw_run(step(mx.zeros((1, rows), mx.int32), rows), 0)

    def plain() -> float:
        started, token = clock(), draw(1)
        for _ in range(PLAIN_PASSES - 1):
            following = sampler.draw_run(step(mx.maximum(token, 0)[None]), 0)
            mx.async_eval(following)
            token.item()
            token = following
        token.item()
        step.cache.trim(PLAIN_PASSES)
        return (clock() - started) / PLAIN_PASSES

    def waited(rows: int) -> float:
        started = clock()
        draw(rows).tolist()
        elapsed = clock() - started
        step.cache.trim(rows)
        return elapsed

    begun = clock()
    times: list[list[float]] = []
    for rounds in range(ROUNDS + 1):
        times.append([plain(), *(waited(rows) for rows in ROWS)])
        if rounds and clock() - begun > SECONDS:
            break
    fastest = np.array(times[1:]).min(axis=0)
    # Another row cannot cost less than none.
    costs = np.maximum.accumulate(np.maximum(fastest[1:] / fastest[0], 1.0))
    return RowCosts(
        float(fastest[0]), tuple(float(x) for x in np.interp(range(1, MAX_ROWS + 1), ROWS, costs))
    )
