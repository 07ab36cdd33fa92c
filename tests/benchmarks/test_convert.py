"""Conversions beside mlx-lm's: sources, digests, space, memory, and failures."""

import json
import math
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from benchmarks import synthetic
from benchmarks.__main__ import main
from benchmarks.converter.convert import (
    MARGIN_BYTES,
    check_space,
    different_tensors,
    output_bytes,
    source_bytes,
    tensor_digests,
)
from benchmarks.synthetic import NARROW, TRUE_WIDTH, write_source
from magistral_mlx.checkpoint.config import ModelConfig
from magistral_mlx.checkpoint.folder import open_checkpoint
from magistral_mlx.errors import OptionError
from magistral_mlx.tokenizer.tekken import Tokenizer

ROOT = Path(__file__).parents[2]
SMALL = replace(NARROW, num_layers=2)
CONVERT = ["convert", "--quick", "--synthetic", "1", "--repeats", "1"]


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


@pytest.mark.slow
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


@pytest.mark.slow
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
    ("arguments", "what"), [(["--repeats", "0"], "0 repeats"), (["--q-bits", "7"], "7 bits")]
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
