"""Command lines: checks before any work, and quick runs."""

import json
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from benchmarks.__main__ import benchmarks, main
from benchmarks.command_line import typed
from benchmarks.commands.everything import machine_name
from benchmarks.measure import circumstances
from benchmarks.runtime.speed import compare_turns
from benchmarks.synthetic import NARROW, TRUE_WIDTH, write_slice
from magistral_mlx.checkpoint.folder import open_checkpoint
from magistral_mlx.engine.load import load
from magistral_mlx.model.footprint import bytes_per_token


def test_a_slice_is_a_checkpoint_and_its_embedding_is_not_read(tmp_path: Path) -> None:
    write_slice(tmp_path, NARROW)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.config.num_layers == TRUE_WIDTH.num_layers
    assert checkpoint.config.head_dim == 128
    # 4.5 bits a weight, with the scale and bias of a group of 64.
    embedding = NARROW.vocab_size * NARROW.hidden_size * 4.5 / 8
    assert bytes_per_token(checkpoint) == checkpoint.nbytes - embedding


@pytest.mark.parametrize("name", ["speed", "memory", "convert", "quality", "reasoning", "samples"])
def test_a_file_that_could_not_be_written_is_refused_before_hours_of_work(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([name, "--json", str(tmp_path / "missing" / "x.json")]) == 2
    assert "x.json cannot be written (there is no folder" in capsys.readouterr().err


def test_what_all_would_write_is_checked_before_the_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "decode-step.json").mkdir()
    (tmp_path / "file").write_text("")
    for arguments, said in (
        (
            ["--out", str(tmp_path), "--only", "drafting", "--only", "graph"],
            "decode-step.json cannot be written",
        ),
        (["--out", str(tmp_path / "file" / "x")], "cannot be made"),
        (
            ["--out", str(tmp_path / "x"), "--only", "graph", "--model", "none"],
            "--only names none of them",
        ),
    ):
        assert main(["all", *arguments]) == 2
        assert said in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["decode-step.json", "file"]


@pytest.mark.parametrize("minutes", ["nan", "0", "-1", "inf"])
def test_minutes_that_are_none(minutes: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["speed", "--minutes", minutes]) == 2
    assert "--minutes" in capsys.readouterr().err


def test_every_help_fits_80_columns(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    # No summary is cut.
    assert "..." not in capsys.readouterr().out.partition("Commands:")[2]
    for name in benchmarks.commands:
        assert main([name, "--help"]) == 0
        out = capsys.readouterr().out
        assert "Usage: python -m benchmarks" in out
        assert [line for line in out.splitlines() if len(line) > 80] == []


def test_mistakes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["speed", "--peer", "none"]) == 2
    assert main(["speed", "--quick", "--synthetic", "1", "--tokens", "0"]) == 2
    assert "decode_tokens=0" in capsys.readouterr().err


def check_quick_run(arguments: list[str], file: Path) -> dict[str, Any]:
    assert main(["speed", "--quick", "--synthetic", "1", "--json", str(file), *arguments]) == 0
    results = json.loads(file.read_text())
    model = results["speed"][1]
    assert results["circumstances"]["versions"]["mlx"]
    assert len(model["checkpoint"]) == 64
    for contenders in model["repeats"].values():
        for repeats in contenders.values():
            assert len(repeats) == 2
    return model


@pytest.mark.slow
def test_a_quick_run_writes_every_repeat(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = check_quick_run([], tmp_path / "speed.json")
    assert list(model["repeats"]) == ["prefill", "decode"]
    out, err = capsys.readouterr()
    assert "GB/s" in out
    assert "warm-up" in err


@pytest.mark.slow
def test_a_quick_run_beside_mlx_lm_decodes_the_same_ids(tmp_path: Path) -> None:
    model = check_quick_run(["--peer", "mlx-lm"], tmp_path / "speed.json")
    reference = "mlx-lm, float32" if mx.default_device().type == mx.DeviceType.cpu else "mlx-lm"
    assert model["same_ids"][reference]


@pytest.mark.slow
def test_a_second_turn_is_compared_with_a_fresh_prompt() -> None:
    comparison = compare_turns("demo", load("demo"), 300, 1)
    facts, cached = comparison.facts, comparison.facts["cached_tokens"]
    assert facts["prompt_tokens"] > 300
    assert 250 < cached["magistral-mlx"] == cached["from disk"] < facts["prompt_tokens"]
    assert cached["nothing cached"] == 0
    assert facts["file_bytes"] > 0
    assert {
        name: len(laps) for name, laps in comparison.laps["first token"].items()
    } == dict.fromkeys(cached, 1)


@pytest.mark.slow
def test_a_quick_run_of_memory_forecasts_and_compares(tmp_path: Path) -> None:
    file = tmp_path / "memory.json"
    assert main(["memory", "--quick", "--peer", "mlx-lm", "--json", str(file)]) == 0
    found = json.loads(file.read_text())["memory"]
    caches, solved = found[:3], found[3:]
    assert [cache["plan"]["kv_bits"] for cache in caches] == [None, 8, 4]
    errors = [cache["logits_error"] for cache in caches]
    assert errors[0] == 0 < errors[1] < errors[2] < 1
    for cache in caches:
        peaks = cache["peak_bytes_above_weights"]
        assert cache["ours_over_theirs"]["mlx-lm"] == peaks["magistral-mlx"] / peaks["mlx-lm"]
    assert [one["exact"] >= 0.5 for one in solved] == [True, True, True]


@pytest.mark.slow
def test_a_quick_run_of_cache_files_saves_and_opens(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, work = tmp_path / "cache.json", tmp_path / "work"
    work.mkdir()
    assert main(["cache", "--quick", "--work", str(work), "--json", str(file)]) == 0
    floats, packed = json.loads(file.read_text())["cache"]
    # Keys and values of a layer: 8 heads of 128 in bf16, or 8 bit with scale and bias of 64.
    per_position = 2 * 8 * 128 * 2
    assert floats["file_bytes"] == pytest.approx(2 * 300 * per_position, rel=0.01)
    assert packed["file_bytes"] == pytest.approx(2 * 300 * per_position * 8.5 / 16, rel=0.01)
    assert {"save", "open"} <= set(floats["repeats"])
    assert list(work.iterdir()) == []
    assert "GB/s" in capsys.readouterr().out


def test_a_result_names_no_file_of_this_machine() -> None:
    assert typed(["memory", "--json", "x", "--quick", "--work", "y"]) == ["memory", "--quick"]


@pytest.mark.slow
def test_a_quick_run_of_samples_counts_and_compares(tmp_path: Path) -> None:
    file = tmp_path / "samples.json"
    assert main(["samples", "--quick", "--json", str(file)]) == 0
    found = json.loads(file.read_text())["samples"]
    assert [held["kv_bits"] for held in found["held"]] == [None, 8, 4]
    for held in found["held"]:
        # 80 positions a reply; together one prompt's, which could grow as far, and 16 times 16.
        assert held["ratio"] == (80 + 16 * 16) / (16 * 80)
    assert found["passes"]["replies_equal_to_single_ones"] == 1
    assert 0 < found["passes"]["passes_a_reply"] < found["passes"]["passes_a_reply_alone"]


def test_machines_are_named_for_their_files() -> None:
    def name(chip: str, system: str, cores: int) -> str:
        return machine_name({"chip": chip, "os": system, "cores": cores})

    assert name("AMD EPYC", "Linux-6.1-x86_64", 2) == "linux-amd-epyc-2-cores"
    intel = "Intel(R) Xeon(R) CPU @ 2.20GHz"
    assert name(intel, "Linux-6.1", 2) == "linux-intel-xeon-2-cores"
    assert name("Apple M4 Pro", "macOS-15.1-arm64", 14) == "macos-apple-m4-pro-14-cores"


def test_all_runs_the_commands_that_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["all", "--out", str(tmp_path), "--quick", "--only", "graph"]
    assert main(command) == 0
    file = tmp_path / "decode-step.json"
    assert capsys.readouterr().out.splitlines()[-1] == str(file)
    assert json.loads(file.read_text())["command"] == ["graph", "--layers", "2"]
    assert main(["all", "--out", str(tmp_path), "--only", "mmlu"]) == 2


@pytest.mark.slow
def test_all_runs_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmarks", "all"])
    command = ["all", "--out", str(tmp_path), "--quick", "--peer", "mlx-lm"]
    assert main(command) == 0
    here = machine_name(circumstances())
    kinds = ("speed", "memory", "cache", "convert", "samples", "quality", "reasoning")
    assert {f"{here}-{kind}.json" for kind in kinds} <= {path.name for path in tmp_path.iterdir()}
