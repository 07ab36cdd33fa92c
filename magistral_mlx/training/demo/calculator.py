"""A calculator as a tool: its definitions, the expressions it is asked, and its results."""

import json
import random
from dataclasses import dataclass
from typing import Any

from magistral_mlx.training.demo.phrases import PHRASES
from magistral_mlx.training.demo.problems import SIGNS, Problem, ask_arithmetic

NAMES = ("calculator", "calculate", "calc", "compute", "evaluate", "eval_expression", "math")
ARGUMENTS = ("expression", "expr", "formula", "input", "text", "query")
DESCRIPTIONS = (
    "Evaluate an arithmetic expression.", "Calculate an expression.", "A calculator.",
    "Compute the value of a sum, difference or product.", "Does arithmetic.",
    "Returns the result of an expression.", "Calculatrice.", "Rechnet einen Ausdruck aus.",
    "Calcula una expresión.", "Calcola un'espressione.", "Calcula uma expressão.", "",
)  # fmt: skip
HINTS = (None, None, None, "The expression.", "For example 12*34", "for example 7+8")
# Other tools that a list may hold; no problem needs them.
OTHERS = (
    ("get_weather", "Weather of a city.", "city"),
    ("search", "Search the web.", "query"),
    ("get_time", "Time of a place.", "place"),
    ("send_mail", "Send a mail.", "text"),
    ("read_file", "Read a file.", "path"),
    ("translate", "Translate a text.", "text"),
)


@dataclass(frozen=True, slots=True)
class Calculator:
    """A calculator that takes one text, by its names in a tool's definition."""

    name: str
    argument: str

    def arguments(self, expression: str) -> str:
        """Return the JSON of a call's arguments."""
        return json.dumps({self.argument: expression}, ensure_ascii=False)


@dataclass(frozen=True, slots=True)
class ToolList:
    """The definitions that a conversation carries, and the calculator among them, if any."""

    definitions: tuple[dict[str, Any], ...]
    calculator: Calculator | None


def definition(
    name: str, description: str, argument: str, hint: str | None = None
) -> dict[str, Any]:
    """Return a tool of one text argument, in OpenAI's form and mistral-common's order of keys."""
    schema = {"type": "string"} | ({} if hint is None else {"description": hint})
    parameters = {"type": "object", "properties": {argument: schema}, "required": [argument]}
    return {
        "type": "function",
        "function": {"name": name, "description": description, "parameters": parameters},
    }


def random_tools(rng: random.Random, words: list[str], usual: float) -> ToolList:
    """Draw a tool list: a calculator, now and then beside another tool, or the other alone.

    Args:
        rng: draws.
        words: pieces to make a calculator's name of, now and then.
        usual: share of calculators with the first name and argument.
    """
    name, argument = rng.choice(NAMES), rng.choice(ARGUMENTS)
    if usual and rng.random() < usual:
        name, argument = NAMES[0], ARGUMENTS[0]
    elif rng.random() < 0.2:
        name = "_".join(rng.choices(words, k=rng.choice((1, 2))))
    calculator = Calculator(name, argument)
    mine = definition(name, rng.choice(DESCRIPTIONS), argument, rng.choice(HINTS))
    draw = rng.random()
    if draw < 0.75:
        return ToolList((mine,), calculator)
    other = definition(*rng.choice(OTHERS))
    if draw > 0.95:
        return ToolList((other,), None)
    both = (mine, other) if rng.random() < 0.5 else (other, mine)
    return ToolList(both, calculator)


def expression_operands(rng: random.Random, kind: str, digits: int) -> tuple[int, int]:
    """Draw operands for a calculator, of up to ``digits`` digits, or two less in a product."""
    most = digits - 2 if kind == "multiply" else digits
    a, b = (rng.randrange(10 ** rng.randint(1, most)) for _ in range(2))
    return a, b


def ask_calculator(
    rng: random.Random, kind: str, a: int, b: int, language: str
) -> tuple[Problem, str]:
    """Make a problem that a call of the calculator solves, and the call's expression."""
    problem = ask_arithmetic(rng, kind, a, b, language)
    expression = f"{a}{SIGNS[kind]}{b}"
    trace = f"{PHRASES[language].tool}\n{expression}"
    return Problem(
        kind, language, problem.question, trace, problem.answer, problem.expected
    ), expression


def random_result(rng: random.Random, expression: str, expected: int) -> tuple[int, str]:
    """Draw what the tool returns: its number and its text.

    One number in eight is another than the expected one, so that the result is read, not guessed.
    """
    number = expected if rng.random() < 0.875 else rng.randint(-(10**5), 10**6)
    draw = rng.random()
    if draw < 0.75:
        return number, str(number)
    if draw < 0.9:
        return number, json.dumps({"result": number})
    return number, f"{expression} = {number}"


def call_id(number: int) -> str:
    """Return the id of a conversation's call, which are counted from 1: call00001."""
    return f"call{number:05}"
