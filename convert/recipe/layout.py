"""Lay out a conversion's files from the model's config and the options alone."""

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from magistral_mlx.checkpoint.config import ModelConfig
from magistral_mlx.checkpoint.quant_format import AFFINE_BITS, QuantFormat, Shape
from magistral_mlx.checkpoint.safetensors_header import Entry, header_bytes, lay_out
from magistral_mlx.convert.packing import check_divisible
from magistral_mlx.convert.recipe.formats import make_formats
from magistral_mlx.convert.recipe.options import ConvertOptions
from magistral_mlx.convert.recipe.recipe_file import format_as_json
from magistral_mlx.convert.source.source import FLOAT_TYPES, Source

T = TypeVar("T")

# Tensors of several layers share a file up to this size: an interruption costs one file or layer.
MAX_DATA_BYTES = 300_000_000


@dataclass(frozen=True, slots=True)
class PlannedShard:
    """One file of weights.

    Attributes:
        sources: its source tensors, in the order of ``in_order``.
        entries: its written tensors by name, in the order of the file.
    """

    file: str
    sources: tuple[str, ...]
    entries: Mapping[str, Entry]

    @property
    def nbytes(self) -> int:
        data = sum(entry.nbytes for entry in self.entries.values())
        return len(header_bytes(self.entries)) + data

    @property
    def header_sha256(self) -> str:
        return hashlib.sha256(header_bytes(self.entries)).hexdigest()


@dataclass(frozen=True, slots=True)
class Plan:
    """All weight files, and the format of each matrix.

    Attributes:
        formats: by module path; None if the matrix is not packed.
        quantization: the block of config.json.
        float_type: type of the tensors that are not packed.
    """

    formats: Mapping[str, QuantFormat | None]
    quantization: Mapping[str, Any] | None
    float_type: str
    num_parameters: int
    shards: tuple[PlannedShard, ...]

    @property
    def tensor_bytes(self) -> int:
        return sum(entry.nbytes for shard in self.shards for entry in shard.entries.values())

    @property
    def file_bytes(self) -> int:
        return sum(shard.nbytes for shard in self.shards)

    @property
    def bits(self) -> dict[str, int]:
        """Bits of each matrix by module path, without scales."""
        unpacked = FLOAT_TYPES[self.float_type][1].size * 8
        return {
            path: unpacked if quant is None else quant.bits for path, quant in self.formats.items()
        }

    @property
    def bits_per_weight(self) -> float:
        return self.tensor_bytes * 8 / self.num_parameters

    def index(self) -> dict[str, Any]:
        """Return the content of model.safetensors.index.json, as mlx-lm writes it."""
        weight_map = {name: shard.file for shard in self.shards for name in shard.entries}
        return {
            "metadata": {"total_size": self.tensor_bytes, "total_parameters": self.num_parameters},
            "weight_map": dict(sorted(weight_map.items())),
        }


def make_plan(
    config: ModelConfig,
    float_type: str,
    options: ConvertOptions,
    max_bytes: int = MAX_DATA_BYTES,
    formats: Mapping[str, QuantFormat | None] | None = None,
) -> Plan:
    """Plan every tensor's format and the files that hold them.

    Args:
        config: of the source.
        float_type: type of tensors that are not packed, a key of FLOAT_TYPES.
        options: of the conversion.
        max_bytes: limit of the tensors in one file.
        formats: formats of the matrices, if they are known already.

    Raises:
        ConversionError: the groups do not divide a matrix.
        OptionError: a rule of the recipe's file matches no matrix.
    """
    formats = make_formats(config, options) if formats is None else formats
    shapes = config.shapes
    written = {
        name: written_tensors(name, shape, formats, float_type) for name, shape in shapes.items()
    }
    sizes = {
        name: sum(e.nbytes for e in lay_out(tensors).values()) for name, tensors in written.items()
    }
    units = [unit for unit in in_order(config) if unit]
    files = divide(((unit, sum(map(sizes.__getitem__, unit))) for unit in units), max_bytes)
    shards = []
    for i, units_of_file in enumerate(files, start=1):
        file = f"model-{i:05}-of-{len(files):05}.safetensors"
        sources = tuple(name for unit in units_of_file for name in unit)
        entries = lay_out({name: tensor for s in sources for name, tensor in written[s].items()})
        shards.append(
            PlannedShard("model.safetensors" if len(files) == 1 else file, sources, entries)
        )
    num_parameters = sum(math.prod(shape) for shape in shapes.values())
    return Plan(
        formats,
        quantization_block(formats, options.default),
        float_type,
        num_parameters,
        tuple(shards),
    )


def quantization_block(
    formats: Mapping[str, QuantFormat | None], default: QuantFormat | None
) -> dict[str, Any] | None:
    """Return ``quantization`` of config.json: the default, and a block for each other format.

    It has no other keys, because mlx-swift refuses them. Modules that are not packed have none:
    mlx-lm and mlx-swift-lm tell packed modules by their scales. Without a ``default``, the most
    frequent format takes its place. The result is None if nothing is packed.
    """
    packed = {path: quant for path, quant in formats.items() if quant is not None}
    if not packed:
        return None
    overall = default or Counter(packed.values()).most_common(1)[0][0]
    return format_as_json(overall) | {
        path: format_as_json(q) for path, q in packed.items() if q != overall
    }


def packed_sizes(source: Source, module: str, group_size: int) -> dict[int, int]:
    """Return the bytes of a matrix in each affine format of a group size, by bits."""
    name = f"{module}.weight"
    sizes = {}
    for bits in AFFINE_BITS:
        formats = {module: QuantFormat(bits, group_size)}
        tensors = written_tensors(name, source.config.shapes[name], formats, source.float_type)
        sizes[bits] = sum(entry.nbytes for entry in lay_out(tensors).values())
    return sizes


def divide(units: Iterable[tuple[T, int]], limit: int = MAX_DATA_BYTES) -> list[list[T]]:
    """Group units (with their bytes) in order into files up to ``limit``, or of one larger unit."""
    files: list[list[T]] = []
    filled = 0
    for unit, nbytes in units:
        if not files or filled + nbytes > limit:
            files.append([])
            filled = 0
        files[-1].append(unit)
        filled += nbytes
    return files


def in_order(config: ModelConfig) -> list[list[str]]:
    """Return the tensors by the step of a forward pass after which they can be written.

    Steps are the embedding, each layer, and the rest. A tied embedding is written last, after its
    use as lm_head.
    """
    names = list(config.shapes)
    layers = [
        [name for name in names if name.startswith(f"model.layers.{layer}.")]
        for layer in range(config.num_layers)
    ]
    first, last = names[0], [name for name in names[1:] if not name.startswith("model.layers.")]
    return [[], *layers, [*last, first]] if config.tie_word_embeddings else [[first], *layers, last]


def read_in_order(config: ModelConfig) -> list[list[str]]:
    """Return the tensors that each step of a forward pass reads.

    A separate embedding reads the first layer as well, for ``column_weights``.
    """
    steps = in_order(config)
    return [
        [next(iter(config.shapes)), *([] if config.tie_word_embeddings else steps[1])],
        *steps[1:],
    ]


def written_tensors(
    name: str, shape: Shape, formats: Mapping[str, QuantFormat | None], float_type: str
) -> dict[str, tuple[str, Shape]]:
    """Return the tensors written for a source tensor: name -> (type, shape)."""
    floating = FLOAT_TYPES[float_type][0]
    module = name.removesuffix(".weight")
    quant = formats.get(module)
    if quant is None:
        return {name: (floating, shape)}
    check_divisible(name, shape, quant)
    types = {
        "weight": "U32",
        "scales": floating if quant.mode == "affine" else "U8",
        "biases": floating,
    }
    return {
        f"{module}.{part}": (types[part], packed)
        for part, packed in quant.packed_shapes(shape).items()
    }
