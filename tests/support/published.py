"""Small made-up datasets in the form of the published ones."""

import csv
import json
from pathlib import Path
from typing import Any

AIME = [("What is 20 + 5?", "025"), ("What is $10^2$?", "100"), ("What is 9 - 9?", "0")]


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
