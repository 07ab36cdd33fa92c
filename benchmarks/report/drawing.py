"""What all pictures have alike: colours, panels, axes of contexts, and what they were taken on."""

from collections.abc import Mapping, Sequence
from typing import Any

# Okabe and Ito's, told apart by every eye; ours comes first.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#5b5b5b")
MARKS = ("o", "s", "^", "D", "v", "P", "X")
WIDTH, HEIGHT = (7.2, 11.0), 4.4  # inches, of one panel and of two
PALE = "#6f6f6f"


def panels(title: str, circumstances: Mapping[str, Any], count: int) -> tuple[Any, Any]:
    """A figure and its axes, side by side."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        1,
        count,
        figsize=(WIDTH[count > 1], HEIGHT),
        squeeze=False,
        layout="constrained",
        gridspec_kw={"wspace": 0.06},
    )
    facts = circumstances
    versions = facts.get("versions", {})
    taken = f"{facts.get('chip')}, {facts.get('cores')} cores, mlx {versions.get('mlx')}, {str(facts.get('at'))[:10]}"
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
    figure.supxlabel(f"taken on {taken}", x=0.99, ha="right", fontsize=8, color=PALE)
    for place in axes[0]:
        place.grid(axis="y", color="#e4e4e4", linewidth=0.8)
        place.set_axisbelow(True)
        place.spines[["top", "right"]].set_visible(False)
    return figure, axes[0]


def across(axes: Any, ticks: Sequence[int], label: str) -> None:
    """Tokens: a doubling is a step, and only as many are labelled as can be read."""
    axes.set_xscale("log", base=2)
    chosen: list[int] = []
    for tick in sorted(ticks, reverse=True):
        if not chosen or tick <= chosen[-1] / 1.5:
            chosen.append(tick)
    axes.set_xticks(chosen, [short(tick) for tick in chosen])
    axes.minorticks_off()
    axes.set_xlabel(label)


def short(count: float) -> str:
    """40,960 is 40k, as contexts are named."""
    return f"{count / 1024:.3g}k" if count >= 1024 else f"{count:.0f}"


def note(axes: Any, text: str, height: float, *, left: bool = False) -> None:
    """Said at an end of a horizontal line, above it."""
    place, end = (0.02, "left") if left else (1, "right")
    axes.text(
        place,
        height,
        text,
        transform=axes.get_yaxis_transform(),
        ha=end,
        va="bottom",
        fontsize=8,
        color=PALE,
    )
