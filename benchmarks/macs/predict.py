"""Predictions for Magistral Small in 4 bit on Macs, and their check against a Mac's result files.

They are arithmetic on counts and published figures. None of them was measured by us.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.measure import OURS
from benchmarks.synthetic import FORMAT, TRUE_WIDTH
from magistral_mlx.checkpoint.config import ModelConfig
from magistral_mlx.errors import OptionError
from magistral_mlx.model.cache_file import HASHERS
from magistral_mlx.model.footprint import kv_bytes, packed_bytes
from magistral_mlx.model.mac import CHIPS as MAC_CHIPS

DRAFTING = Path(__file__).parents[1] / "results" / "drafting-counts.json"
KINDS = ("reasoning", "edits")
SAME_MODEL = 0.02  # weights read a token may differ by as much


@dataclass(frozen=True, slots=True)
class Range:
    """A predicted range."""

    low: float
    high: float

    def __str__(self) -> str:
        return " to ".join(f"{bound:#.3g}".rstrip(".") for bound in (self.low, self.high))

    def __truediv__(self, divisor: float) -> "Range":
        return Range(self.low / divisor, self.high / divisor)

    def inverse(self) -> "Range":
        return Range(1 / self.high, 1 / self.low)


@dataclass(frozen=True, slots=True)
class Chip:
    """A chip with all its GPU cores.

    Attributes:
        bandwidth: bytes a second, by its maker.
        flops: a second, of the matrix products of a prefill.
        read: share of the bandwidth that others measured while decoding.
        computed: share of the flops that others measured during a prefill.
    """

    name: str
    bandwidth: float
    flops: float
    read: Range
    computed: Range


def _chip(name: str, flops: float, computed: Range) -> Chip:
    """Return a chip with the bandwidth of its fastest version."""
    known = MAC_CHIPS[name]
    return Chip(name, known.bandwidths[-1], flops, Range(*known.share), computed)


# Bandwidths and shares of them are those that `magistral plan` uses: magistral_mlx/model/mac.py.
# Prefill: 4-bit models on an M3 Ultra, github.com/raullenchai/Rapid-MLX pull 585: 0.82. M5 Max:
# Apple states 4 times the M4 Max's, by its neural accelerators, and the share that a 4-bit model
# gets is the widest guess here. Flops: github.com/huggingface/huggingface.js, hardware.ts.
CHIPS = (
    _chip("M4 Pro", 9.2e12, Range(0.65, 0.85)),
    _chip("M4 Max", 18.4e12, Range(0.65, 0.85)),
    _chip("M5 Max", 4 * 18.4e12, Range(0.4, 0.8)),
    _chip("M3 Ultra", 28.2e12, Range(0.65, 0.85)),
)

# Predictions that no chip is named in. Opening a cache's file, in bytes a second: the drive reads,
# then MLX copies twice, while several cores hash. Drives from the smallest of an M2 Air to those of
# M4 Pro and Max, SHA-256 and copies on one core: as published, or guessed from the bandwidth.
COPIES = 2
OPENING = Range(
    *(
        min(1 / (1 / drive + COPIES / copy), HASHERS * sha256)
        for drive, copy, sha256 in ((1.5e9, 15e9, 2.0e9), (6.0e9, 40e9, 2.6e9))
    )
)
OVER_MLX_LM = Range(0.98, 1.1)  # decode, of the same checkpoint
REPLIES, REPLIES_AT_ONCE = 8, Range(2.8, 3.6)  # speed over one by one, on M3 and later
FORECAST = Range(0.95, 1.05)  # the plan's over the measured memory of a prefill


@dataclass(frozen=True, slots=True)
class Prediction:
    """One chip's figures for a prompt and the reply after it.

    ``drafted`` is ``per_second`` with drafting, by kind of text. ``pass_seconds`` is the time of a
    pass over the weights, which a separate pass for the prompt's last id would add.
    """

    chip: Chip
    per_second: Range
    drafted: dict[str, Range]
    first_token_seconds: Range
    pass_seconds: Range


def counted_drafting() -> dict[str, float]:
    """Return the cost of an id with drafting in plain passes, by kind of text, as counted."""
    counts = json.loads(DRAFTING.read_text())["drafting"]["M4 Pro"]
    return {kind: counts[kind]["cost_per_token"] for kind in KINDS}


def predict(chip: Chip, prompt_tokens: int, drafting: Mapping[str, float]) -> Prediction:
    """Predict one chip; ``drafting`` is the cost of an id in plain passes, by kind of text."""
    read = weights_bytes(TRUE_WIDTH) + kv_bytes(TRUE_WIDTH, prompt_tokens)
    seconds = (chip.read / (read / chip.bandwidth)).inverse()
    work = prompt_tokens * flops_per_token(TRUE_WIDTH, prompt_tokens / 2)
    prompt = (chip.computed / (work / chip.flops)).inverse()
    per_second = seconds.inverse()
    return Prediction(
        chip,
        per_second=per_second,
        drafted={kind: per_second / cost for kind, cost in drafting.items()},
        first_token_seconds=Range(max(prompt.low, seconds.low), max(prompt.high, seconds.high)),
        pass_seconds=seconds,
    )


def weights_bytes(config: ModelConfig) -> float:
    """Return the bytes of weights that one id reads: all but the embedding."""
    D, V = config.hidden_size, config.vocab_size
    bits = FORMAT.bits + 2 * 16 / FORMAT.group_size  # a group has a scale and a bias
    return packed_bytes(config, FORMAT) - V * D * bits / 8


def flops_per_token(config: ModelConfig, context: float) -> float:
    """Return the operations to read one id after ``context`` others, without the head."""
    layers = sum(
        shape[0] * shape[1]
        for name, shape in config.shapes.items()
        if len(shape) == 2 and name.startswith("model.layers.")
    )
    return 2 * layers + 4 * config.num_layers * config.num_heads * config.head_dim * context


@dataclass(frozen=True, slots=True)
class Check:
    """One prediction beside the value that a Mac measured."""

    name: str
    predicted: Range
    measured: float

    @property
    def has_held(self) -> bool:
        return self.predicted.low <= self.measured <= self.predicted.high


def read_results(folder: Path) -> list[dict[str, Any]]:
    """Read the result files in a folder.

    Raises:
        OptionError: there are none of a Mac with Apple silicon, or one is damaged.
    """
    try:
        found = [json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))]
        found = [
            one for one in found if one.get("circumstances", {}).get("chip", "")[:5] == "Apple"
        ]
    except (ValueError, AttributeError, OSError) as error:
        raise OptionError(f"{folder} has a file that is no result ({error!r}); move it") from None
    if not found:
        raise OptionError(
            f"{folder} has no results of a Mac; take them there with: python -m benchmarks all "
            f"--out {folder} --model ~/magistral-4bit --peer mlx-lm"
        )
    return found


def checks(results: Sequence[Mapping[str, Any]]) -> Iterator[Check]:
    """Yield every prediction that the results of a Mac have a figure for."""
    for one in results:
        name = one["circumstances"]["chip"].removeprefix("Apple ")
        chip = next((chip for chip in CHIPS if chip.name == name), None)
        rows = one.get("speed", [])
        models = [row for row in rows if _is_magistral(row)]
        titles = {f"{row['title']}, {REPLIES} replies" for row in models}
        for row in models:
            tokens = row["workload"]["prompt_tokens"]
            decode = _speeds(row, "decode")
            if chip is not None:
                predicted = predict(chip, tokens, {})
                seconds = tokens / _speeds(row, "prefill")[OURS]
                yield Check(f"decode after {tokens:,}, tok/s", predicted.per_second, decode[OURS])
                yield Check(f"prompt of {tokens:,}, s", predicted.first_token_seconds, seconds)
            if "mlx-lm" in decode:
                ratio = decode[OURS] / decode["mlx-lm"]
                yield Check(f"decode after {tokens:,}, over mlx-lm's", OVER_MLX_LM, ratio)
        for row in (row for row in rows if row["title"] in titles):
            ours, alone = _speeds(row, "ids of all").values()
            yield Check(
                f"{REPLIES} replies at once, over one by one", REPLIES_AT_ONCE, ours / alone
            )
        for row in one.get("cache", []):
            phase = next(p for p in ("open, out of the file cache", "open") if p in row["repeats"])
            speed = _speeds(row, phase)[OURS] / 1e9
            yield Check(f"opening a cache of {row['title']}, GB/s", OPENING / 1e9, speed)
        for row in one.get("memory", []):
            if "forecast_over_measured_in_all" in row:
                title = f"forecast/measured, {row['title']}, prompt of {row['prompt_tokens']:,}"
                yield Check(title, FORECAST, row["forecast_over_measured_in_all"])


def _is_magistral(row: Mapping[str, Any]) -> bool:
    weights = row.get("bytes_per_token", 0)
    return abs(weights / weights_bytes(TRUE_WIDTH) - 1) < SAME_MODEL


def _speeds(row: Mapping[str, Any], phase: str) -> dict[str, float]:
    """Return the median speed of every contender."""
    return {
        name: median(lap["count"] / lap["seconds"] for lap in laps)
        for name, laps in row["repeats"][phase].items()
    }
