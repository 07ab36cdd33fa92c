"""Conversions by ours and by mlx-lm in turn: time, memory, and whether the tensors are equal."""

import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.converter.contender import GROUP_SIZE
from benchmarks.measure import OURS, Comparison, Lap, Run, report
from benchmarks.synthetic import write_source
from magistral_mlx.checkpoint.config import ModelConfig
from magistral_mlx.checkpoint.folder import open_checkpoint
from magistral_mlx.checkpoint.quant_format import QuantFormat
from magistral_mlx.checkpoint.safetensors import Shard
from magistral_mlx.errors import ConversionError, OptionError
from magistral_mlx.model.footprint import packed_bytes

ROOT = Path(__file__).parents[2]
PHASE = "convert"
MARGIN_BYTES = 200_000_000  # tokenizer files and the file system's own
BLOCK_BYTES = 2**24
HOW = {
    OURS: "magistral_mlx.convert.convert_checkpoint, tokenizer.json made",
    "mlx-lm": "mlx_lm.convert, quantize=True, as published; it writes no tokenizer.json here and "
    "flushes no file",
}


@dataclass(frozen=True, slots=True)
class Conversion(Lap):
    """One conversion.

    Attributes:
        count: bytes of the source's tensors.
        import_seconds: before the conversion, and not in ``seconds``.
        sync_seconds: after it, until everything is on the disk; not in ``seconds``.
        baseline_rss_bytes: of the interpreter with its imports.
        output_bytes: of all files.
        caches_dropped: the source was read from the disk.
    """

    import_seconds: float
    sync_seconds: float
    baseline_rss_bytes: int
    peak_rss_bytes: int
    rss_from: str
    output_bytes: int
    caches_dropped: bool

    @property
    def peak_bytes(self) -> int:
        """The peak above the interpreter."""
        return self.peak_rss_bytes - self.baseline_rss_bytes

    def __str__(self) -> str:
        return (
            f"{self.seconds:.1f} s, {self.cpu_seconds:.1f} s of CPU, "
            f"peak {self.peak_bytes / 1e6:,.0f} MB above the interpreter"
        )


@dataclass(frozen=True, slots=True)
class Job:
    """A conversion, its repeats, and the folder for temporary files. mlx-lm always rounds."""

    work: Path
    bits: int
    repeats: int
    peer: bool
    method: str = "round"

    def __post_init__(self) -> None:
        QuantFormat(self.bits, GROUP_SIZE)
        if self.repeats < 1:
            raise OptionError(f"{self.repeats} repeats cannot be timed; use at least 1")


def compare_conversions(config: ModelConfig, job: Job) -> Comparison:
    """Convert random weights of a shape, which are written first and deleted afterwards.

    Raises:
        OptionError: a disk is too small. Nothing was written.
        ConversionError: a contender failed.
    """
    check_space(job.work, source_bytes(config) + output_bytes(config, job.bits))
    with tempfile.TemporaryDirectory(prefix="magistral-source-", dir=job.work) as name:
        source = Path(name) / "source"
        report(f"writing a source of {source_bytes(config) / 1e9:.1f} GB")
        write_source(source, config)
        return _compare(
            f"{config.num_layers} layers, {config.hidden_size} wide", source, config, job
        )


def check_space(folder: Path, nbytes: int) -> None:
    """Raise OptionError if the folder's disk has less space than is needed."""
    nbytes += MARGIN_BYTES
    free = shutil.disk_usage(folder).free
    if free < nbytes:
        raise OptionError(
            f"{folder} needs {nbytes / 1e9:.1f} GB for a while, and {free / 1e9:.1f} GB are free; "
            "free some space, convert fewer layers, or name a folder on a larger disk with --work"
        )


def source_bytes(config: ModelConfig) -> int:
    """Return the bytes of all tensors in bf16."""
    return 2 * sum(math.prod(shape) for shape in config.shapes.values())


def output_bytes(config: ModelConfig, bits: int) -> int:
    """Return the bytes of the tensors that a conversion of a bf16 checkpoint writes."""
    return packed_bytes(config, QuantFormat(bits, GROUP_SIZE))


def tensor_digests(folder: Path) -> dict[str, str]:
    """Return SHA-256 of every tensor's type, shape and bytes, by name, in whichever file it is."""
    digests: dict[str, str] = {}
    for path in sorted(folder.glob("*.safetensors")):
        shard = Shard.open(path)
        with path.open("rb") as file:
            for name, entry in shard.header.items():
                digest = hashlib.sha256(f"{entry.dtype} {entry.shape}".encode())
                file.seek(shard.data_start + entry.begin)
                for start in range(0, entry.nbytes, BLOCK_BYTES):
                    digest.update(file.read(min(BLOCK_BYTES, entry.nbytes - start)))
                digests[name] = digest.hexdigest()
    return digests


def different_tensors(one: Mapping[str, str], other: Mapping[str, str]) -> list[str]:
    """Return the names whose digests differ, or that only one of them has."""
    return sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))


def _compare(title: str, source: Path, config: ModelConfig, job: Job) -> Comparison:
    names = [OURS, "mlx-lm"] if job.peer else [OURS]
    checkpoint = open_checkpoint(source)
    digests: dict[str, list[dict[str, str]]] = {name: [] for name in names}

    def contender(name: str) -> Run:
        def run() -> dict[str, Lap]:
            conversion, found = convert_once(name, source, checkpoint.nbytes, job)
            digests[name].append(found)
            return {PHASE: conversion}

        return run

    facts = {
        "source": {
            "checkpoint": checkpoint.fingerprint(),
            "bytes": checkpoint.nbytes,
            "layers": config.num_layers,
        },
        "quantization": {
            "bits": job.bits,
            "group_size": GROUP_SIZE,
            "mode": "affine",
            "method": job.method,
        },
        "workload": {"repeats": job.repeats, "warm_up": False},
    }
    comparison = Comparison(title, facts)
    comparison.run({name: contender(name) for name in names}, job.repeats, warm_up=False)
    facts["contenders"] = {
        name: _summary(name, comparison.laps[PHASE][name], digests[OURS][0], digests[name])
        for name in names
    }
    return comparison


def _summary(
    name: str, laps: list[Lap], expected: dict[str, str], found: list[dict[str, str]]
) -> dict[str, Any]:
    """Return a contender's medians, and the tensors that differ from our first repeat's."""
    runs = [lap for lap in laps if isinstance(lap, Conversion)]
    different = sorted(
        {tensor for digests in found for tensor in different_tensors(expected, digests)}
    )
    return {
        "how": HOW[name],
        "seconds": float(np.median([run.seconds for run in runs])),
        "cpu_seconds": float(np.median([run.cpu_seconds for run in runs])),
        "seconds_and_sync": float(np.median([run.seconds + run.sync_seconds for run in runs])),
        "peak_bytes_above_interpreter": max(run.peak_bytes for run in runs),
        "output_bytes": runs[-1].output_bytes,
        "tensors": len(found[0]),
        "same_tensors": not different,
        "different_tensors": different,
    }


def convert_once(
    name: str, source: Path, nbytes: int, job: Job
) -> tuple[Conversion, dict[str, str]]:
    """Convert in a process of its own, return its figures and digests, and delete its output."""
    with tempfile.TemporaryDirectory(prefix="magistral-converted-", dir=job.work) as parent:
        target = Path(parent) / "out"
        caches_dropped = _drop_caches(source)
        command = [sys.executable, "-m", "benchmarks.converter.contender", name]
        command += [str(source), str(target), str(job.bits), job.method]
        offline = os.environ | {"HF_HUB_OFFLINE": "1"}
        done = subprocess.run(
            command, cwd=ROOT, env=offline, capture_output=True, text=True, check=False
        )
        if done.returncode:
            said = done.stderr[-2000:].strip() or "it said nothing"
            raise ConversionError(f"{name} ended with exit code {done.returncode}: {said}")
        took = json.loads(done.stdout.splitlines()[-1])
        written = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
        conversion = Conversion(
            count=nbytes, output_bytes=written, caches_dropped=caches_dropped, **took
        )
        return conversion, tensor_digests(target)


def _drop_caches(source: Path) -> bool:
    """Flush all files and drop the source's tensors from the file cache, if the system can."""
    os.sync()
    if sys.platform != "linux":
        return False
    for path in source.glob("*.safetensors"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return True
