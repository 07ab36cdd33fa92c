"""Interrupted conversions by importance and GPTQ continue to the same bytes."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from numpy.typing import NDArray

from magistral_mlx.convert import stream_conversion
from magistral_mlx.convert.calibration.statistics import mean_squares
from magistral_mlx.convert.output.staging import CALIBRATION
from magistral_mlx.errors import ConversionError
from tests.convert.output.test_resume import killed
from tests.support.sources import content, convert_quickly

pytestmark = pytest.mark.usefixtures("small_pieces")
Array = NDArray[np.float64]
METHODS = ("importance", "gptq")
ONE_IS_SLOW = ("importance", pytest.param("gptq", marks=pytest.mark.slow))
# Documents that differ from those of rounding.
DOCUMENTS = {"magistral_mlx.json"}


@pytest.mark.parametrize("method", ONE_IS_SLOW)
def test_closed_after_any_step_the_same_command_resumes_to_the_same_bytes(
    tmp_path: Path, source: Path, made: dict[str, Path], method: str
) -> None:
    options: dict[str, Any] = {"q_method": method, "tokenizer_json": False}
    count = 0
    while not (tmp_path / "out").exists():
        for steps_taken, _ in enumerate(
            steps := stream_conversion(source, tmp_path / "out", **options)
        ):
            if steps_taken == 2 + count:
                break
        steps.close()
        count += 1
    assert count > 2
    assert content(tmp_path / "out") == content(made[method])
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("method", ONE_IS_SLOW)
def test_finished_layers_are_not_visited_again(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    options: dict[str, Any] = {"q_method": method, "tokenizer_json": False}
    steps = stream_conversion(source, tmp_path / "out", **options)
    while not any((tmp_path / "out.partial" / CALIBRATION).glob("*/layers-00001-*")):
        next(steps)
    steps.close()
    seen: list[str] = []

    def seeing(modules: Sequence[str], x: mx.array) -> mx.array:
        seen.extend(modules)
        return mean_squares(modules, x)

    for module in ("calibration.forward", "methods.sequential"):
        monkeypatch.setattr(f"magistral_mlx.convert.{module}.mean_squares", seeing)
    stream_conversion(source, tmp_path / "out", **options).result()
    assert seen[0] == "model.layers.1.self_attn.q_proj"
    assert seen[-1] == "lm_head"


@pytest.mark.parametrize("method", ONE_IS_SLOW)
@pytest.mark.slow
def test_killed_at_some_boundaries(
    tmp_path: Path, source: Path, made: dict[str, Path], method: str
) -> None:
    counts = killed(source, made[method], tmp_path, "--method", method, "--boundaries", "2")
    assert counts["killed"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_killed_at_many_boundaries(
    tmp_path: Path, source: Path, made: dict[str, Path], method: str
) -> None:
    counts = killed(source, made[method], tmp_path, "--method", method, "--boundaries", "30")
    assert counts["killed"] == 30 < counts["boundaries"]


@pytest.mark.parametrize("method", ONE_IS_SLOW)
def test_another_method_or_calibration_is_refused_with_the_way_out(
    tmp_path: Path, source: Path, method: str
) -> None:
    (tmp_path / "text").write_text(
        "All the world's a stage, and all the men and women merely players. " * 40
    )
    options: dict[str, Any] = {"q_method": method, "tokenizer_json": False}
    steps = stream_conversion(source, tmp_path / "out", **options)
    while not any((tmp_path / "out.partial" / CALIBRATION).glob("*")):
        next(steps)
    steps.close()
    before = os.listdir(tmp_path / "out.partial")
    other = next(name for name in METHODS if name != method)
    for way, changed in (
        ({"q_method": other}, f"q_method: {method}, now {other}"),
        ({"q_method": "round"}, f"q_method: {method}, now round"),
        (
            {"q_method": method, "calibration": str(tmp_path / "text")},
            "calibration: built-in, now file",
        ),
    ):
        with pytest.raises(
            ConversionError, match=f"unfinished conversion with another ({changed}).*force"
        ):
            convert_quickly(source, tmp_path / "out", **way)
    assert os.listdir(tmp_path / "out.partial") == before
    convert_quickly(
        source, tmp_path / "out", force=True, calibration=str(tmp_path / "text"), q_method=method
    )
    recorded = json.loads((tmp_path / "out" / "magistral_mlx.json").read_text())["options"][
        "calibration"
    ]
    assert recorded["origin"] == "file"
    with pytest.raises(ConversionError, match="made with another calibration: file, now built-in"):
        convert_quickly(source, tmp_path / "out", q_method=method)
