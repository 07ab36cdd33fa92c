"""A path or hub id -> a validated folder -> its tensors."""

import hashlib
import os
import re
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from magistral_mlx.checkpoint.config import ModelConfig
from magistral_mlx.checkpoint.documents import parse_json, read_document
from magistral_mlx.checkpoint.hub_api import Layout
from magistral_mlx.checkpoint.hub_cache import fetch
from magistral_mlx.checkpoint.manifest import compare_manifest
from magistral_mlx.checkpoint.multimodal import MODEL_TYPE, language_config, text_name, text_shards
from magistral_mlx.checkpoint.quant_format import QuantFormat, Shape
from magistral_mlx.checkpoint.safetensors import Shard
from magistral_mlx.checkpoint.safetensors_header import FLOATS, FP8, INDEX, Entry
from magistral_mlx.errors import CheckpointError, OptionError, quoted

__all__ = ["Checkpoint", "Layout", "Shard", "open_checkpoint", "resolve"]

PLAIN_NAME = r"\w[\w.-]{,200}\.safetensors"
FP8_SCALES = ("_scale", "_scale_inv")


def resolve(
    model: str | Path, *, revision: str | None = None, layout: Layout | None = None
) -> Path:
    """The folder of a checkpoint: an existing one as it is, a hub id's files fetched into the hub's cache.

    Args:
        model: a folder, or a hub id ``org/name``; where both exist, the folder.
        revision: branch, tag or commit of a hub id.
        layout: the weights to fetch; None prefers HF shards, and takes the consolidated file without them.
    Raises:
        CheckpointError: neither a folder nor a hub id.
        HubError: the id cannot be fetched.
        OptionError: a revision of a folder.
    """
    folder = Path(
        os.path.expanduser(model)
    )  # unlike Path's, it leaves an unknown ~user for the error below
    if os.path.isdir(folder):  # unlike Path's, false for a name too long
        if revision is not None:
            raise OptionError(
                f"{folder} is a folder, which has no revision {revision!r}; leave the revision out"
            )
        return folder
    if os.path.exists(folder):
        raise CheckpointError(
            f"{folder} is a file; name the folder that holds config.json and the weights"
        )
    if isinstance(model, str) and re.fullmatch(
        r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", model, re.ASCII
    ):
        return fetch(model, revision=revision, layout=layout)
    raise CheckpointError(
        f"{model}: no such folder, and not a hub id either. Name a folder that holds a "
        "checkpoint; or a ready-made one on the hub, such as "
        "lmstudio-community/Magistral-Small-2506-MLX-4bit; or 'demo', the embedded model"
    )


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A folder in HF layout whose files agree with each other and with ``config``.

    Of a multimodal one, everything here is its language model alone, under the names of a text model.
    """

    folder: Path
    config: ModelConfig
    raw_config: dict[str, Any]  # config.json
    shards: tuple[Shard, ...]
    formats: Mapping[
        str, QuantFormat | None
    ]  # how each linear and the embedding is stored, by module path
    nbytes: int  # of all tensors
    documents_sha256: str  # config.json and the index

    def tensors(self) -> dict[str, mx.array]:
        """Every tensor under its Hugging Face name, read from disk when first evaluated."""
        arrays: dict[str, mx.array] = {}
        for shard in self.shards:
            loaded = mx.load(str(shard.path), format="safetensors")
            assert isinstance(loaded, dict)
            named = ((text_name(stored), array) for stored, array in loaded.items())
            arrays |= {name: array for name, array in named if name is not None}
        return arrays

    def read(self, name: str, rows: slice | None = None) -> mx.array:
        """One tensor or a block of its rows, read now; see ``Shard.read``."""
        return next(shard for shard in self.shards if name in shard.header).read(name, rows)

    def fingerprint(self) -> str:
        """SHA-256 by which caches know this checkpoint, in hex.

        Over config.json, the index, and each shard's name, size, header and sample: what was computed with one
        fine-tune is wrong for another.
        """
        digest = hashlib.sha256(self.documents_sha256.encode())
        for shard in self.shards:
            size, sample = shard.path.stat().st_size, shard.sample_sha256()
            digest.update(os.fsencode(f"\n{shard.path.name} {size} {shard.header_sha256} {sample}"))
        return digest.hexdigest()


def open_checkpoint(
    folder: Path, *, compares_manifest: bool = True, shards: Sequence[Shard] | None = None
) -> Checkpoint:
    """Check a folder in HF layout, bf16 to float32 or packed by MLX, and read none of its weights.

    Also without an index, where every ``model*.safetensors`` belongs to it; and a multimodal one, whose vision
    part is left out with a warning.

    Args:
        compares_manifest: whether its files must be those that magistral_mlx.json records, where there is one.
        shards: the weight files, where their headers are known already; the files need not be there then.
    Raises:
        CheckpointError: a file is missing, damaged, of another model or contradicts another. The message
            names the file and the tensor.
    """
    config_path = folder / "config.json"
    if not config_path.is_file():
        raise CheckpointError(f"{folder} {_what_it_is_instead(folder)}")
    config_text = read_document(config_path)
    published = parse_json(config_text, config_path)
    raw = language_config(published, config_path)
    index_path = folder / INDEX
    has_index = os.path.lexists(index_path)  # a link whose target is gone stands for an index, too
    index_text = read_document(index_path) if has_index else b""
    there = (
        [path.name for path in folder.glob("*.safetensors")]
        if shards is None
        else [s.path.name for s in shards]
    )
    whole = {
        name for name in there if shards is not None or (folder / name).is_file()
    }  # no pipe, no link to nothing
    weight_map = _weight_map(index_path, index_text, whole) if has_index else None
    names = _shard_names(folder, weight_map, there)
    if shards is None:
        shards = [Shard.open(folder / name) for name in names]
    entries = _merge(shards, weight_map, index_path)
    if published.get("model_type") == MODEL_TYPE:
        shards = text_shards(shards, folder)
        entries = {name: entry for shard in shards for name, entry in shard.header.items()}
    config = ModelConfig.from_dict(
        raw, config_path, {name: entry.shape for name, entry in entries.items()}
    )
    formats = _check_tensors(folder, config, entries)
    if compares_manifest:
        compare_manifest(folder, shards)
    documents = hashlib.sha256(
        hashlib.sha256(config_text).digest() + hashlib.sha256(index_text).digest()
    )
    nbytes = sum(entry.nbytes for entry in entries.values())
    return Checkpoint(folder, config, raw, tuple(shards), formats, nbytes, documents.hexdigest())


def _what_it_is_instead(folder: Path) -> str:
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
    return "has no config.json, so it is not a checkpoint; name a folder that holds config.json and model*.safetensors"


def _weight_map(index_path: Path, text: bytes, there: Container[str]) -> dict[str, str]:
    """The index: the shard of every tensor. Its file names must be plain names, not ways out of the folder."""
    weight_map = parse_json(text, index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            f"{index_path}: weight_map is not a table of tensors and files; fetch the index again"
        )
    for name, file in weight_map.items():
        if (
            not isinstance(file, str)
            or not re.fullmatch(PLAIN_NAME, file, re.ASCII)
            or ".." in file
        ):
            raise CheckpointError(
                f"{index_path}: tensor {quoted(name)} is said to be in {quoted(file)}, which is "
                "no plain .safetensors file name; do not trust this checkpoint, fetch it again "
                "from its publisher"
            )
        if file not in there:
            raise CheckpointError(
                f"{index_path}: tensor {quoted(name)} is said to be in {file}, which is missing; "
                "fetch the checkpoint again, a download resumes with what is lacking"
            )
    return weight_map


def _shard_names(
    folder: Path, weight_map: Mapping[str, str] | None, there: Iterable[str]
) -> list[str]:
    found = sorted(name for name in there if name.startswith("model"))
    if weight_map is None:
        if not found:
            raise CheckpointError(
                f"{folder} has a config.json but no model*.safetensors; fetch the weights as well"
            )
        return found
    named = set(weight_map.values())
    if strays := [name for name in found if name not in named]:
        raise CheckpointError(
            f"{folder}: {strays[0]} lies beside the weights, but {INDEX} does not name it; move "
            "it away (other software would merge it into the model)"
        )
    return sorted(named)


def _merge(
    shards: Sequence[Shard], weight_map: Mapping[str, str] | None, index_path: Path
) -> dict[str, Entry]:
    """All tensors by name; each must be in one shard, the one that the index names."""
    entries: dict[str, Entry] = {}
    places: dict[str, str] = {}
    for shard in shards:
        for name, entry in shard.header.items():
            if name in places:
                raise CheckpointError(
                    f"{shard.path}: tensor {quoted(name)} is also in {places[name]}; remove the "
                    "file that is not part of it"
                )
            entries[name], places[name] = entry, shard.path.name
    if weight_map is not None and (wrong := sorted(set(weight_map.items()) ^ set(places.items()))):
        name = wrong[0][0]
        raise CheckpointError(
            f"{index_path}: tensor {quoted(name)} should be in {weight_map.get(name, 'no file')}, "
            f"but is in {places.get(name, 'no file')}; index and shards are not of one "
            "checkpoint: fetch it again"
        )
    return entries


def _check_tensors(
    folder: Path, config: ModelConfig, entries: Mapping[str, Entry]
) -> dict[str, QuantFormat | None]:
    """Compare every tensor with what config.json implies; returns how each matrix is stored."""
    config_path = folder / "config.json"
    if config.num_layers > len(entries):  # before a table of that many layers is made
        raise CheckpointError(
            f"{config_path}: {config.num_layers} layers, but the weights are {len(entries)} "
            "tensors; they are not of one model: fetch both again"
        )
    formats: dict[str, QuantFormat | None] = {}
    expected: dict[str, tuple[Shape, frozenset[str]]] = {}
    for name, shape in config.shapes.items():
        module = name.removesuffix(".weight")
        quant = None
        if len(shape) == 2:
            quant = formats[module] = _stored_format(
                config_path, config, module, f"{module}.scales" in entries
            )
        if quant is None:
            expected[name] = shape, FLOATS
            continue
        if shape[1] % quant.group_size:
            raise CheckpointError(
                f"{config_path}: groups of {quant.group_size} do not divide the {shape[1]} "
                f"columns of {module!r}; fetch config.json again"
            )
        beside = FLOATS if quant.mode == "affine" else frozenset({"U8"})
        for kind, packed in quant.packed_shapes(shape).items():
            expected[f"{module}.{kind}"] = (
                packed,
                frozenset({"U32"}) if kind == "weight" else beside,
            )
    if missing := sorted(set(expected) - set(entries)):
        raise CheckpointError(
            f"{folder}: {len(missing)} tensors are missing, first {quoted(missing[0])}; the "
            "checkpoint is incomplete, fetch it again"
        )
    extra = sorted(set(entries) - set(expected))
    if scales := [name for name in extra if name.endswith(FP8_SCALES)]:
        raise CheckpointError(
            f"{folder}: {quoted(scales[0])} is a scale of weights in {FP8}; start from the bf16 "
            "checkpoint"
        )
    if extra:
        raise CheckpointError(
            f"{folder}: {len(extra)} tensors do not belong to this model, first "
            f"{quoted(extra[0])}; the weights are of another model than config.json: fetch both "
            "again"
        )
    for name, (shape, dtypes) in expected.items():
        entry = entries[name]
        if entry.shape != shape or entry.dtype not in dtypes:
            raise CheckpointError(
                f"{folder}: tensor {name!r} is {entry.dtype} {list(entry.shape)}, config.json "
                f"implies {' or '.join(sorted(dtypes))} {list(shape)}; one is damaged or of "
                "another model, fetch both again"
            )
    return formats


def _stored_format(
    config_path: Path, config: ModelConfig, module: str, is_packed: bool
) -> QuantFormat | None:
    """How a matrix is stored. Whether it is packed shows in its scales, how it is packed only config.json says."""
    quantization = config.quantization
    stated = None if quantization is None else quantization.for_module(module)
    if is_packed and stated is None:
        raise CheckpointError(
            f"{config_path}: {module!r} has scales, but the quantization block does not say how "
            "it is packed; fetch config.json again"
        )
    if (
        not is_packed
        and quantization is not None
        and quantization.overrides.get(module) is not None
    ):
        raise CheckpointError(
            f"{config_path}: quantization names {module!r}, but the tensor '{module}.scales' is "
            "missing; fetch the weights again"
        )
    return stated if is_packed else None  # what the default covers may have been left as it was
