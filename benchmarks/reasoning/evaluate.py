"""A task run to its end: what a journal lacks is sampled, several replies over one prompt, graded and written down."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from benchmarks.reasoning.journal import Journal, Record
from benchmarks.reasoning.programs import Program, passes
from benchmarks.reasoning.sandbox import Sandbox
from benchmarks.reasoning.tasks import Problem, Task, digest
from magistral_mlx.engine.magistral import Magistral
from magistral_mlx.errors import MemoryLimitError, OptionError
from magistral_mlx.generation.params import SamplingParams
from magistral_mlx.generation.reply import Reply
from magistral_mlx.model.memory import DEFAULT_CONTEXT

SEEDS_A_PROBLEM = 10_000


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be sampled: ``samples`` replies to each problem, up to ``at_once`` side by side."""

    task: Task
    problems: Sequence[Problem]
    sampling: SamplingParams  # its seed is the first problem's first
    samples: int
    at_once: int

    def __post_init__(self) -> None:
        if self.samples < 1 or self.at_once < 1:
            raise OptionError(
                f"{self.samples} samples, {self.at_once} at once: use at least 1 of each"
            )
        if self.samples > SEEDS_A_PROBLEM:
            raise OptionError(
                f"{self.samples} samples a problem are more than the {SEEDS_A_PROBLEM} seeds it has"
            )

    def key(self, magistral: Magistral) -> dict[str, Any]:
        """What replies must share to be of one run."""
        return {
            "task": self.task.name,
            "checkpoint": magistral.checkpoint.fingerprint(),
            "kv_bits": magistral.plan.kv_bits,
            "sampling": asdict(self.sampling) | {"stop": list(self.sampling.stop)},
            "dataset": digest(self.problems),
        }

    def missing(self, journal: Journal) -> Iterator[tuple[int, Problem, list[int]]]:
        """Problems, by their place, and the samples of each that are to be taken."""
        for place, problem in enumerate(self.problems):
            samples = [i for i in range(self.samples) if not journal.has(problem.id, i)]
            if samples:
                yield place, problem, samples


def run(
    plan: Plan,
    magistral: Magistral,
    journal: Journal,
    sandbox: Sandbox | None,
    report: Callable[[str], None],
) -> None:
    """Sample and grade what the journal lacks.

    Raises:
        ContextError, MemoryLimitError: a prompt, or one reply to it, does not fit.
    """
    total = plan.samples * len(plan.problems)
    for place, problem, samples in plan.missing(journal):
        for run_of_samples in _in_rows(samples):
            for first, reply in _replies(plan, magistral, place, problem, run_of_samples):
                record = _graded(plan.task, problem, first, reply, sandbox)
                journal.add(record)
                done = sum(r.is_correct for r in journal.records)
                report(
                    f"{plan.task.title}: {len(journal.records)}/{total}, problem {problem.id}, sample {record.sample}: "
                    f"{'right' if record.is_correct else 'wrong'}, {record.completion_tokens} tokens "
                    f"({done} right so far)"
                )


def _replies(
    plan: Plan, magistral: Magistral, place: int, problem: Problem, samples: Sequence[int]
) -> Iterator[tuple[int, Reply]]:
    """(sample, reply) as they end; as many side by side as were asked for and fit."""
    seed = (plan.sampling.seed or 0) + place * SEEDS_A_PROBLEM
    prompt_tokens = len(magistral.tokenizer.encode_chat(problem.prompt))
    allowed = plan.sampling.max_tokens or magistral.plan.reply_tokens(prompt_tokens, None)
    waiting, n = list(samples), plan.at_once
    while waiting:
        some = waiting[:n]
        sampling = replace(plan.sampling, seed=seed + some[0], max_tokens=allowed)
        try:
            replies = magistral.stream_samples(problem.prompt, sampling, n=len(some))
        except MemoryLimitError:
            if len(some) == 1:
                raise
            n = len(some) // 2
            continue
        for reply in replies:
            if reply.finish_reason == "cancelled":
                raise KeyboardInterrupt
            yield reply.usage.seed - seed, reply
        waiting = waiting[len(some) :]


def _graded(
    task: Task, problem: Problem, sample: int, reply: Reply, sandbox: Sandbox | None
) -> Record:
    """The answer alone is graded: a reply whose trace did not end has none. One that was cut off is wrong."""
    stated: int | str | None = None
    if reply.finish_reason == "length":
        is_correct = False
    elif isinstance(problem.expected, Program):
        assert sandbox is not None, "refused before"
        is_correct = passes(reply.answer, problem.expected, sandbox)
    else:
        assert task.stated is not None
        stated = task.stated(reply.answer)
        is_correct = stated == problem.expected
    usage = reply.usage
    return Record(
        problem=problem.id,
        sample=sample,
        seed=usage.seed,
        is_correct=is_correct,
        stated=stated,
        answer=reply.answer,
        finish_reason=reply.finish_reason,
        reasoning_closed_by=reply.reasoning_closed_by,
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        reasoning_tokens=usage.reasoning_tokens,
        max_tokens=usage.max_tokens,
    )


def _in_rows(samples: Sequence[int]) -> Iterator[list[int]]:
    """Samples that follow one another: their seeds do too."""
    row: list[int] = []
    for sample in samples:
        if row and sample != row[-1] + 1:
            yield row
            row = []
        row.append(sample)
    if row:
        yield row


def wanted(plan: Plan, journal: Journal) -> list[Record]:
    """The records of the problems and samples asked for; a journal may hold more."""
    ids = {problem.id for problem in plan.problems}
    return [r for r in journal.records if r.problem in ids and r.sample < plan.samples]


def facts(plan: Plan, records: Sequence[Record], magistral: Magistral) -> Mapping[str, Any]:
    """What a score must be read with."""
    tokens = sorted(record.completion_tokens for record in records)
    return {
        "task": plan.task.name,
        "title": plan.task.title,
        **plan.key(magistral),
        "context": magistral.plan.context,
        "card_context": DEFAULT_CONTEXT,
        "card_percent": plan.task.card_percent,
        "published_problems": plan.task.published_problems,
        "median_completion_tokens": tokens[len(tokens) // 2],
        "cut_off": sum(record.finish_reason == "length" for record in records) / len(records),
        "looped": sum(
            record.finish_reason == "loop" or record.reasoning_closed_by == "loop"
            for record in records
        )
        / len(records),
        "no_answer": sum(not record.answer.strip() for record in records) / len(records),
    }
