"""Options of a conversion, and the formats that recipes give by name."""

import json
from pathlib import Path

import pytest

from magistral_mlx.checkpoint.quant_format import (
    AFFINE_BITS,
    AFFINE_GROUP_SIZES,
    FP_FORMATS,
    QuantFormat,
    QuantizationConfig,
)
from magistral_mlx.convert.recipe.formats import make_formats
from magistral_mlx.convert.recipe.layout import quantization_block
from magistral_mlx.convert.recipe.named import RECIPES
from magistral_mlx.convert.recipe.options import ConvertOptions
from magistral_mlx.errors import OptionError
from tests.support.tiny import make_config

FORMATS = [QuantFormat(bits, group) for bits in AFFINE_BITS for group in AFFINE_GROUP_SIZES]
FORMATS += [QuantFormat(bits, group, mode) for mode, (bits, group) in FP_FORMATS.items()]  # type: ignore[arg-type]
WIDE = make_config(hidden_size=128, intermediate_size=384, head_dim=64, vocab_size=1500)


@pytest.mark.parametrize("num_layers", [1, 2, 3, 5, 7, 8, 9, 16, 17, 40])
def test_mixed_4_6_is_mlx_lms_choice(num_layers: int) -> None:
    from mlx_lm.convert import mixed_quant_predicate_builder
    from mlx_lm.models.llama import Model, ModelArgs

    config = make_config(num_layers=num_layers)
    args = ModelArgs(
        model_type="mistral",
        hidden_size=64,
        num_hidden_layers=num_layers,
        intermediate_size=96,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        rms_norm_eps=1e-5,
        vocab_size=320,
        tie_word_embeddings=False,
    )
    model = Model(args)
    choose = mixed_quant_predicate_builder("mixed_4_6", model)
    theirs = {
        path: choose(path, m)["bits"]
        for path, m in model.named_modules()
        if hasattr(m, "to_quantized")
    }  # type: ignore[call-arg, index]  # its types are not its own
    ours = {
        path: quant.bits
        for path, quant in make_formats(config, ConvertOptions(recipe="mixed_4_6")).items()
    }
    assert ours == theirs


def test_named_recipes() -> None:
    bits = {name: make_formats(WIDE, ConvertOptions(recipe=name)) for name in RECIPES}
    assert {q.bits for q in bits["4bit"].values()} == {4}
    assert {q.bits for q in bits["8bit"].values()} == {8}
    assert {m for m, q in bits["4bit-head6"].items() if q.bits == 6} == {
        "model.embed_tokens",
        "lm_head",
    }
    tied = make_formats(make_config(tie_word_embeddings=True), ConvertOptions(recipe="4bit-head6"))
    assert {m for m, q in tied.items() if q.bits == 6} == {"model.embed_tokens"}


@pytest.mark.parametrize("recipe", [None, *RECIPES])
def test_config_has_only_the_formats_that_differ_and_reads_back(recipe: str | None) -> None:
    options = ConvertOptions(recipe=recipe, q_group_size=32)
    formats = make_formats(WIDE, options)
    block = quantization_block(formats, options.default)
    differing = {path for path, quant in formats.items() if quant != options.default}
    assert set(block) == {"group_size", "bits", "mode"} | differing
    read = QuantizationConfig.from_dict(json.loads(json.dumps(block)), Path("config.json"))
    assert {path: read.for_module(path) for path in formats} == formats


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"q_bits": 7}, "7 bits in groups of 64 does not exist"),
        (
            {"q_bits": 16, "q_group_size": 64},
            "with q_bits=16 nothing is packed; leave q_group_size and q_mode out",
        ),
        ({"q_bits": 16, "q_mode": "mxfp8"}, "with q_bits=16 nothing is packed"),
        ({"q_bits": 16, "recipe": "4bit"}, "sets the bits; leave q_bits out"),
        ({"q_group_size": 16}, "groups of 16 does not exist"),
        ({"q_mode": "int4"}, "q_mode is 'int4'; use one of affine"),
        ({"q_mode": "mxfp4", "q_bits": 8}, "it is 4 bits in groups of 32"),
        ({"q_method": "awq"}, "q_method is 'awq'; use one of round, importance, gptq"),
        (
            {"q_method": "gptq", "q_mode": "mxfp4"},
            "q_method=gptq is for affine formats, and none is written here",
        ),
        ({"q_method": "importance", "q_bits": 16}, "q_method=importance is for affine formats"),
        ({"q_method": "round", "calibration": "x"}, "rounding weights needs no calibration"),
        ({"q_bits": 8, "calibration": "x"}, "rounding weights needs no calibration"),
        (
            {"recipe": "bits.json"},
            "one of the names 4bit, 8bit, .*, or a JSON file, and there is none of that name",
        ),
        ({"recipe": "~nobody-here/bits.json"}, "there is none of that name"),
        ({"recipe": "8bit", "q_bits": 4}, "sets the bits; leave q_bits out"),
        ({"recipe": "mixed_4_6", "q_mode": "mxfp4"}, "is for q_mode=affine"),
        ({"recipe": "auto", "target_bits": "4.6"}, "target_bits is '4.6'; use a number"),
        (
            {"recipe": "auto", "target_bits": 4.6, "q_group_size": 0},
            "q_group_size is 0; use one of 32, 64, 128",
        ),
    ],
)
def test_options_that_do_not_exist_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        ConvertOptions(**options)  # type: ignore[arg-type]


def test_options_left_out_are_the_modes() -> None:
    assert ConvertOptions().default == QuantFormat(4, 64)
    assert ConvertOptions(recipe="8bit").default == QuantFormat(8, 64)
    for mode, (bits, group) in FP_FORMATS.items():
        assert ConvertOptions(q_mode=mode).default == QuantFormat(bits, group, mode)  # type: ignore[arg-type]
