"""The published datasets' forms, what is asked of them, and what is said of any other form."""

import base64
import importlib.util
import json
import pickle
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.reasoning import rows as rows_module
from benchmarks.reasoning.programs import Program
from benchmarks.reasoning.rows import read_dataset
from benchmarks.reasoning.tasks import TASKS, Problem, digest, problems_of
from magistral_mlx.errors import HubError, OptionError
from tests.support import published


def read(task: str, source: Path) -> list[Problem]:
    return problems_of(TASKS[task], read_dataset(str(source), TASKS[task].files))


def test_the_card_s_figures() -> None:
    assert [task.card_percent for task in TASKS.values()] == [70.68, 62.76, 68.18, 55.84, None]


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


def test_version_5_is_its_five_files_and_tests_are_unpacked(tmp_path: Path) -> None:
    first, second = read("livecodebench-v5", published.write_livecodebench(tmp_path))
    assert (first.id, second.id) == ("abc1_a", "3000")
    assert isinstance(first.expected, Program)
    assert isinstance(second.expected, Program)
    assert [case.given for case in first.expected.cases] == ["2 3\n", "-1 1\n"]
    assert (first.expected.function, second.expected.function) == (None, "scale")
    assert "# YOUR CODE HERE" in first.prompt
    assert published.STARTER in second.prompt


def test_tests_stay_in_the_file_which_must_not_change(tmp_path: Path) -> None:
    rows = published.livecodebench_rows()
    file = published.write_jsonl(tmp_path / "test.jsonl", rows)
    placed = [problem.expected for problem in read("livecodebench-v5", file)]
    held = [problem.expected for problem in problems_of(TASKS["livecodebench-v5"], rows)]
    for one, other in zip(placed, held, strict=True):
        assert isinstance(one, Program)
        assert isinstance(other, Program)
        assert (one.cases, one.as_dict()) == (other.cases, other.as_dict())
        assert not isinstance(one._cases, tuple)
    published.write_jsonl(file, rows[::-1])
    with pytest.raises(OptionError, match="was changed while it was used"):
        placed[0].cases  # type: ignore[union-attr]  # noqa: B018


def broken(name: str, value: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda row: {**row, name: value}


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("ran",))


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
        ("livecodebench-v5", published.aime24_rows, lambda row: row, "no public_test_cases"),
        (
            "livecodebench-v5",
            published.livecodebench_rows,
            broken("private_test_cases", "%"),
            "no list of tests",
        ),
        (
            "livecodebench-v5",
            published.livecodebench_rows,
            broken("public_test_cases", '[{"input": ""}]'),
            "KeyError",
        ),
        (
            "livecodebench-v5",
            published.livecodebench_rows,
            broken("metadata", "{"),
            "names no func_name",
        ),
        (
            "livecodebench-v5",
            published.livecodebench_rows,
            broken("metadata", "[1]"),
            "names no func_name",
        ),
        (
            "livecodebench-v5",
            published.livecodebench_rows,
            broken("question_id", "one"),
            "two problems 'one'",
        ),
    ],
)
def test_another_shape_is_refused_by_what_it_lacks(
    task: str, rows: Callable[[], list[dict[str, Any]]], change: Callable[..., Any], said: str
) -> None:
    with pytest.raises(OptionError, match=said):
        problems_of(TASKS[task], [change(row) for row in rows()])


def test_a_pickle_that_would_do_something_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    evil = base64.b64encode(zlib.compress(pickle.dumps(Evil()))).decode()
    rows = [broken("private_test_cases", evil)(row) for row in published.livecodebench_rows()]
    with pytest.raises(OptionError, match="the pickle is no text"):
        problems_of(TASKS["livecodebench-v5"], rows)
    assert "ran" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", "{", "could not be read as .jsonl"),
        ("a.json", "{}", "not a list of rows"),
        ("a.json", "[1]", "row 1 is 1; every row must have named columns"),
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
    with pytest.raises(OptionError, match=r"has no file test.jsonl or test2.jsonl"):
        read_dataset(str(tmp_path), TASKS["livecodebench-v5"].files)
    with pytest.raises(OptionError, match="no such file or folder"):
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
        return str(published.write_livecodebench(tmp_path))

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert (
        len(
            list(
                rows_module.read_dataset("org/name", TASKS["livecodebench-v5"].files, revision="v5")
            )
        )
        == 2
    )
    assert asked["repo_type"] == "dataset"
    assert asked["revision"] == "v5"
    assert asked["allow_patterns"] == ["test.jsonl", *(f"test{i}.jsonl" for i in (2, 3, 4, 5))]
