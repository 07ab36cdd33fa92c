"""A checkpoint as published, in either layout -> its tensors under Hugging Face names, a block of rows at a time."""

import hashlib
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_args

import mlx.core as mx

from magistral_mlx.checkpoint.config import ModelConfig
from magistral_mlx.checkpoint.folder import Layout, Shard, open_checkpoint
from magistral_mlx.checkpoint.hub_api import HubFile
from magistral_mlx.checkpoint.quant_format import QuantFormat
from magistral_mlx.checkpoint.safetensors import Entry
from magistral_mlx.convert.packing import PARTS, dequantize
from magistral_mlx.convert.source.consolidated import (
    CONSOLIDATED,
    PARAMS,
    halves_from_pairs,
    is_rotated,
    native_name,
    open_consolidated,
)
from magistral_mlx.errors import CheckpointError, ConversionError, OptionError, quoted

log = logging.getLogger(__name__)

FLOAT_TYPES: Mapping[
    str, tuple[str, mx.Dtype]
] = {  # as config.json, safetensors and MLX spell them
    "bfloat16": ("BF16", mx.bfloat16),
    "float16": ("F16", mx.float16),
    "float32": ("F32", mx.float32),
}
MAX_BLOCK_BYTES = 64 * 2**20  # a feed-forward matrix of the 24B model has 335 MB
DOCUMENTS = ("config.json", PARAMS, "tekken.json", "SYSTEM_PROMPT.txt")


@dataclass(frozen=True, slots=True)
class Source:
    """A checked checkpoint in one of the published layouts, none of whose weights is read yet."""

    folder: Path
    layout: Layout
    config: ModelConfig
    float_type: str  # of the output's tensors that are not packed: a key of FLOAT_TYPES
    shards: tuple[Shard, ...]
    formats: Mapping[
        str, QuantFormat | None
    ]  # how a matrix is packed already, by module path; left out: it is not

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.nbytes for shard in self.shards for entry in shard.header.values())

    def nbytes_of(self, name: str) -> int:
        """Bytes in the files of one tensor, by its Hugging Face name, with what it is packed with."""
        return sum(shard.header[stored].nbytes for shard, stored in self.places(name))

    def row_step(self, name: str, block_bytes: int = MAX_BLOCK_BYTES) -> int:
        """Rows that take at most ``block_bytes`` once they are read: one at least, whole heads where the rows of
        heads are reordered."""
        shard, stored = self._place(name)
        entry, quant = shard.header[stored], self._format(name)
        row_bytes = entry.nbytes // entry.shape[0]
        if quant is not None:
            row_bytes = row_bytes * 8 // quant.bits * FLOAT_TYPES[self.float_type][1].size
        step = max(1, block_bytes // row_bytes)
        return (
            max(1, step // self.config.head_dim) * self.config.head_dim
            if self._is_reordered(name)
            else step
        )

    def read(self, name: str, rows: slice) -> mx.array:
        """Rows of one tensor as Hugging Face orders them, read now; ``rows`` starts at a multiple of ``row_step``.

        What is packed is dequantized, affine formats in ``float_type``. Safe from any thread.
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
        """All rows of one tensor, in order: (first row, rows)."""
        step = self.row_step(name, block_bytes)
        for row in range(0, self.config.shapes[name][0], step):
            yield row, self.read(name, slice(row, row + step))

    def places(self, name: str) -> list[tuple[Shard, str]]:
        """The files that one tensor is read from, by its Hugging Face name, and the names of its parts there."""
        return (
            [self._place(name)] if self._format(name) is None else list(self._packed(name).values())
        )

    def _place(self, name: str) -> tuple[Shard, str]:
        """The file of a tensor, and its name there."""
        stored = native_name(name) if self.layout == "consolidated" else name
        return next(shard for shard in self.shards if stored in shard.header), stored

    def _format(self, name: str) -> QuantFormat | None:
        return self.formats.get(name.removesuffix(".weight"))

    def _packed(self, name: str) -> dict[str, tuple[Shard, str]]:
        """Where the parts of a packed tensor are: its weight, its scales and, of affine formats, its biases."""
        module, quant = name.removesuffix(".weight"), self._format(name)
        kinds = PARTS if quant is not None and quant.mode == "affine" else PARTS[:2]
        return {kind: self._place(f"{module}.{kind}") for kind in kinds}

    def _is_reordered(self, name: str) -> bool:
        return self.layout == "consolidated" and is_rotated(name)

    def identity(self, files_of_hub: Mapping[str, HubFile] | None = None) -> dict[str, Any]:
        """What tells this source from another: of every file its size and hashes.

        Of weights those are the header's hash; the hub's, where they lie in its cache; and that of a few bytes from
        the middle of each tensor (fine-tunes differ in nothing else). Of ``files_of_hub``, which need not be there
        yet, it is what the hub states in place of the last two.
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
                content = path.read_bytes()
                files[path.name] = {
                    "size": len(content),
                    "sha256": hashlib.sha256(content).hexdigest(),
                }
        return {"layout": self.layout, "files": dict(sorted(files.items()))}


def checked_layout(layout: str | None) -> Layout | None:
    """Raises OptionError for an unknown layout."""
    for known in (None, *get_args(Layout)):
        if layout == known:
            return cast(Layout | None, known)
    raise OptionError(f"layout is {layout!r}; known are {', '.join(get_args(Layout))}")


def open_source(
    folder: Path, layout: Layout | None = None, shards: Sequence[Shard] | None = None
) -> Source:
    """Check a checkpoint in one of the published layouts; HF shards where it has both and ``layout`` is None.

    Args:
        shards: the weight files of ``layout``, where their headers are known already; they need not be there then.
    Raises:
        CheckpointError: a file is missing, damaged, of another model or contradicts another.
        ConversionError: it does not say its type.
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
    has_hf = (
        any(folder.glob("model*.safetensors")) or (folder / "model.safetensors.index.json").exists()
    )
    has_native = (folder / CONSOLIDATED).exists()
    if layout is None:
        layout = "consolidated" if has_native and not has_hf else "hf"
        if has_native and has_hf:
            log.warning(
                "%s holds HF shards and %s; the HF shards are converted (--layout consolidated takes the other)",
                folder,
                CONSOLIDATED,
            )
        elif not has_native and (folder / PARAMS).exists() and not has_hf:
            raise CheckpointError(
                f"{folder} has {PARAMS} but neither {CONSOLIDATED} nor model*.safetensors; fetch the weights as well"
            )
    return layout


def warn_of_rounding_twice(source: Source, formats: Mapping[str, QuantFormat | None]) -> None:
    """Log, once, where matrices that are packed already are packed anew."""
    if twice := [
        path
        for path, quant in formats.items()
        if quant is not None and source.formats.get(path) is not None
    ]:
        bits = sorted({quant.bits for quant in map(source.formats.get, twice) if quant is not None})
        log.warning(
            "%s is quantized already, to %s bit: rounding again adds to the error it has; the bf16 checkpoint that it "
            "was made from gives better weights of the same size",
            source.folder,
            " and ".join(map(str, bits)),
        )


def _float_type(folder: Path, raw: Mapping[str, Any], entries: Mapping[str, Entry]) -> str:
    """The type config.json states, as mlx-lm takes it; without one, that of all tensors."""
    stated = [raw[key] for key in ("torch_dtype", "dtype") if raw.get(key) is not None]
    if stated:
        if (
            not isinstance(stated[0], str)
            or stated[0] not in FLOAT_TYPES
            or stated[0] != stated[-1]
        ):
            raise CheckpointError(
                f"{folder / 'config.json'}: torch_dtype is {' and '.join(map(quoted, stated))}, expected one of "
                f"{', '.join(FLOAT_TYPES)}; download config.json again"
            )
        return str(stated[0])
    found = {entry.dtype for entry in entries.values()} & {
        dtype for dtype, _ in FLOAT_TYPES.values()
    }
    if len(found) > 1:
        raise ConversionError(
            f"{folder}: tensors are {' and '.join(sorted(found))}, and no torch_dtype says which the model has; "
            "state it in config.json"
        )
    return next(name for name, (dtype, _) in FLOAT_TYPES.items() if dtype in found)


def _hub_sha256(path: Path) -> dict[str, str]:
    """A weight file in the hub's cache is a link to ``blobs/SHA256``."""
    blob = path.resolve()
    is_stated = blob.parent.name == "blobs" and re.fullmatch("[0-9a-f]{64}", blob.name)
    return {"sha256": blob.name} if is_stated else {}
