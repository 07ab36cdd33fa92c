"""The benchmarks of the model card: where their problems are published, how they are asked, and who grades."""

import hashlib
import json
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.reasoning.grading import final_integer, final_letter
from benchmarks.reasoning.programs import Program, program_of, program_prompt
from benchmarks.reasoning.rows import Row, column
from magistral_mlx.errors import OptionError, quoted
from magistral_mlx.tokenizer.tekken import Tokenizer
from magistral_mlx.training.demo.problems import ARITHMETIC, held_out_problems

DEMO_PROBLEMS, DEMO_SEED = 100, 2026
LETTERS = "ABCD"

# Published with github.com/openai/simple-evals, whose form of the answer suits a model told to write no \boxed.
MATH_PROMPT = (
    "Solve the following math problem step by step. The last line of your response should be of the form "
    "Answer: $ANSWER (without quotes) where $ANSWER is the answer to the problem.\n\n{problem}\n\n"
    'Remember to put your answer on its own line after "Answer:", and you do not need to use a \\boxed command.'
)
CHOICE_PROMPT = (
    "Answer the following multiple choice question. The last line of your response should be of the following format: "
    "'Answer: $LETTER' (without quotes) where LETTER is one of ABCD. Think step by step before answering.\n\n"
    "{question}\n\nA) {A}\nB) {B}\nC) {C}\nD) {D}"
)


@dataclass(frozen=True, slots=True)
class Problem:
    """What is asked, and what is right."""

    id: str
    prompt: str
    expected: int | str | Program


@dataclass(frozen=True, slots=True)
class Task:
    """A benchmark. ``stated`` reads from an answer what is held against ``expected``; None where it is a program."""

    name: str
    title: str
    repo: str | None  # on the hub; None where the problems are made here
    files: tuple[str, ...]
    published_problems: int | None
    card_percent: float | None  # Magistral Small 2506, pass@1
    problem: Callable[[Row, int], Problem]
    stated: Callable[[str], int | str | None] | None


def _competition(row: Row, number: int) -> Problem:
    expected = column(row, ("answer",), number)
    text = str(expected).strip()
    if (
        not text.isascii()
        or not text.removesuffix(".0").isdigit()
        or int(text.removesuffix(".0")) > 999
    ):
        raise OptionError(
            f"row {number} of the dataset has the answer {quoted(expected)}; AIME's are from 0 to 999"
        )
    problem = str(column(row, ("problem", "question"), number)).strip()
    return Problem(str(number), MATH_PROMPT.format(problem=problem), int(text.removesuffix(".0")))


def _choice(row: Row, number: int) -> Problem:
    question = str(column(row, ("Question",), number)).strip()
    names = ("Correct Answer", *(f"Incorrect Answer {i}" for i in (1, 2, 3)))
    options = [str(column(row, (name,), number)).strip() for name in names]
    order = random.Random(question).sample(
        range(4), 4
    )  # the same on every machine, and for every sample
    shown_options = {letter: options[i] for letter, i in zip(LETTERS, order, strict=True)}
    prompt = CHOICE_PROMPT.format(question=question, **shown_options)
    return Problem(str(number), prompt, LETTERS[order.index(0)])


def _program(row: Row, number: int) -> Problem:
    program = program_of(row, number)
    question = str(column(row, ("question_content",), number))
    identity = str(column(row, ("question_id",), number))
    return Problem(identity, program_prompt(question, program.starter), program)


def _made(row: Row, number: int) -> Problem:
    return Problem(str(number), str(row["question"]), int(row["expected"]))


ANY_FORM = ("*.parquet", "*.jsonl", "*.json", "*.csv")
V5_FILES = ("test.jsonl", "test2.jsonl", "test3.jsonl", "test4.jsonl", "test5.jsonl")
TASKS = {
    task.name: task
    for task in (
        Task(
            "aime24",
            "AIME 2024",
            "HuggingFaceH4/aime_2024",
            ANY_FORM,
            30,
            70.68,
            _competition,
            final_integer,
        ),
        Task(
            "aime25",
            "AIME 2025",
            "opencompass/AIME2025",
            ANY_FORM,
            30,
            62.76,
            _competition,
            final_integer,
        ),
        Task(
            "gpqa-diamond",
            "GPQA Diamond",
            "Idavidrein/gpqa",
            ("gpqa_diamond.csv", "gpqa_diamond.parquet", "gpqa_diamond.jsonl"),
            198,
            68.18,
            _choice,
            final_letter,
        ),
        Task(
            "livecodebench-v5",
            "LiveCodeBench v5",
            "livecodebench/code_generation_lite",
            V5_FILES,
            880,
            55.84,
            _program,
            None,
        ),
        Task("demo-arithmetic", "arithmetic, held out", None, (), None, None, _made, final_integer),
    )
}


def demo_rows(tokenizer: Tokenizer) -> list[Row]:
    """Problems that the embedded model never saw, as the rows of a dataset."""
    made = held_out_problems(DEMO_PROBLEMS, DEMO_SEED, tokenizer.pieces, ARITHMETIC)
    return [{"question": problem.question, "expected": problem.expected} for problem in made]


def problems_of(task: Task, rows: Iterable[Row]) -> list[Problem]:
    """Raises OptionError where a row is not of the task's form, or two problems have one id."""
    problems = [task.problem(row, number) for number, row in enumerate(rows, start=1)]
    ids = [problem.id for problem in problems]
    if len(set(ids)) < len(ids):
        twice = next(one for one in ids if ids.count(one) > 1)
        raise OptionError(
            f"the dataset has two problems {twice!r}; is one of its files in the folder twice?"
        )
    return problems


def digest(problems: Sequence[Problem]) -> str:
    """sha256 of everything that is asked, and of what is right."""

    def plain(expected: int | str | Program) -> Any:
        return expected.as_dict() if isinstance(expected, Program) else expected

    everything = [[p.id, p.prompt, plain(p.expected)] for p in problems]
    return hashlib.sha256(json.dumps(everything).encode()).hexdigest()
