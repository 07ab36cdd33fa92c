"""Forecast which Macs Magistral Small fits, from shapes alone."""

from magistral_mlx.checkpoint.config import ModelConfig
from magistral_mlx.checkpoint.quant_format import QuantFormat
from magistral_mlx.errors import MemoryLimitError
from magistral_mlx.model.footprint import packed_bytes
from magistral_mlx.model.load_options import KVBits, LoadOptions
from magistral_mlx.model.memory import make_plan

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
MAC_GB = (16, 24, 32, 36, 48, 64)


def mac_budget_bytes(memory_gb: int) -> int:
    """Return the working set that a Mac with ``memory_gb`` GiB recommends by default.

    Two thirds up to 36 GB, three quarters above: read off published logs of Macs with 16, 32 and
    64 GB, and assumed for the others. A Mac itself is asked for its own.
    """
    return memory_gb * 2**30 * 2 // 3 if memory_gb <= 36 else memory_gb * 2**30 * 3 // 4


def contexts(config: ModelConfig, weights_bytes: int) -> dict[int, int | None]:
    """Forecast the context that fits beside the weights, by a Mac's gigabytes; None if none.

    A context is the tokens of prompt and reply together.
    """
    found: dict[int, int | None] = {}
    for memory_gb in MAC_GB:
        options = LoadOptions(memory_gb=mac_budget_bytes(memory_gb) / 1e9)
        try:
            found[memory_gb] = make_plan(config, weights_bytes, options).context
        except MemoryLimitError:
            found[memory_gb] = None
    return found


def mac_table(config: ModelConfig = MAGISTRAL_SMALL) -> str:
    """Return a Markdown table of the context that fits each Mac, by bits of weights and cache."""
    weights = {bits: packed_bytes(config, QuantFormat(bits, 64)) for bits in (4, 6, 8)}
    caches: tuple[KVBits | None, ...] = (None, 8)
    columns = [(bits, kv_bits) for bits in weights for kv_bits in caches]
    heads = [f"{bits} bit" + (", 8-bit cache" if kv_bits else "") for bits, kv_bits in columns]
    lines = ["| Mac | may use | " + " | ".join(heads) + " |", "|---|---|" + "---|" * len(heads)]
    for memory_gb in MAC_GB:
        budget = mac_budget_bytes(memory_gb)
        cells = []
        for bits, kv_bits in columns:
            try:
                options = LoadOptions(kv_bits=kv_bits, memory_gb=budget / 1e9)
                plan = make_plan(config, weights[bits], options)
                cells.append(f"{plan.context:,}")
            except MemoryLimitError:
                cells.append("-")
        lines.append(f"| {memory_gb} GB | {budget / 1e9:.1f} GB | " + " | ".join(cells) + " |")
    return "\n".join(lines)
