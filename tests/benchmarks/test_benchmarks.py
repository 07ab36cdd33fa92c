"""Statistics with closed forms, the checks before any work, and quick runs of the commands."""

import json
import math
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from benchmarks import synthetic
from benchmarks.__main__ import main
from benchmarks.command_line import typed
from benchmarks.commands.everything import machine_name
from benchmarks.commands.speed import speed_or_latency
from benchmarks.converter.convert import (
    MARGIN_BYTES,
    check_space,
    different_tensors,
    output_bytes,
    source_bytes,
    tensor_digests,
)
from benchmarks.measure import Lap, Stopwatch, circumstances, interleave, speedup, spread
from benchmarks.runtime.speed import bytes_per_token, compare_turns
from benchmarks.synthetic import NARROW, TRUE_WIDTH, write_slice, write_source
from magistral_mlx.checkpoint.config import ModelConfig
from magistral_mlx.checkpoint.folder import open_checkpoint
from magistral_mlx.engine.load import load
from magistral_mlx.errors import OptionError
from magistral_mlx.tokenizer.tekken import Tokenizer

ROOT = Path(__file__).parents[2]
SMALL = replace(NARROW, num_layers=2)
CONVERT = ["convert", "--quick", "--synthetic", "1", "--repeats", "1"]


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


def test_help_and_mistakes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["speed", "--help"]) == 0
    assert "--synthetic" in capsys.readouterr().out
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


def test_a_source_is_a_checkpoint_with_random_tensors_of_their_own(tmp_path: Path) -> None:
    write_source(tmp_path / "source", SMALL)
    checkpoint = open_checkpoint(tmp_path / "source")
    assert checkpoint.config == SMALL
    assert checkpoint.nbytes == source_bytes(SMALL)
    assert Tokenizer.from_folder(tmp_path / "source").vocab_size == SMALL.vocab_size
    tensors = {
        name: np.array(shard.read(name).astype(mx.float32))
        for shard in checkpoint.shards
        for name in shard.header
    }
    assert len({values.tobytes() for values in tensors.values()}) == len(tensors)
    for name, values in tensors.items():
        mean, deviation = (1, 0.1) if values.ndim == 1 else (0, synthetic.SCALE)
        error = deviation / math.sqrt(values.size)
        assert abs(values.mean() - mean) < 6 * error + 2**-9 * mean, name
        assert abs(values.std() / deviation - 1) < 6 / math.sqrt(2 * values.size) + 2**-6, name


def test_the_published_size_and_files_are_magistrals() -> None:
    assert source_bytes(TRUE_WIDTH) == 2 * 23_572_403_200
    assert round(output_bytes(TRUE_WIDTH, 4) / 1e9, 2) == 13.26


def test_digests_do_not_depend_on_the_files_and_find_one_byte(tmp_path: Path) -> None:
    write_source(tmp_path / "many", SMALL)
    expected = tensor_digests(tmp_path / "many")
    assert expected.keys() == SMALL.shapes.keys()
    files = sorted((tmp_path / "many").glob("*.safetensors"))
    (tmp_path / "one").mkdir()
    arrays = {name: array for file in files for name, array in mx.load(str(file)).items()}
    mx.save_safetensors(str(tmp_path / "one" / "model.safetensors"), arrays)
    assert different_tensors(expected, tensor_digests(tmp_path / "one")) == []
    file = next(file for file in files if "lm_head.weight" in mx.load(str(file)))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    found = tensor_digests(tmp_path / "many")
    assert different_tensors(expected, found) == ["lm_head.weight"]
    del found["model.norm.weight"]
    assert different_tensors(expected, found) == ["lm_head.weight", "model.norm.weight"]


def test_a_disk_that_is_too_small_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1_200_000_000))
    check_space(tmp_path, 1_200_000_000 - MARGIN_BYTES)
    with pytest.raises(OptionError, match=r"needs 1\.2 GB for a while, and 1\.2 GB are free"):
        check_space(tmp_path, 1_200_000_001 - MARGIN_BYTES)


PEAK = """
import json
from benchmarks.converter.contender import measured
before = bytes(range(256)) * (400 << 12)  # 400 MiB, at the peak of the imports
del before
print(json.dumps(measured(lambda: bytes(range(256)) * (200 << 12))))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak cannot be restarted")
def test_the_peak_is_of_the_work_alone() -> None:
    """Memory of this process, or of the child before, is not in it."""
    mine = bytes(range(256)) * (300 << 12)
    done = subprocess.run(
        [sys.executable, "-c", PEAK], cwd=ROOT, capture_output=True, text=True, check=True
    )
    took = json.loads(done.stdout)
    assert len(mine) == 300 * 2**20
    peak = took["peak_rss_bytes"] - took["baseline_rss_bytes"]
    # The kernel counts pages in batches.
    assert 199 * 2**20 < peak < 210 * 2**20


def convert_quickly(work: Path, *arguments: str) -> dict[str, Any]:
    """Return the results of a quick run, which must leave nothing in ``work``."""
    work.mkdir()
    file = work.parent / "convert.json"
    assert main([*CONVERT, "--work", str(work), "--json", str(file), *arguments]) == 0
    assert list(work.iterdir()) == []
    return json.loads(file.read_text())


@pytest.mark.slow
def test_a_quick_conversion_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = convert_quickly(tmp_path / "work")
    (comparison,) = results["convert"]
    (run,) = comparison["repeats"]["convert"]["magistral-mlx"]
    assert results["circumstances"]["versions"]["mlx"]
    assert run["count"] == source_bytes(replace(NARROW, num_layers=1))
    assert output_bytes(replace(NARROW, num_layers=1), 4) < run["output_bytes"]
    assert "peak" in capsys.readouterr().out


def test_a_contender_that_fails_is_quoted_and_nothing_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def write_half(folder: Path, config: ModelConfig) -> None:
        write_source(folder, config)
        (folder / "tekken.json").unlink()

    monkeypatch.setattr("benchmarks.converter.convert.write_source", write_half)
    assert main([*CONVERT, "--work", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "magistral-mlx ended with exit code 1" in error
    assert "tekken.json" in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_command_that_is_ended_takes_everything_away(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks", *CONVERT, "--work", str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert process.stderr.readline().startswith("writing")
        process.send_signal(signal.SIGTERM)
        assert process.wait() == 130
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["--repeats", "0"], "0 repeats"),
        (["--q-bits", "7"], "7 bits"),
    ],
)
def test_conversions_that_make_no_sense_are_refused(
    arguments: list[str], what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", *arguments]) == 2
    assert what in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("bits", ["4", "8"])
def test_a_quick_conversion_beside_mlx_lm_gives_the_same_tensors(tmp_path: Path, bits: str) -> None:
    (comparison,) = convert_quickly(tmp_path / "work", "--peer", "mlx-lm", "--q-bits", bits)[
        "convert"
    ]
    contenders = comparison["contenders"]
    assert list(contenders) == ["magistral-mlx", "mlx-lm"]
    for facts in contenders.values():
        # 7 matrices of the layer and 2 more, in 3 parts each, and 3 norms.
        assert facts["tensors"] == 30
        assert facts["same_tensors"]


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
