"""The benchmarks' statistics, which have closed forms, and that a quick run runs."""

import json
from importlib import metadata
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from benchmarks.__main__ import main
from benchmarks.measure import Lap, Stopwatch, circumstances, interleave, speedup, spread
from benchmarks.speed import bytes_per_token
from benchmarks.synthetic import NARROW, TRUE_WIDTH, write_slice
from magistral_mlx.checkpoint import open_checkpoint


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
        [1 / other.median, 1 / other.high, 1 / other.low], [one.median, one.low, one.high], rtol=1e-3
    )
    assert one.low < one.median < one.high


def test_contenders_alternate_and_the_warm_up_is_repeat_0() -> None:
    order = [(repeat, name) for repeat, name, _ in interleave({"a": dict, "b": dict}, repeats=2)]
    assert order == [(0, "a"), (0, "b"), (1, "a"), (1, "b"), (2, "a"), (2, "b")]


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
    embedding = NARROW.vocab_size * NARROW.hidden_size * 4.5 / 8  # bits a weight, scale and bias of 64 included
    assert bytes_per_token(checkpoint) == checkpoint.nbytes - embedding


def test_help_and_mistakes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["speed", "--help"]) == 0
    assert "--synthetic" in capsys.readouterr().out
    assert main(["speed", "--peer", "none"]) == 2
    assert main(["speed", "--quick", "--synthetic", "1", "--tokens", "0"]) == 2
    assert "decode_tokens=0" in capsys.readouterr().err


def check_quick_run(arguments: list[str], file: Path) -> dict[str, Any]:
    assert main(["speed", "--quick", "--synthetic", "1", "--json", str(file), *arguments]) == 0
    results = json.loads(file.read_text())
    model = results["speed"][0]
    assert results["circumstances"]["versions"]["mlx"]
    assert len(model["checkpoint"]) == 64
    for contenders in model["repeats"].values():
        for repeats in contenders.values():
            assert len(repeats) == 2
    return model


def test_a_quick_run_writes_every_repeat(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
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
