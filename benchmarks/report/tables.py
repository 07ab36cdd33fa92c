"""What the benchmarks print of what is timed: a row a contender."""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx
from rich.console import Console
from rich.table import Table

from benchmarks.measure import OURS, Comparison, Finding, Interval
from benchmarks.runtime.bridge import Felt
from benchmarks.runtime.cache import Prediction as CacheFile
from benchmarks.runtime.samples import Held

RATIO = "ratio with 95 % interval"
TIMES = f"{OURS}, times as fast"


def show_speeds(
    chip: str, comparisons: Sequence[Comparison], bandwidth: float | None = None
) -> None:
    """``bandwidth``: this machine's own, in bytes a second."""
    table = new_table(
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
                as_text(per_second),
                "" if read is None else f"{read / 1e9:.3g} GB/s",
                "" if read is None or bandwidth is None else f"{read / bandwidth:.0%}",
                f"{1000 * cpu_seconds:.3g}",
                _times(ratio),
            )
        table.add_section()
    show(table)


def _bytes_per_second(comparison: Comparison, per_second: Interval) -> float:
    facts = comparison.facts
    return per_second.median * float(facts["bytes_per_token"] + facts["kv_bytes_per_token"])


def show_findings(findings: Sequence[Finding]) -> None:
    for one in findings:
        if "bytes_per_second" in one.facts:
            print(
                f"{one.title} ({one.facts['by']}): {one.facts['bytes_per_second'] / 1e9:.2f} GB/s"
            )
        else:
            print(
                f"{one.title}: {one.facts['passes_per_token']:.3f} ({one.facts['tokens']} tokens)"
            )


def show_conversions(chip: str, comparison: Comparison) -> None:
    repeats, quantization = (
        comparison.facts["workload"]["repeats"],
        comparison.facts["quantization"],
    )
    table = new_table(
        f"{comparison.title}, {comparison.facts['source']['bytes'] / 1e9:.2f} GB, to "
        f"{quantization['bits']} bit by {quantization['method']} on {chip}; median of {repeats}, highest peak; {RATIO}",
        ("who",),
        (
            "seconds",
            "until on disk",
            "CPU s",
            "GB/s",
            "peak above imports",
            "written",
            "tensors",
            TIMES,
        ),
    )
    for _, name, per_second, _, ratio in comparison.rows():
        facts = comparison.facts["contenders"][name]
        gigabytes = Interval(per_second.median / 1e9, per_second.low / 1e9, per_second.high / 1e9)
        table.add_row(
            name,
            f"{facts['seconds']:.2f}",
            f"{facts['seconds_and_sync']:.2f}",
            f"{facts['cpu_seconds']:.2f}",
            as_text(gigabytes),
            f"{facts['peak_bytes_above_interpreter'] / 1e6:,.0f} MB",
            f"{facts['output_bytes'] / 1e6:,.0f} MB",
            "the same" if facts["same_tensors"] else f"{len(facts['different_tensors'])} differ",
            _times(ratio),
        )
    show(table)


def show_memory(
    chip: str,
    comparisons: Sequence[Comparison],
    footprints: Sequence[Finding],
    answers: Sequence[Finding],
) -> None:
    table = new_table(
        f"Prefill on {chip}; highest peak above the weights; {RATIO}",
        ("what", "prompt", "who"),
        (
            "tokens/s",
            "peak",
            "ours of theirs",
            "forecast/measured",
            "in all",
            "logits error",
            TIMES,
        ),
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
            table.add_row(*what, as_text(per_second), peak, part, *own, _times(ratio))
    show(table)
    table = new_table(
        "One reply in a process of its own",
        ("model",),
        ("forecast", "MLX's peak", "process above imports"),
    )
    for one in footprints:
        figures = (
            one.facts[key]
            for key in ("forecast_bytes", "mlx_peak_bytes", "rss_bytes_above_imports")
        )
        table.add_row(one.title, *(f"{figure / 1e6:,.0f} MB" for figure in figures))
    show(table)
    table = new_table(
        "Answers with a packed cache", ("model",), ("held-out problems", "exact", "logits error")
    )
    for one in answers:
        table.add_row(
            one.title,
            str(one.facts["problems"]),
            f"{one.facts['exact']:.1%}",
            f"{one.facts['logits_error']:.2%}",
        )
    show(table)


def show_samples(
    chip: str, held: Sequence[Held], passes: Mapping[str, Any], comparisons: Sequence[Comparison]
) -> None:
    figures = ("separate caches, MB", "shared, MB", "ratio", "goal, at most")
    table = new_table(
        "Caches of several replies in the end; counted",
        ("replies", "prompt + reply", "cache"),
        figures,
    )
    for one in held:
        shape = (
            str(one.n),
            f"{one.prompt_tokens} + {one.new_tokens}",
            f"{one.kv_bits} bit" if one.kv_bits else "float",
        )
        sizes = (f"{size / 1e6:.1f}" for size in (one.separate_bytes, one.shared_bytes))
        table.add_row(*shape, *sizes, f"{one.as_dict()['ratio']:.3f}", str(one.as_dict()["goal"]))
    show(table)
    print(
        f"{passes['n']} replies to {passes['questions']} questions, embedded model: "
        f"{passes['passes_a_reply']:.1f} passes a reply, {passes['passes_a_reply_alone']:.1f} alone; "
        f"{passes['replies_equal_to_single_ones']:.1%} are the single replies"
    )
    show_speeds(chip, comparisons)


def show_cache_files(
    chip: str, comparisons: Sequence[Comparison], predicted: Sequence[CacheFile]
) -> None:
    table = new_table(
        f"A cache's file on {chip}; median (slowest to fastest repeat); {RATIO}",
        ("cache", "phase", "who"),
        ("GB/s", "CPU s a GB", TIMES),
    )
    for comparison in comparisons:
        for phase, name, per_second, cpu_seconds, ratio in comparison.rows():
            gigabytes = Interval(
                per_second.median / 1e9, per_second.low / 1e9, per_second.high / 1e9
            )
            row = comparison.title, phase, name, as_text(gigabytes), f"{1e9 * cpu_seconds:.3g}"
            table.add_row(*row, _times(ratio))
        table.add_section()
    show(table)
    table = new_table(
        "Opening on a Mac, predicted, measured on none",
        ("24B model, positions", "cache"),
        ("GB", "seconds"),
    )
    for one in predicted:
        kind = f"{one.kv_bits} bit" if one.kv_bits else "bf16"
        table.add_row(f"{one.tokens:,}", kind, f"{one.file_bytes / 1e9:.2f}", str(one.open_seconds))
    show(table)


def show_felt(chip: str, felt: Felt) -> None:
    table = new_table(
        f"{chip}; milliseconds, median (longest of all repeats)",
        ("what",),
        ("takes", "longest wait for the GIL"),
    )
    for what, seconds, longest, wait, longest_wait in felt.rows():
        waited = (
            ""
            if wait is None or longest_wait is None
            else f"{1000 * wait:.3g} ({1000 * longest_wait:.3g})"
        )
        table.add_row(what, f"{1000 * seconds:.3g} ({1000 * longest:.3g})", waited)
    show(table)


def new_table(title: str, words: Sequence[str], figures: Sequence[str]) -> Table:
    table = Table(title=title)
    for column in words:
        table.add_column(column)
    for column in figures:
        table.add_column(column, justify="right")
    return table


def show(table: Table) -> None:
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def _times(ratio: Interval | None) -> str:
    return "" if ratio is None else as_text(ratio)


def as_text(interval: Interval) -> str:
    """Without its ends where one repeat has none."""
    if interval.low == interval.high:
        return f"{interval.median:.3g}"
    return f"{interval.median:.3g} ({interval.low:.3g} to {interval.high:.3g})"
