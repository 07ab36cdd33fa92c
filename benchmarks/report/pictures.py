"""The single pictures: speed and memory against context, quality against size, score against budget."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.measure import OURS
from benchmarks.report.drawing import COLOURS, MARKS, across, note, panels
from benchmarks.synthetic import FORMAT
from magistral_mlx.model.load_options import KVBits, LoadOptions
from magistral_mlx.model.mac_table import MAC_GB, MAGISTRAL_SMALL, mac_budget_bytes
from magistral_mlx.model.memory import make_plan, packed_bytes

Results = Mapping[str, Any]
INSIDE = {"trace": "inside the trace", "answer": "inside the answer"}
CACHES: dict[KVBits | None, str] = {None: "float cache", 8: "8-bit cache", 4: "4-bit cache"}
FORECAST_CONTEXTS = (512, 1024, 2048, 4096, 8192, 16_384, 24_576, 32_768, 40_960)
LEAST_GB = 10  # a measured model this large is drawn beside the sizes of Macs
MARKED_GB = (24, 32, 36)


def speed_figure(results: Sequence[Results]) -> Any:
    """Prefill and decode against context: of each contender the median, and its slowest and fastest repeat."""
    results = [result for result in results if "speed" in result]
    rows = [
        row for result in results for row in result["speed"] if "decode" in row.get("repeats", {})
    ]
    titles = [row["title"] for row in rows]
    title = max(titles, key=titles.count, default="")
    rows = [row for row in rows if row["title"] == title]
    if len(rows) < 2:
        return None
    figure, axes = panels(f"Speed against context: {title}", results[0]["circumstances"], 2)
    contexts = [
        row["workload"]["prompt_tokens"] + row["workload"]["decode_tokens"] + 1 for row in rows
    ]
    for place, phase in zip(axes, ("prefill", "decode"), strict=True):
        for i, name in enumerate(rows[0]["repeats"][phase]):
            taken = [
                row["repeats"][phase].get(name) for row in rows
            ]  # None: it did not take part at this context
            speeds = [[lap["count"] / lap["seconds"] for lap in laps] for laps in taken if laps]
            where = [context for context, laps in zip(contexts, taken, strict=True) if laps]
            middle = np.array([np.median(several) for several in speeds])
            spread = np.abs(np.array([[min(s), max(s)] for s in speeds]).T - middle)
            place.errorbar(
                where, middle, spread, color=COLOURS[i], marker=MARKS[i], capsize=3, label=name
            )
        place.set_title(phase, fontsize=10, loc="left")
        place.set_ylabel("tokens a second")
        place.set_ylim(bottom=0)
        across(place, contexts, "context, tokens")
    axes[0].legend(frameon=False)
    return figure


def memory_figure(results: Sequence[Results]) -> Any:
    """What a prefill was measured to take, and what the plan forecasts of Magistral Small, with the sizes of Macs."""
    results = [result for result in results if "memory" in result]
    rows = [
        row for result in results for row in result["memory"] if "peak_bytes_above_weights" in row
    ]
    if len({row["plan"]["context"] for row in rows}) < 2:
        return None
    figure, (here, forecast) = panels("Memory against context", results[0]["circumstances"], 2)
    unit, name = (1e9, "GB") if max(_total(row, OURS) for row in rows) > 2e9 else (1e6, "MB")
    for i, (bits, kind) in enumerate(CACHES.items()):
        some = [row for row in rows if row["plan"]["kv_bits"] == bits]
        for who, line in (("mlx-lm", "--"), (OURS, "-")):
            several = [row for row in some if who in row["peak_bytes_above_weights"]]
            tokens = [row["plan"]["context"] for row in several]
            sizes = [_total(row, who) / unit for row in several]
            label = kind if who == OURS else None
            here.plot(
                tokens, sizes, line, color=COLOURS[i], marker=MARKS[i], markersize=5, label=label
            )
        planned = [
            sum(row["plan"][f"{part}_bytes"] for part in ("weights", "kv", "workspace")) / unit
            for row in some
        ]
        here.plot(
            [row["plan"]["context"] for row in some],
            planned,
            "x",
            color="black",
            markersize=7,
            zorder=3,
        )
    here.plot([], [], "--", color="black", label="the same, mlx-lm's")
    here.plot([], [], "x", color="black", label="forecast of ours")
    here.set_title(
        f"measured here: {rows[0]['title'].rpartition(', ')[0]}", fontsize=10, loc="left"
    )
    here.set_ylabel(f"peak with weights, {name}")
    here.set_ylim(bottom=0)
    across(here, sorted({row["plan"]["context"] for row in rows}), "context, tokens")
    if unit == 1e9 and max(_total(row, OURS) for row in rows) > LEAST_GB * 1e9:
        _mark_macs(here)
    here.legend(frameon=False, fontsize=8)
    _forecast(forecast)
    return figure


def _total(row: Mapping[str, Any], who: str) -> float:
    return float(row["plan"]["weights_bytes"] + row["peak_bytes_above_weights"][who])


def _forecast(axes: Any) -> None:
    weights = packed_bytes(MAGISTRAL_SMALL, FORMAT)
    for i, (bits, kind) in enumerate(CACHES.items()):
        plans = [
            make_plan(
                MAGISTRAL_SMALL,
                weights,
                LoadOptions(max_kv_size=tokens, kv_bits=bits, memory_gb=1000),
            )
            for tokens in FORECAST_CONTEXTS
        ]
        sizes = [plan.total_bytes / 1e9 for plan in plans]
        axes.plot(
            FORECAST_CONTEXTS,
            sizes,
            ":",
            color=COLOURS[i],
            marker=MARKS[i],
            markersize=4,
            label=kind,
        )
    axes.set_title("forecast, measured on no Mac: Magistral Small, 4 bit", fontsize=10, loc="left")
    axes.set_ylabel("GB")
    axes.set_ylim(10, 28)
    across(axes, FORECAST_CONTEXTS, "context, tokens")
    _mark_macs(axes)
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(0, 0.62))


def _mark_macs(axes: Any) -> None:
    for size in MAC_GB:
        if size in MARKED_GB:
            budget = mac_budget_bytes(size) / 1e9
            axes.axhline(budget, color="black", linewidth=0.8, alpha=0.5)
            note(axes, f"a Mac of {size} GB may use {budget:.1f}", budget, left=True)


def quality_figure(results: Sequence[Results]) -> Any:
    """KL per token against bits a weight, in traces and in answers."""
    results = [result for result in results if "quality" in result]
    found = [one for result in results for one in result["quality"]["candidates"]]
    if not found:
        return None
    parts = [part for part in found[0]["parts"] if part != "all"]
    figure, axes = panels("Quality against size", results[0]["circumstances"], len(parts))
    for place, part in zip(axes, parts, strict=True):
        for i, one in enumerate(sorted(found, key=lambda one: one["title"])):
            scores = one["parts"][part]
            style = {
                "color": COLOURS[i % len(COLOURS)],
                "marker": MARKS[(i + i // len(COLOURS)) % len(MARKS)],
            }
            error = scores["kl_error"] or 0
            place.errorbar(
                one["bits_per_weight"],
                scores["kl"],
                error,
                capsize=3,
                linestyle="",
                label=one["title"],
                **style,
            )
        place.set_title(INSIDE.get(part, part), fontsize=10, loc="left")
        place.set_xlabel("bits a weight")
        place.set_ylabel("KL to the reference, nats a token")
        place.margins(x=0.2, y=0.15)
        place.set_yscale("log")
    axes[-1].legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def budget_figure(results: Sequence[Results]) -> Any:
    """Score against the budget of tokens, its standard error shaded, and the card's figure as a line."""
    results = [result for result in results if "reasoning" in result]
    tasks = [task for result in results for task in result["reasoning"]]
    if not tasks:
        return None
    figure, (axes,) = panels("Score against the budget of tokens", results[0]["circumstances"], 1)
    for i, task in enumerate(tasks):
        rows = _rising(task["against_budget"])
        budgets = [row["budget"] for row in rows]
        scores = [100 * row["pass_at_1"] for row in rows]
        errors = [100 * (row["standard_error"] or 0) for row in rows]
        label = (
            f"{task['title']}, {task['problems']} problems x {task['samples'] / task['problems']:g}"
        )
        if task["card_percent"] is not None:
            label += f" (dotted: the card's {task['card_percent']:g})"
        axes.plot(budgets, scores, color=COLOURS[i % 7], marker=MARKS[i % 7], label=label)
        low = [max(0, score - error) for score, error in zip(scores, errors, strict=True)]
        high = [min(100, score + error) for score, error in zip(scores, errors, strict=True)]
        axes.fill_between(budgets, low, high, color=COLOURS[i % 7], alpha=0.15, linewidth=0)
        if task["card_percent"] is not None:
            axes.axhline(task["card_percent"], color=COLOURS[i % 7], linestyle=":", linewidth=1)
    axes.set_ylim(0, 102)
    axes.set_ylabel("pass@1, percent")
    across(
        axes,
        sorted({row["budget"] for task in tasks for row in _rising(task["against_budget"])}),
        "tokens a reply may take",
    )
    axes.legend(frameon=False, loc="best")
    return figure


def _rising(rows: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    """Without the last budget, that of the run, where a much smaller one gave as much."""
    if (
        len(rows) > 1
        and rows[-1]["pass_at_1"] == rows[-2]["pass_at_1"]
        and rows[-1]["budget"] > 2 * rows[-2]["budget"]
    ):
        return rows[:-1]
    return rows


PICTURES: dict[str, Callable[[Sequence[Results]], Any]] = {
    "speed-against-context": speed_figure,
    "memory-against-context": memory_figure,
    "quality-against-size": quality_figure,
    "score-against-budget": budget_figure,
}
