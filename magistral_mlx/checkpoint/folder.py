"""A checkpoint: from a path or hub id to a validated folder, and to its tensors."""

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from magistral_mlx.checkpoint.config import ModelConfig
from magistral_mlx.checkpoint.consistency import (
    check_tensors,
    merge_entries,
    read_weight_map,
    shard_names,
)
from magistral_mlx.checkpoint.documents import parse_json, read_document
from magistral_mlx.checkpoint.hub_api import Layout, is_hub_id
from magistral_mlx.checkpoint.hub_cache import fetch
from magistral_mlx.checkpoint.manifest import compare_manifest
from magistral_mlx.checkpoint.multimodal import MODEL_TYPE, language_config, text_name, text_shards
from magistral_mlx.checkpoint.quant_format import QuantFormat
from magistral_mlx.checkpoint.safetensors import Shard
from magistral_mlx.checkpoint.safetensors_header import INDEX
from magistral_mlx.errors import CheckpointError, OptionError

# The embedded model's name, and the folder of its bf16 weights.
DEMO, DEMO_SOURCE = "demo", Path(__file__).parents[1] / "demo"
MODELS = (
    "Name a folder that holds a checkpoint; or a ready-made one on the hub, such as "
    "lmstudio-community/Magistral-Small-2506-MLX-4bit; or 'demo', the embedded model"
)
SOURCES = (
    "Name the folder of a published checkpoint; or its hub id, such as "
    "mistralai/Magistral-Small-2506; or 'demo', the embedded model"
)

__all__ = ["Checkpoint", "Layout", "Shard", "open_checkpoint", "resolve"]


def resolve(
    model: str | Path,
    *,
    revision: str | None = None,
    layout: Layout | None = None,
    advice: str = MODELS,
    check: Callable[[Path], None] | None = None,
) -> Path:
    """Return the folder of a checkpoint; a hub id's files are fetched into the hub's cache.

    Args:
        model: "demo", a folder, or a hub id ``org/name``; if both exist, the folder.
        revision: branch, tag or commit of a hub id.
        layout: the weights to fetch; None prefers HF shards to the consolidated file.
        advice: what to name where there is no such model.
        check: called with a folder of a hub id's other files before weights are fetched.

    Raises:
        CheckpointError: neither a folder nor a hub id.
        HubError: the id cannot be fetched.
        OptionError: a revision of a folder or of the demo.
    """
    if model == DEMO:
        if revision is not None:
            raise OptionError(
                f"demo is the embedded model, which has no revision {revision!r}; "
                "leave the revision out"
            )
        return DEMO_SOURCE
    # These functions of os.path do not raise for an unknown ~user or a name that is too long.
    folder = Path(os.path.expanduser(model))
    if os.path.isdir(folder):
        if revision is not None:
            raise OptionError(
                f"{folder} is a folder, which has no revision {revision!r}; leave the revision out"
            )
        return folder
    if os.path.exists(folder):
        raise CheckpointError(
            f"{folder} is a file; name the folder that holds config.json and the weights"
        )
    if isinstance(model, str) and is_hub_id(model):
        return fetch(model, revision=revision, layout=layout, check=check)
    raise CheckpointError(f"{model}: no such folder, and not a hub id either. {advice}")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Folder in HF layout whose files agree with each other and with ``config``.

    A multimodal checkpoint appears as its language model alone, under the names of a text model.

    Attributes:
        raw_config: config.json.
        formats: format of each linear and the embedding, by module path.
        nbytes: bytes of all tensors.
        documents_sha256: of config.json and the index.
    """

    folder: Path
    config: ModelConfig
    raw_config: dict[str, Any]
    shards: tuple[Shard, ...]
    formats: Mapping[str, QuantFormat | None]
    nbytes: int
    documents_sha256: str

    def tensors(self) -> dict[str, mx.array]:
        """Return every tensor by its Hugging Face name; it is read when first evaluated."""
        arrays: dict[str, mx.array] = {}
        for shard in self.shards:
            named = ((text_name(stored), array) for stored, array in shard.load().items())
            found = {name: array for name, array in named if name is not None}
            if {n: a.shape for n, a in found.items()} != {
                n: entry.shape for n, entry in shard.header.items()
            }:
                raise shard.changed()
            arrays |= found
        return arrays

    def check_unchanged(self) -> None:
        """Raise CheckpointError if a file of weights changed since the checkpoint was opened."""
        for shard in self.shards:
            shard.check_unchanged()

    def read(self, name: str, rows: slice | None = None) -> mx.array:
        """Read one tensor or a block of its rows, see ``Shard.read``."""
        return next(shard for shard in self.shards if name in shard.header).read(name, rows)

    def fingerprint(self) -> str:
        """Return the SHA-256, in hex, by which caches know this checkpoint.

        It covers config.json, the index, and each shard's name, size, header and sample: a cache
        that was computed with one fine-tune is wrong for another.
        """
        digest = hashlib.sha256(self.documents_sha256.encode())
        for shard in self.shards:
            size, sample = shard.path.stat().st_size, shard.sample_sha256()
            digest.update(os.fsencode(f"\n{shard.path.name} {size} {shard.header_sha256} {sample}"))
        return digest.hexdigest()


def open_checkpoint(
    folder: Path, *, compares_manifest: bool = True, shards: Sequence[Shard] | None = None
) -> Checkpoint:
    """Check a folder in HF layout, bf16 to float32 or packed by MLX; read no weights.

    Without an index, every ``model*.safetensors`` belongs to the checkpoint. The vision part of a
    multimodal one is left out with a warning.

    Args:
        folder: with config.json and the weights.
        compares_manifest: compare the files with magistral_mlx.json, if it is there.
        shards: the weight files, if their headers are known; then the files need not be there.

    Raises:
        CheckpointError: a file is missing, damaged, of another model or contradicts another. The
            message names the file and the tensor.
    """
    config_path = folder / "config.json"
    if not config_path.is_file():
        raise CheckpointError(f"{folder} {_why_no_checkpoint(folder)}")
    config_text = read_document(config_path)
    published = parse_json(config_text, config_path)
    raw = language_config(published, config_path)
    index_path = folder / INDEX
    # A link whose target is gone counts as an index.
    has_index = os.path.lexists(index_path)
    index_text = read_document(index_path) if has_index else b""
    there = (
        [path.name for path in folder.glob("*.safetensors")]
        if shards is None
        else [s.path.name for s in shards]
    )
    # Neither pipes nor links to nothing.
    plain = {name for name in there if shards is not None or (folder / name).is_file()}
    weight_map = read_weight_map(index_path, index_text, plain) if has_index else None
    names = shard_names(folder, weight_map, there)
    if shards is None:
        shards = [Shard.open(folder / name) for name in names]
    entries = merge_entries(shards, weight_map, index_path)
    if published.get("model_type") == MODEL_TYPE:
        shards = text_shards(shards, folder)
        entries = {name: entry for shard in shards for name, entry in shard.header.items()}
    config = ModelConfig.from_dict(
        raw, config_path, {name: entry.shape for name, entry in entries.items()}
    )
    formats = check_tensors(folder, config, entries)
    if compares_manifest:
        compare_manifest(folder, shards)
    documents = hashlib.sha256(
        hashlib.sha256(config_text).digest() + hashlib.sha256(index_text).digest()
    )
    nbytes = sum(entry.nbytes for entry in entries.values())
    return Checkpoint(folder, config, raw, tuple(shards), formats, nbytes, documents.hexdigest())


def _why_no_checkpoint(folder: Path) -> str:
    if not folder.is_dir():
        return "is no folder; name one that holds config.json and model*.safetensors"
    if (folder / "params.json").exists() or any(folder.glob("consolidated*.safetensors")):
        return (
            "holds Mistral's own layout; convert it first: "
            f"python -m magistral_mlx.convert --hf-path {folder} --mlx-path OUT"
        )
    if any(folder.glob("*.gguf")):
        return "holds GGUF files, which are not read here; take the safetensors of the same model"
    if not any(folder.iterdir()):
        return "is empty; name a folder that holds config.json and model*.safetensors"
    return (
        "has no config.json, so it is not a checkpoint; name a folder that holds config.json and "
        "model*.safetensors"
    )
