"""``reasoning``: the benchmarks of the model card."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from benchmarks.command_line import COUNT, json_option, write
from benchmarks.measure import circumstances, report
from benchmarks.reasoning.evaluate import Plan, facts, run, wanted
from benchmarks.reasoning.journal import open_journal
from benchmarks.reasoning.rows import read_dataset
from benchmarks.reasoning.score import against_budget, score
from benchmarks.reasoning.tasks import TASKS, demo_rows, problems_of
from benchmarks.report.table import show
from magistral_mlx.engine.load import load
from magistral_mlx.errors import OptionError
from magistral_mlx.files import cache_dir
from magistral_mlx.generation.params import SamplingParams
from magistral_mlx.model.load_options import KVBits

KEY_CHARACTERS = 16
KV_BITS: dict[str, KVBits] = {"4": 4, "8": 8, "16": 16}


@click.command()
@click.option("--task", required=True, type=click.Choice(list(TASKS)), help="The benchmark.")
@click.option(
    "--model", default="demo", show_default=True, metavar="demo|PATH|HUB", help="In MLX layout."
)
@click.option("--data", metavar="PATH|HUB", help="The dataset, if not the task's own on the hub.")
@click.option("--samples", default=1, show_default=True, help="Replies to each problem.")
@click.option("--limit", type=COUNT, help="Only the first problems.")
@click.option("--max-tokens", type=COUNT, help="Tokens of a reply; the card's 40,960 if unset.")
@click.option("--think-budget", type=click.IntRange(0), help="Tokens of a trace at most.")
@click.option("--seed", default=0, show_default=True, help="Seed of the first reply.")
@click.option("--kv-bits", type=click.Choice(list(KV_BITS)), help="Bits of the cache.")
@click.option(
    "--journal",
    "journal_file",
    type=click.Path(dir_okay=False, path_type=Path),
    help="The file of graded replies; one in the cache folder if unset.",
)
@json_option
def reasoning(
    *,
    task: str,
    model: str,
    data: str | None,
    samples: int,
    limit: int | None,
    max_tokens: int | None,
    think_budget: int | None,
    seed: int,
    kv_bits: str | None,
    journal_file: Path | None,
    json_file: Path | None,
) -> None:
    """Measure pass@1 on AIME 2024 and 2025 and GPQA Diamond.

    Replies are sampled as on the model card. Every graded reply is written at once: the same
    command continues an interrupted run, and more --samples add to it. The trace is never graded.

    \b
    python -m benchmarks reasoning --task demo-arithmetic --samples 4
    python -m benchmarks reasoning --task aime24 --model ~/4bit --samples 16
    python -m benchmarks reasoning --task gpqa-diamond --model ~/4bit \\
        --data ~/gpqa.csv
    """
    if journal_file and json_file and journal_file.absolute() == json_file.absolute():
        raise OptionError(f"--json and --journal are both {json_file}; name two files")
    chosen = TASKS[task]
    if chosen.repo is None and data is not None:
        raise OptionError(f"{task} makes its problems itself; leave --data out")
    problems = None
    if chosen.repo is not None:
        rows = read_dataset(data or chosen.repo, chosen.files)
        problems = problems_of(chosen, rows)
    sampling = SamplingParams(max_tokens=max_tokens, think_budget=think_budget, seed=seed)
    circumstance = circumstances()
    magistral = load(model, kv_bits=None if kv_bits is None else KV_BITS[kv_bits])
    problems = problems or problems_of(chosen, demo_rows(magistral.tokenizer))
    plan = Plan(chosen, problems, sampling, samples)
    key = plan.key(magistral)
    plan = replace(plan, problems=problems[:limit])
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    name = f"{chosen.name}-{digest[:KEY_CHARACTERS]}.jsonl"
    with open_journal(journal_file or cache_dir() / "reasoning" / name, key) as journal:
        known, total = len(wanted(plan, journal)), samples * len(plan.problems)
        report(f"{chosen.title}: {known} of {total} replies are in {journal.path}")
        published = chosen.published_problems
        if published is not None and len(plan.problems) != published:
            report(f"{len(plan.problems)} problems; the card's figure is of {published}")
        run(plan, magistral, journal)
        records = wanted(plan, journal)
    found = {
        **facts(plan, records, magistral),
        **key,
        **score(records).as_dict(),
        "against_budget": against_budget(records),
        "replies": [[r.problem, r.sample, r.is_correct, r.completion_tokens] for r in records],
    }
    write("reasoning", circumstance, [found], json_file)
    show_reasoning(found)


def show_reasoning(found: Mapping[str, Any]) -> None:
    """Print a task's score beside the card's, and the score against the budget."""

    def percent(one: Mapping[str, Any], *keys: str) -> list[str]:
        return ["-" if one[key] is None else f"{100 * one[key]:.2f}" for key in keys]

    card = "-" if found["card_percent"] is None else f"{found['card_percent']:.2f}"
    shares = percent(found, "cut_off", "looped", "no_answer")
    show(
        f"{found['title']}, pass@1 in percent; the card's is of Magistral Small 2506 in bf16",
        "problems | replies",
        "pass@1 | standard error | by the seeds alone | the card's | cut off | looped | no answer"
        " | tokens",
        [
            (
                found["problems"],
                found["samples"],
                *percent(found, "pass_at_1", "standard_error", "sampling_error"),
                card,
                *shares,
                f"{found['median_completion_tokens']:,}",
            )
        ],
    )
    show(
        "Score against the budget of tokens, trace and answer",
        "budget",
        "pass@1 | standard error",
        [
            (f"{row['budget']:,}", *percent(row, "pass_at_1", "standard_error"))
            for row in found["against_budget"]
        ],
    )
