"""Comparison of two result files: a slow-down is found, a rerun is not, and every file is read."""

import copy
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.__main__ import main
from benchmarks.measure import OURS, Comparison, Lap
from benchmarks.report.compare import compare, differences, figures
from magistral_mlx.errors import OptionError

RESULTS = sorted((Path(__file__).parents[2] / "benchmarks" / "results").glob("*.json"))


def timed(rng: np.random.Generator, *, speed: float = 1.0, repeats: int = 9) -> dict[str, Any]:
    """Return a run whose repeats vary by 4 %, on a machine that varies by 1.5 % between runs."""
    comparison = Comparison(
        "demo", {"checkpoint": "c", "workload": {"prompt_tokens": 9, "repeats": repeats}}
    )
    machine = rng.normal(1, 0.015)
    for _ in range(repeats):
        seconds = {
            OURS: 2 * machine / speed * rng.lognormal(0, 0.04),
            "mlx-lm": 3 * rng.lognormal(0, 0.04),
        }
        for name, taken in seconds.items():
            comparison.add(name, {"decode": Lap(taken, taken, 100)})
    return {
        "circumstances": {"chip": "x", "versions": {"mlx": "1"}},
        "speed": [comparison.as_dict()],
    }


def regressions(before: Any, after: Any, margin: float = 0.05) -> list[str]:
    return [change.name for change in compare(before, after, margin) if change.is_regression]


def test_a_planted_slow_down_is_found_and_a_rerun_is_not() -> None:
    rng = np.random.default_rng(0)
    runs = [timed(rng) for _ in range(30)]
    slow = [timed(rng, speed=0.8) for _ in range(30)]
    found = sum(bool(regressions(a, b)) for a, b in zip(runs, slow, strict=True))
    false = sum(bool(regressions(a, b)) for a, b in pairwise(runs))
    assert found >= 29
    assert false == 0


def test_a_faster_run_and_a_slower_peer_are_no_regression() -> None:
    one = timed(np.random.default_rng(0))
    faster, peer = copy.deepcopy(one), copy.deepcopy(one)
    for results, name, times in ((faster, OURS, 0.5), (peer, "mlx-lm", 5)):
        for lap in results["speed"][0]["repeats"]["decode"][name]:
            lap["seconds"] *= times
    assert regressions(one, faster) == []
    assert regressions(one, peer) == []
    assert len(regressions(faster, one)) == 1
    ratio = next(c.ratio for c in compare(one, faster, 0.05) if OURS in c.name)
    np.testing.assert_allclose(ratio.median, 2)
    assert ratio.low < 2 < ratio.high


@pytest.mark.parametrize("control", ["mlx-lm", "matrix"])
def test_a_machine_that_was_slower_itself_is_no_regression_of_ours(control: str) -> None:
    """The machine is a third slower, and then ours is slower by another fifth."""

    def run(machine: float, ours: float) -> dict[str, Any]:
        results = timed(np.random.default_rng(3), speed=machine * ours)
        repeats = results["speed"][0]["repeats"]["decode"]
        if control == "mlx-lm":
            for lap in repeats["mlx-lm"]:
                lap["seconds"] /= machine
        else:
            del repeats["mlx-lm"]
            results["speed"].append(
                {"title": "streaming matvec", "bytes_per_second": 1e10 * machine}
            )
        return results

    assert regressions(run(1, 1), run(2 / 3, 1)) == []
    assert len(regressions(run(1, 1), run(2 / 3, 0.8))) == 1
    assert len(regressions(run(1, 1), run(1.5, 1 / 1.5 * 0.8))) == 1


@pytest.mark.parametrize(
    ("key", "before", "after", "is_worse"),
    [
        ("passes_a_reply", 10.0, 10.01, True),
        ("passes_a_reply", 10.0, 9.0, False),
        ("mlx_peak_bytes", 100, 104, False),
        ("mlx_peak_bytes", 100, 112, True),
        ("exact", 0.98, 0.96, False),  # within the noise of 200 problems
        ("exact", 0.98, 0.70, True),
        ("logits_error", 0.0, 0.0, False),
        ("logits_error", 0.0, 0.1, True),
        ("kl", 0.02, 0.03, True),
    ],
)
def test_every_kind_of_figure_has_its_own_noise(
    key: str, before: float, after: float, is_worse: bool
) -> None:
    one, other = (
        {"memory": [{"title": "t", "problems": 200, key: value}]} for value in (before, after)
    )
    assert bool(regressions(one, other)) is is_worse


def test_a_peer_beside_is_not_ours_and_everything_else_is() -> None:
    laps = [{"seconds": 1.0, "cpu_seconds": 1.0, "count": 5}]
    contenders = dict.fromkeys(
        [OURS, "from disk", "mlx-lm, float32", "mlx, no hash", "llama.cpp"], laps
    )
    results = {"x": [{"title": "t", "repeats": {"p": contenders}}, {"title": "u", "repeats": laps}]}
    results["x"].append({"seconds": {"ask": [0.1, 0.2]}, "waits": {"ask": [0.1]}})
    changes = compare(results, results, 0)
    assert {change.name for change in changes if not change.is_ours} == {
        f"x / t / p / {name} / per second"
        for name in ("mlx-lm, float32", "mlx, no hash", "llama.cpp")
    }
    durations = {change.name for change in changes if change.name.startswith("x / 2")}
    assert durations == {"x / 2 / ask / seconds", "x / 2 / ask / waits"}
    assert len(changes) == 8


def test_a_first_token_is_a_latency() -> None:
    def turns(seconds: float) -> dict[str, Any]:
        laps = [{"seconds": seconds, "cpu_seconds": seconds, "count": 1}]
        return {"speed": [{"title": "turns", "repeats": {"first token": {OURS: laps}}}]}

    (change,) = compare(turns(0.1), turns(0.2), 0.05)
    assert change.name.endswith("milliseconds")
    assert (change.before, change.after, change.ratio.median) == (100, 200, 0.5)
    assert change.is_regression


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_every_result_file_is_understood(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = json.loads(path.read_text())
    assert figures(results)
    assert main(["compare", str(path), str(path)]) == 0
    assert "none worse" in capsys.readouterr().out
    assert {change.ratio.median for change in compare(results, results, 0)} == {1}


def test_a_regression_is_exit_code_1_and_the_file_says_which(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(1)
    for name, speed in (("a", 1.0), ("b", 0.7)):
        (tmp_path / f"{name}.json").write_text(json.dumps(timed(rng, speed=speed)))
    a, b, out = (str(tmp_path / name) for name in ("a.json", "b.json", "out.json"))
    assert main(["compare", a, b, "--json", out]) == 1
    assert "1 worse beyond noise" in capsys.readouterr().out
    worse = [
        change for change in json.loads(Path(out).read_text())["compare"] if change["is_regression"]
    ]
    assert [OURS in change["name"] for change in worse] == [True]
    assert main(["compare", b, a]) == 0
    assert main(["compare", a, b, "--margin", "0.5"]) == 0
    assert main(["compare", a, b, "--margin", "2"]) == 2


def test_other_circumstances_are_named_and_other_weights_not_compared() -> None:
    one = timed(np.random.default_rng(0))
    other = copy.deepcopy(one)
    other["circumstances"] = {"chip": "y", "versions": {"mlx": "2"}}
    assert differences(one, other) == ["chip: 'x', then 'y'", "mlx: '1', then '2'"]
    other["speed"][0]["checkpoint"] = "d"
    with pytest.raises(OptionError, match="no figure in common: speed"):
        compare(one, other, 0.05)


def test_a_comparison_never_takes_the_place_of_what_it_compares(tmp_path: Path) -> None:
    a, b = tmp_path / "a.json", tmp_path / "b.json"
    a.write_text(json.dumps(timed(np.random.default_rng(1))))
    b.symlink_to(a)
    before = a.read_bytes()
    assert main(["compare", str(a), str(a), "--json", str(b)]) == 2
    assert a.read_bytes() == before


def test_damaged_values_are_no_regression(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = timed(np.random.default_rng(1), repeats=2)

    def damaged(node: Any, at: int) -> list[Any]:
        """Return copies of the result, each with another value replaced, at any depth."""
        if not isinstance(node, dict | list):
            return [[None, "x", 0, [], {}, 10**400][at % 6]]
        keys = list(node) if isinstance(node, dict) else range(len(node))
        copies: list[Any] = []
        for i, key in enumerate(keys):
            for inner in damaged(node[key], at + i):
                copies.append(copy.copy(node))
                copies[-1][key] = inner
        return copies

    (tmp_path / "a.json").write_text(json.dumps(good))
    codes = set()
    for at in range(0, 6, 2):
        for bad in damaged(good, at):
            (tmp_path / "b.json").write_text(json.dumps(bad))
            codes.add(main(["compare", str(tmp_path / "a.json"), str(tmp_path / "b.json")]))
    capsys.readouterr()
    assert 2 in codes
    assert codes <= {0, 1, 2}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "is no JSON"),
        ("[" * 100_000, "is no JSON"),
        ("[]", "no result file"),
        ('{"a": 1}', "no result file"),
    ],
    ids=["cut", "deep", "a list", "a number"],
)
def test_what_is_no_result_is_refused(
    tmp_path: Path, content: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "x.json"
    file.write_text(content)
    assert main(["compare", str(file), str(file)]) == 2
    assert said in capsys.readouterr().err
