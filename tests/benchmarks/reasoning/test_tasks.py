"""Datasets in their published forms, the prompts made of them, and errors for any other form."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.reasoning import rows as rows_module
from benchmarks.reasoning.rows import read_dataset
from benchmarks.reasoning.tasks import TASKS, Problem, digest, problems_of
from magistral_mlx.errors import HubError, OptionError
from tests.support import published


def read(task: str, source: Path) -> list[Problem]:
    return problems_of(TASKS[task], read_dataset(str(source), TASKS[task].files))


def test_the_card_s_figures() -> None:
    assert [task.card_percent for task in TASKS.values()] == [70.68, 62.76, 68.18, None]


def test_one_dataset_in_every_form_is_the_same_problems(tmp_path: Path) -> None:
    rows = published.aime24_rows()
    (tmp_path / "a.json").write_text(json.dumps(rows))
    published.write_jsonl(tmp_path / "a.jsonl", rows)
    lines = [
        "ID,Problem,Solution,Answer",
        *(f"2024-I-{i},{r['problem']},,{r['answer']}" for i, r in enumerate(rows)),
    ]
    (tmp_path / "a.csv").write_text("\ufeff" + "\n".join(lines) + "\n")
    digests = {digest(read("aime24", tmp_path / name)) for name in ("a.json", "a.jsonl", "a.csv")}
    if importlib.util.find_spec("pyarrow"):
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        folder = tmp_path / "hub" / "data"
        folder.mkdir(parents=True)
        parquet.write_table(
            pyarrow.Table.from_pylist(rows), folder / "train-00000-of-00001.parquet"
        )
        (tmp_path / "hub" / "README.json").write_text("{}")
        digests.add(digest(read("aime24", tmp_path / "hub")))
    assert len(digests) == 1


def test_the_halves_of_a_year_come_one_after_the_other(tmp_path: Path) -> None:
    rows = published.aime25_rows()
    published.write_jsonl(tmp_path / "aime2025-I.jsonl", rows[:2])
    published.write_jsonl(tmp_path / "aime2025-II.jsonl", rows[2:])
    problems = read("aime25", tmp_path)
    assert [problem.expected for problem in problems] == [25, 100, 0]
    assert [problem.id for problem in problems] == ["1", "2", "3"]
    assert "\n\nWhat is 20 + 5?\n\n" in problems[0].prompt


def test_options_are_shuffled_once_and_for_all(tmp_path: Path) -> None:
    problems = read("gpqa-diamond", published.write_gpqa(tmp_path / "gpqa_diamond.csv"))
    assert problems == read("gpqa-diamond", tmp_path)
    assert len({problem.expected for problem in problems}) > 2
    for i, problem in enumerate(problems):
        assert f"\n{problem.expected}) right {i}" in problem.prompt.rstrip() + "\n"
        options = problem.prompt.splitlines()[-4:]
        assert sorted(line[3:] for line in options) == sorted(
            [f"right {i}", *(f"wrong {k} of {i}" for k in (1, 2, 3))]
        )
        assert f'Which is right,\n"number {i}"?' in problem.prompt


def broken(name: str, value: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda row: {**row, name: value}


@pytest.mark.parametrize(
    ("task", "rows", "change", "said"),
    [
        (
            "aime24",
            published.aime24_rows,
            lambda row: {"text": row["problem"]},
            "no answer; its columns are text",
        ),
        ("aime24", published.aime24_rows, broken("answer", "1/2"), "AIME's are from 0 to 999"),
        ("aime24", published.aime24_rows, broken("answer", 1000), "AIME's are from 0 to 999"),
        ("aime24", published.aime24_rows, broken("problem", ""), "no problem or question"),
        ("gpqa-diamond", published.aime24_rows, lambda row: row, "no Question"),
    ],
)
def test_another_shape_is_refused_by_what_it_lacks(
    task: str, rows: Callable[[], list[dict[str, Any]]], change: Callable[..., Any], said: str
) -> None:
    with pytest.raises(OptionError, match=said):
        problems_of(TASKS[task], [change(row) for row in rows()])


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", "{", "could not be read as .jsonl"),
        ("a.json", "{}", "not a list of rows"),
        ("a.json", "[1]", "row 1 is 1, without named columns"),
        ("a.csv", "problem,answer\n", "no rows"),
        ("a.parquet", "PAR1", "parquet"),
        ("a.txt", "x", "the name must end in"),
        ("a.jsonl", "\udcff", "could not be read"),
    ],
)
def test_a_file_of_another_form_is_refused(
    tmp_path: Path, name: str, content: str, said: str
) -> None:
    (tmp_path / name).write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(OptionError, match=said):
        list(read_dataset(str(tmp_path / name), ("*",)))


def test_what_is_nowhere_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OptionError, match=r"has no file gpqa_diamond.csv or"):
        read_dataset(str(tmp_path), TASKS["gpqa-diamond"].files)
    with pytest.raises(OptionError, match="no file or folder"):
        read_dataset(str(tmp_path / "none.csv"), ("*.csv",))

    def unreachable(*arguments: object, **options: object) -> str:
        raise OSError("no route")

    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    with pytest.raises(
        HubError, match=r"org/name could not be fetched .*name a copy on this disk with --data"
    ):
        read_dataset("org/name", ("*.csv",))


def test_the_hub_is_asked_for_the_task_s_files_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def download(repo: str, **options: Any) -> str:
        asked.update(options, repo=repo)
        return str(published.write_gpqa(tmp_path / "gpqa_diamond.csv").parent)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert len(list(rows_module.read_dataset("org/name", TASKS["gpqa-diamond"].files))) == 12
    assert asked["repo_type"] == "dataset"
    assert asked["allow_patterns"] == list(TASKS["gpqa-diamond"].files)
