"""Predictions are arithmetic: held against the published figures they start from, and labelled."""

import json
from pathlib import Path

import pytest

from benchmarks.__main__ import main
from benchmarks.macs.predict import CHIPS, flops_per_token, predict, weights_bytes
from benchmarks.synthetic import TRUE_WIDTH

BY_NAME = {chip.name: chip for chip in CHIPS}


def test_what_one_token_reads_and_computes() -> None:
    assert weights_bytes(TRUE_WIDTH) == pytest.approx(12.88e9, rel=1e-3)
    assert flops_per_token(TRUE_WIDTH, 0) == pytest.approx(44.5e9, rel=1e-3)


@pytest.mark.parametrize(("name", "low", "high"), [("M4 Pro", 17.4, 17.4), ("M3 Ultra", 40, 48)])
def test_published_decode_speeds_are_inside(name: str, low: float, high: float) -> None:
    found = predict(BY_NAME[name], 16, {}).per_second
    assert found.low <= low + 0.5
    assert found.high >= high - 0.5


def test_drafting_divides_by_its_cost_and_a_short_prompt_takes_a_pass() -> None:
    prediction = predict(BY_NAME["M4 Max"], 4, {"edits": 0.5})
    assert prediction.drafted["edits"].low == pytest.approx(2 * prediction.per_second.low)
    assert prediction.first_token_seconds == prediction.pass_seconds


def test_the_table_says_that_it_is_a_prediction(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "predictions.json"
    assert main(["predict", "--prompt-tokens", "512", "--json", str(file)]) == 0
    shown = capsys.readouterr().out
    assert "Prediction, measured on no Mac" in shown
    assert "python -m benchmarks speed --model magistral-4bit" in shown
    written = json.loads(file.read_text())["predict"]
    assert [row["chip"] for row in written] == list(BY_NAME)
    assert all(row["is_prediction"] for row in written)
    assert main(["predict", "--prompt-tokens", "50000"]) == 2
