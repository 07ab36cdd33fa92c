"""The single pictures: speed and memory against context, quality against size, score against budget."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

# Okabe and Ito's, told apart by every eye; ours comes first.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#5b5b5b")
MARKS = ("o", "s", "^", "D", "v", "P", "X")
SIZE = (7.2, 4.4)  # inches
PALE = "#8a8a8a"
Results = Mapping[str, Any]


def budget_figure(results: Sequence[Results]) -> Any:
    """Score against the budget of tokens, its standard error shaded, and the card's figure as a line."""
    results = [result for result in results if "reasoning" in result]
    tasks = [task for result in results for task in result["reasoning"]]
    if not tasks:
        return None
    figure, axes = _axes("Score against the budget of tokens", results, "tokens a reply may take", "pass@1, percent")
    for i, task in enumerate(tasks):
        rows = _rising(task["against_budget"])
        budgets = [row["budget"] for row in rows]
        scores = [100 * row["pass_at_1"] for row in rows]
        errors = [100 * (row["standard_error"] or 0) for row in rows]
        label = f"{task['title']}, {task['problems']} problems x {task['samples'] / task['problems']:g}"
        axes.plot(budgets, scores, color=COLOURS[i % 7], marker=MARKS[i % 7], label=label)
        low = [max(0, score - error) for score, error in zip(scores, errors, strict=True)]
        high = [min(100, score + error) for score, error in zip(scores, errors, strict=True)]
        axes.fill_between(budgets, low, high, color=COLOURS[i % 7], alpha=0.15, linewidth=0)
        if task["card_percent"] is not None:
            axes.axhline(task["card_percent"], color=COLOURS[i % 7], linestyle=":", linewidth=1)
            _note(axes, f"the card's, {task['card_percent']:g}", task["card_percent"])
    axes.set_ylim(0, 102)
    _contexts(axes, sorted({row["budget"] for task in tasks for row in _rising(task["against_budget"])}))
    axes.legend(frameon=False, loc="best")
    return figure


def _rising(rows: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    """Without the last budget, that of the run, where a much smaller one gave as much."""
    if len(rows) > 1 and rows[-1]["pass_at_1"] == rows[-2]["pass_at_1"] and rows[-1]["budget"] > 2 * rows[-2]["budget"]:
        return rows[:-1]
    return rows


def _axes(title: str, results: Sequence[Results], x: str, y: str) -> tuple[Any, Any]:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=SIZE)
    facts = results[0]["circumstances"]
    axes.set_title(title, loc="left", fontweight="bold", pad=22)
    made = f"{facts['chip']}, {facts['cores']} cores, mlx {facts['versions']['mlx']}, {facts['at'][:10]}"
    axes.text(0, 1.02, made, transform=axes.transAxes, color=PALE, fontsize=8, va="bottom")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(axis="y", color="#e4e4e4", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _contexts(axes: Any, ticks: Sequence[int]) -> None:
    """A doubling is a step; only as many labels as can be read."""
    axes.set_xscale("log", base=2)
    apart = [tick for i, tick in enumerate(ticks) if i == 0 or tick >= 1.5 * ticks[i - 1] or tick == ticks[-1]]
    if len(apart) > 1 and apart[-1] < 1.3 * apart[-2]:
        del apart[-2]
    axes.set_xticks(apart, [_short(tick) for tick in apart])
    axes.minorticks_off()


def _short(count: float) -> str:
    return f"{count / 1024:.3g}k" if count >= 1024 else f"{count:.0f}"


def _note(axes: Any, text: str, height: float) -> None:
    """Said at a horizontal line's right end, above it."""
    axes.text(1, height, text, transform=axes.get_yaxis_transform(), ha="right", va="bottom", fontsize=8, color=PALE)


PICTURES: dict[str, Callable[[Sequence[Results]], Any]] = {"score-against-budget": budget_figure}
