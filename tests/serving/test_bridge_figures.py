"""What a host feels is measured: every call and every wait is there, and can be shown and written."""

import json
from pathlib import Path

import pytest

from benchmarks.__main__ import main
from benchmarks.runtime.bridge import Felt


def test_figures_are_medians_and_longest() -> None:
    felt = Felt({"load": [1.0, 3.0, 2.0]}, {"load": [0.5, 0.1, 0.2], "nothing": [0.0]})
    assert list(felt.rows()) == [("load", 2.0, 3.0, 0.2, 0.5), ("nothing", 0.0, 0.0, 0.0, 0.0)]


@pytest.mark.slow
def test_what_a_host_feels_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "felt.json"
    assert main(["bridge", "--repeats", "1", "--json", str(file)]) == 0
    found = json.loads(file.read_text())["bridge"][0]
    calls = {"load returns", "start returns", "cancel returns", "start to first event, prompt new"}
    assert calls <= set(found["seconds"])
    assert all(len(times) >= 1 and min(times) > 0 for times in found["seconds"].values())
    assert {"nothing", "ask", "close amid a reply"} <= set(found["waits"])
    assert "prompt cached" in capsys.readouterr().out
