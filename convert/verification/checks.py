"""Check a checkpoint's files: hashes, config.json, and that all values are finite."""

import os
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import mlx.core as mx
import numpy as np

from magistral_mlx.checkpoint.folder import Checkpoint
from magistral_mlx.checkpoint.manifest import MANIFEST, FileEntry, Manifest
from magistral_mlx.checkpoint.safetensors_header import FLOATS, INDEX, METADATA
from magistral_mlx.convert.packing import EXPONENTS, is_finite
from magistral_mlx.convert.recipe.options import METHODS
from magistral_mlx.convert.threads import unordered
from magistral_mlx.errors import CheckpointError, in_units, quoted
from magistral_mlx.files import sha256_of

# Bytes read per job when values are checked: few calls, and little memory on every thread.
SCAN_BLOCK_BYTES = 16 * 2**20
# Keys for which other software assumes wrong defaults.
REQUIRED_KEYS = ("head_dim", "rope_theta", "tie_word_embeddings")
# NaNs of 8-bit floats.
NAN_BYTES = {"E8M0": (0xFF,), "E4M3": (0x7F, 0xFF)}
SCALES = {"mxfp4": "E8M0", "mxfp8": "E8M0", "nvfp4": "E4M3"}


@dataclass(frozen=True, slots=True)
class Check:
    """One check and its outcome.

    Attributes:
        passed: None if there was nothing to compare with.
        detail: the checked facts, or the first faults.
    """

    name: str
    passed: bool | None
    detail: str


# Yields the bytes read and the name of their file or tensor.
Steps = Generator[tuple[int, str], None, Check]


def verdict(name: str, faults: Iterable[str], holds: str) -> Check:
    """Make a check that names its first faults, or says ``holds`` if there are none."""
    found = list(faults)
    more = [f"and {len(found) - 3} more"] if len(found) > 3 else []
    return Check(name, not found, "; ".join(found[:3] + more) or holds)


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of a converted checkpoint.

    Raises:
        CheckpointError: it is missing or incomplete.
    """
    manifest = Manifest.find(folder)
    if manifest is None:
        raise CheckpointError(
            f"{MANIFEST} is missing, which records the hashes; convert with this software, "
            "which writes it"
        )
    manifest.require_all()
    if manifest.options.get("q_method") not in METHODS:
        raise manifest.damaged(f"its q_method is {quoted(manifest.options.get('q_method'))}")
    return manifest


def check_files(folder: Path, manifest: Manifest) -> Steps:
    """Check that every file has the recorded size and hash, and that there is no other file.

    Names with a leading dot are ignored: Finder, git and the hub's client write them.
    """
    faults: list[str] = []
    with closing(
        unordered(
            partial(_file_fault, folder / name, entry) for name, entry in manifest.files.items()
        )
    ) as hashed:
        for name, fault in hashed:
            faults += [fault] if fault else []
            yield manifest.files[name].size, name
    there = {name for name in os.listdir(folder) if not name.startswith(".")}
    strays = sorted(there - set(manifest.files) - {MANIFEST})
    faults = sorted(faults) + [
        f"{name} is not recorded in {MANIFEST}: move it away" for name in strays
    ]
    holds = f"{len(manifest.files)} files, {in_units(manifest.nbytes)}, have the recorded sha256"
    return verdict("files", faults, holds)


def check_config(checkpoint: Checkpoint) -> Check:
    """Check that config.json, index and metadata hold everything that other runtimes read."""
    raw = checkpoint.raw_config
    faults = [f"config.json has no {key}" for key in REQUIRED_KEYS if raw.get(key) is None]
    if raw.get("quantization") != raw.get("quantization_config"):
        faults.append("config.json: quantization and quantization_config differ")
    if not (checkpoint.folder / INDEX).is_file():
        faults.append(f"{INDEX} is missing")
    faults += [
        f"{shard.path.name} has the metadata {quoted(dict(shard.metadata))}, expected {METADATA}"
        for shard in checkpoint.shards
        if shard.metadata != METADATA
    ]
    return verdict("config", faults, "config.json, index and metadata hold what MLX runtimes read")


def check_finite(checkpoint: Checkpoint) -> Steps:
    """Check that no float is NaN or infinite: norms, scales, biases and 8-bit floats."""
    kinds = float_tensors(checkpoint)
    wrong: set[str] = set()
    with closing(unordered(_jobs(checkpoint, kinds))) as read:
        for name, nbytes, holds in read:
            wrong |= set() if holds else {name}
            yield nbytes, name
    faults = [f"tensor {name!r} holds NaN or infinity" for name in sorted(wrong)]
    return verdict(
        "finite", faults, f"{len(kinds)} norms, scales and biases hold no NaN and no infinity"
    )


def float_tensors(checkpoint: Checkpoint) -> dict[str, str]:
    """Return the tensors whose values may be NaN, with the type of these values."""
    kinds = {}
    for name, entry in (
        (name, entry) for shard in checkpoint.shards for name, entry in shard.header.items()
    ):
        module, _, part = name.rpartition(".")
        quant = checkpoint.formats.get(module)
        if entry.dtype in FLOATS:
            kinds[name] = entry.dtype
        elif quant is not None and part == "scales":
            kinds[name] = SCALES[quant.mode]
        elif quant is not None and quant.mode == "mxfp8":
            kinds[name] = "E4M3"
    return kinds


def nbytes_of(checkpoint: Checkpoint, names: Iterable[str]) -> int:
    entries = {name: entry for shard in checkpoint.shards for name, entry in shard.header.items()}
    return sum(entries[name].nbytes for name in names)


def _file_fault(path: Path, entry: FileEntry) -> tuple[str, str | None]:
    try:
        if not path.is_file():
            return path.name, f"{path.name} is missing"
        if (found := path.stat().st_size) != entry.size:
            return path.name, f"{path.name} has {found} bytes, {entry.size} are recorded"
        is_same = sha256_of(path) == entry.sha256
        return path.name, None if is_same else f"{path.name} was changed: its sha256 differs"
    except OSError as error:
        return path.name, f"{path.name} cannot be read ({error})"


def _jobs(
    checkpoint: Checkpoint, kinds: dict[str, str]
) -> Iterator[partial[tuple[str, int, bool]]]:
    for shard in checkpoint.shards:
        for name in (name for name in shard.header if name in kinds):
            entry = shard.header[name]
            count = entry.shape[0]
            step = max(1, SCAN_BLOCK_BYTES * count // entry.nbytes)
            for row in range(0, count, step):
                yield partial(_finite, checkpoint, name, slice(row, row + step), kinds[name])


def _finite(checkpoint: Checkpoint, name: str, rows: slice, kind: str) -> tuple[str, int, bool]:
    with mx.stream(mx.cpu):
        block = checkpoint.read(name, rows)
        if block.dtype in EXPONENTS:
            return name, block.nbytes, is_finite(block)
        codes = np.array(block, copy=False).view(np.uint8)
        return name, block.nbytes, not any((codes == code).any() for code in NAN_BYTES[kind])
