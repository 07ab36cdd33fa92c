"""Converting one checkpoint with ours and with mlx-lm's in turn: time, memory, and whether the tensors are the same."""

import hashlib
import json
import math
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.converter.contender import GROUP_SIZE
from benchmarks.converter.source import source_bytes, write_source
from benchmarks.measure import OURS, Comparison, Lap, Run, interleave
from magistral_mlx.checkpoint.config import ModelConfig
from magistral_mlx.checkpoint.folder import open_checkpoint
from magistral_mlx.checkpoint.quant_format import QuantFormat
from magistral_mlx.checkpoint.safetensors import Shard
from magistral_mlx.errors import ConversionError, OptionError

ROOT = Path(__file__).parent.parent
PHASE = "convert"
MARGIN_BYTES = 200_000_000  # tokenizer files, the file system's own
BLOCK_BYTES = 2**24
HOW = {
    OURS: "magistral_mlx.convert.convert_checkpoint, tokenizer.json made",
    "mlx-lm": "mlx_lm.convert, quantize=True, as published; it writes no tokenizer.json here and flushes no file",
}


@dataclass(frozen=True, slots=True)
class Conversion(Lap):
    """One conversion; ``count`` is the bytes of the source's tensors."""

    import_seconds: float  # before, not in ``seconds``
    sync_seconds: float  # afterwards, not in ``seconds``: until the system had written everything
    baseline_rss_bytes: int  # of the interpreter with its imports
    peak_rss_bytes: int
    rss_from: str
    output_bytes: int  # of all files
    caches_dropped: bool  # so that the source came from the disk

    @property
    def peak_bytes(self) -> int:
        """Above the interpreter."""
        return self.peak_rss_bytes - self.baseline_rss_bytes


@dataclass(frozen=True, slots=True)
class Job:
    """What is converted how often, and where that is tried out."""

    work: Path  # for temporary files
    bits: int
    repeats: int
    peer: bool
    method: str = "round"  # ours; mlx-lm's convert rounds

    def __post_init__(self) -> None:
        QuantFormat(self.bits, GROUP_SIZE)
        if self.repeats < 1:
            raise OptionError(f"{self.repeats} repeats cannot be timed; use at least 1")


def compare_synthetic(
    config: ModelConfig, job: Job, *, keep: Path | None, report: Callable[[str], None]
) -> Comparison:
    """Convert random weights of ``config``'s shapes, written first, and left in ``keep`` where that is given.

    Raises:
        OptionError: ``keep`` is there already, or a disk has too little space; nothing was written.
        ConversionError: a contender failed.
    """
    if keep is not None and os.path.lexists(keep):
        raise OptionError(
            f"{keep} exists; convert what is in it with --source {keep}, or name another folder"
        )
    source_home = job.work if keep is None else keep.absolute().parent
    check_space([(source_home, source_bytes(config)), (job.work, output_bytes(config, job.bits))])
    with tempfile.TemporaryDirectory(prefix="magistral-source-", dir=job.work) as name:
        source = Path(name) / "source" if keep is None else keep.absolute()
        write_source(source, config, report=report)
        return _compare(
            f"{config.num_layers} layers, {config.hidden_size} wide", source, config, job, report
        )


def compare_source(source: Path, job: Job, *, report: Callable[[str], None]) -> Comparison:
    """Convert the HF checkpoint in ``source``; raises as ``compare_synthetic``, and CheckpointError."""
    config = open_checkpoint(source).config
    check_space([(job.work, output_bytes(config, job.bits))])
    return _compare(source.name, source.absolute(), config, job, report)


def check_space(needs: list[tuple[Path, int]]) -> None:
    """Raises OptionError where the disk of a folder has less free than everything that it is to hold."""
    by_disk: dict[int, tuple[Path, int]] = {}
    for folder, nbytes in needs:
        disk = folder.stat().st_dev
        by_disk[disk] = (folder, nbytes + by_disk.get(disk, (folder, MARGIN_BYTES))[1])
    for folder, nbytes in by_disk.values():
        free = shutil.disk_usage(folder).free
        if free < nbytes:
            raise OptionError(
                f"{folder} needs {nbytes / 1e9:.1f} GB for a while, and {free / 1e9:.1f} GB are free; "
                "free some space, convert fewer layers, or name a folder on a larger disk with --work"
            )


def output_bytes(config: ModelConfig, bits: int) -> int:
    """Bytes of the tensors that a conversion of a bf16 checkpoint writes."""
    total = 0
    for shape in config.shapes.values():
        if len(shape) == 1:
            total += 2 * shape[0]
        else:
            packed = QuantFormat(bits, GROUP_SIZE).packed_shapes(shape)
            total += sum(
                (4 if kind == "weight" else 2) * math.prod(part) for kind, part in packed.items()
            )
    return total


def tensor_digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every tensor's type, shape and bytes, by its name, whichever file it is in."""
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
    """The names whose digests differ, or that only one of them has."""
    return sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))


def _compare(
    title: str, source: Path, config: ModelConfig, job: Job, report: Callable[[str], None]
) -> Comparison:
    names = [OURS, "mlx-lm"] if job.peer else [OURS]
    checkpoint = open_checkpoint(source)
    conversions: dict[str, list[Conversion]] = {name: [] for name in names}
    digests: dict[str, list[dict[str, str]]] = {name: [] for name in names}

    def contender(name: str) -> Run:
        def run() -> dict[str, Lap]:
            conversion, found = convert_once(name, source, checkpoint.nbytes, job)
            conversions[name].append(conversion)
            digests[name].append(found)
            return {PHASE: conversion}

        return run

    comparison = Comparison(
        title,
        {
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
        },
    )
    for repeat, name, laps in interleave(
        {n: contender(n) for n in names}, job.repeats, warm_up=False
    ):
        comparison.add(name, laps)
        last = conversions[name][-1]
        report(
            f"{title}: {repeat}/{job.repeats} {name}: {last.seconds:.1f} s, {last.cpu_seconds:.1f} s of CPU, "
            f"peak {last.peak_bytes / 1e6:,.0f} MB above the interpreter"
        )
    comparison.facts["contenders"] = {
        name: _summary(name, conversions[name], digests[OURS][0], digests[name]) for name in names
    }
    return comparison


def _summary(
    name: str, runs: list[Conversion], expected: dict[str, str], found: list[dict[str, str]]
) -> dict[str, Any]:
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
        "same_tensors": not different,  # as ours of the first repeat, bit for bit, in every repeat
        "different_tensors": different,
    }


def convert_once(
    name: str, source: Path, nbytes: int, job: Job
) -> tuple[Conversion, dict[str, str]]:
    """One conversion in a process of its own, and its tensors' digests; what it wrote is deleted.

    Args:
        nbytes: of the source's tensors.
    """
    with tempfile.TemporaryDirectory(prefix="magistral-converted-", dir=job.work) as parent:
        target = Path(parent) / "out"
        caches_dropped = _let_go_of(source)
        command = [
            sys.executable,
            "-m",
            "benchmarks.converter.contender",
            name,
            str(source),
            str(target),
            str(job.bits),
            job.method,
        ]
        offline = os.environ | {"HF_HUB_OFFLINE": "1"}
        done = subprocess.run(
            command, cwd=ROOT, env=offline, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise ConversionError(
                f"{name} ended with exit code {done.returncode}: {done.stderr[-2000:].strip() or 'it said nothing'}\n"
                f"To see more, run it on a source that is kept (--keep-source): {shlex.join(command)}"
            )
        took = json.loads(done.stdout.splitlines()[-1])
        files = [path for path in target.rglob("*") if path.is_file()]
        written = sum(path.stat().st_size for path in files)
        conversion = Conversion(
            count=nbytes, output_bytes=written, caches_dropped=caches_dropped, **took
        )
        return conversion, tensor_digests(target)


def _let_go_of(source: Path) -> bool:
    """Write out what the system has not yet, and have it forget the source's tensors; whether it could."""
    os.sync()
    if sys.platform != "linux":
        return False
    for path in source.glob("*.safetensors"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return True
