"""What Macs should reach with the 24B model in 4 bit: arithmetic on counts and published figures, measured on none."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.synthetic import FORMAT, TRUE_WIDTH
from magistral_mlx.checkpoint.config import ModelConfig
from magistral_mlx.model.memory import kv_bytes, packed_bytes

CHECK = "python -m benchmarks speed --model magistral-4bit --peer mlx-lm --prompt-tokens {} --tokens 256"

DRAFTING = Path(__file__).parent / "results" / "drafting-counts.json"
KINDS = ("reasoning", "edits")


def counted_drafting() -> dict[str, float]:
    """What an id took with drafting, in plain passes, by kind of text: as ``benchmarks drafting`` counted it."""
    counts = json.loads(DRAFTING.read_text())["drafting"]["M4 Pro"]
    return {kind: counts[kind]["cost_per_token"] for kind in KINDS}


@dataclass(frozen=True, slots=True)
class Range:
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.low:.3g} to {self.high:.3g}"


@dataclass(frozen=True, slots=True)
class Chip:
    """A chip with all of its GPU's cores: what its maker states, and which share of that others measured."""

    name: str
    bandwidth: float  # bytes a second
    flops: float  # a second, of the matrix products that prefill consists of
    read: Range  # of the bandwidth, while decoding
    computed: Range  # of the flops, while reading a prompt


# Decode of this shape was published for M4 Pro (17.4 ids a second: 0.82) and M3 Ultra (40 to 48: 0.63 to 0.76);
# Max chips are taken as M4 Pro, less a little. Prefill: 4-bit models on an M3 Ultra, github.com/raullenchai/Rapid-MLX
# pull 585: 0.82. M5 Max: Apple states 4 times the M4 Max's, by its neural accelerators; how much of that a 4-bit
# model gets is the widest guess here. flops: github.com/huggingface/huggingface.js, hardware.ts.
CHIPS = (
    Chip("M4 Pro", 273e9, 9.2e12, Range(0.78, 0.84), Range(0.65, 0.85)),
    Chip("M4 Max", 546e9, 18.4e12, Range(0.74, 0.84), Range(0.65, 0.85)),
    Chip("M5 Max", 614e9, 4 * 18.4e12, Range(0.74, 0.84), Range(0.4, 0.8)),
    Chip("M3 Ultra", 819e9, 28.2e12, Range(0.63, 0.76), Range(0.65, 0.85)),
)


@dataclass(frozen=True, slots=True)
class Prediction:
    """One chip's figures for a prompt and the reply after it."""

    chip: Chip
    per_second: Range  # ids decoded, without drafting
    drafted: dict[str, Range]  # the same with drafting, by kind of text
    first_token_seconds: Range
    pass_seconds: Range  # what a pass for the prompt's last id alone would add to that


def predict(chip: Chip, prompt_tokens: int, drafting: Mapping[str, float]) -> Prediction:
    """``drafting``: cost of an id in plain passes, by kind of text, where the cost of rows is that of M3 to M5."""
    read = weights_bytes(TRUE_WIDTH) + kv_bytes(TRUE_WIDTH, prompt_tokens)
    seconds = Range(
        read / (chip.bandwidth * chip.read.high), read / (chip.bandwidth * chip.read.low)
    )
    work = prompt_tokens * flops_per_token(TRUE_WIDTH, prompt_tokens / 2)
    prompt = Range(
        work / (chip.flops * chip.computed.high), work / (chip.flops * chip.computed.low)
    )
    return Prediction(
        chip,
        per_second=Range(1 / seconds.high, 1 / seconds.low),
        drafted={
            kind: Range(1 / seconds.high / cost, 1 / seconds.low / cost)
            for kind, cost in drafting.items()
        },
        first_token_seconds=Range(max(prompt.low, seconds.low), max(prompt.high, seconds.high)),
        pass_seconds=seconds,
    )


def weights_bytes(config: ModelConfig) -> float:
    """Bytes of weights that one id reads: all but the embedding, of which it reads a row."""
    D, V = config.hidden_size, config.vocab_size
    return packed_bytes(config, FORMAT) - sum(
        V
        * D
        // (1 if kind == "weight" else FORMAT.group_size)
        * (FORMAT.bits / 8 if kind == "weight" else 2)
        for kind in FORMAT.packed_shapes((V, D))
    )


def flops_per_token(config: ModelConfig, context: float) -> float:
    """Floating-point operations to read one id with ``context`` before it; the head only counts for the last."""
    layers = sum(
        rows * columns
        for name, (rows, columns) in ((n, s) for n, s in config.shapes.items() if len(s) == 2)
        if name.startswith("model.layers.")
    )
    return 2 * layers + 4 * config.num_layers * config.num_heads * config.head_dim * context


def as_dict(prediction: Prediction, prompt_tokens: int) -> dict[str, Any]:
    def ends(interval: Range) -> list[float]:
        return [interval.low, interval.high]

    return {
        "chip": prediction.chip.name,
        "prompt_tokens": prompt_tokens,
        "is_prediction": True,
        "decode_per_second": ends(prediction.per_second),
        "decode_per_second_drafted": {
            kind: ends(drafted) for kind, drafted in prediction.drafted.items()
        },
        "first_token_seconds": ends(prediction.first_token_seconds),
        "saved_pass_seconds": ends(prediction.pass_seconds),
        "checked_by": CHECK.format(prompt_tokens),
    }
