"""What a checkpoint says about itself: read once, checked once, frozen."""

import logging
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from magistral_mlx.errors import CheckpointError, quoted

log = logging.getLogger(__name__)

Mode = Literal["affine", "mxfp4", "nvfp4", "mxfp8"]
Shape = tuple[int, ...]
PLAIN_ROPE = {"rope_type": "default", "type": "default", "partial_rotary_factor": 1.0}
LARGEST = sys.float_info.max  # JSON may hold infinity, and whole numbers that no float can

# What mx.quantize accepts, per mode.
AFFINE_BITS = (2, 3, 4, 5, 6, 8)
AFFINE_GROUP_SIZES = (32, 64, 128)
AFFINE_DEFAULT = (4, 64)  # bits, group
FP_FORMATS: Mapping[str, tuple[int, int]] = {
    "mxfp4": (4, 32),
    "nvfp4": (4, 16),
    "mxfp8": (8, 32),
}  # bits, group


@dataclass(frozen=True, slots=True)
class QuantFormat:
    """How one weight is packed: bits a weight, weights a group, and the kind of code."""

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
                    f"affine quantization with {quoted(self.bits)} bits in groups of {quoted(self.group_size)} does not "
                    f"exist; use bits in {AFFINE_BITS} and a group size in {AFFINE_GROUP_SIZES}"
                )
        elif (self.bits, self.group_size) != FP_FORMATS[self.mode]:
            bits, group_size = FP_FORMATS[self.mode]
            raise CheckpointError(
                f"{self.mode} with {quoted(self.bits)} bits in groups of {quoted(self.group_size)} does not exist; "
                f"it is {bits} bits in groups of {group_size}"
            )

    def packed_shapes(self, shape: Shape) -> dict[str, Shape]:
        """Shapes of ``weight``, ``scales`` and (affine) ``biases`` for a weight of ``shape`` [rows, columns]."""
        rows, columns = shape
        groups = columns // self.group_size
        shapes: dict[str, Shape] = {
            "weight": (rows, columns * self.bits // 32),
            "scales": (rows, groups),
        }
        return shapes | ({"biases": (rows, groups)} if self.mode == "affine" else {})


@dataclass(frozen=True, slots=True)
class QuantizationConfig:
    """The default format, and the modules that differ; ``None`` means the module stays unquantized."""

    default: QuantFormat
    overrides: Mapping[str, QuantFormat | None] = field(default_factory=dict)

    def for_module(self, path: str) -> QuantFormat | None:
        """The format that config.json states for a module such as ``model.layers.0.mlp.down_proj``."""
        return self.overrides.get(path, self.default)

    @classmethod
    def from_dict(cls, raw: Any, source: Path) -> "QuantizationConfig":
        """Read the ``quantization`` block of MLX checkpoints, with or without ``mode`` and per-module blocks."""
        if not isinstance(raw, dict):
            raise _refusal(source, f"quantization is {type(raw).__name__}, expected an object")
        if "quant_method" in raw:
            raise CheckpointError(
                f"{source}: quantized with {quoted(raw['quant_method'])}, which is not an MLX format; "
                "start from the bf16 checkpoint"
            )

        for key in ("bits", "group_size"):
            if key not in raw:
                raise _refusal(source, f"quantization has no {key!r}")
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
                raise _refusal(source, f"quantization has an unknown key {quoted(path)}")
        return cls(default, overrides)


def _refusal(source: Path, what: str) -> CheckpointError:
    return CheckpointError(
        f"{source}: {what}; download the file again, or name a checkpoint of Magistral"
    )


def _quant_format(block: Mapping[str, Any], source: Path, where: str) -> QuantFormat:
    """One format. What is left out, or null as mlx-lm writes it, is MLX's default for the mode, not another block's."""
    mode: Any = "affine" if block.get("mode") is None else block["mode"]
    bits, group_size = (
        FP_FORMATS.get(mode, AFFINE_DEFAULT) if isinstance(mode, str) else AFFINE_DEFAULT
    )
    bits = bits if block.get("bits") is None else block["bits"]
    group_size = group_size if block.get("group_size") is None else block["group_size"]
    if type(bits) is not int or type(group_size) is not int:
        raise _refusal(source, f"{where}: bits and group_size must be whole numbers")
    try:
        return QuantFormat(bits, group_size, mode)
    except CheckpointError as error:
        raise _refusal(source, f"{where}: {error}") from None


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The shape of a Magistral checkpoint: a Mistral decoder without sliding window."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    rms_norm_eps: float
    rope_theta: float
    max_positions: int
    tie_word_embeddings: bool = False
    quantization: QuantizationConfig | None = None

    def parameter_shapes(self) -> dict[str, Shape]:
        """Every tensor of the unquantized checkpoint under its Hugging Face name: 9 a layer and 3 (tied: 2)."""
        D, F, d = self.hidden_size, self.intermediate_size, self.head_dim
        q, kv = self.num_heads * d, self.num_kv_heads * d
        shapes: dict[str, Shape] = {"model.embed_tokens.weight": (self.vocab_size, D)}
        for i in range(self.num_layers):
            shapes |= {
                f"model.layers.{i}.{name}.weight": shape
                for name, shape in {
                    "input_layernorm": (D,),
                    "self_attn.q_proj": (q, D),
                    "self_attn.k_proj": (kv, D),
                    "self_attn.v_proj": (kv, D),
                    "self_attn.o_proj": (D, q),
                    "post_attention_layernorm": (D,),
                    "mlp.gate_proj": (F, D),
                    "mlp.up_proj": (F, D),
                    "mlp.down_proj": (D, F),
                }.items()
            }
        shapes["model.norm.weight"] = (D,)
        if not self.tie_word_embeddings:
            shapes["lm_head.weight"] = (self.vocab_size, D)
        return shapes

    @classmethod
    def from_dict(
        cls, raw: Mapping[str, Any], source: Path, tensors: Mapping[str, Shape]
    ) -> "ModelConfig":
        """Check a config.json against itself and against the shapes of the checkpoint's tensors.

        Args:
            raw: config.json, parsed.
            source: its path, for messages.
            tensors: shape of every tensor under its Hugging Face name; what the config leaves out
                (head_dim, tie_word_embeddings) is read off these, never computed by a formula.
        Raises:
            CheckpointError: a value is missing, impossible, contradicted by a tensor, or of another model.
        """

        def fail(what: str) -> CheckpointError:
            return _refusal(source, what)

        def number(key: str, kind: type[int] | type[float] = int) -> Any:
            value = raw.get(key)
            if value is None:
                raise fail(f"{key} is missing; this is not a complete Mistral config")
            if (
                isinstance(value, bool)
                or not isinstance(value, int | kind)
                or not 0 < value <= LARGEST
            ):
                raise fail(f"{key} is {quoted(value)}, expected a positive number")
            return kind(value)

        if raw.get("model_type") != "mistral":
            raise fail(
                f"model_type is {quoted(raw.get('model_type'))}; this software runs Magistral's text model, "
                "model_type 'mistral'"
            )
        if raw.get("sliding_window") is not None:
            raise fail(
                f"sliding_window is {quoted(raw['sliding_window'])}; Magistral attends to its whole context"
            )
        if raw.get("hidden_act", "silu") != "silu":
            raise fail(f"hidden_act is {quoted(raw['hidden_act'])}, expected 'silu'")
        for key in ("attention_bias", "mlp_bias"):
            if raw.get(key, False):
                raise fail(f"{key} is {quoted(raw[key])}; Magistral has no biases")

        num_layers, num_heads, num_kv_heads = map(
            number, ("num_hidden_layers", "num_attention_heads", "num_key_value_heads")
        )
        if num_heads % num_kv_heads:
            raise fail(
                f"{num_heads} query heads do not share {num_kv_heads} key/value heads evenly"
            )
        blocks = (raw.get("quantization"), raw.get("quantization_config"))
        quantization = next((block for block in blocks if block is not None), None)
        return cls(
            hidden_size=number("hidden_size"),
            intermediate_size=number("intermediate_size"),
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=_head_dim(raw, source, tensors, num_heads),
            vocab_size=number("vocab_size"),
            rms_norm_eps=number("rms_norm_eps", float),
            rope_theta=_rope_theta(raw, source),
            max_positions=number("max_position_embeddings"),
            tie_word_embeddings=_tied(raw, source, tensors),
            quantization=None
            if quantization is None
            else QuantizationConfig.from_dict(quantization, source),
        )


def _head_dim(
    raw: Mapping[str, Any], source: Path, tensors: Mapping[str, Shape], num_heads: int
) -> int:
    """The stated head size, or q's rows over the heads; both must agree."""
    name = "model.layers.0.self_attn.q_proj.weight"
    if name not in tensors or len(tensors[name]) != 2:
        raise _refusal(
            source, f"the checkpoint has no matrix {name!r}; it is not a Mistral checkpoint"
        )
    rows = tensors[name][0]
    stated = raw.get("head_dim")
    if stated is None:
        if rows % num_heads:
            raise _refusal(
                source, f"{name!r} has {rows} rows, which {num_heads} heads do not divide"
            )
        log.info("%s has no head_dim: %d, read off %s", source, rows // num_heads, name)
        stated = rows // num_heads
    if type(stated) is not int or stated * num_heads != rows:
        raise _refusal(
            source,
            f"head_dim is {quoted(stated)} with {num_heads} heads, but {name!r} has {rows} rows: config and weights "
            "are not of the same model",
        )
    if not stated or stated % 2:
        raise _refusal(source, f"head_dim is {stated}, but RoPE turns pairs")
    return stated


def _tied(raw: Mapping[str, Any], source: Path, tensors: Mapping[str, Shape]) -> bool:
    """Whether the embedding serves as lm_head: stated, or the absence of lm_head.weight; both must agree."""
    tied = "lm_head.weight" not in tensors
    stated = raw.get("tie_word_embeddings")
    if stated is None:
        log.info("%s has no tie_word_embeddings: %s, by lm_head.weight", source, tied)
    elif stated is not tied:
        raise _refusal(
            source,
            f"tie_word_embeddings is {quoted(stated)}, but lm_head.weight is {'missing' if tied else 'present'}",
        )
    return tied


def _rope_theta(raw: Mapping[str, Any], source: Path) -> float:
    """``rope_theta`` from the top level or transformers 5's ``rope_parameters``. It has no default:
    10,000 where the truth is 1e9 gives fluent nonsense."""
    if raw.get("rope_scaling") is not None:
        raise _refusal(
            source, f"rope_scaling is {quoted(raw['rope_scaling'])}; Magistral uses plain RoPE"
        )
    parameters = raw.get("rope_parameters") or {}
    if not isinstance(parameters, dict) or any(
        key != "rope_theta" and value is not None and value != PLAIN_ROPE.get(key)
        for key, value in parameters.items()
    ):
        raise _refusal(
            source, f"rope_parameters is {quoted(parameters)}; Magistral uses plain RoPE"
        )
    stated = [
        value
        for value in (raw.get("rope_theta"), parameters.get("rope_theta"))
        if value is not None
    ]
    if not stated:
        raise CheckpointError(
            f"{source}: rope_theta is missing, and no value may be assumed; download config.json again"
        )
    if len(stated) > 1 and stated[0] != stated[1]:
        raise _refusal(source, f"rope_theta is {quoted(stated[0])} and also {quoted(stated[1])}")
    theta = stated[0]
    if isinstance(theta, bool) or not isinstance(theta, int | float) or not 1 < theta <= LARGEST:
        raise _refusal(source, f"rope_theta is {quoted(theta)}, expected a number over 1")
    return float(theta)
