"""Formats of packed weights: one format, and those that config.json gives its modules."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from magistral_mlx.errors import CheckpointError, quoted

Mode = Literal["affine", "mxfp4", "nvfp4", "mxfp8"]
Shape = tuple[int, ...]

# What mx.quantize accepts in each mode; pairs are (bits, group size).
AFFINE_BITS = (2, 3, 4, 5, 6, 8)
AFFINE_GROUP_SIZES = (32, 64, 128)
AFFINE_DEFAULT = (4, 64)
FP_FORMATS: Mapping[str, tuple[int, int]] = {"mxfp4": (4, 32), "nvfp4": (4, 16), "mxfp8": (8, 32)}


@dataclass(frozen=True, slots=True)
class QuantFormat:
    """Format of one packed weight: bits a weight, weights a group, and the kind of code."""

    bits: int
    group_size: int
    mode: Mode = "affine"

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode):
            raise CheckpointError(
                f"quantization mode is {quoted(self.mode)}; known are {', '.join(get_args(Mode))}"
            )
        if self.mode == "affine":
            if self.bits not in AFFINE_BITS or self.group_size not in AFFINE_GROUP_SIZES:
                raise CheckpointError(
                    f"affine quantization with {quoted(self.bits)} bits in groups of "
                    f"{quoted(self.group_size)} does not exist; use bits in {AFFINE_BITS} and a "
                    f"group size in {AFFINE_GROUP_SIZES}"
                )
        elif (self.bits, self.group_size) != FP_FORMATS[self.mode]:
            bits, group_size = FP_FORMATS[self.mode]
            raise CheckpointError(
                f"{self.mode} with {quoted(self.bits)} bits in groups of {quoted(self.group_size)} "
                f"does not exist; it is {bits} bits in groups of {group_size}"
            )

    def packed_shapes(self, shape: Shape) -> dict[str, Shape]:
        """Return the shapes of ``weight``, ``scales`` and (affine) ``biases``.

        Args:
            shape: [rows, columns] of the weight that is packed.
        """
        rows, columns = shape
        groups = columns // self.group_size
        shapes: dict[str, Shape] = {
            "weight": (rows, columns * self.bits // 32),
            "scales": (rows, groups),
        }
        return shapes | ({"biases": (rows, groups)} if self.mode == "affine" else {})


@dataclass(frozen=True, slots=True)
class QuantizationConfig:
    """Default format, and the modules that differ; None for a module that is not quantized."""

    default: QuantFormat
    overrides: Mapping[str, QuantFormat | None] = field(default_factory=dict)

    def for_module(self, path: str) -> QuantFormat | None:
        """Return the format that config.json gives for a module such as ``lm_head``."""
        return self.overrides.get(path, self.default)

    @classmethod
    def from_dict(cls, raw: Any, source: Path) -> "QuantizationConfig":
        """Read the ``quantization`` block of MLX checkpoints.

        ``mode`` and the blocks of single modules may be missing.
        """
        if not isinstance(raw, dict):
            raise bad_config(source, f"quantization is {type(raw).__name__}, expected an object")
        if "quant_method" in raw:
            raise CheckpointError(
                f"{source}: quantized with {quoted(raw['quant_method'])}, which is not an MLX "
                "format; start from the bf16 checkpoint"
            )

        for key in ("bits", "group_size"):
            if key not in raw:
                raise bad_config(source, f"quantization has no {key!r}")
        default = _quant_format(raw, source, "quantization")
        overrides: dict[str, QuantFormat | None] = {}
        for path, block in raw.items():
            if isinstance(block, dict):
                overrides[path] = _quant_format(block, source, f"quantization of {quoted(path)}")
            elif block is False:
                overrides[path] = None
            elif block is True:
                overrides[path] = default
            elif path not in ("bits", "group_size", "mode"):
                raise bad_config(source, f"quantization has an unknown key {quoted(path)}")
        return cls(default, overrides)


def bad_config(source: Path, what: str) -> CheckpointError:
    """Make the error for a config.json that cannot be used."""
    return CheckpointError(
        f"{source}: {what}; download the file again, or name a checkpoint of Magistral"
    )


def _quant_format(block: Mapping[str, Any], source: Path, where: str) -> QuantFormat:
    """Read one format.

    A value that is missing, or null as mlx-lm writes it, is MLX's default for the mode; it is never
    taken from another block.
    """
    mode: Any = "affine" if block.get("mode") is None else block["mode"]
    bits, group_size = (
        FP_FORMATS.get(mode, AFFINE_DEFAULT) if isinstance(mode, str) else AFFINE_DEFAULT
    )
    bits = bits if block.get("bits") is None else block["bits"]
    group_size = group_size if block.get("group_size") is None else block["group_size"]
    if type(bits) is not int or type(group_size) is not int:
        raise bad_config(source, f"{where}: bits and group_size must be whole numbers")
    try:
        return QuantFormat(bits, group_size, mode)
    except CheckpointError as error:
        raise bad_config(source, f"{where}: {error}") from None
