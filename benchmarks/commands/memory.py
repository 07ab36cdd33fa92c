"""``memory``: peaks beside what was forecast."""

import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import click

from benchmarks.commands.shared import json_option, peer_option, report, require, write
from benchmarks.measure import circumstances
from benchmarks.memory import answers, compare_caches, footprint
from benchmarks.synthetic import NARROW, TRUE_WIDTH, write_slice
from benchmarks.tables import show_memory
from magistral_mlx.demo import demo_checkpoint


@click.command()
@peer_option
@click.option("--prompt-tokens", type=int, help="Length of the prompt; 8192 if unset.")
@click.option("--repeats", type=int, help="Prefills by each; 3 if unset.")
@click.option("--quick", is_flag=True, help="A short prompt and a narrow model: does it run?")
@json_option
def memory(
    *, peer: str | None, prompt_tokens: int | None, repeats: int | None, quick: bool, json_file: Path | None
) -> None:
    """Memory of a prefill into an 8- and a 4-bit cache, what was forecast of it, and what packing costs in answers.

    The layers have the true width of attention, and narrow matrices: a prompt of 8,192 through true ones would
    take an hour on a CPU.

    \b
    python -m benchmarks memory --peer mlx-lm      an hour on two cores; a third of it with --repeats 1
    python -m benchmarks memory --quick            half a minute
    """
    require(peer)
    facts = circumstances()
    tokens, times = prompt_tokens or (96 if quick else 8192), repeats or (1 if quick else 3)
    attention = replace(TRUE_WIDTH, hidden_size=1024, intermediate_size=1024, num_layers=2, vocab_size=2048)
    config = replace(NARROW, num_layers=2) if quick else attention
    with tempfile.TemporaryDirectory(prefix="magistral-slice-") as name:
        write_slice(Path(name), config)
        title = f"{config.num_layers} layers, {config.num_heads} heads"
        found = compare_caches(title, Path(name), tokens, times, peer=peer is not None, report=report)
        comparisons = list(found)
    with tempfile.TemporaryDirectory(prefix="magistral-slice-") as name:
        wide = replace(NARROW if quick else TRUE_WIDTH, num_layers=2, vocab_size=2048)
        write_slice(Path(name), wide)
        shutil.copy(demo_checkpoint() / "tekken.json", name)
        footprints = [footprint(f"2 layers, {wide.hidden_size} wide", Path(name), 16, report=report)]
    solved = list(answers(6 if quick else 200, report=report))
    write("memory", facts, [*comparisons, *footprints, *solved], json_file)
    show_memory(facts["chip"], comparisons, footprints, solved)
