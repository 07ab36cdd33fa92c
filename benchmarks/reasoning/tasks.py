"""The benchmarks of the model card: their source, their prompts and their graders."""

import hashlib
import json
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import astuple, dataclass

from benchmarks.reasoning.grading import final_integer, final_letter
from benchmarks.reasoning.rows import Row, column
from magistral_mlx.errors import OptionError, quoted
from magistral_mlx.tokenizer.tekken import Tokenizer
from magistral_mlx.training.demo.problems import ARITHMETIC, held_out_problems

DEMO_PROBLEMS, DEMO_SEED = 100, 2026
LETTERS = "ABCD"
LARGEST = 999  # answer of AIME

# Source: github.com/openai/simple-evals, whose form of the answer needs no \boxed.
MATH_PROMPT = (
    "Solve the following math problem step by step. The last line of your response should be of "
    "the form Answer: $ANSWER (without quotes) where $ANSWER is the answer to the problem."
    '\n\n{problem}\n\nRemember to put your answer on its own line after "Answer:", and you do not '
    "need to use a \\boxed command."
)
CHOICE_PROMPT = (
    "Answer the following multiple choice question. The last line of your response should be of "
    "the following format: 'Answer: $LETTER' (without quotes) where LETTER is one of ABCD. Think "
    "step by step before answering.\n\n{question}\n\nA) {A}\nB) {B}\nC) {C}\nD) {D}"
)


@dataclass(frozen=True, slots=True)
class Problem:
    """A question and its right answer."""

    id: str
    prompt: str
    expected: int | str


@dataclass(frozen=True, slots=True)
class Task:
    """A benchmark.

    Attributes:
        repo: the dataset on the hub; None if the problems are made here.
        files: patterns of its files.
        card_percent: pass@1 of Magistral Small 2506 on the model card.
        stated: reads from an answer the value that is compared with the expected one.
    """

    name: str
    title: str
    repo: str | None
    files: tuple[str, ...]
    published_problems: int | None
    card_percent: float | None
    problem: Callable[[Row, int], Problem]
    stated: Callable[[str], int | str | None]


def _competition(row: Row, number: int) -> Problem:
    expected = column(row, ("answer",), number)
    digits = str(expected).strip().removesuffix(".0")
    if not digits.isascii() or not digits.isdigit() or int(digits) > LARGEST:
        raise OptionError(
            f"row {number} of the dataset has the answer {quoted(expected)}; AIME's are from 0 to "
            f"{LARGEST}"
        )
    problem = str(column(row, ("problem", "question"), number)).strip()
    return Problem(str(number), MATH_PROMPT.format(problem=problem), int(digits))


def _choice(row: Row, number: int) -> Problem:
    question = str(column(row, ("Question",), number)).strip()
    names = ("Correct Answer", *(f"Incorrect Answer {i}" for i in (1, 2, 3)))
    options = [str(column(row, (name,), number)).strip() for name in names]
    # The order is the same on every machine and for every sample.
    order = random.Random(question).sample(range(4), 4)
    lettered = {letter: options[i] for letter, i in zip(LETTERS, order, strict=True)}
    prompt = CHOICE_PROMPT.format(question=question, **lettered)
    return Problem(str(number), prompt, LETTERS[order.index(0)])


def _made(row: Row, number: int) -> Problem:
    return Problem(str(number), str(row["question"]), int(row["expected"]))


ANY_FORM = ("*.parquet", "*.jsonl", "*.json", "*.csv")
GPQA_FILES = ("gpqa_diamond.csv", "gpqa_diamond.parquet", "gpqa_diamond.jsonl")
_AIME = (_competition, final_integer)
TASKS = {
    task.name: task
    for task in (
        Task("aime24", "AIME 2024", "HuggingFaceH4/aime_2024", ANY_FORM, 30, 70.68, *_AIME),
        Task("aime25", "AIME 2025", "opencompass/AIME2025", ANY_FORM, 30, 62.76, *_AIME),
        Task(
            "gpqa-diamond",
            "GPQA Diamond",
            "Idavidrein/gpqa",
            GPQA_FILES,
            published_problems=198,
            card_percent=68.18,
            problem=_choice,
            stated=final_letter,
        ),
        Task("demo-arithmetic", "arithmetic, held out", None, (), None, None, _made, final_integer),
    )
}


def demo_rows(tokenizer: Tokenizer) -> list[Row]:
    """Return problems that the embedded model never saw, as the rows of a dataset."""
    made = held_out_problems(DEMO_PROBLEMS, DEMO_SEED, tokenizer.pieces, ARITHMETIC)
    return [{"question": problem.question, "expected": problem.expected} for problem in made]


def problems_of(task: Task, rows: Iterable[Row]) -> list[Problem]:
    """Return the problems of a dataset; raise OptionError if a row has another form."""
    return [task.problem(row, number) for number, row in enumerate(rows, start=1)]


def digest(problems: Sequence[Problem]) -> str:
    """Return sha256 of all prompts and right answers."""
    return hashlib.sha256(json.dumps(list(map(astuple, problems))).encode()).hexdigest()
