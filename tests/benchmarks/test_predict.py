"""Predictions against the published figures they start from, and their check on results."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.__main__ import main
from benchmarks.macs.predict import CHIPS, checks, flops_per_token, predict, weights_bytes
from benchmarks.measure import OURS
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


def test_the_table_says_that_it_is_a_prediction(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", "--prompt-tokens", "512"]) == 0
    shown = capsys.readouterr().out
    assert "Prediction, measured on no Mac" in shown
    assert "python -m benchmarks predict --check results" in shown
    assert all(chip.name in shown for chip in CHIPS)
    assert main(["predict", "--prompt-tokens", "50000"]) == 2


def mac_results(decode: float, forecast: float) -> list[dict[str, Any]]:
    """Return results of an M4 Pro whose other figures are inside the predicted ranges."""

    def laps(speed: float) -> list[dict[str, float]]:
        return [{"seconds": 100 / speed, "cpu_seconds": 1, "count": 100}]

    model = {
        "title": "m",
        "bytes_per_token": int(weights_bytes(TRUE_WIDTH)),
        "workload": {"prompt_tokens": 2048},
        "repeats": {
            "prefill": {OURS: laps(2048 / 13)},
            "decode": {OURS: laps(decode), "mlx-lm": laps(16)},
        },
    }
    together = {OURS: laps(50), "one after another": laps(16)}
    replies = {"title": "m, 8 replies", "repeats": {"ids of all": together}}
    matrix = {"title": "streaming matvec", "bytes_per_second": 1}
    fill = {"title": "t", "prompt_tokens": 511, "forecast_over_measured_in_all": forecast}
    opened = {"title": "6 layers", "repeats": {"open": {OURS: laps(2e9)}}}
    facts = {"circumstances": {"chip": "Apple M4 Pro"}}
    return [
        facts | {"speed": [matrix, model, replies]},
        facts | {"memory": [fill]},
        facts | {"cache": [opened]},
    ]


def test_results_of_a_mac_are_judged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = {check.name: check.has_held for check in checks(mac_results(16.5, 1.0))}
    assert len(found) == 6
    assert all(found.values())
    failed = [check.name for check in checks(mac_results(12, 1.2)) if not check.has_held]
    assert failed == [
        "decode after 2,048, tok/s",
        "decode after 2,048, over mlx-lm's",
        "forecast/measured, t, prompt of 511",
    ]
    for i, one in enumerate(mac_results(12, 1.2)):
        (tmp_path / f"{i}.json").write_text(json.dumps(one))
    assert main(["predict", "--check", str(tmp_path)]) == 1
    assert "6 predictions checked, 3 failed" in capsys.readouterr().out


def test_a_folder_without_results_of_a_mac_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.json").write_text('{"circumstances": {"chip": "AMD EPYC"}}')
    assert main(["predict", "--check", str(tmp_path)]) == 2
    assert "has no results of a Mac" in capsys.readouterr().err
