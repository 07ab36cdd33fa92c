"""``reasoning``: the benchmarks of the model card."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import click

from benchmarks.commands.shared import json_option, plot_option, plot_results, report, write_results
from benchmarks.measure import circumstances
from benchmarks.reasoning.evaluate import Plan, facts, run, wanted
from benchmarks.reasoning.journal import Journal, open_journal
from benchmarks.reasoning.rows import read_dataset
from benchmarks.reasoning.sandbox import Sandbox, find_sandbox
from benchmarks.reasoning.score import against_budget, score
from benchmarks.reasoning.tasks import TASKS, Task, demo_rows, problems_of
from benchmarks.report.tables_counted import show_reasoning
from magistral_mlx.engine.load import load
from magistral_mlx.errors import OptionError
from magistral_mlx.files import cache_dir
from magistral_mlx.generation.params import SamplingParams
from magistral_mlx.model.load_options import KVBits

KEY_CHARACTERS = 16

KV_BITS: dict[str, KVBits] = {"4": 4, "8": 8, "16": 16}


@click.command()
@click.option("--task", required=True, type=click.Choice(list(TASKS)), help="Which of them.")
@click.option(
    "--model",
    default="demo",
    show_default=True,
    metavar="demo|PATH|HUB",
    help="A checkpoint in MLX layout.",
)
@click.option(
    "--data",
    metavar="PATH|HUB",
    help="The dataset: a file, a folder or a name on the hub; else the task's own.",
)
@click.option("--revision", help="Branch, tag or commit of the dataset on the hub.")
@click.option("--samples", default=1, show_default=True, help="Replies to each problem.")
@click.option(
    "--at-once", default=8, show_default=True, help="Replies side by side at most, if they fit."
)
@click.option("--limit", type=click.IntRange(1), help="The first problems only.")
@click.option(
    "--max-tokens",
    type=click.IntRange(1),
    help="Of a reply; by default the card's 40,960, or what fits.",
)
@click.option("--think-budget", type=click.IntRange(0), help="Reasoning tokens at most.")
@click.option("--seed", default=0, show_default=True, help="Of the first reply.")
@click.option("--kv-bits", type=click.Choice(list(KV_BITS)), help="Bits of the cache.")
@click.option(
    "--journal",
    "journal_file",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Where replies are kept.",
)
@click.option(
    "--allow-code-execution",
    is_flag=True,
    help="Run the programs that the model writes, in a sandbox.",
)
@json_option
@plot_option
def reasoning(
    *,
    task: str,
    model: str,
    data: str | None,
    revision: str | None,
    samples: int,
    at_once: int,
    limit: int | None,
    max_tokens: int | None,
    think_budget: int | None,
    seed: int,
    kv_bits: str | None,
    journal_file: Path | None,
    allow_code_execution: bool,
    json_file: Path | None,
    plot: Path | None,
) -> None:
    """pass@1 on AIME 2024 and 2025, GPQA Diamond, LiveCodeBench v5, as the model card samples.

    Every graded reply is kept at once: the same command goes on where an interrupted one stopped, and with more
    --samples adds to it. The trace is never graded.

    \b
    python -m benchmarks reasoning --task demo-arithmetic --samples 4
    python -m benchmarks reasoning --task aime24 --model ~/magistral-4bit --samples 16
    python -m benchmarks reasoning --task gpqa-diamond --model ~/magistral-4bit --data ~/gpqa_diamond.csv
    python -m benchmarks reasoning --task livecodebench-v5 --model ~/magistral-4bit --allow-code-execution
    """
    if (
        journal_file is not None
        and json_file is not None
        and journal_file.absolute() == json_file.absolute()
    ):
        raise OptionError(f"--json and --journal are both {json_file}; name two files")
    chosen = TASKS[task]
    sandbox = _sandbox(chosen, allowed=allow_code_execution)
    if chosen.repo is None and (data is not None or revision is not None):
        raise OptionError(f"{task} makes its problems itself; leave --data and --revision out")
    rows = (
        None
        if chosen.repo is None
        else read_dataset(data or chosen.repo, chosen.files, revision=revision)
    )
    problems = None if rows is None else problems_of(chosen, rows)
    sampling = SamplingParams(max_tokens=max_tokens, think_budget=think_budget, seed=seed)
    circumstance = circumstances()
    magistral = load(model, kv_bits=None if kv_bits is None else KV_BITS[kv_bits])
    problems = problems or problems_of(chosen, demo_rows(magistral.tokenizer))
    plan = Plan(chosen, problems, sampling, samples, at_once)
    key = plan.key(magistral)
    plan = replace(plan, problems=problems[:limit])
    file = journal_file or _own_journal(chosen, key)
    with open_journal(file, key) as journal:
        _announce(plan, journal)
        run(plan, magistral, journal, sandbox, report)
        records = wanted(plan, journal)
    found = {
        **facts(plan, records, magistral),
        **key,
        **score(records).as_dict(),
        "against_budget": against_budget(records),
        "replies": [[r.problem, r.sample, r.is_correct, r.completion_tokens] for r in records],
    }
    plot_results(write_results("reasoning", circumstance, [found], json_file), plot)
    show_reasoning(found)


def _sandbox(task: Task, *, allowed: bool) -> Sandbox | None:
    if task.stated is not None:
        if allowed:
            raise OptionError(f"{task.name} runs no code; leave --allow-code-execution out")
        return None
    if not allowed:
        raise OptionError(
            f"{task.name} is graded by running the programs that the model writes: without a network, within "
            "limits of time and memory, as your user. If that is what you want, add --allow-code-execution"
        )
    return find_sandbox()


def _own_journal(task: Task, key: dict[str, object]) -> Path:
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    return cache_dir() / "reasoning" / f"{task.name}-{digest[:KEY_CHARACTERS]}.jsonl"


def _announce(plan: Plan, journal: Journal) -> None:
    known, total = len(wanted(plan, journal)), plan.samples * len(plan.problems)
    report(f"{plan.task.title}: {known} of {total} replies are in {journal.path}")
    published = plan.task.published_problems
    if published is not None and len(plan.problems) != published:
        report(
            f"{plan.task.title}: {len(plan.problems)} problems; the card's figure is of {published}"
        )
