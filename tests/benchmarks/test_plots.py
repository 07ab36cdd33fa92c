"""Pictures: drawn of what results hold, refused where there is nothing to draw, and complete."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.__main__ import main
from benchmarks.commands.everything import machine_name
from benchmarks.report.drawing import short
from benchmarks.report.plots import draw

FACTS = {"chip": "x", "cores": 2, "versions": {"mlx": "1"}, "at": "2026-01-02T03"}
OURS = "magistral-mlx"


def laps(speed: float) -> list[dict[str, float]]:
    return [{"seconds": 100 / speed / f, "cpu_seconds": 1, "count": 100} for f in (0.9, 1, 1.1)]


def speed() -> dict[str, Any]:
    phases = {phase: {OURS: laps(100), "mlx-lm": laps(90)} for phase in ("prefill", "decode")}
    rows = [
        {"title": "demo", "workload": {"prompt_tokens": n, "decode_tokens": 4}, "repeats": phases}
        for n in (507, 4091)
    ]
    return {"circumstances": FACTS, "speed": [{"title": "matvec"}, *rows]}


def memory() -> dict[str, Any]:
    def row(bits: int | None, context: int) -> dict[str, Any]:
        plan = {
            "kv_bits": bits,
            "context": context,
            "weights_bytes": 10**7,
            "kv_bytes": 10**6,
            "workspace_bytes": 10**6,
        }
        return {
            "title": "a, b",
            "plan": plan,
            "peak_bytes_above_weights": {OURS: 2 * 10**6, "mlx-lm": 10**7},
        }

    return {
        "circumstances": FACTS,
        "memory": [row(bits, n) for bits in (None, 8, 4) for n in (512, 4096)],
    }


def quality() -> dict[str, Any]:
    part = {"kl": 0.1, "kl_error": 0.01}
    candidates = [
        {
            "title": f"{bits} bit",
            "bits_per_weight": bits,
            "parts": {"trace": part, "answer": part | {"kl_error": None}, "all": part},
        }
        for bits in (3, 4)
    ]
    return {"circumstances": FACTS, "quality": {"candidates": candidates}}


def reasoning() -> dict[str, Any]:
    rows = [
        {"budget": b, "pass_at_1": s, "standard_error": None}
        for b, s in ((64, 0.2), (96, 0.7), (4096, 0.7))
    ]
    task = {
        "title": "AIME",
        "problems": 3,
        "samples": 6,
        "card_percent": 70.68,
        "against_budget": rows,
    }
    return {"circumstances": FACTS, "reasoning": [task]}


@pytest.mark.slow
def test_every_picture_is_drawn_in_both_forms(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr("benchmarks.report.plots.DPI", 20)
    files = draw([speed(), memory(), quality(), reasoning()], tmp_path / "pictures")
    assert len(files) == 8
    for file in files:
        content = file.read_bytes()
        assert content.startswith(b"\x89PNG" if file.suffix == ".png" else b"<?xml")
    assert {f.stem for f in files} == {
        "speed-against-context",
        "memory-against-context",
        "quality-against-size",
        "score-against-budget",
    }


def test_a_curve_s_last_step_that_gains_nothing_is_left_out() -> None:
    pytest.importorskip("matplotlib")
    from benchmarks.report.pictures import budget_figure, speed_figure

    (axes,) = budget_figure([reasoning()]).axes
    assert list(axes.lines[0].get_xdata()) == [64, 96]
    measured = speed()
    measured["speed"][2]["repeats"] = {phase: {OURS: laps(100)} for phase in ("prefill", "decode")}
    decode = speed_figure([measured]).axes[1]
    ours, theirs = [bars.lines[0] for bars in decode.containers]
    assert (list(ours.get_xdata()), list(theirs.get_xdata())) == (
        [512, 4096],
        [512],
    )  # it took part in one only
    assert {text.get_text() for text in decode.get_xticklabels()} == {"512", "4k"}


@pytest.mark.parametrize(
    ("count", "name"), [(511, "511"), (512, "512"), (4096, "4k"), (40_960, "40k"), (1536, "1.5k")]
)
def test_contexts_are_named_as_people_name_them(count: int, name: str) -> None:
    assert short(count) == name


def test_nothing_to_draw_is_no_error_and_no_matplotlib_is_said_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    once = {"circumstances": FACTS, "speed": speed()["speed"][:2]}
    assert draw([{"circumstances": FACTS, "graph": []}, once], tmp_path) == []
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["speed", "--plot", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert "pip install 'magistral-mlx[bench]'" in err
    assert "streaming" not in err


def test_machines_are_named_for_their_files() -> None:
    assert (
        machine_name("AMD EPYC", {"os": "Linux-6.1-x86_64", "cores": 2}) == "linux-amd-epyc-2-cores"
    )
    intel = "Intel(R) Xeon(R) CPU @ 2.20GHz"
    assert machine_name(intel, {"os": "Linux-6.1", "cores": 2}) == "linux-intel-xeon-2-cores"
    assert (
        machine_name("Apple M4 Pro", {"os": "macOS-15.1-arm64", "cores": 14})
        == "macos-apple-m4-pro-14-cores"
    )


def test_all_runs_what_it_is_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(
            [
                "all",
                "--out",
                str(tmp_path),
                "--name",
                "here",
                "--quick",
                "--only",
                "graph",
                "--only",
                "predict",
            ]
        )
        == 0
    )
    assert capsys.readouterr().out.splitlines()[-2:] == [
        str(tmp_path / f"{n}.json") for n in ("decode-step", "predictions")
    ]
    assert json.loads((tmp_path / "decode-step.json").read_text())["command"] == [
        "graph",
        "--layers",
        "2",
    ]
    assert main(["all", "--out", str(tmp_path), "--only", "mmlu"]) == 2


@pytest.mark.slow
def test_all_runs_everything_and_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(sys, "argv", ["benchmarks", "all"])
    assert (
        main(
            [
                "all",
                "--out",
                str(tmp_path),
                "--name",
                "here",
                "--quick",
                "--plot",
                "--peer",
                "mlx-lm",
            ]
        )
        == 0
    )
    names = {path.name for path in tmp_path.iterdir()}
    assert {
        f"here-{name}.json"
        for name in ("speed", "memory", "convert", "samples", "quality", "reasoning")
    } <= names
    assert {
        "quality-against-size.png",
        "quality-against-size.svg",
        "score-against-budget.png",
    } <= names
