"""What is predicted of a Mac against measurements made up here; and that what measures runs, if not on a Mac."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.__main__ import main
from benchmarks.macs import mac_check as module
from benchmarks.macs.claims import Machine, Range, claims, judge
from benchmarks.macs.mac_check import drafting, is_magistral_small, joined, measure_model, this_mac
from benchmarks.macs.predict import CHIPS
from benchmarks.runtime.speed import Workload
from benchmarks.synthetic import NARROW, write_slice
from magistral_mlx.checkpoint.folder import open_checkpoint
from magistral_mlx.demo import demo_checkpoint
from magistral_mlx.errors import OptionError

M4_PRO = Machine("Apple M4 Pro", 48 * 2**30)
M1 = Machine("Apple M1", 16 * 2**30)
SMALL = replace(NARROW, num_layers=1)
WORKLOAD = Workload(5, 4, 1)


def predicted(machine: Machine) -> dict[str, Range | None]:
    return {claim.name: claim.predicted for claim in claims(machine, 2048)}


@pytest.mark.parametrize(
    ("chip", "generation", "is_known"),
    [
        ("Apple M4 Pro", 4, True),
        ("Apple M3 Ultra", 3, True),
        ("Apple M1", 1, False),
        ("Apple M10 Max", 10, False),
    ],
)
def test_a_mac_is_known_by_its_name(chip: str, generation: int, is_known: bool) -> None:
    machine = Machine(chip, 2**35)
    assert machine.generation == generation
    assert (machine.known is not None) is is_known
    assert Machine("AMD EPYC", 2**35).generation == 0


def test_every_chip_of_the_table_of_predictions_has_its_claims() -> None:
    for chip in CHIPS:
        found = predicted(Machine(f"Apple {chip.name}", 64 * 2**30))
        assert found["decode"] is not None
        assert found["first token"] is not None


def test_the_middle_of_every_prediction_holds_and_beside_it_fails() -> None:
    every = claims(M4_PRO, 2048)
    ranges = {claim.name: claim.predicted for claim in every if claim.predicted is not None}
    middle = {name: (span.low + span.high) / 2 for name, span in ranges.items()}
    assert {one.verdict for one in judge(every, middle) if one.claim.predicted} == {"held"}
    for name, span in ranges.items():
        for outside in (span.low - 1e-3, span.high + 1e-3):
            failed = [
                one.claim.name
                for one in judge(every, middle | {name: outside})
                if one.verdict == "failed"
            ]
            assert failed == [name]


def test_what_is_not_measured_or_not_predicted_is_neither_held_nor_failed() -> None:
    verdicts = {
        one.claim.name: one.verdict
        for one in judge(claims(M1, 2048), {"decode": 5.0, "working set": 11.4})
    }
    assert verdicts["decode"] == "no prediction"  # of a chip that is not in the table
    assert verdicts["working set"] == "held"
    assert verdicts["first token"] == "not measured"
    with pytest.raises(ValueError, match="nobody claims"):
        judge(claims(M1, 2048), {"speed": 1.0})


def test_generations_differ_in_what_rows_cost_and_which_floats_they_have() -> None:
    new, old = predicted(M4_PRO), predicted(M1)
    assert new["cost of 4 rows"] == Range(1.45 * 0.85, 1.45 * 1.15)
    assert old["cost of 4 rows"] is None
    assert new["float16 over bfloat16, decode"] is None
    assert old["float16 over bfloat16, decode"] is not None


def test_elsewhere_it_says_what_it_needs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    assert main(["mac-check"]) == 2
    said = capsys.readouterr().err
    assert "Macs with Apple silicon" in said
    assert "this is linux" in said


def pretend_mac(monkeypatch: pytest.MonkeyPatch, *, working_set: float = 38.7e9) -> None:
    monkeypatch.setattr(module, "this_mac", lambda: M4_PRO)
    monkeypatch.setattr("benchmarks.commands.mac_check.this_mac", lambda: M4_PRO)
    monkeypatch.setattr(
        module.mx, "device_info", lambda: {"max_recommended_working_set_size": working_set}
    )
    monkeypatch.setattr("benchmarks.commands.mac_check.TRUE_WIDTH", SMALL)
    monkeypatch.setattr(module, "SLICE_PROMPT", 40)
    monkeypatch.setattr(module, "CACHE_TOKENS", 40)


@pytest.mark.slow
def test_the_command_measures_judges_and_tells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All that it does on a Mac but the Mac; forecasts of so small a model are not asserted."""
    pretend_mac(monkeypatch)
    out = tmp_path / "check.json"
    assert main(["mac-check", "--json", str(out)]) in (0, 1)
    rows = {row["name"]: row for row in json.loads(out.read_text())["mac_check"]}
    assert rows["working set"]["verdict"] == "held"
    assert rows["decode"]["verdict"] == "not measured"
    assert rows["joined matrices, largest difference"] == rows[
        "joined matrices, largest difference"
    ] | {
        "measured": 0.0,
        "verdict": "held",
    }
    assert "Predictions about this Mac: Apple M4 Pro" in capsys.readouterr().out
    pretend_mac(monkeypatch, working_set=20e9)
    for name in ("forecasts", "opening"):
        monkeypatch.setattr(module, name, lambda *_: {})
    assert main(["mac-check"]) == 1
    assert "1 failed" in capsys.readouterr().out


def test_a_checkpoint_that_nothing_is_predicted_of_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pretend_mac(monkeypatch)
    write_slice(tmp_path, SMALL)
    assert not is_magistral_small(open_checkpoint(tmp_path))
    assert main(["mac-check", "--model", str(tmp_path)]) == 2
    assert "is not Magistral Small in 4 bit" in capsys.readouterr().err
    monkeypatch.setattr(module, "TRUE_WIDTH", SMALL)
    assert is_magistral_small(open_checkpoint(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("machine", [M4_PRO, M1], ids=lambda machine: machine.name)
def test_everything_measured_of_a_model_is_claimed(
    tmp_path: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mlx_lm")
    write_slice(tmp_path, SMALL)
    monkeypatch.setattr(module, "measure_rows", lambda *_: fake_costs())
    monkeypatch.setattr(module, "REPLY_TOKENS", 24)
    measured = measure_model(tmp_path, WORKLOAD, machine, lambda _: None)
    measured |= drafting(demo_checkpoint(), lambda _: None)
    judged = judge(claims(machine, WORKLOAD.prompt_tokens), measured)
    needed = {one.claim.name for one in judged if one.claim.needs and one.measured is None}
    half = {claim for claim in predicted(machine) if claim.startswith("float16")}
    assert needed == (set() if machine is M1 else half)


def fake_costs() -> Any:
    from magistral_mlx.generation.row_costs import LINEAR

    return LINEAR


def test_joined_products_are_those_of_the_parts() -> None:
    assert joined(SMALL) == {"joined matrices, largest difference": 0.0}


def test_a_mac_without_its_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(module.platform, "machine", lambda: "arm64")
    monkeypatch.setattr(module.mx.metal, "is_available", lambda: True)
    device = module.mx.Device(module.mx.DeviceType.cpu)
    monkeypatch.setattr(module.mx, "default_device", lambda: device)
    with pytest.raises(OptionError, match="default device is the CPU"):
        this_mac()
