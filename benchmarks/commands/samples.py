"""``samples``: several replies over one prompt."""

import tempfile
from dataclasses import replace
from pathlib import Path

import click

from benchmarks.command_line import json_option, quick_option, write
from benchmarks.commands.speed import QUESTIONS
from benchmarks.measure import circumstances
from benchmarks.report.table import show
from benchmarks.runtime.samples import Held, count_passes, hold
from benchmarks.synthetic import NARROW, write_slice


@click.command()
@quick_option
@json_option
def samples(*, quick: bool, json_file: Path | None) -> None:
    """Count cache bytes and passes of several replies to one prompt.

    They are compared with those of single replies.

    \b
    python -m benchmarks samples             five minutes on two cores
    python -m benchmarks samples --quick     half a minute
    """
    facts = circumstances()
    prompt, new = (64, 16) if quick else (4096, 1000)
    with tempfile.TemporaryDirectory(prefix="magistral-slice-") as name:
        write_slice(Path(name), replace(NARROW, num_layers=1))
        held = [
            hold(Path(name), 16, prompt_tokens=prompt, new_tokens=new, kv_bits=bits)
            for bits in (None, 8, 4)
        ]
    passes = count_passes(2 if quick else 16, QUESTIONS[: 1 if quick else None])
    found = {"held": [one.as_dict() for one in held], "passes": passes}
    write("samples", facts, found, json_file)
    show(
        "Caches of several replies at their end; counted",
        "replies | prompt + reply | cache",
        "separate caches, MB | shared, MB | ratio | goal, at most",
        map(_row, held),
    )
    print(
        f"{passes['n']} replies to {passes['questions']} questions, embedded model: "
        f"{passes['passes_a_reply']:.1f} passes a reply, "
        f"{passes['passes_a_reply_alone']:.1f} alone; "
        f"{passes['replies_equal_to_single_ones']:.1%} are the single replies"
    )


def _row(one: Held) -> tuple[object, ...]:
    figures = one.as_dict()
    return (
        one.n,
        f"{one.prompt_tokens} + {one.new_tokens}",
        f"{one.kv_bits} bit" if one.kv_bits else "float",
        f"{one.separate_bytes / 1e6:.1f}",
        f"{one.shared_bytes / 1e6:.1f}",
        f"{figures['ratio']:.3f}",
        figures["goal"],
    )
