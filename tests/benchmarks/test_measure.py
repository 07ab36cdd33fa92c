"""Statistics with closed forms, and the circumstances of a figure."""

from importlib import metadata

import numpy as np

from benchmarks.commands.speed import speed_or_latency
from benchmarks.measure import Lap, Stopwatch, circumstances, interleave, speedup, spread


def laps(*seconds: float) -> list[Lap]:
    return [Lap(s, s, count=10) for s in seconds]


def test_spread_is_the_median_and_the_extremes_of_units_a_second() -> None:
    found = spread(laps(5, 1, 2))
    assert (found.median, found.low, found.high) == (5, 2, 10)


def test_a_constant_speedup_is_certain_whatever_the_noise_they_share() -> None:
    seconds = np.random.default_rng(0).uniform(1, 10, 9)
    found = speedup(laps(*seconds), laps(*(3 * seconds)))
    np.testing.assert_allclose([found.median, found.low, found.high], 3)


def test_a_speedup_turned_round_is_its_inverse() -> None:
    rng = np.random.default_rng(1)
    ours, theirs = laps(*rng.uniform(1, 2, 15)), laps(*rng.uniform(2, 4, 15))
    one, other = speedup(ours, theirs), speedup(theirs, ours)
    np.testing.assert_allclose(
        [1 / other.median, 1 / other.high, 1 / other.low],
        [one.median, one.low, one.high],
        rtol=1e-3,
    )
    assert one.low < one.median < one.high


def test_a_first_token_is_shown_in_milliseconds() -> None:
    interval = spread([Lap(s, s, 1) for s in (0.1, 0.05, 0.2)])
    assert speed_or_latency("first token", interval) == "100 (50 to 200) ms"
    assert speed_or_latency("decode", interval) == "10 (5 to 20) tok/s"


def test_contenders_alternate_and_the_warm_up_is_repeat_0() -> None:
    order = [(repeat, name) for repeat, name, _ in interleave({"a": dict, "b": dict}, repeats=2)]
    assert order == [(0, "a"), (0, "b"), (1, "a"), (1, "b"), (2, "a"), (2, "b")]
    assert [repeat for repeat, _, _ in interleave({"a": dict}, repeats=2, warm_up=False)] == [1, 2]


def test_a_lap_starts_where_the_one_before_ended() -> None:
    watch = Stopwatch()
    first, second = watch.lap(1), watch.lap(2)
    assert first.seconds > 0
    assert second.per_second == 2 / second.seconds


def test_circumstances_name_the_machine_and_the_versions() -> None:
    facts = circumstances()
    assert facts["chip"]
    assert facts["memory_bytes"] > 2**30
    assert facts["versions"]["mlx"] == metadata.version("mlx")
