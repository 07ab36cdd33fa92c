"""Read a published checkpoint, in either layout, by Hugging Face names and blocks of rows."""

import hashlib
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from magistral_mlx.checkpoint.config import ModelConfig
from magistral_mlx.checkpoint.documents import read_document
from magistral_mlx.checkpoint.folder import Layout, Shard, open_checkpoint
from magistral_mlx.checkpoint.hub_api import HubFile
from magistral_mlx.checkpoint.manifest import MAX_HASHED_BYTES
from magistral_mlx.checkpoint.quant_format import QuantFormat
from magistral_mlx.checkpoint.safetensors_header import INDEX, Entry
from magistral_mlx.convert.packing import PARTS, dequantize
from magistral_mlx.convert.source.consolidated import (
    CONSOLIDATED,
    PARAMS,
    halves_from_pairs,
    is_rotated,
    native_name,
    open_consolidated,
)
from magistral_mlx.errors import CheckpointError, ConversionError, quoted

log = logging.getLogger(__name__)

# A float type's name in config.json -> its names in safetensors and in MLX.
FLOAT_TYPES: Mapping[str, tuple[str, mx.Dtype]] = {
    "bfloat16": ("BF16", mx.bfloat16),
    "float16": ("F16", mx.float16),
    "float32": ("F32", mx.float32),
}
# Default bytes of a block; a linear of the 24B model has up to 335 MB.
MAX_BLOCK_BYTES = 64 * 2**20
DOCUMENTS = ("config.json", PARAMS, "tekken.json", "SYSTEM_PROMPT.txt")


@dataclass(frozen=True, slots=True)
class Source:
    """A checked checkpoint in one of the published layouts; its weights are read on demand.

    Attributes:
        float_type: type of the output's unpacked tensors, a key of FLOAT_TYPES.
        formats: formats of the matrices that are packed already, by module path.
    """

    folder: Path
    layout: Layout
    config: ModelConfig
    float_type: str
    shards: tuple[Shard, ...]
    formats: Mapping[str, QuantFormat | None]

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for shard in self.shards for entry in shard.header.values())

    def nbytes_of(self, name: str) -> int:
        """Return the bytes of a tensor in the files, with its scales and biases."""
        return sum(shard.header[stored].nbytes for shard, stored in self.places(name))

    def row_step(self, name: str, block_bytes: int = MAX_BLOCK_BYTES) -> int:
        """Return the number of rows that take at most ``block_bytes`` once read, at least one.

        Rows that are reordered are read in whole heads.
        """
        shard, stored = self._place(name)
        entry, quant = shard.header[stored], self._format(name)
        row_bytes = entry.nbytes // entry.shape[0]
        if quant is not None:
            row_bytes = row_bytes * 8 // quant.bits * FLOAT_TYPES[self.float_type][1].size
        step = max(1, block_bytes // row_bytes)
        if not self._is_reordered(name):
            return step
        return max(1, step // self.config.head_dim) * self.config.head_dim

    def read(self, name: str, rows: slice) -> mx.array:
        """Read rows of a tensor in Hugging Face's order, from a multiple of ``row_step`` on.

        Packed rows are dequantized, affine formats in ``float_type``. Safe from any thread.
        """
        if (quant := self._format(name)) is not None:
            parts = {
                part: shard.read(stored, rows, once=True)
                for part, (shard, stored) in self._packed(name).items()
            }
            if quant.mode == "affine":
                dtype = FLOAT_TYPES[self.float_type][1]
                parts |= {part: parts[part].astype(dtype) for part in ("scales", "biases")}
            return dequantize(parts, quant)
        shard, stored = self._place(name)
        block = shard.read(stored, rows, once=True)
        return halves_from_pairs(block, self.config.head_dim) if self._is_reordered(name) else block

    def blocks(
        self, name: str, block_bytes: int = MAX_BLOCK_BYTES
    ) -> Iterator[tuple[int, mx.array]]:
        """Yield all rows of a tensor in order, as (first row, rows)."""
        step = self.row_step(name, block_bytes)
        for row in range(0, self.config.shapes[name][0], step):
            yield row, self.read(name, slice(row, row + step))

    def places(self, name: str) -> list[tuple[Shard, str]]:
        """Return the file and stored name of each part of a tensor."""
        return (
            [self._place(name)] if self._format(name) is None else list(self._packed(name).values())
        )

    def _place(self, name: str) -> tuple[Shard, str]:
        stored = native_name(name) if self.layout == "consolidated" else name
        return next(shard for shard in self.shards if stored in shard.header), stored

    def _format(self, name: str) -> QuantFormat | None:
        return self.formats.get(name.removesuffix(".weight"))

    def _packed(self, name: str) -> dict[str, tuple[Shard, str]]:
        """Return the places of a packed tensor's parts: weight, scales and affine biases."""
        module, quant = name.removesuffix(".weight"), self._format(name)
        kinds = PARTS if quant is not None and quant.mode == "affine" else PARTS[:2]
        return {kind: self._place(f"{module}.{kind}") for kind in kinds}

    def _is_reordered(self, name: str) -> bool:
        return self.layout == "consolidated" and is_rotated(name)

    def identity(self, files_of_hub: Mapping[str, HubFile] | None = None) -> dict[str, Any]:
        """Return the layout and the size and hashes of every file, to identify the source.

        Weight files have the hash of the header, the hub's hash if they are in its cache, and a
        hash of some bytes of each tensor, which tells fine-tunes apart. Of files that are not
        fetched yet, ``files_of_hub`` supplies the hub's hash in place of the last two.
        """
        files: dict[str, dict[str, Any]] = {}
        for shard in self.shards:
            file = shard.path.name
            files[file] = {"header_sha256": shard.header_sha256}
            if files_of_hub is None:
                files[file] |= {
                    "size": shard.path.stat().st_size,
                    "sample_sha256": shard.sample_sha256(),
                }
                files[file] |= _hub_sha256(shard.path)
            else:
                size, sha256 = files_of_hub[file].size, files_of_hub[file].sha256
                files[file] |= {"size": size} | ({} if sha256 is None else {"sha256": sha256})
        for path in (self.folder / name for name in DOCUMENTS):
            if path.is_file():
                files[path.name] = _hashes(path)
        return {"layout": self.layout, "files": dict(sorted(files.items()))}


def with_document(identity: dict[str, Any], path: Path) -> dict[str, Any]:
    """Return a source's identity with a document that may lie elsewhere, such as tekken.json."""
    files = identity["files"] | {path.name: _hashes(path)}
    return identity | {"files": dict(sorted(files.items()))}


def _hashes(path: Path) -> dict[str, Any]:
    content = read_document(path, MAX_HASHED_BYTES)
    return {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def open_source(
    folder: Path, layout: Layout | None = None, shards: Sequence[Shard] | None = None
) -> Source:
    """Check a checkpoint in one of the published layouts.

    Args:
        folder: of the checkpoint.
        layout: None prefers HF shards to a consolidated file.
        shards: the weight files of ``layout``, if their headers are known; the files may then be
            missing.

    Raises:
        CheckpointError: a file is missing, damaged, of another model or contradicts another.
        ConversionError: the float type is unknown.
    """
    if shards is None:
        layout = _chosen_layout(folder, layout)
    if layout == "consolidated":
        known = next((shard for shard in shards or () if shard.path.name == CONSOLIDATED), None)
        config, raw, shards, entries = open_consolidated(folder, known)
        return Source(folder, layout, config, _float_type(folder, raw, entries), shards, {})
    checkpoint = open_checkpoint(folder, compares_manifest=shards is None, shards=shards)
    entries = {name: entry for shard in checkpoint.shards for name, entry in shard.header.items()}
    float_type = _float_type(folder, checkpoint.raw_config, entries)
    return Source(
        folder, "hf", checkpoint.config, float_type, checkpoint.shards, checkpoint.formats
    )


def _chosen_layout(folder: Path, layout: Layout | None) -> Layout:
    has_hf = any(folder.glob("model*.safetensors")) or (folder / INDEX).exists()
    has_native = (folder / CONSOLIDATED).exists()
    if layout is None:
        layout = "consolidated" if has_native and not has_hf else "hf"
        if has_native and has_hf:
            log.warning(
                "%s holds HF shards and %s; the HF shards are converted (--layout consolidated "
                "takes the other)",
                folder,
                CONSOLIDATED,
            )
        elif not has_native and (folder / PARAMS).exists() and not has_hf:
            raise CheckpointError(
                f"{folder} has {PARAMS} but neither {CONSOLIDATED} nor model*.safetensors; fetch "
                "the weights as well"
            )
    return layout


def warn_of_rounding_twice(source: Source, formats: Mapping[str, QuantFormat | None]) -> None:
    """Log a warning if matrices that are packed already are packed again."""
    if twice := [
        path
        for path, quant in formats.items()
        if quant is not None and source.formats.get(path) is not None
    ]:
        bits = sorted({quant.bits for quant in map(source.formats.get, twice) if quant is not None})
        log.warning(
            "%s is quantized already, to %s bit: rounding again adds to its error; the bf16 "
            "checkpoint that it was made from gives better weights of the same size",
            source.folder,
            " and ".join(map(str, bits)),
        )


def _float_type(folder: Path, raw: Mapping[str, Any], entries: Mapping[str, Entry]) -> str:
    """Return the float type that config.json names, as mlx-lm reads it, or that of all tensors."""
    named = [raw[key] for key in ("torch_dtype", "dtype") if raw.get(key) is not None]
    if named:
        if not isinstance(named[0], str) or named[0] not in FLOAT_TYPES or named[0] != named[-1]:
            raise CheckpointError(
                f"{folder / 'config.json'}: torch_dtype is {' and '.join(map(quoted, named))}, "
                f"expected one of {', '.join(FLOAT_TYPES)}; download config.json again"
            )
        return str(named[0])
    found = {entry.dtype for entry in entries.values()} & {
        dtype for dtype, _ in FLOAT_TYPES.values()
    }
    if len(found) > 1:
        raise ConversionError(
            f"{folder}: tensors are {' and '.join(sorted(found))}; name the "
            "model's type as torch_dtype in config.json"
        )
    return next(name for name, (dtype, _) in FLOAT_TYPES.items() if dtype in found)


def _hub_sha256(path: Path) -> dict[str, str]:
    """Return the hash of a weight file in the hub's cache, a link to ``blobs/SHA256``."""
    blob = path.resolve()
    is_hashed = blob.parent.name == "blobs" and re.fullmatch("[0-9a-f]{64}", blob.name)
    return {"sha256": blob.name} if is_hashed else {}
