"""Measure the embedded model: each operation in each language, and its calls of a calculator.

Run ``python -m magistral_mlx.training.demo.evaluate FOLDER``, where FOLDER is the checkpoint or a
conversion of it. Replies are greedy. Problems are ones that training never saw.
"""

import argparse
import random
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from magistral_mlx.tokenizer.segments import ToolCall
from magistral_mlx.tokenizer.tekken import Tokenizer
from magistral_mlx.tokenizer.tool_calls import as_message
from magistral_mlx.training.demo.calculator import (
    Calculator,
    ask_calculator,
    definition,
    expression_operands,
)
from magistral_mlx.training.demo.decoder import Decoder
from magistral_mlx.training.demo.phrases import LANGUAGES
from magistral_mlx.training.demo.problems import (
    ARITHMETIC,
    Problem,
    ask_arithmetic,
    held_out_problems,
    is_correct,
    is_unseen,
    random_operands,
)

CALCULATOR = Calculator("calculator", "expression")
TOOLS = [definition(CALCULATOR.name, "Evaluate an arithmetic expression.", CALCULATOR.argument)]
DIGITS = 5
Cell = tuple[str, str]


class Evaluator:
    """A checkpoint that is asked many problems side by side."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = Tokenizer.from_folder(folder)
        self.decoder = Decoder(folder)

    def answers(self, problems: Sequence[Problem]) -> list[str | None]:
        """Return the answer to each problem; None where the trace was not closed."""
        prompts = [self.tokenizer.encode_chat(p.question) for p in problems]
        return [self._read(ids)[0] for ids in self._replies(prompts)]

    def right(self, problems: Sequence[Problem]) -> list[bool]:
        """Tell for each problem if it is answered rightly."""
        return [
            answer is not None and is_correct(p, answer)
            for p, answer in zip(problems, self.answers(problems), strict=True)
        ]

    def calls(self, problems: Sequence[tuple[Problem, str]]) -> tuple[list[bool], list[bool]]:
        """Run the tool loop on problems and their expressions.

        Returns:
            For each problem: if the call is the right one, and if the answer after its result is.
        """
        asked = [[{"role": "user", "content": p.question}] for p, _ in problems]
        prompts = [self.tokenizer.encode_chat(m, tools=TOOLS) for m in asked]
        called: list[bool] = []
        for i, (ids, (problem, expression)) in enumerate(
            zip(self._replies(prompts), problems, strict=True)
        ):
            answer, calls, trace = self._read(ids)
            wanted = (CALCULATOR.name, {CALCULATOR.argument: expression})
            called.append([(c.name, c.arguments) for c in calls] == [wanted] and answer == "")
            if called[-1]:
                asked[i] += _turn(trace, calls[0], str(problem.expected))
        going = [i for i, is_right in enumerate(called) if is_right]
        prompts = [self.tokenizer.encode_chat(asked[i], tools=TOOLS) for i in going]
        answered = [False] * len(problems)
        for i, ids in zip(going, self._replies(prompts), strict=True):
            answer, calls, _ = self._read(ids)
            answered[i] = not calls and answer is not None and is_correct(problems[i][0], answer)
        return called, answered

    def _replies(self, prompts: list[list[int]]) -> list[list[int]]:
        return self.decoder.replies(prompts, stop=self.tokenizer.eos_id)

    def _read(self, ids: list[int]) -> tuple[str | None, list[ToolCall], str]:
        """Return the answer, None without a closed trace, the calls, and the trace."""
        calls, _ = self.tokenizer.tool_calls(ids)
        end = ids.index(self.tokenizer.tool_calls_id) if calls else len(ids)
        trace, close, answer = self.tokenizer.decode(ids[:end]).partition("\n</think>\n")
        return answer if close else None, calls, trace.removeprefix("<think>\n")


def _turn(trace: str, call: ToolCall, result: str) -> list[dict[str, Any]]:
    return [
        {
            "role": "assistant", "content": "", "reasoning": trace,
            "tool_calls": [as_message(call)],
        },
        {"role": "tool", "tool_call_id": call.id, "content": result},
    ]  # fmt: skip


def uniform_problems(cell: Cell, n: int, seed: int) -> list[Problem]:
    """Draw unseen problems of a (language, operation), with operands uniform below 1,000.

    A factor of a product is below 10.
    """
    language, kind = cell
    rng = random.Random(f"{seed} {language} {kind}")
    found: list[Problem] = []
    while len(found) < n:
        a, b = rng.randrange(1000), rng.randrange(10 if kind == "multiply" else 1000)
        a, b = (b, a) if kind == "multiply" and rng.random() < 0.5 else (a, b)
        if not is_unseen(kind, a, b):
            continue
        problem = ask_arithmetic(rng, kind, a, b, language)
        # "7 * 7 = ?" does not tell its language.
        if language == "en" or re.search(r"[a-wyz]", problem.question):
            found.append(problem)
    return found


def calculations(n: int, seed: int) -> list[tuple[Problem, str]]:
    """Draw unseen problems for the calculator, half of them with larger numbers."""
    rng = random.Random(f"{seed} calculator")
    found: list[tuple[Problem, str]] = []
    while len(found) < n:
        kind, language = rng.choice(ARITHMETIC), rng.choice(LANGUAGES)
        is_large = rng.random() < 0.5
        a, b = expression_operands(rng, kind, DIGITS) if is_large else random_operands(rng, kind)
        if is_unseen(kind, a, b):
            found.append(ask_calculator(rng, kind, a, b, language))
    return found


def table(evaluator: Evaluator, n: int, seed: int = 2026) -> Counter[Cell]:
    """Return how many of ``n`` problems are answered rightly in each language and operation."""
    cells = [(language, kind) for language in LANGUAGES for kind in ARITHMETIC]
    problems = [(cell, p) for cell in cells for p in uniform_problems(cell, n, seed)]
    right = evaluator.right([p for _, p in problems])
    return Counter(
        dict.fromkeys(cells, 0)
        | Counter(c for (c, _), is_right in zip(problems, right, strict=True) if is_right)
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m magistral_mlx.training.demo.evaluate", description=__doc__
    )
    parser.add_argument("folder", type=Path, help="of the checkpoint or of a conversion of it")
    parser.add_argument("--problems", type=int, default=500, metavar="N", help="in each cell")
    parser.add_argument("--seed", type=int, default=2026)
    options = parser.parse_args()
    evaluator, n = Evaluator(options.folder), options.problems
    right = table(evaluator, n, options.seed)
    print(f"right answers in %, of {n} each", *ARITHMETIC, sep="\t")
    for language in LANGUAGES:
        print(language, *(f"{100 * right[language, k] / n:.1f}" for k in ARITHMETIC), sep="\t")
    letters = held_out_problems(n, options.seed, evaluator.tokenizer.pieces, ("letters",))
    called, answered = evaluator.calls(calculations(n, options.seed))
    for name, results in (
        ("letters", evaluator.right(letters)),
        ("calculator called rightly", called),
        ("and its result used", answered),
    ):
        print(f"{name}\t{100 * sum(results) / n:.1f}")


if __name__ == "__main__":
    main()
