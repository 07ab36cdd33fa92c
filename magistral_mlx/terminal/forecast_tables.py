"""Tables of what fits a Mac, and a plan in words."""

from collections.abc import Sequence

from magistral_mlx.errors import in_units
from magistral_mlx.model.mac import Mac
from magistral_mlx.model.mac_table import SPEED_CONTEXT, Forecast, small_bytes
from magistral_mlx.model.memory import MemoryPlan
from magistral_mlx.terminal.table import Table

NAME = "Magistral Small"
LONGEST = "Each cell is the longest context that fits: prompt plus reply, in tokens."
NEEDED = "Each cell is the memory in GB that a context of {:,} tokens needs."
CELLS = '"-" means that it does not fit. "kv 8" is an 8-bit KV cache (--kv-bits 8).'
CALCULATED = "Calculated from shapes, not measured on a Mac."
SPEED = f"tok/s: predicted decoding after {SPEED_CONTEXT:,} tokens, without drafting."


def of_macs(found: Sequence[Forecast], this: Mac | None, context: int | None) -> Table:
    """Lay out a row for each Mac, and a column for each format of weights and cache."""
    columns = list(dict.fromkeys((one.bits, one.kv_bits) for one in found))
    budgets = list(dict.fromkeys((one.mac, one.budget_bytes) for one in found))
    rows = []
    for i, (mac, budget) in enumerate(budgets):
        assert mac is not None
        mark = "* " if mac == this else ""
        cells = found[i * len(columns) : (i + 1) * len(columns)]
        rows.append([f"{mark}{mac.memory_gb} GB", f"{budget / 1e9:.1f}", *_cells(cells, context)])
    headings = [f"{weights(bits)}\n{_cache(kv_bits)}" for bits, kv_bits in columns]
    marked = next((i for i, (mac, _) in enumerate(budgets) if mac == this), None)
    return Table(f"{NAME} on Macs", ["Mac", "may\nuse GB", *headings], rows, marked=marked)


def of_one_mac(found: Sequence[Forecast], context: int | None) -> Table:
    """Lay out a row for each format of the weights, and a column for each cache."""
    mac, budget = found[0].mac, found[0].budget_bytes
    caches = list(dict.fromkeys(one.kv_bits for one in found))
    rows = []
    for i in range(0, len(found), len(caches)):
        cells = found[i : i + len(caches)]
        size = f"{small_bytes(cells[0].bits) / 1e9:.1f}"
        speeds = [one.tokens_per_second for one in cells]
        row = [weights(cells[0].bits), size, *_cells(cells, context)]
        if mac is not None and mac.chip is not None:
            row.append(next((in_range(speed) for speed in speeds if speed is not None), "-"))
        rows.append(row)
    where = "" if mac is None else f" on {mac.name}"
    headings = ["weights", "GB", *map(_cache, caches)]
    headings += ["tok/s"] if mac is not None and mac.chip is not None else []
    return Table(f"{NAME}{where}: {in_units(budget)} may be used", headings, rows)


def legend(found: Sequence[Forecast], context: int | None) -> list[str]:
    """Return the sentences that say what the cells are."""
    has_speed = any(one.tokens_per_second for one in found)
    first = LONGEST if context is None else NEEDED.format(context)
    return [first, CELLS, *([SPEED] if has_speed else []), CALCULATED]


def in_words(
    plan: MemoryPlan, heading: str, speed: tuple[float, float] | None, *, has_chip: bool = False
) -> str:
    """Format a plan that fits as a table."""
    cache = f"{plan.kv_bits}-bit KV cache" if plan.kv_bits else "KV cache"
    rows = [
        ("weights", plan.weights_bytes),
        (f"{cache}, context {plan.context:,}", plan.kv_bytes),
        (f"workspace, {plan.prefill_chunk:,} tokens a pass", plan.workspace_bytes),
        *([("draft model and its cache", plan.draft_bytes)] if plan.draft_bytes else []),
        ("together", plan.total_bytes),
        ("may be used", plan.budget_bytes),
    ]
    width = max(len(name) for name, _ in rows)
    lines = [f"{heading}: a context of {plan.context:,} tokens fits"]
    lines += [f"{name:<{width}}  {size / 1e9:8.3f} GB" for name, size in rows]
    if speed is not None:
        lines.append(f"{in_range(speed)} tokens a second, predicted after {SPEED_CONTEXT:,} tokens")
    elif has_chip:
        lines.append("no speed is predicted: this model is too small for the bandwidth to decide")
    return "\n".join(lines)


def in_range(speed: tuple[float, float]) -> str:
    """Return a range of speeds."""
    low, high = speed
    return f"{low:.1f} to {high:.1f}"


def _cells(found: Sequence[Forecast], context: int | None) -> list[str]:
    def cell(plan: MemoryPlan | None) -> str:
        if plan is None:
            return "-"
        return f"{plan.context:,}" if context is None else f"{plan.total_bytes / 1e9:.1f}"

    return [cell(one.plan) for one in found]


def weights(bits: str) -> str:
    """Return the name of a format of the weights."""
    return f"{bits} bit" if bits.isdigit() else bits


def _cache(kv_bits: int) -> str:
    return f"kv {kv_bits}"
