"""``samples``: several replies over one prompt."""

import tempfile
from dataclasses import replace
from pathlib import Path

import click

from benchmarks.commands.shared import json_option, report, write_results
from benchmarks.commands.speed import QUESTIONS, QUICK, WHOLE
from benchmarks.measure import circumstances
from benchmarks.report.tables import show_samples
from benchmarks.runtime.samples import compare_steps, count_passes, hold
from benchmarks.synthetic import NARROW, write_slice
from magistral_mlx.demo import demo_checkpoint


@click.command()
@click.option("--quick", is_flag=True, help="A short prompt, two repeats: does it run?")
@json_option
def samples(*, quick: bool, json_file: Path | None) -> None:
    """Several replies over one prompt: bytes of their caches, passes, and the time of a step, against single ones.

    \b
    python -m benchmarks samples             ten minutes on two cores
    python -m benchmarks samples --quick     half a minute
    """
    facts = circumstances()
    with tempfile.TemporaryDirectory(prefix="magistral-slice-") as name:
        write_slice(Path(name), replace(NARROW, num_layers=1))
        prompt, new = (64, 16) if quick else (4096, 1000)
        held = [
            hold(Path(name), 16, prompt_tokens=prompt, new_tokens=new, kv_bits=bits, report=report)
            for bits in (None, 8, 4)
        ]
    passes = count_passes(2 if quick else 16, QUESTIONS[: 1 if quick else None], report)
    workload = QUICK if quick else replace(WHOLE, decode_tokens=64, repeats=7)
    steps = [
        compare_steps("demo", demo_checkpoint(), n, workload, report)
        for n in ((2,) if quick else (2, 4, 8, 16))
    ]
    found = {
        "held": [h.as_dict() for h in held],
        "passes": passes,
        "decode": [c.as_dict() for c in steps],
    }
    write_results("samples", facts, found, json_file)
    show_samples(facts["chip"], held, passes, steps)
