"""Forecast which Macs Magistral Small fits, from shapes alone."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import product

from magistral_mlx.checkpoint.config import ModelConfig
from magistral_mlx.checkpoint.quant_format import FP_FORMATS, QuantFormat
from magistral_mlx.errors import MemoryLimitError
from magistral_mlx.model.footprint import kv_bytes, packed_bytes, tensor_bytes
from magistral_mlx.model.load_options import DEFAULTS, KVBits, LoadOptions
from magistral_mlx.model.mac import Mac
from magistral_mlx.model.memory import MemoryPlan, make_plan

# The published file may state more positions.
MAGISTRAL_SMALL = ModelConfig(
    hidden_size=5120,
    intermediate_size=32_768,
    num_layers=40,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    vocab_size=131_072,
    rms_norm_eps=1e-5,
    rope_theta=1e9,
    max_positions=40_960,
)
# Formats of the weights by the name of their bits; None is bf16.
FORMATS: Mapping[str, QuantFormat | None] = {
    **{str(bits): QuantFormat(bits, 64) for bits in (3, 4, 5, 6, 8)},
    "16": None,
    "mxfp4": QuantFormat(*FP_FORMATS["mxfp4"], "mxfp4"),
}
CACHES: tuple[KVBits, ...] = (16, 8, 4)
# Gigabytes of the Macs in README's table, and in the forecast of a conversion.
README_GB = (16, 18, 24, 32, 36, 48)
CONVERTER_GB = (16, 24, 32, 36, 48, 64)
# Cached positions when a speed is predicted.
SPEED_CONTEXT = 2048


@dataclass(frozen=True, slots=True)
class Forecast:
    """Forecast of Magistral Small in one format, with one cache, for one budget.

    Attributes:
        mac: None for a budget that no Mac has by default.
        bits: a name of ``FORMATS``.
        plan: None if it does not fit.
    """

    mac: Mac | None
    budget_bytes: int
    bits: str
    kv_bits: KVBits
    plan: MemoryPlan | None

    @property
    def tokens_per_second(self) -> tuple[float, float] | None:
        """Predicted decoding speed, if the chip is known and the model fits."""
        if self.mac is None or self.mac.chip is None or self.plan is None:
            return None
        return self.mac.chip.tokens_per_second(small_bytes_per_token(self.bits))


@cache
def small_bytes(bits: str) -> int:
    """Return the bytes of Magistral Small's weights in a format of ``FORMATS``."""
    return packed_bytes(MAGISTRAL_SMALL, FORMATS[bits])


def small_bytes_per_token(bits: str) -> int:
    """Return the bytes that a decoded token reads: weights but the embedding, and the cache."""
    config = MAGISTRAL_SMALL
    embedding = tensor_bytes((config.vocab_size, config.hidden_size), FORMATS[bits])
    return small_bytes(bits) - embedding + kv_bytes(config, SPEED_CONTEXT)


def plan_small(bits: str, options: LoadOptions) -> MemoryPlan:
    """Plan for Magistral Small on a Mac's GPU, see ``make_plan``.

    Raises:
        MemoryLimitError: it does not fit; the message names what fits.
    """
    return make_plan(MAGISTRAL_SMALL, small_bytes(bits), options)


def forecasts(
    budgets: Sequence[tuple[Mac | None, int]],
    formats: Sequence[str],
    caches: Sequence[KVBits],
    context: int | None = None,
) -> list[Forecast]:
    """Forecast each budget with each format and each cache, in this order.

    Args:
        budgets: Macs, and the bytes that may be used.
        formats: names of ``FORMATS``.
        caches: bits of the KV cache.
        context: the context that has to fit; by default the longest that fits.

    Raises:
        OptionError: the model has no such context.
    """
    found = []
    for (mac, budget), bits, kv_bits in product(budgets, formats, caches):
        options = LoadOptions(max_kv_size=context, kv_bits=kv_bits, memory_gb=budget / 1e9)
        try:
            plan = plan_small(bits, options)
        except MemoryLimitError:
            plan = None
        found.append(Forecast(mac, budget, bits, kv_bits, plan))
    return found


def contexts(config: ModelConfig, weights_bytes: int) -> dict[int, int | None]:
    """Forecast the context that fits beside the weights, by a Mac's gigabytes; None if none.

    A context is the tokens of prompt and reply together.
    """
    found: dict[int, int | None] = {}
    for memory_gb in CONVERTER_GB:
        options = replace(DEFAULTS, memory_gb=Mac(memory_gb).budget_bytes / 1e9)
        try:
            found[memory_gb] = make_plan(config, weights_bytes, options).context
        except MemoryLimitError:
            found[memory_gb] = None
    return found


def readme_table() -> str:
    """Return a Markdown table of the context that fits each Mac, by bits of weights and cache."""
    columns = [(bits, kv_bits) for bits in ("3", "4", "6", "8") for kv_bits in CACHES[:2]]
    heads = [f"{bits} bit" + (", 8-bit cache" if kv_bits == 8 else "") for bits, kv_bits in columns]
    lines = ["| Mac | may use | " + " | ".join(heads) + " |", "|---|---|" + "---|" * len(heads)]
    for mac in map(Mac, README_GB):
        cells = [
            "-" if one.plan is None else f"{one.plan.context:,}"
            for bits, kv_bits in columns
            for one in forecasts([(mac, mac.budget_bytes)], [bits], [kv_bits])
        ]
        budget = f"{mac.budget_bytes / 1e9:.1f} GB"
        lines.append(f"| {mac.memory_gb} GB | {budget} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
