"""Checks that the files of a checkpoint agree: index, shards, tensors and config.json."""

import re
from collections.abc import Container, Iterable, Mapping, Sequence
from pathlib import Path

from magistral_mlx.checkpoint.config import ModelConfig
from magistral_mlx.checkpoint.documents import parse_json
from magistral_mlx.checkpoint.quant_format import QuantFormat, Shape
from magistral_mlx.checkpoint.safetensors import Shard
from magistral_mlx.checkpoint.safetensors_header import FLOATS, FP8, INDEX, Entry
from magistral_mlx.errors import CheckpointError, quoted

SHARD_NAME = r"\w[\w.-]{,200}\.safetensors"
FP8_SCALES = ("_scale", "_scale_inv")


def read_weight_map(index_path: Path, text: bytes, there: Container[str]) -> dict[str, str]:
    """Return the shard of every tensor by the index.

    File names must be plain names of shards in ``there``: a path could leave the folder.
    """
    weight_map = parse_json(text, index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            f"{index_path}: weight_map is not a table of tensors and files; fetch the index again"
        )
    for name, file in weight_map.items():
        if (
            not isinstance(file, str)
            or not re.fullmatch(SHARD_NAME, file, re.ASCII)
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


def shard_names(
    folder: Path, weight_map: Mapping[str, str] | None, there: Iterable[str]
) -> list[str]:
    """Return the names of the shards that belong to the model."""
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


def merge_entries(
    shards: Sequence[Shard], weight_map: Mapping[str, str] | None, index_path: Path
) -> dict[str, Entry]:
    """Return all tensors by name; each must be in one shard, the one that the index names."""
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


def check_tensors(
    folder: Path, config: ModelConfig, entries: Mapping[str, Entry]
) -> dict[str, QuantFormat | None]:
    """Compare every tensor with config.json, and return the format of each matrix."""
    config_path = folder / "config.json"
    # Checked before a table of that many layers is made.
    if config.num_layers > len(entries):
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
    """Return the format of a matrix.

    Scales show that it is packed; only config.json tells the format.
    """
    quantization = config.quantization
    configured = None if quantization is None else quantization.for_module(module)
    if is_packed and configured is None:
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
    # A module that only the default covers may have been left unquantized.
    return configured if is_packed else None
