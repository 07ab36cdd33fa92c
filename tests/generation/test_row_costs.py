"""Costs of rows: measured in a few passes, kept in a file, measured again if it breaks."""

import json
from dataclasses import asdict
from pathlib import Path

import mlx.core as mx
import pytest

from benchmarks.runtime.drafting import M4_PRO
from magistral_mlx.generation import row_costs as row_costs_module
from magistral_mlx.generation.decoding import Stepper
from magistral_mlx.generation.drafting import MAX_ROWS
from magistral_mlx.generation.row_costs import LINEAR, RowCosts, measure, remembered
from magistral_mlx.model.transformer import Transformer
from tests.support.tiny import fill, make_config, make_weights

CONFIG = make_config()


@pytest.fixture(scope="module")
def model() -> Transformer:
    return fill(Transformer(CONFIG), CONFIG, make_weights(CONFIG))


class Clock:
    """A clock that advances with the rows that are computed, and a little between passes."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, cost: dict[int, float], waiting: float
    ) -> None:
        self.now = 0.0
        original = Stepper.__call__

        def call(step: Stepper, ids: mx.array, wanted: int = 1) -> mx.array:
            self.now += cost[wanted]
            return original(step, ids, wanted)

        monkeypatch.setattr(Stepper, "__call__", call)
        self.waiting = waiting

    def __call__(self) -> float:
        self.now += self.waiting
        return self.now


def test_costs_are_measured_against_passes_queued_ahead(
    model: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Count 0.04 s for a reading of the clock: one a lap of plain passes, one a waited pass."""
    clock = Clock(monkeypatch, {1: 1.0, 2: 1.0, 3: 1.2, 4: 1.4, 6: 2.0, 8: 1.8}, waiting=0.04)
    costs = measure(model, CONFIG, clock=clock)
    assert costs.plain_seconds == pytest.approx(1.01)
    expected = [
        1.04,
        1.04,
        1.24,
        1.44,
        1.74,
        2.04,
        2.04,
        2.04,
    ]  # 5 and 7 between; 8 rows never under 6
    assert costs.passes == pytest.approx([cost / 1.01 for cost in expected])


def test_a_calibration_is_a_few_passes(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    passes = []
    original = Stepper.extend
    monkeypatch.setattr(
        Stepper, "extend", lambda step, *args: passes.append(1) or original(step, *args)
    )
    assert len(measure(model, CONFIG).passes) == MAX_ROWS
    assert len(passes) <= 40


def test_costs_are_kept_and_a_broken_file_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MAGISTRAL_MLX_CACHE", str(tmp_path))
    costs, made = RowCosts(0.05, M4_PRO), []

    def make() -> RowCosts:
        made.append(1)
        return costs

    assert remembered(["a"], make) == remembered(["a"], make) == costs
    assert len(made) == 1
    remembered(["b"], make)
    assert len(made) == 2  # another device or checkpoint
    good = asdict(costs)
    broken = [
        "",
        "[]",
        "{}",
        "null",
        "{",
        json.dumps(good | {"passes": [1.0]}),
        json.dumps(good | {"plain_seconds": 0}),
    ]
    broken += [
        json.dumps(good | {"passes": [value] * MAX_ROWS})
        for value in (-1.0, float("nan"), None, "x", 1e999)
    ]
    for text in [*broken, "\udcff"]:
        for path in (tmp_path / "row-costs").iterdir():
            path.write_bytes(text.encode(errors="surrogateescape"))
        made.clear()
        assert remembered(["a"], make) == costs
        assert len(made) == 1, text


def test_a_cache_folder_that_cannot_be_written_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MAGISTRAL_MLX_CACHE", str(tmp_path / "file"))
    assert remembered(["a"], lambda: LINEAR) == LINEAR


def test_costs_are_known_by_device_version_and_checkpoint(
    model: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = []

    class Gpu:
        type = mx.DeviceType.gpu

    monkeypatch.setattr(row_costs_module.mx, "default_device", Gpu)
    monkeypatch.setattr(row_costs_module.mx, "device_info", lambda: {"device_name": "Apple M4 Pro"})
    monkeypatch.setattr(
        row_costs_module, "remembered", lambda key, make: keys.append(key) or LINEAR
    )
    row_costs_module.row_costs(model, CONFIG, "f00d")
    [key] = keys
    assert "f00d" in key
    assert any("Apple M4 Pro" in part for part in key)
