"""config.json: optional and required values, and contradictions to the tensors."""

import logging
import math
from pathlib import Path
from typing import Any

import pytest

from magistral_mlx.checkpoint.config import ModelConfig
from magistral_mlx.checkpoint.quant_format import QuantFormat, QuantizationConfig
from magistral_mlx.errors import CheckpointError
from tests.support.tiny import make_config, raw_config

SOURCE = Path("folder/config.json")
WITHOUT = object()


def read(
    config: ModelConfig | None = None, /, tensors: dict[str, Any] | None = None, **changes: Any
) -> ModelConfig:
    """Read back what a publisher writes for ``config``, with some keys changed or left out."""
    config = config or make_config()
    raw = {
        key: value for key, value in (raw_config(config) | changes).items() if value is not WITHOUT
    }
    return ModelConfig.from_dict(raw, SOURCE, tensors or config.shapes)


@pytest.mark.parametrize("is_tied", [False, True])
def test_what_is_published_is_read(is_tied: bool) -> None:
    config = make_config(tie_word_embeddings=is_tied)
    assert read(config) == config


def test_the_released_model_has_the_published_size() -> None:
    released = make_config(
        hidden_size=5120,
        intermediate_size=32768,
        num_layers=40,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        vocab_size=131072,
    )
    shapes = released.shapes
    assert len(shapes) == 363
    assert sum(map(math.prod, shapes.values())) == 23_572_403_200


def test_a_missing_head_dim_is_read_off_the_rows_of_q(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    assert read(head_dim=WITHOUT).head_dim == 32  # not 64 / 4
    assert read(head_dim=None).head_dim == 32
    assert "has no head_dim: 32, read off model.layers.0.self_attn.q_proj.weight" in caplog.text


@pytest.mark.parametrize("is_tied", [False, True])
def test_a_missing_tie_flag_is_read_off_lm_head(
    is_tied: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    config = make_config(tie_word_embeddings=is_tied)
    assert read(config, tie_word_embeddings=WITHOUT) == config
    assert f"has no tie_word_embeddings: {is_tied}, by lm_head.weight" in caplog.text


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"head_dim": 16},
            "head_dim is 16 with 4 heads, but 'model.layers.0.self_attn.q_proj.weight' has 128",
        ),
        ({"head_dim": 32.0}, "head_dim is 32.0"),
        ({"num_attention_heads": 8}, "head_dim is 32 with 8 heads"),
        ({"head_dim": WITHOUT, "num_attention_heads": 6}, "128 rows, which 6 heads do not divide"),
        (
            {"tie_word_embeddings": True},
            "tie_word_embeddings is True, but lm_head.weight is present",
        ),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no'"),
        ({"num_key_value_heads": 3}, "4 query heads do not share 3 key/value heads evenly"),
        ({"rope_parameters": {"rope_theta": 1e4}}, "rope_theta is 1000000000.0 and also 10000.0"),
    ],
)
def test_a_contradiction_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        read(**changes)
    assert words in str(caught.value)
    assert str(SOURCE) in str(caught.value)


def test_a_tied_flag_without_its_meaning_is_refused() -> None:
    with pytest.raises(
        CheckpointError, match=r"tie_word_embeddings is False, but lm_head\.weight is missing"
    ):
        read(make_config(tie_word_embeddings=True), tie_word_embeddings=False)


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_theta": WITHOUT, "rope_parameters": {"rope_theta": 1e9}},
        {"rope_theta": WITHOUT, "rope_parameters": {"rope_theta": 10**9, "rope_type": "default"}},
        {"rope_theta": 10**9, "rope_parameters": {"rope_theta": 1e9}},
        {"rope_parameters": {"rope_type": "default"}},
        {
            "rope_parameters": {
                "rope_theta": 1e9,
                "type": "default",
                "partial_rotary_factor": 1,
                "factor": None,
            }
        },
        {"rope_parameters": None, "rope_scaling": None, "sliding_window": None},
    ],
)
def test_rope_theta_is_read_where_either_transformers_writes_it(changes: dict[str, Any]) -> None:
    assert read(**changes).rope_theta == 1e9


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rope_theta": WITHOUT}, "rope_theta is missing, and no value may be assumed"),
        ({"rope_theta": WITHOUT, "rope_parameters": {}}, "rope_theta is missing"),
        ({"rope_theta": 0}, "rope_theta is 0"),
        ({"rope_theta": True}, "rope_theta is True"),
        ({"rope_theta": "1e9"}, "rope_theta is '1e9'"),
        ({"rope_theta": [1e9]}, "rope_theta is [1000000000.0]"),
        ({"rope_theta": math.inf}, "rope_theta is inf"),
        ({"rope_theta": math.nan}, "rope_theta is nan"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "Magistral uses plain RoPE"),
        (
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e9}},
            "Magistral uses plain RoPE",
        ),
        ({"rope_parameters": {"type": "linear", "rope_theta": 1e9}}, "Magistral uses plain RoPE"),
        ({"rope_parameters": {"rope_theta": 1e9, "factor": 4.0}}, "'factor': 4.0"),
        (
            {"rope_parameters": {"rope_theta": 1e9, "partial_rotary_factor": 0.5}},
            "'partial_rotary_factor': 0.5",
        ),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e9}}}, "Magistral uses plain RoPE"),
        ({"rope_parameters": [1e9]}, "rope_parameters is [1000000000.0]"),
        ({"model_type": "qwen3"}, "model_type is 'qwen3'"),
        ({"model_type": "mistral3"}, "model_type is 'mistral3'"),
        ({"model_type": WITHOUT}, "model_type is None"),
        ({"sliding_window": 4096}, "sliding_window is 4096"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"hidden_size": WITHOUT}, "hidden_size is missing"),
        ({"vocab_size": 0}, "vocab_size is 0"),
        ({"num_hidden_layers": -1}, "num_hidden_layers is -1"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True"),
        ({"intermediate_size": 96.5}, "intermediate_size is 96.5"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps is '1e-5'"),
        ({"rms_norm_eps": math.nan}, "rms_norm_eps is nan"),
    ],
)
def test_another_model_or_a_damaged_value_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        read(**changes)
    assert words in str(caught.value)
    assert str(SOURCE) in str(caught.value)


def test_tensors_of_another_architecture_are_refused() -> None:
    with pytest.raises(
        CheckpointError, match=r"no matrix 'model\.layers\.0\.self_attn\.q_proj\.weight'"
    ):
        read(tensors={"transformer.h.0.attn.weight": (64, 64)})


ODD = [None, True, -1, 0, 1.5, "x", [], [1], {}, {"x": 1}, 10**400, -(10**400), math.inf, math.nan]


@pytest.mark.parametrize(
    "key", [*raw_config(make_config()), "rope_parameters", "rope_scaling", "quantization"]
)
@pytest.mark.parametrize("value", ODD, ids=lambda value: repr(value)[:9])
def test_no_value_of_any_key_ends_in_another_error(key: str, value: Any) -> None:
    try:
        assert isinstance(read(**{key: value}), ModelConfig)
    except CheckpointError as error:
        assert str(SOURCE) in str(error)  # noqa: PT017


# quantization blocks


def quantization(raw: Any) -> QuantizationConfig:
    return QuantizationConfig.from_dict(raw, SOURCE)


@pytest.mark.parametrize("key", ["quantization", "quantization_config"])
def test_the_block_is_found_under_either_name(key: str) -> None:
    read_back = read(**{key: {"bits": 4, "group_size": 64}}).quantization
    assert read_back == QuantizationConfig(QuantFormat(4, 64, "affine"))
    assert read().quantization is None


def test_a_block_that_is_null_hides_no_other() -> None:
    assert (
        read(quantization=None, quantization_config={"bits": 4, "group_size": 64}).quantization
        is not None
    )
    with pytest.raises(
        CheckpointError,
        match="quantized with 'fp8', which is not an MLX format; start from the bf16",
    ):
        read(quantization=None, quantization_config={"quant_method": "fp8"})


@pytest.mark.parametrize(
    ("block", "expected"),
    [
        ({"bits": 4, "group_size": 64}, QuantFormat(4, 64, "affine")),  # before mlx-lm wrote modes
        ({"bits": 3, "group_size": 32, "mode": "affine"}, QuantFormat(3, 32, "affine")),
        ({"bits": 4, "group_size": 32, "mode": "mxfp4"}, QuantFormat(4, 32, "mxfp4")),
        ({"bits": 4, "group_size": 16, "mode": "nvfp4"}, QuantFormat(4, 16, "nvfp4")),
        ({"bits": 8, "group_size": 32, "mode": "mxfp8"}, QuantFormat(8, 32, "mxfp8")),
    ],
)
def test_every_format_of_mlx_is_read(block: dict[str, Any], expected: QuantFormat) -> None:
    assert quantization(block).default == expected
    assert quantization(block).for_module("lm_head") == expected


def test_a_module_may_differ_in_part_in_whole_or_not_be_packed() -> None:
    read_back = quantization(
        {
            "bits": 4,
            "group_size": 64,
            "lm_head": {"bits": 6},
            "model.embed_tokens": {"bits": 4, "group_size": 32, "mode": "mxfp4"},
            "model.layers.0.mlp.down_proj": False,
            "model.layers.1.mlp.down_proj": True,
        }
    )
    assert read_back.for_module("lm_head") == QuantFormat(6, 64, "affine")
    assert read_back.for_module("model.embed_tokens") == QuantFormat(4, 32, "mxfp4")
    assert read_back.for_module("model.layers.0.mlp.down_proj") is None
    assert read_back.for_module("model.layers.1.mlp.down_proj") == QuantFormat(4, 64)
    assert read_back.for_module("model.layers.2.mlp.down_proj") == QuantFormat(4, 64)


def test_what_a_module_leaves_out_is_mlx_default_for_its_mode() -> None:
    """mlx-lm writes a null group in mixed recipes; mlx.nn.quantize reads MLX's default."""
    block = {
        "group_size": 32,
        "bits": 8,
        "a": {"bits": 6, "group_size": None},
        "b": {"mode": "nvfp4"},
        "c": {},
    }
    quantization = QuantizationConfig.from_dict(block, Path("config.json"))
    assert quantization.for_module("a") == QuantFormat(6, 64)
    assert quantization.for_module("b") == QuantFormat(4, 16, "nvfp4")
    assert quantization.for_module("c") == QuantFormat(4, 64)
    assert quantization.for_module("d") == QuantFormat(8, 32)


@pytest.mark.parametrize(
    ("block", "words"),
    [
        ({"group_size": 64}, "quantization has no 'bits'"),
        ({"bits": 4}, "quantization has no 'group_size'"),
        (
            {"bits": 7, "group_size": 64},
            "affine quantization with 7 bits in groups of 64 does not exist",
        ),
        ({"bits": 4, "group_size": 48}, "in groups of 48 does not exist"),
        ({"bits": 4, "group_size": 64, "mode": "mxfp4"}, "it is 4 bits in groups of 32"),
        (
            {"bits": 4, "group_size": 64, "mode": "gguf"},
            "quantization mode is 'gguf'; known are affine, mxfp4",
        ),
        ({"bits": 4, "group_size": 64, "mode": []}, "quantization mode is []"),
        ({"bits": "4", "group_size": 64}, "must be whole numbers"),
        ({"bits": True, "group_size": 64}, "must be whole numbers"),
        (
            {"bits": 4, "group_size": 64, "lm_head": {"bits": 9}},
            "quantization of 'lm_head': affine quantization",
        ),
        (
            {"bits": 4, "group_size": 64, "lm_head": {"mode": "nvfp4", "group_size": 64}},
            "quantization of 'lm_head': nvfp4 with 4 bits",
        ),
        ({"bits": 4, "group_size": 64, "lm_head": None}, "unknown key 'lm_head'"),
        ({"bits": 4, "group_size": 64, "version": "gemm"}, "unknown key 'version'"),
        ({"quant_method": "fp8", "bits": 8}, "quantized with 'fp8', which is not an MLX format"),
        ([4, 64], "quantization is list, expected an object"),
    ],
)
def test_a_block_that_mlx_cannot_mean_is_refused(block: Any, words: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        quantization(block)
    assert words in str(caught.value)
    assert str(SOURCE) in str(caught.value)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_packed_shapes_hold_the_bits(bits: int, group_size: int) -> None:
    """Closed form: rows * columns * bits, in 32-bit words, and one scale and bias a group."""
    shapes = QuantFormat(bits, group_size).packed_shapes((7, 384))
    assert 32 * math.prod(shapes["weight"]) == 7 * 384 * bits
    assert shapes["scales"] == shapes["biases"] == (7, 384 // group_size)


@pytest.mark.parametrize(
    ("mode", "bits", "group_size"), [("mxfp4", 4, 32), ("nvfp4", 4, 16), ("mxfp8", 8, 32)]
)
def test_float_formats_have_no_biases(mode: Any, bits: int, group_size: int) -> None:
    shapes = QuantFormat(bits, group_size, mode).packed_shapes((7, 384))
    assert shapes == {"weight": (7, 384 * bits // 32), "scales": (7, 384 // group_size)}
