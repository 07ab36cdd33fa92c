"""A task run to its end: missing replies are sampled, graded and written to the journal."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from typing import Any

from benchmarks.measure import report
from benchmarks.reasoning.journal import Journal, Record
from benchmarks.reasoning.tasks import Problem, Task, digest
from magistral_mlx.engine.magistral import Magistral
from magistral_mlx.errors import MemoryLimitError, OptionError
from magistral_mlx.generation.params import SamplingParams
from magistral_mlx.generation.reply import Reply
from magistral_mlx.model.memory import DEFAULT_CONTEXT

SEEDS_A_PROBLEM = 10_000
AT_ONCE = 8  # replies side by side, if they fit


@dataclass(frozen=True, slots=True)
class Plan:
    """The work: ``samples`` replies to each problem.

    The seed of ``sampling`` is that of the first problem's first reply.
    """

    task: Task
    problems: Sequence[Problem]
    sampling: SamplingParams
    samples: int

    def __post_init__(self) -> None:
        if not 1 <= self.samples <= SEEDS_A_PROBLEM:
            raise OptionError(f"{self.samples} samples: use at least 1, at most {SEEDS_A_PROBLEM}")

    def key(self, magistral: Magistral) -> dict[str, Any]:
        """Return the facts that all replies of one run share."""
        return {
            "task": self.task.name,
            "checkpoint": magistral.checkpoint.fingerprint(),
            "kv_bits": magistral.plan.kv_bits,
            "sampling": asdict(self.sampling) | {"stop": list(self.sampling.stop)},
            "dataset": digest(self.problems),
        }


def run(plan: Plan, magistral: Magistral, journal: Journal) -> None:
    """Sample and grade the replies that the journal lacks.

    Raises:
        ContextError, MemoryLimitError: a prompt, or one reply to it, does not fit.
    """
    total = plan.samples * len(plan.problems)
    for place, problem in enumerate(plan.problems):
        missing = [i for i in range(plan.samples) if not journal.has(problem.id, i)]
        for samples in _consecutive(missing):
            for sample, reply in _replies(plan, magistral, place, problem, samples):
                record = _graded(plan.task, problem, sample, reply)
                journal.add(record)
                right = sum(r.is_correct for r in journal.records)
                report(
                    f"{plan.task.title}: {len(journal.records)}/{total}, problem {problem.id}, "
                    f"sample {sample}: {'right' if record.is_correct else 'wrong'}, "
                    f"{record.completion_tokens} tokens ({right} right so far)"
                )


def _consecutive(samples: Sequence[int]) -> Iterator[list[int]]:
    """Split samples into runs of consecutive numbers, whose seeds are consecutive too."""
    for _, run_of in groupby(enumerate(samples), lambda pair: pair[1] - pair[0]):
        yield [sample for _, sample in run_of]


def _replies(
    plan: Plan, magistral: Magistral, place: int, problem: Problem, samples: Sequence[int]
) -> Iterator[tuple[int, Reply]]:
    """Yield (sample, reply) as replies end, as many side by side as are allowed and fit."""
    seed = (plan.sampling.seed or 0) + place * SEEDS_A_PROBLEM
    prompt_tokens = len(magistral.tokenizer.encode_chat(problem.prompt))
    allowed = plan.sampling.max_tokens or magistral.plan.reply_tokens(prompt_tokens, None)
    waiting, n = list(samples), AT_ONCE
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


def _graded(task: Task, problem: Problem, sample: int, reply: Reply) -> Record:
    """Grade the answer, never the trace. A reply that was cut off is wrong."""
    stated = None if reply.finish_reason == "length" else task.stated(reply.answer)
    usage = reply.usage
    return Record(
        problem=problem.id,
        sample=sample,
        seed=usage.seed,
        is_correct=stated is not None and stated == problem.expected,
        stated=stated,
        answer=reply.answer,
        finish_reason=reply.finish_reason,
        reasoning_closed_by=reply.reasoning_closed_by,
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        reasoning_tokens=usage.reasoning_tokens,
        max_tokens=usage.max_tokens,
    )


def wanted(plan: Plan, journal: Journal) -> list[Record]:
    """Return the records of a plan's problems and samples; a journal may hold more."""
    ids = {problem.id for problem in plan.problems}
    return [r for r in journal.records if r.problem in ids and r.sample < plan.samples]


def facts(plan: Plan, records: Sequence[Record], magistral: Magistral) -> Mapping[str, Any]:
    """Return the facts that a score must be read with."""

    def share(values: Iterator[bool]) -> float:
        return sum(values) / len(records)

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
        "cut_off": share(r.finish_reason == "length" for r in records),
        "looped": share("loop" in (r.finish_reason, r.reasoning_closed_by) for r in records),
        "no_answer": share(not r.answer.strip() for r in records),
    }
