"""benchmarks/README.md agrees with the code: commands, the card's figures, predictions, files."""

import re
import shlex
from pathlib import Path

import click
import pytest

from benchmarks.__main__ import benchmarks
from benchmarks.macs.predict import CHIPS, counted_drafting, predict
from benchmarks.reasoning.tasks import TASKS
from tests.support.graded_integers import INTEGERS, TRACED_INTEGERS
from tests.support.graded_letters import LETTERS, TRACED_LETTERS

FOLDER = Path(__file__).parents[2] / "benchmarks"
TEXT = (FOLDER / "README.md").read_text()
LINES = [
    line for block in re.findall(r"```sh\n(.*?)```", TEXT, re.DOTALL) for line in block.splitlines()
]


@pytest.mark.parametrize("line", LINES)
def test_its_commands_are_understood(line: str) -> None:
    words = shlex.split(line, comments=True)
    assert words[:3] == ["python", "-m", "benchmarks"]
    command = benchmarks.get_command(click.Context(benchmarks), words[3])
    assert command is not None
    command.make_context(words[3], words[4:])  # parses, and runs nothing


def test_every_command_is_in_its_table() -> None:
    named = set(re.findall(r"^\| (`.*?) \|", TEXT, re.MULTILINE))
    names = {word for row in named for word in re.findall(r"`([\w-]+)", row)}
    assert set(benchmarks.commands) <= names


@pytest.mark.parametrize("name", [task.name for task in TASKS.values() if task.repo])
def test_the_tasks_are_those_of_the_code(name: str) -> None:
    task = TASKS[name]
    assert (
        f"| `{name}` | {task.card_percent:.2f} | {task.published_problems} | `{task.repo}`" in TEXT
    )


def test_the_predictions_are_those_that_are_computed() -> None:
    for chip in CHIPS:
        found = predict(chip, 2048, counted_drafting())
        cells = [
            found.per_second,
            *found.drafted.values(),
            found.first_token_seconds,
            found.pass_seconds,
        ]
        assert f"| {chip.name} | " + " | ".join(map(str, cells)) + " |" in TEXT


def test_the_graders_answers_are_counted() -> None:
    count = sum(map(len, (INTEGERS, LETTERS, TRACED_INTEGERS, TRACED_LETTERS)))
    assert f"held against {count} answers made by hand" in " ".join(TEXT.split())


def test_files_it_names_exist() -> None:
    for name in re.findall(r"`([\w-]+\.json)`", TEXT):
        assert (FOLDER / "results" / name).exists() or name in ("A.json", "B.json"), name
