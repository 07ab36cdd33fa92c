"""LiveCodeBench's problems: the prompt, the tests, the code in an answer, and whether it passes.

Source: github.com/LiveCodeBench/LiveCodeBench, release v5 of its lite dataset; prompts and comparison as there.
"""

import base64
import binascii
import hashlib
import json
import pickletools
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any

from benchmarks.reasoning.rows import Place, PlacedRow, Row, column
from benchmarks.reasoning.sandbox import Sandbox
from magistral_mlx.errors import OptionError, quoted

ROLE = (
    "You are an expert Python programmer. You will be given a question (problem specification) and will generate a "
    "correct Python program that matches the specification and passes all tests."
)
WITH_STARTER = (
    "You will use the following starter code to write the solution to the problem and enclose your code within "
    "delimiters."
)
FROM_STDIN = (
    "Read the inputs from stdin solve the problem and write the answer to stdout (do not directly test on the sample "
    "inputs). Enclose your code within delimiters as follows. Ensure that when the python program runs, it reads the "
    "inputs, runs the algorithm and writes output to STDOUT."
)
STARTER = "# YOUR CODE HERE"
MOST_BYTES = 2**28  # of a row's tests once unpacked
HARMLESS = {
    "PROTO",
    "FRAME",
    "BINUNICODE",
    "SHORT_BINUNICODE",
    "BINUNICODE8",
    "UNICODE",
}  # of a pickled text
HARMLESS |= {"MEMOIZE", "BINPUT", "LONG_BINPUT", "PUT", "STOP"}

# Solutions count on these being there, as they are where the problems come from.
PRELUDE = """import bisect, collections, copy, functools, heapq, itertools, math, operator, random, re, string, sys
from bisect import *
from collections import *
from functools import *
from heapq import *
from itertools import *
from math import *
from typing import *
sys.setrecursionlimit(50_000)
"""
CALL = """
import json as _json, sys as _sys
_arguments = [_json.loads(line) for line in _sys.stdin.read().splitlines() if line.strip()]
_function = getattr(Solution(), {name!r}) if "Solution" in globals() else globals()[{name!r}]
print("\\n" + _json.dumps(_function(*_arguments)))
"""


@dataclass(frozen=True, slots=True)
class Case:
    """One test: what goes in, and what must come out."""

    given: str
    wanted: str


@dataclass(frozen=True, slots=True)
class Program:
    """What a program must do. ``function`` is None where it reads stdin and prints.

    The tests stay in the dataset's file until they are needed: those of all problems are gigabytes.
    """

    starter: str
    function: str | None
    tests_sha256: str
    _cases: tuple[Case, ...] | Place

    @property
    def cases(self) -> tuple[Case, ...]:
        """Raises OptionError where the file is no longer what it was."""
        if not isinstance(self._cases, Place):
            return self._cases
        try:
            cases, _ = _cases_of(self._cases.row(), 0)
        except (OSError, ValueError, OptionError):
            cases = ()
        if _digest(cases) != self.tests_sha256:
            raise OptionError(
                f"{self._cases.file} was changed while it was used; run the same command to go on"
            )
        return cases

    def as_dict(self) -> dict[str, Any]:
        return {"starter": self.starter, "function": self.function, "tests": self.tests_sha256}


def program_prompt(question: str, starter: str) -> str:
    wish, code = (WITH_STARTER, starter) if starter else (FROM_STDIN, STARTER)
    return (
        f"{ROLE}\n\n### Question:\n{question}\n\n### Format: {wish}\n```python\n{code}\n```\n\n"
        "### Answer: (use the provided format with backticks)\n\n"
    )


def program_of(row: Row, number: int) -> Program:
    """Raises OptionError where the row is not of LiveCodeBench's form."""
    cases, kind = _cases_of(row, number)
    function = None
    if kind == "functional":
        function = _function(column(row, ("metadata",), number), number)
    kept = row.place if isinstance(row, PlacedRow) else cases
    return Program(str(row.get("starter_code") or ""), function, _digest(cases), kept)


def _function(metadata: Any, number: int) -> str:
    try:
        facts = metadata if isinstance(metadata, dict) else json.loads(str(metadata))
        return str(facts["func_name"])
    except (ValueError, KeyError, TypeError):
        raise OptionError(
            f"row {number} of the dataset: metadata is {quoted(metadata)}, which names no func_name to call"
        ) from None


def _cases_of(row: Row, number: int) -> tuple[tuple[Case, ...], str]:
    """The tests, and which kind they are."""
    cases: list[dict[str, str]] = []
    for name in ("public_test_cases", "private_test_cases"):
        value = column(row, (name,), number)
        try:
            found = value if isinstance(value, list) else _unpacked(str(value))
            cases += [{key: case[key] for key in ("input", "output", "testtype")} for case in found]
        except (ValueError, KeyError, TypeError, zlib.error, binascii.Error) as error:
            raise OptionError(
                f"row {number} of the dataset: {name} is {quoted(value)}, which is no list of tests ({error!r})"
            ) from None
    kinds = {case["testtype"] for case in cases}
    if len(kinds) != 1 or not kinds <= {"stdin", "functional"}:
        raise OptionError(
            f"row {number} of the dataset has tests of the types {sorted(kinds)}; one type is known"
        )
    return tuple(Case(case["input"], case["output"]) for case in cases), kinds.pop()


def _digest(cases: Sequence[Case]) -> str:
    found = hashlib.sha256()
    for case in cases:
        found.update(json.dumps([case.given, case.wanted]).encode())
    return found.hexdigest()


def _unpacked(text: str) -> Any:
    """JSON, or a pickled text of JSON, compressed, in base64: of the pickle only a text is taken, nothing is run."""
    if text.lstrip().startswith("["):
        return json.loads(text)
    inflater = zlib.decompressobj()
    packed = inflater.decompress(base64.b64decode(text, validate=True), MOST_BYTES)
    if inflater.unconsumed_tail:
        raise ValueError(f"over {MOST_BYTES} bytes")
    texts = []
    for operation, argument, _ in pickletools.genops(packed):
        if operation.name not in HARMLESS:
            raise ValueError(f"the pickle is no text: it has {operation.name}")
        if isinstance(argument, str):
            texts.append(argument)
    (found,) = texts
    return json.loads(found)


def code_in(answer: str) -> str | None:
    """The last block between fences; None where there is none."""
    blocks = re.findall(r"^[ \t]*```[^\n]*\n(.*?)^[ \t]*```", answer, re.DOTALL | re.MULTILINE)
    return blocks[-1] if blocks else None


def passes(answer: str, program: Program, sandbox: Sandbox) -> bool:
    """Whether the code in an answer passes every test."""
    code = code_in(answer)
    if code is None:
        return False
    script = (
        PRELUDE + code + ("" if program.function is None else CALL.format(name=program.function))
    )
    return all(_passes(script, case, program, sandbox) for case in program.cases)


def _passes(script: str, case: Case, program: Program, sandbox: Sandbox) -> bool:
    printed = sandbox.run(script, case.given)
    if printed is None:
        return False
    if program.function is None:
        return same_output(printed, case.wanted)
    try:
        return bool(json.loads(printed.splitlines()[-1]) == json.loads(case.wanted))
    except (ValueError, IndexError):
        return False


def same_output(printed: str, wanted: str) -> bool:
    """Line by line, without white space at the ends; or the same numbers, however they are written."""
    one, other = (
        [line.strip() for line in text.strip().splitlines()] for text in (printed, wanted)
    )
    if len(one) != len(other):
        return False
    return all(
        a == b or (_numbers(a) is not None and _numbers(a) == _numbers(b))
        for a, b in zip(one, other, strict=True)
    )


def _numbers(line: str) -> list[Decimal] | None:
    try:
        return [Decimal(word) for word in line.split()]
    except InvalidOperation:
        return None
