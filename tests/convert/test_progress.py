"""Progress of the converter: its pace is honest, and a log shows it too."""

import io
import itertools
from collections.abc import Generator

import pytest
from rich.console import Console

from magistral_mlx.convert import progress
from magistral_mlx.convert.progress import Pace, run_with_bar
from magistral_mlx.streams import Progress, streamed
from magistral_mlx.terminal import verbosity
from magistral_mlx.terminal.verbosity import Status


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_the_time_left_is_told_from_the_second_step_on_and_never_0() -> None:
    clock = Clock()
    pace = Pace(clock)
    assert pace.words() == "0:00 so far"
    pace.take(Progress(1_000_000, 5_000_000))
    clock.now = 12.0
    assert pace.words() == "0:12 so far"
    pace.take(Progress(2_000_000, 5_000_000))
    assert pace.words() == "83,333 bytes/s, about 0:36 left"
    for now, left in ((20, "0:28"), (24, "0:24"), (4000, "0:24")):  # a long step
        clock.now = now
        assert pace.words() == f"83,333 bytes/s, about {left} left"
    pace.take(Progress(4_999_999, 5_000_000))
    clock.now = 9000
    assert pace.words().endswith("about 0:01 left")
    pace.take(Progress(5_000_000, 5_000_000))
    assert pace.words() == "finishing, 2:30:00 so far"


def test_another_stage_has_another_pace() -> None:
    clock = Clock()
    pace = Pace(clock)
    for clock.now, done in enumerate((10, 20, 30), start=1):
        pace.take(Progress(done, 30))
    clock.now = 10.0
    pace.take(Progress(0, 3000))
    assert pace.words() == "0:10 so far"
    pace.take(Progress(1000, 3000))
    clock.now = 20.0
    pace.take(Progress(2000, 3000))
    assert pace.words() == "100 bytes/s, about 0:10 left"


def test_a_log_gets_a_line_every_30_seconds(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(verbosity, "BETWEEN_LOOKS", 1e6)
    seconds = itertools.count(step=10)
    monkeypatch.setattr(progress, "Status", lambda: Status(clock=lambda: next(seconds)))

    @streamed
    def work() -> Generator[Progress, None, str]:
        for done in range(1, 7):
            yield Progress(done, 6, f"tensor {done}")
        return "result"

    assert run_with_bar(work()) == "result"
    lines = capsys.readouterr().err.splitlines()
    assert [line.rpartition(": ")[2] for line in lines] == ["tensor 3", "tensor 6"]
    assert lines[0].startswith("3 bytes of 6 bytes, ")


def test_a_bar_takes_one_line_of_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(progress, "can_draw", lambda _: True)
    monkeypatch.setattr(
        progress, "Console", lambda **_: Console(file=terminal, width=80, force_terminal=True)
    )

    @streamed
    def work() -> Generator[Progress, None, None]:
        yield Progress(46_900_000_000, 47_100_000_000, f"model.layers.39.{'long' * 20}.weight")

    run_with_bar(work())
    drawn = terminal.getvalue()
    assert "46.9/47.1 GB" in drawn
    assert "model.layers.39.long" in drawn
    assert "…" in drawn
    assert "weight" not in drawn
    assert drawn.count("\n") <= 1
