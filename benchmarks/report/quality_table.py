"""How quality is shown."""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

Finding = Mapping[str, Any]


def show_quality(reference: str, found: Sequence[Finding]) -> None:
    """A row for each candidate and part of the text, then the exact answers where they were asked for."""
    title = f"Against {reference}; KL in nats a token, ± standard error between texts; ratio to the first of a size"
    table = Table(title=title, title_justify="left")
    for name in ("checkpoint", "bits", "part"):
        table.add_column(name)
    for name in ("tokens", "KL", "KL ratio", "top-1", "perplexity", "reference's"):
        table.add_column(name, justify="right")
    for one in found:
        for part, figures in one["parts"].items():
            error, ratio = figures["kl_error"], figures["kl_ratio"]
            table.add_row(
                one["title"],
                f"{one['bits_per_weight']:.2f}",
                part,
                f"{figures['tokens']:,}",
                _bounded(figures["kl"], error, figures["kl_upper_bound"]),
                ""
                if one["kl_ratio_to"] is None
                else f"{ratio['mean']:.3f} ×÷ {ratio['factor']:.2f}",
                f"{figures['top1_agreement']:.2%}",
                f"{figures['perplexity']:.4g}",
                f"{figures['reference_perplexity']:.4g}",
            )
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(table)
    if any("answers" in one for one in found):
        table = Table(title="Held-out problems answered exactly, greedily", title_justify="left")
        for name in ("checkpoint", "problems", "exact"):
            table.add_column(name)
        for one in (one for one in found if "answers" in one):
            answers = one["answers"]
            exact = f"{answers['exact']:.1%} ± {answers['exact_error']:.1%}"
            table.add_row(one["title"], str(answers["problems"]), exact)
        console.print(table)


def _bounded(kl: float, error: float | None, upper: float) -> str:
    """KL with its error, and how far the ids that were not kept could raise it, where they could."""
    shown = f"{kl:.3g}" + ("" if error is None else f" ± {error:.1g}")
    return shown if upper <= kl * 1.001 else f"{shown} (at most {upper:.3g})"
