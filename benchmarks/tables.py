"""What the benchmarks print: a row a contender."""

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx
from rich.console import Console
from rich.table import Table

from benchmarks.bridge import Felt
from benchmarks.budget import SHARES
from benchmarks.cache import Prediction as CacheFile
from benchmarks.claims import Judgement
from benchmarks.compare import Change
from benchmarks.graph import GraphComparison
from benchmarks.measure import OURS, Comparison, Finding, Interval
from benchmarks.predict import CHECK, Prediction
from benchmarks.samples import Held

RATIO = "ratio with 95 % interval"
TIMES = f"{OURS}, times as fast"


def show_speeds(chip: str, comparisons: Sequence[Comparison], bandwidth: float | None = None) -> None:
    """``bandwidth``: this machine's own, in bytes a second."""
    table = _table(
        f"{chip}, {mx.default_device()}; median (slowest to fastest repeat); {RATIO}",
        ("what", "context", "phase", "who"),
        ("a second", "weights and cache read", "of the bandwidth", "CPU ms each", TIMES),
    )
    for comparison in comparisons:
        workload = comparison.facts.get("workload", {})
        context = f"{workload['prompt_tokens']:,}" if "prompt_tokens" in workload else ""
        for phase, name, per_second, cpu_seconds, ratio in comparison.rows():
            read = _bytes_per_second(comparison, per_second) if phase == "decode" else None
            table.add_row(
                comparison.title,
                context,
                phase,
                name,
                _interval(per_second),
                "" if read is None else f"{read / 1e9:.3g} GB/s",
                "" if read is None or bandwidth is None else f"{read / bandwidth:.0%}",
                f"{1000 * cpu_seconds:.3g}",
                _times(ratio),
            )
        table.add_section()
    _print(table)


def _bytes_per_second(comparison: Comparison, per_second: Interval) -> float:
    facts = comparison.facts
    return per_second.median * float(facts["bytes_per_token"] + facts["kv_bytes_per_token"])


def show_findings(findings: Sequence[Finding]) -> None:
    for one in findings:
        if "bytes_per_second" in one.facts:
            print(f"{one.title} ({one.facts['by']}): {one.facts['bytes_per_second'] / 1e9:.2f} GB/s")
        else:
            print(f"{one.title}: {one.facts['passes_per_token']:.3f} ({one.facts['tokens']} tokens)")


def show_conversions(chip: str, comparison: Comparison) -> None:
    repeats, quantization = comparison.facts["workload"]["repeats"], comparison.facts["quantization"]
    table = _table(
        f"{comparison.title}, {comparison.facts['source']['bytes'] / 1e9:.2f} GB, to "
        f"{quantization['bits']} bit by {quantization['method']} on {chip}; median of {repeats}, highest peak; {RATIO}",
        ("who",),
        ("seconds", "until on disk", "CPU s", "GB/s", "peak above imports", "written", "tensors", TIMES),
    )
    for _, name, per_second, _, ratio in comparison.rows():
        facts = comparison.facts["contenders"][name]
        gigabytes = Interval(per_second.median / 1e9, per_second.low / 1e9, per_second.high / 1e9)
        table.add_row(
            name,
            f"{facts['seconds']:.2f}",
            f"{facts['seconds_and_sync']:.2f}",
            f"{facts['cpu_seconds']:.2f}",
            _interval(gigabytes),
            f"{facts['peak_bytes_above_interpreter'] / 1e6:,.0f} MB",
            f"{facts['output_bytes'] / 1e6:,.0f} MB",
            "the same" if facts["same_tensors"] else f"{len(facts['different_tensors'])} differ",
            _times(ratio),
        )
    _print(table)


def show_memory(
    chip: str, comparisons: Sequence[Comparison], footprints: Sequence[Finding], answers: Sequence[Finding]
) -> None:
    table = _table(
        f"Prefill on {chip}; highest peak above the weights; {RATIO}",
        ("what", "prompt", "who"),
        ("tokens/s", "peak", "ours of theirs", "forecast/measured", "in all", "logits error", TIMES),
    )
    for comparison in comparisons:
        for _, name, per_second, _, ratio in comparison.rows():
            facts = comparison.facts
            share = facts["ours_over_theirs"].get(name)
            forecasts = (facts["forecast_over_measured"], facts["forecast_over_measured_in_all"])
            own = ("", "", "")
            if name == OURS:
                own = (f"{forecasts[0]:.3f}", f"{forecasts[1]:.3f}", f"{facts['logits_error']:.2%}")
            peak = f"{facts['peak_bytes_above_weights'][name] / 1e6:,.0f} MB"
            what = (comparison.title, f"{facts['prompt_tokens']:,}", name)
            part = "" if share is None else f"{share:.3f}"
            table.add_row(*what, _interval(per_second), peak, part, *own, _times(ratio))
    _print(table)
    table = _table("One reply in a process of its own", ("model",), ("forecast", "MLX's peak", "process above imports"))
    for one in footprints:
        figures = (one.facts[key] for key in ("forecast_bytes", "mlx_peak_bytes", "rss_bytes_above_imports"))
        table.add_row(one.title, *(f"{figure / 1e6:,.0f} MB" for figure in figures))
    _print(table)
    table = _table("Answers with a packed cache", ("model",), ("held-out problems", "exact", "logits error"))
    for one in answers:
        table.add_row(
            one.title, str(one.facts["problems"]), f"{one.facts['exact']:.1%}", f"{one.facts['logits_error']:.2%}"
        )
    _print(table)


def show_graphs(comparison: GraphComparison) -> None:
    table = _table(
        f"One decode step, {comparison.title}; counted, not timed",
        ("who",),
        ("primitives, CPU", "kernels, GPU", "kernels a layer", "primitives, ours over theirs", "kernels"),
    )
    for name, graph in comparison.graphs.items():
        counts = (str(graph.primitives.total()), str(graph.kernels.total()), f"{graph.kernels_per_layer:.2f}")
        ratios = ("", "") if name == OURS else (f"{ratio:.3f}" for ratio in comparison.ratios(name))
        table.add_row(name, *counts, *ratios)
    _print(table)


def show_predictions(predictions: Sequence[Prediction], prompt_tokens: int) -> None:
    kinds = list(predictions[0].drafted)
    table = _table(
        f"Prediction, measured on no Mac: Magistral Small in 4 bit after {prompt_tokens:,} tokens of prompt",
        ("chip",),
        ("decode, tok/s", *(f"drafting, {kind}" for kind in kinds), "first token, s", "a pass more would add, s"),
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
    _print(table)
    print(f"On such a Mac this checks it: {CHECK.format(prompt_tokens)}")


def show_drafting(found: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> None:
    figures = ("tokens", "passes", "cost a token, in plain passes", "highest of a reply", "goal, at most")
    table = _table("Drafting from the text so far; counted, not timed", ("cost of rows", "text"), figures)
    for name, kinds in found.items():
        for kind, row in kinds.items():
            keys = ("tokens", "passes", "cost_per_token", "highest_of_a_reply", "goal")
            table.add_row(name, kind, *(str(row[key]) for key in keys))
    _print(table)


def show_samples(chip: str, held: Sequence[Held], passes: Mapping[str, Any], comparisons: Sequence[Comparison]) -> None:
    figures = ("separate caches, MB", "shared, MB", "ratio", "goal, at most")
    table = _table("Caches of several replies in the end; counted", ("replies", "prompt + reply", "cache"), figures)
    for one in held:
        shape = (
            str(one.n),
            f"{one.prompt_tokens} + {one.new_tokens}",
            f"{one.kv_bits} bit" if one.kv_bits else "float",
        )
        sizes = (f"{size / 1e6:.1f}" for size in (one.separate_bytes, one.shared_bytes))
        table.add_row(*shape, *sizes, f"{one.as_dict()['ratio']:.3f}", str(one.as_dict()["goal"]))
    _print(table)
    print(
        f"{passes['n']} replies to {passes['questions']} questions, embedded model: "
        f"{passes['passes_a_reply']:.1f} passes a reply, {passes['passes_a_reply_alone']:.1f} alone; "
        f"{passes['replies_equal_to_single_ones']:.1%} are the single replies"
    )
    show_speeds(chip, comparisons)


def show_reasoning(found: Mapping[str, Any]) -> None:
    """One task: its score beside the card's, then against the budget."""

    def percent(share: float | None) -> str:
        return "-" if share is None else f"{100 * share:.2f}"

    card = "-" if found["card_percent"] is None else f"{found['card_percent']:.2f}"
    table = _table(
        f"{found['title']}, pass@1 in percent; the card's is of Magistral Small 2506 in bf16",
        ("problems", "replies"),
        ("pass@1", "standard error", "by the seeds alone", "the card's", "cut off", "looped", "no answer", "tokens"),
    )
    shares = (percent(found[key]) for key in ("cut_off", "looped", "no_answer"))
    errors = (percent(found[key]) for key in ("pass_at_1", "standard_error", "sampling_error"))
    counts = (str(found["problems"]), str(found["samples"]))
    table.add_row(*counts, *errors, card, *shares, f"{found['median_completion_tokens']:,}")
    _print(table)
    table = _table("Against the budget of tokens, trace and answer", ("budget",), ("pass@1", "standard error"))
    for row in found["against_budget"]:
        table.add_row(f"{row['budget']:,}", percent(row["pass_at_1"]), percent(row["standard_error"]))
    _print(table)


def show_changes(changes: Sequence[Change], margin: float, *, everything: bool) -> None:
    """Those that moved by more than the margin, or at all where they are counted; regressions first."""
    moved = [c for c in changes if c.is_regression or not 1 - margin < c.ratio.median < 1 + margin]
    table = _table(f"B against A; over 1 is better; {RATIO}", ("figure",), ("A", "B", "ratio", "the machine", ""))
    for change in sorted(changes if everything else moved, key=lambda c: (not c.is_regression, c.name)):
        verdict = "worse" if change.is_regression else "" if change.is_ours else "not ours"
        ratio = _interval(change.ratio)
        machine = "" if change.machine == 1 else f"{change.machine:.3g}"
        table.add_row(change.name, f"{change.before:.4g}", f"{change.after:.4g}", ratio, machine, verdict)
    if table.row_count:
        _print(table)
    worse = sum(change.is_regression for change in changes)
    print(f"{len(changes)} figures in both; {worse or 'none'} worse beyond noise and {100 * margin:g} %")


def show_cache_files(chip: str, comparisons: Sequence[Comparison], predicted: Sequence[CacheFile]) -> None:
    table = _table(
        f"A cache's file on {chip}; median (slowest to fastest repeat); {RATIO}",
        ("cache", "phase", "who"),
        ("GB/s", "CPU s a GB", TIMES),
    )
    for comparison in comparisons:
        for phase, name, per_second, cpu_seconds, ratio in comparison.rows():
            gigabytes = Interval(per_second.median / 1e9, per_second.low / 1e9, per_second.high / 1e9)
            row = comparison.title, phase, name, _interval(gigabytes), f"{1e9 * cpu_seconds:.3g}"
            table.add_row(*row, _times(ratio))
        table.add_section()
    _print(table)
    table = _table(
        "Opening on a Mac, predicted, measured on none", ("24B model, positions", "cache"), ("GB", "seconds")
    )
    for one in predicted:
        kind = f"{one.kv_bits} bit" if one.kv_bits else "bf16"
        table.add_row(f"{one.tokens:,}", kind, f"{one.file_bytes / 1e9:.2f}", str(one.open_seconds))
    _print(table)


def show_felt(chip: str, felt: Felt) -> None:
    table = _table(
        f"{chip}; milliseconds, median (longest of all repeats)", ("what",), ("takes", "longest wait for the GIL")
    )
    for what, seconds, longest, wait, longest_wait in felt.rows():
        waited = "" if wait is None or longest_wait is None else f"{1000 * wait:.3g} ({1000 * longest_wait:.3g})"
        table.add_row(what, f"{1000 * seconds:.3g} ({1000 * longest:.3g})", waited)
    _print(table)


def show_judgements(chip: str, judgements: Sequence[Judgement]) -> None:
    table = _table(f"Predictions about this Mac: {chip}", ("what", "unit"), ("predicted", "measured", "", "said in"))
    for one in judgements:
        predicted = "-" if one.claim.predicted is None else str(one.claim.predicted)
        measured = one.claim.needs or "-" if one.measured is None else f"{one.measured:.4g}"
        table.add_row(one.claim.name, one.claim.unit, predicted, measured, one.verdict, one.claim.said_in)
    _print(table)
    counts = Counter(one.verdict for one in judgements)
    print(", ".join(f"{count} {verdict}" for verdict, count in counts.items()))


def show_budgets(found: Mapping[str, Any]) -> None:
    """Right answers by where a budget ends a trace, and by the closing tag's probability at the end of a line."""
    title = f"Right answers to {found['traces']} problems, embedded model, temperature {found['temperature']:g}"
    shares = [f"{share:.0%}" for share in SHARES]
    table = _table(f"{title}; budgets in tokens of the trace without one", ("a line is enough",), [*shares, "in all"])
    for row in found["budgets"]:
        where = "never" if row["threshold"] > 1 else f"from {row['threshold']:g}"
        table.add_row(where, *map(str, row["right"]), str(sum(row["right"])))
    _print(table)
    table = _table("Closed at the end of a line", ("probability of the tag",), ("places", "right"))
    for row in found["places"]:
        where = "anywhere inside a line" if row["from"] is None else f"from {row['from']:g}"
        table.add_row(where, f"{row['places']:,}", f"{row['right']:,}")
    _print(table)


def _table(title: str, words: Sequence[str], figures: Sequence[str]) -> Table:
    table = Table(title=title)
    for column in words:
        table.add_column(column)
    for column in figures:
        table.add_column(column, justify="right")
    return table


def _print(table: Table) -> None:
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def _times(ratio: Interval | None) -> str:
    return "" if ratio is None else _interval(ratio)


def _interval(interval: Interval) -> str:
    """Without its ends where one repeat has none."""
    if interval.low == interval.high:
        return f"{interval.median:.3g}"
    return f"{interval.median:.3g} ({interval.low:.3g} to {interval.high:.3g})"
