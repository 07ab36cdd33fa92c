"""A run of a task on the embedded model: interrupted, continued, refused, and scored."""

import json
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.__main__ import main
from benchmarks.reasoning.evaluate import _graded
from benchmarks.reasoning.journal import Journal, Record, open_journal
from benchmarks.reasoning.score import against_budget, score
from benchmarks.reasoning.tasks import TASKS, Problem
from magistral_mlx.errors import OptionError
from magistral_mlx.generation.reply import Reply, Usage
from tests.support import published

KEY = {"task": "t", "checkpoint": "c" * 64, "sampling": {"seed": 0}, "dataset": "d"}
USAGE = Usage(
    prompt_tokens=10,
    completion_tokens=20,
    reasoning_tokens=15,
    cached_tokens=0,
    forward_passes=20,
    prefill_seconds=0.1,
    decode_seconds=0.2,
    peak_memory_bytes=1,
    max_tokens=100,
    seed=7,
)
RECORD = Record("1", 0, 0, True, 7, "7", "stop", "model", 10, 20, 15, 100)


def records(grades: dict[str, list[int]], tokens: int = 20) -> list[Record]:
    return [
        replace(
            RECORD, problem=problem, sample=i, is_correct=bool(grade), completion_tokens=tokens + i
        )
        for problem, several in grades.items()
        for i, grade in enumerate(several)
    ]


def test_a_score_is_the_mean_of_the_problems_and_its_errors_have_closed_forms() -> None:
    found = score(records({"a": [1, 1], "b": [1, 0], "c": [0, 0]}))
    assert found.pass_at_1 == pytest.approx(0.5)
    assert found.standard_error == pytest.approx(np.std([1, 0.5, 0], ddof=1) / 3**0.5)
    assert found.sampling_error == pytest.approx((0.5 / 2) ** 0.5 / 3)
    alone = score(records({"a": [1]}))
    assert (alone.pass_at_1, alone.standard_error, alone.sampling_error) == (1, None, None)


@pytest.mark.slow
def test_errors_are_what_other_seeds_and_problems_give() -> None:
    rng = np.random.default_rng(0)
    P, n = 12, 3
    chances = rng.uniform(size=P)
    scores, within, across = [], [], []
    for _ in range(600):
        found = score(records({str(i): list(rng.random(n) < p) for i, p in enumerate(chances)}))
        scores.append(found.pass_at_1)
        within.append(found.sampling_error**2 if found.sampling_error else 0)
    assert np.std(scores) == pytest.approx(np.mean(within) ** 0.5, rel=0.1)
    scores = []
    for _ in range(600):
        found = score(
            records({str(i): list(rng.random(n) < p) for i, p in enumerate(rng.uniform(size=P))})
        )
        scores.append(found.pass_at_1)
        across.append((found.standard_error or 0) ** 2)
    assert np.std(scores) == pytest.approx(np.mean(across) ** 0.5, rel=0.1)


def test_a_smaller_budget_counts_what_had_ended_by_then() -> None:
    several = records({"a": [1, 1, 1, 1]}, tokens=47)  # 47 to 50 tokens
    rows = {row["budget"]: row["pass_at_1"] for row in against_budget(several)}
    assert rows == {32: 0, 40: 0, 48: 0.5, 56: 1, 100: 1}


def test_a_journal_keeps_what_was_written_and_drops_a_line_cut_off(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "journal.jsonl"
    with open_journal(file, KEY) as journal:
        journal.add(RECORD)
        journal.add(replace(RECORD, sample=1, answer="é\nx"))
    whole = file.read_bytes()
    for cut in range(1, len(whole.splitlines()[-1]), 9):
        file.write_bytes(whole[:-cut])
        with open_journal(file, KEY) as journal:
            assert journal.records == [RECORD]
            assert not journal.has("1", 1)
    with open_journal(file, KEY) as journal:
        journal.add(replace(RECORD, sample=1, answer="é\nx"))
    assert file.read_bytes() == whole


@pytest.mark.parametrize("name", list(KEY))
def test_a_journal_of_another_run_is_refused(tmp_path: Path, name: str) -> None:
    file = tmp_path / "journal.jsonl"
    with open_journal(file, KEY) as journal:
        journal.add(RECORD)
    before = file.read_bytes()
    with (
        pytest.raises(OptionError, match=f"another run: {name}"),
        open_journal(file, {**KEY, name: "other"}),
    ):
        pass
    assert file.read_bytes() == before


def test_a_journal_in_use_or_damaged_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "journal.jsonl"
    with (
        open_journal(file, KEY),
        pytest.raises(OptionError, match="being written by another run"),
        open_journal(file, KEY),
    ):
        pass
    for content in ("no journal\n", json.dumps(KEY) + "\n{}\n", "[]\n1\n"):
        file.write_text(content)
        with (
            pytest.raises(OptionError, match="no journal of a run, or is damaged"),
            open_journal(file, KEY),
        ):
            pass


@pytest.mark.parametrize(
    "content",
    [b"a line without an end", bytes(range(100)), b'{"a":1}\n{"b":"precious"}', b"x,y\n1,2", b"{"],
    ids=repr,
)
def test_what_is_no_journal_keeps_every_byte(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "data.csv"
    file.write_bytes(content)
    if content == b"{":  # how a journal begins whose first line an interruption cut off
        with open_journal(file, KEY) as journal:
            journal.add(RECORD)
        with open_journal(file, KEY) as journal:
            assert journal.records == [RECORD]
        return
    with (
        pytest.raises(OptionError, match=r"no journal of a run|another run"),
        open_journal(file, KEY),
    ):
        pass
    assert file.read_bytes() == content


def test_what_cannot_be_a_journal_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "pipe", tmp_path / "file" / "x", tmp_path / ("a" * 300)):
        with pytest.raises(OptionError, match="cannot be a journal"), open_journal(path, KEY):
            pass


@pytest.mark.parametrize(
    ("reply", "is_correct", "stated"),
    [
        (Reply("so 25", "Answer: 25", (), "stop", "model", USAGE), True, 25),
        (Reply("so 25", "", (), "stop", None, USAGE), False, None),
        (Reply("so 25", "See above.", (), "stop", "model", USAGE), False, None),
        (Reply("", "Answer: 25", (), "length", "model", USAGE), False, None),  # of perhaps 250
        (Reply("", "Answer: 24", (), "stop", None, USAGE), False, 24),
    ],
)
def test_an_answer_is_graded_and_a_trace_is_not(
    reply: Reply, is_correct: bool, stated: int | None
) -> None:
    record = _graded(TASKS["aime24"], Problem("1", "?", 25), 3, reply)
    assert (record.is_correct, record.stated, record.sample, record.seed) == (
        is_correct,
        stated,
        3,
        7,
    )


ARITHMETIC = [
    "reasoning",
    "--task",
    "demo-arithmetic",
    "--limit",
    "2",
    "--samples",
    "2",
    "--max-tokens",
    "150",
]


def graded(file: Path) -> list[dict[str, Any]]:
    return sorted(
        (json.loads(line) for line in file.read_text().splitlines()[1:]),
        key=lambda r: (r["problem"], r["sample"]),
    )


@pytest.mark.slow
def test_an_interrupted_run_goes_on_to_the_same_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, broken, out = (
        tmp_path / "whole.jsonl",
        tmp_path / "broken.jsonl",
        tmp_path / "reasoning.json",
    )
    assert main([*ARITHMETIC, "--journal", str(whole)]) == 0
    add = Journal.add

    def interrupted(journal: Journal, record: Record) -> None:
        if len(journal.records) == 1:
            raise KeyboardInterrupt
        add(journal, record)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "add", interrupted)
        assert main([*ARITHMETIC, "--journal", str(broken)]) == 130
    assert len(graded(broken)) == 1
    assert main([*ARITHMETIC, "--journal", str(broken), "--json", str(out)]) == 0
    assert graded(broken) == graded(whole)
    assert "1 of 4 replies are in" in capsys.readouterr().err
    (found,) = json.loads(out.read_text())["reasoning"]
    assert found["pass_at_1"] == sum(record["is_correct"] for record in graded(whole)) / 4 >= 0.5
    assert found["problems"] == 2
    assert str(tmp_path) not in out.read_text()
    assert main([*ARITHMETIC, "--seed", "1", "--journal", str(broken)]) == 2
    assert "another run: sampling.seed is 0 there, 1 now" in capsys.readouterr().err


@pytest.mark.slow
def test_each_published_task_runs_to_its_score(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The embedded model cannot solve them; it is asked, cut off and graded."""
    sources = {
        "aime24": published.write_jsonl(tmp_path / "a24" / "a.jsonl", published.aime24_rows()[:1]),
        "aime25": published.write_jsonl(tmp_path / "a25" / "a.jsonl", published.aime25_rows()[:1]),
        "gpqa-diamond": published.write_gpqa(tmp_path / "gpqa" / "gpqa_diamond.csv"),
    }
    for task, source in sources.items():
        out = tmp_path / f"{task}.json"
        command = [
            "reasoning",
            "--task",
            task,
            "--data",
            str(source),
            "--limit",
            "1",
            "--max-tokens",
            "4",
        ]
        command += ["--journal", str(tmp_path / f"{task}.jsonl"), "--json", str(out)]
        assert main(command) == 0, task
        (found,) = json.loads(out.read_text())["reasoning"]
        assert (found["pass_at_1"], found["cut_off"], found["samples"]) == (0, 1, 1)
        shown = capsys.readouterr().out
        assert f"{found['card_percent']:.2f}" in shown


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--task", "mmlu"], "is not one of 'aime24'"),
        ([], "Missing option '--task'"),
        (["--task", "demo-arithmetic", "--data", "x"], "makes its problems itself"),
        (["--task", "demo-arithmetic", "--samples", "0"], "use at least 1"),
        (["--task", "aime24", "--data", "none.csv"], "no file or folder"),
    ],
)
def test_what_cannot_be_run_is_refused(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["reasoning", *arguments]) == 2
    assert said in capsys.readouterr().err


def test_a_record_is_its_line() -> None:
    assert Record(**json.loads(json.dumps(asdict(RECORD)))) == RECORD
