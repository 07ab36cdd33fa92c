"""The shape of a model, read from config.json and checked once."""

import logging
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from magistral_mlx.checkpoint.quant_format import QuantizationConfig, Shape, bad_config
from magistral_mlx.errors import CheckpointError, quoted

log = logging.getLogger(__name__)

# Magistral is a Llama decoder, and its conversions made here say so; see the converter's export.
MODEL_TYPES = ("mistral", "llama")
PLAIN_ROPE = {"rope_type": "default", "type": "default", "partial_rotary_factor": 1.0}
# JSON may hold infinity, and whole numbers that no float can hold.
LARGEST = sys.float_info.max


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a Magistral checkpoint: a Mistral decoder without sliding window."""

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

    # No slots: this is computed once and kept in the instance's dictionary.
    @cached_property
    def shapes(self) -> Mapping[str, Shape]:
        """Shape of each tensor of the unquantized checkpoint, by its Hugging Face name.

        9 tensors a layer, and 3 more (2 if the embedding is tied).
        """
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
            source: path of config.json, for messages.
            tensors: shape of every tensor by its Hugging Face name. If the config has no head_dim
                or tie_word_embeddings, they are read off these, never computed by a formula.

        Raises:
            CheckpointError: a value is missing, impossible, contradicted by a tensor, or of another
                model.
        """

        def fail(what: str) -> CheckpointError:
            return bad_config(source, what)

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

        if raw.get("model_type") not in MODEL_TYPES:
            raise fail(
                f"model_type is {quoted(raw.get('model_type'))}; this software runs Magistral's "
                "text model, model_type 'mistral' or 'llama'"
            )
        if raw.get("sliding_window") is not None:
            raise fail(
                f"sliding_window is {quoted(raw['sliding_window'])}; Magistral attends to its "
                "whole context"
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
    """Return head_dim; if it is missing, the rows of q_proj over the heads. Both must agree."""
    name = "model.layers.0.self_attn.q_proj.weight"
    if name not in tensors or len(tensors[name]) != 2:
        raise bad_config(
            source, f"the checkpoint has no matrix {name!r}; it is not a Mistral checkpoint"
        )
    rows = tensors[name][0]
    head_dim = raw.get("head_dim")
    if head_dim is None:
        if rows % num_heads:
            raise bad_config(
                source, f"{name!r} has {rows} rows, which {num_heads} heads do not divide"
            )
        log.info("%s has no head_dim: %d, read off %s", source, rows // num_heads, name)
        head_dim = rows // num_heads
    if type(head_dim) is not int or head_dim * num_heads != rows:
        raise bad_config(
            source,
            f"head_dim is {quoted(head_dim)} with {num_heads} heads, but {name!r} has {rows} rows: "
            "config and weights are not of the same model",
        )
    if not head_dim or head_dim % 2:
        raise bad_config(source, f"head_dim is {head_dim}, but RoPE turns pairs")
    return head_dim


def _tied(raw: Mapping[str, Any], source: Path, tensors: Mapping[str, Shape]) -> bool:
    """Return whether the embedding serves as lm_head.

    If config.json does not tell, lm_head.weight does. Both must agree.
    """
    tied = "lm_head.weight" not in tensors
    configured = raw.get("tie_word_embeddings")
    if configured is None:
        log.info("%s has no tie_word_embeddings: %s, by lm_head.weight", source, tied)
    elif configured is not tied:
        raise bad_config(
            source,
            f"tie_word_embeddings is {quoted(configured)}, but lm_head.weight is "
            f"{'missing' if tied else 'present'}",
        )
    return tied


def _rope_theta(raw: Mapping[str, Any], source: Path) -> float:
    """Return ``rope_theta`` of the top level or of transformers 5's ``rope_parameters``.

    It has no default: 10,000 instead of 1e9 gives fluent nonsense.
    """
    if raw.get("rope_scaling") is not None:
        raise bad_config(
            source, f"rope_scaling is {quoted(raw['rope_scaling'])}; Magistral uses plain RoPE"
        )
    parameters = raw.get("rope_parameters") or {}
    if not isinstance(parameters, dict) or any(
        key != "rope_theta" and value is not None and value != PLAIN_ROPE.get(key)
        for key, value in parameters.items()
    ):
        raise bad_config(
            source, f"rope_parameters is {quoted(parameters)}; Magistral uses plain RoPE"
        )
    found = [
        value
        for value in (raw.get("rope_theta"), parameters.get("rope_theta"))
        if value is not None
    ]
    if not found:
        raise CheckpointError(
            f"{source}: rope_theta is missing, and no value may be assumed; "
            "download config.json again"
        )
    if len(found) > 1 and found[0] != found[1]:
        raise bad_config(source, f"rope_theta is {quoted(found[0])} and also {quoted(found[1])}")
    theta = found[0]
    if isinstance(theta, bool) or not isinstance(theta, int | float) or not 1 < theta <= LARGEST:
        raise bad_config(source, f"rope_theta is {quoted(theta)}, expected a number over 1")
    return float(theta)
