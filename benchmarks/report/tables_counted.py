"""What the benchmarks print of what is counted, graded, predicted or judged."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.macs.claims import Judgement
from benchmarks.macs.predict import CHECK, Prediction
from benchmarks.measure import OURS
from benchmarks.report.compare import Change
from benchmarks.report.tables import RATIO, as_text, new_table, show
from benchmarks.runtime.budget import SHARES
from benchmarks.runtime.graph import GraphComparison


def show_graphs(comparison: GraphComparison) -> None:
    table = new_table(
        f"One decode step, {comparison.title}; counted, not timed",
        ("who",),
        (
            "primitives, CPU",
            "kernels, GPU",
            "kernels a layer",
            "primitives, ours over theirs",
            "kernels",
        ),
    )
    for name, graph in comparison.graphs.items():
        counts = (
            str(graph.primitives.total()),
            str(graph.kernels.total()),
            f"{graph.kernels_per_layer:.2f}",
        )
        ratios = ("", "") if name == OURS else (f"{ratio:.3f}" for ratio in comparison.ratios(name))
        table.add_row(name, *counts, *ratios)
    show(table)


def show_drafting(found: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> None:
    figures = (
        "tokens",
        "passes",
        "cost a token, in plain passes",
        "highest of a reply",
        "goal, at most",
    )
    table = new_table(
        "Drafting from the text so far; counted, not timed", ("cost of rows", "text"), figures
    )
    for name, kinds in found.items():
        for kind, row in kinds.items():
            keys = ("tokens", "passes", "cost_per_token", "highest_of_a_reply", "goal")
            table.add_row(name, kind, *(str(row[key]) for key in keys))
    show(table)


def show_predictions(predictions: Sequence[Prediction], prompt_tokens: int) -> None:
    kinds = list(predictions[0].drafted)
    table = new_table(
        f"Prediction, measured on no Mac: Magistral Small in 4 bit after {prompt_tokens:,} tokens of prompt",
        ("chip",),
        (
            "decode, tok/s",
            *(f"drafting, {kind}" for kind in kinds),
            "first token, s",
            "a pass more would add, s",
        ),
    )
    for prediction in predictions:
        drafted = (str(prediction.drafted[kind]) for kind in kinds)
        table.add_row(
            prediction.chip.name,
            str(prediction.per_second),
            *drafted,
            str(prediction.first_token_seconds),
            str(prediction.pass_seconds),
        )
    show(table)
    print(f"On such a Mac this checks it: {CHECK.format(prompt_tokens)}")


def show_reasoning(found: Mapping[str, Any]) -> None:
    """One task: its score beside the card's, then against the budget."""

    def percent(share: float | None) -> str:
        return "-" if share is None else f"{100 * share:.2f}"

    card = "-" if found["card_percent"] is None else f"{found['card_percent']:.2f}"
    table = new_table(
        f"{found['title']}, pass@1 in percent; the card's is of Magistral Small 2506 in bf16",
        ("problems", "replies"),
        (
            "pass@1",
            "standard error",
            "by the seeds alone",
            "the card's",
            "cut off",
            "looped",
            "no answer",
            "tokens",
        ),
    )
    shares = (percent(found[key]) for key in ("cut_off", "looped", "no_answer"))
    errors = (percent(found[key]) for key in ("pass_at_1", "standard_error", "sampling_error"))
    counts = (str(found["problems"]), str(found["samples"]))
    table.add_row(*counts, *errors, card, *shares, f"{found['median_completion_tokens']:,}")
    show(table)
    table = new_table(
        "Against the budget of tokens, trace and answer", ("budget",), ("pass@1", "standard error")
    )
    for row in found["against_budget"]:
        table.add_row(
            f"{row['budget']:,}", percent(row["pass_at_1"]), percent(row["standard_error"])
        )
    show(table)


def show_changes(changes: Sequence[Change], margin: float, *, everything: bool) -> None:
    """Those that moved by more than the margin, or at all where they are counted; regressions first."""
    moved = [c for c in changes if c.is_regression or not 1 - margin < c.ratio.median < 1 + margin]
    table = new_table(
        f"B against A; over 1 is better; {RATIO}",
        ("figure",),
        ("A", "B", "ratio", "the machine", ""),
    )
    for change in sorted(
        changes if everything else moved, key=lambda c: (not c.is_regression, c.name)
    ):
        verdict = "worse" if change.is_regression else "" if change.is_ours else "not ours"
        ratio = as_text(change.ratio)
        machine = "" if change.machine == 1 else f"{change.machine:.3g}"
        table.add_row(
            change.name, f"{change.before:.4g}", f"{change.after:.4g}", ratio, machine, verdict
        )
    if table.row_count:
        show(table)
    worse = sum(change.is_regression for change in changes)
    print(
        f"{len(changes)} figures in both; {worse or 'none'} worse beyond noise and {100 * margin:g} %"
    )


def show_judgements(chip: str, judgements: Sequence[Judgement]) -> None:
    table = new_table(
        f"Predictions about this Mac: {chip}",
        ("what", "unit"),
        ("predicted", "measured", "", "said in"),
    )
    for one in judgements:
        predicted = "-" if one.claim.predicted is None else str(one.claim.predicted)
        measured = one.claim.needs or "-" if one.measured is None else f"{one.measured:.4g}"
        table.add_row(
            one.claim.name, one.claim.unit, predicted, measured, one.verdict, one.claim.said_in
        )
    show(table)
    counts = Counter(one.verdict for one in judgements)
    print(", ".join(f"{count} {verdict}" for verdict, count in counts.items()))


def show_budgets(found: Mapping[str, Any]) -> None:
    """Right answers by where a budget ends a trace, and by the closing tag's probability at the end of a line."""
    title = f"Right answers to {found['traces']} problems, embedded model, temperature {found['temperature']:g}"
    shares = [f"{share:.0%}" for share in SHARES]
    table = new_table(
        f"{title}; budgets in tokens of the trace without one",
        ("a line is enough",),
        [*shares, "in all"],
    )
    for row in found["budgets"]:
        where = "never" if row["threshold"] > 1 else f"from {row['threshold']:g}"
        table.add_row(where, *map(str, row["right"]), str(sum(row["right"])))
    show(table)
    table = new_table(
        "Closed at the end of a line", ("probability of the tag",), ("places", "right")
    )
    for row in found["places"]:
        where = "anywhere inside a line" if row["from"] is None else f"from {row['from']:g}"
        table.add_row(where, f"{row['places']:,}", f"{row['right']:,}")
    show(table)
