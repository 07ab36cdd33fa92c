"""Small datasets in the form of the published ones."""

import base64
import csv
import json
import pickle
import zlib
from pathlib import Path
from typing import Any

AIME = [("What is 20 + 5?", "025"), ("What is $10^2$?", "100"), ("What is 9 - 9?", "0")]
CASES = [
    {"input": "2 3\n", "output": "5\n", "testtype": "stdin"},
    {"input": "-1 1\n", "output": "0", "testtype": "stdin"},
]
CALLS = [
    {"input": "[1, 2, 3]\n2", "output": "[2, 4, 6]", "testtype": "functional"},
    {"input": "[]\n5", "output": "[]", "testtype": "functional"},
]
STARTER = (
    "class Solution:\n    def scale(self, values: List[int], factor: int) -> List[int]:\n        "
)


def aime24_rows() -> list[dict[str, Any]]:
    return [
        {"id": 60 + i, "problem": p, "solution": "...", "answer": a, "url": "", "year": "2024"}
        for i, (p, a) in enumerate(AIME)
    ]


def aime25_rows() -> list[dict[str, Any]]:
    return [{"question": problem, "answer": answer} for problem, answer in AIME]


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_gpqa(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = ["Pre-Revision Question", "Question", "Correct Answer"]
    columns += [f"Incorrect Answer {i}" for i in (1, 2, 3)] + [
        "Explanation",
        "Subdomain",
        "Record ID",
    ]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        for i in range(12):
            wrong = {f"Incorrect Answer {k}": f"wrong {k} of {i}" for k in (1, 2, 3)}
            row = {
                "Question": f'Which is right,\n"number {i}"?',
                "Correct Answer": f"right {i}\n",
                "Record ID": f"rec{i}",
            }
            writer.writerow(row | wrong)
    return path


def packed(cases: list[dict[str, str]]) -> str:
    """Pack cases as private tests are: a pickled text of JSON, compressed, in base64."""
    return base64.b64encode(zlib.compress(pickle.dumps(json.dumps(cases)))).decode()


def livecodebench_rows() -> list[dict[str, Any]]:
    shared = {
        "platform": "atcoder",
        "contest_id": "abc1",
        "contest_date": "2024-09-01T00:00:00",
        "difficulty": "easy",
    }
    return [
        {
            "question_title": "Sum",
            "question_content": "Print the sum of two integers.",
            "question_id": "abc1_a",
            "starter_code": "",
            "public_test_cases": json.dumps(CASES[:1]),
            "private_test_cases": packed(CASES[1:]),
            "metadata": "{}",
            **shared,
        },
        {
            "question_title": "Scale",
            "question_content": "Multiply every value.",
            "question_id": "3000",
            "starter_code": STARTER,
            "public_test_cases": json.dumps(CALLS[:1]),
            "private_test_cases": json.dumps(CALLS[1:]),
            "metadata": json.dumps({"func_name": "scale"}),
            **shared,
        },
    ]


def write_livecodebench(folder: Path) -> Path:
    first, second = livecodebench_rows()
    write_jsonl(folder / "test.jsonl", [first])
    write_jsonl(folder / "test5.jsonl", [second])
    write_jsonl(folder / "test6.jsonl", [{**second, "question_id": "later"}])  # of v6
    return folder
