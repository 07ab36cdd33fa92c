"""Parts of the converter: names and row order, rounding, recipes, the plan, the file writer."""

import hashlib
import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from safetensors import safe_open

from magistral_mlx.checkpoint.quant_format import (
    AFFINE_BITS,
    AFFINE_GROUP_SIZES,
    FP_FORMATS,
    QuantFormat,
    QuantizationConfig,
)
from magistral_mlx.checkpoint.safetensors_header import header_bytes, lay_out
from magistral_mlx.convert.output.writer import ShardWriter
from magistral_mlx.convert.packing import dequantize, quantize
from magistral_mlx.convert.recipe.layout import divide, in_order, make_plan, quantization_block
from magistral_mlx.convert.recipe.named import RECIPES
from magistral_mlx.convert.recipe.options import ConvertOptions, make_formats
from magistral_mlx.convert.source.consolidated import halves_from_pairs, is_rotated, native_name
from magistral_mlx.errors import ConversionError, OptionError
from tests.support.tiny import make_config

FORMATS = [QuantFormat(bits, group) for bits in AFFINE_BITS for group in AFFINE_GROUP_SIZES]
FORMATS += [QuantFormat(bits, group, mode) for mode, (bits, group) in FP_FORMATS.items()]  # type: ignore[arg-type]
WIDE = make_config(hidden_size=128, intermediate_size=384, head_dim=64, vocab_size=1500)


def same(a: mx.array, b: mx.array) -> bool:
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and bool(mx.array_equal(a.view(mx.uint8), b.view(mx.uint8)))
    )


# names


def test_native_names_are_mistrals() -> None:
    assert native_name("model.embed_tokens.weight") == "tok_embeddings.weight"
    assert native_name("model.layers.12.self_attn.o_proj.weight") == "layers.12.attention.wo.weight"
    assert native_name("model.layers.0.mlp.down_proj.weight") == "layers.0.feed_forward.w2.weight"
    names = list(WIDE.shapes)
    assert len({native_name(name) for name in names}) == len(names)
    assert sum(map(is_rotated, names)) == 2 * WIDE.num_layers


def test_reordering_rows_turns_mistrals_rope_into_hugging_faces() -> None:
    """Check by definition: both conventions rotate the same pair of channels by the same angle."""
    heads, d = 3, 8
    # Each row holds its own number in Mistral's order, where pair i is (2i, 2i + 1).
    rows = np.arange(heads * d)
    moved = np.array(halves_from_pairs(mx.array(rows)[:, None], d))[:, 0].reshape(heads, d)
    for head in range(heads):
        # Hugging Face's pair i is (i, i + d/2).
        for pair in range(d // 2):
            assert moved[head, pair] == head * d + 2 * pair
            assert moved[head, pair + d // 2] == head * d + 2 * pair + 1


@pytest.mark.parametrize(
    "quant", [QuantFormat(4, 32), QuantFormat(3, 64), QuantFormat(4, 16, "nvfp4")]
)
def test_reordering_rows_commutes_with_quantization(quant: QuantFormat) -> None:
    weight = mx.random.normal((4 * 32, 64), key=mx.random.key(0)).astype(mx.bfloat16)
    moved_first = quantize(halves_from_pairs(weight, 32), quant)
    moved_last = {
        kind: halves_from_pairs(part, 32) for kind, part in quantize(weight, quant).items()
    }
    assert moved_first.keys() == moved_last.keys()
    assert all(same(moved_first[kind], moved_last[kind]) for kind in moved_first)


# quantize


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16, mx.float32])
@pytest.mark.parametrize("quant", FORMATS, ids=lambda q: f"{q.mode}-{q.bits}-{q.group_size}")
def test_rounding_is_mlx_s_own_in_whole_and_by_blocks_of_rows(
    quant: QuantFormat, dtype: mx.Dtype
) -> None:
    weight = mx.random.normal((7, 384), key=mx.random.key(1)).astype(dtype)
    weight[3] = 0
    expected = mx.quantize(weight, quant.group_size, quant.bits, quant.mode)
    parts = quantize(weight, quant)
    assert {kind: part.shape for kind, part in parts.items()} == quant.packed_shapes((7, 384))
    blocks = [quantize(weight[rows], quant) for rows in (slice(0, 1), slice(1, 6), slice(6, 7))]
    for (kind, part), whole in zip(parts.items(), expected, strict=True):
        assert same(part, whole)
        assert same(mx.concatenate([block[kind] for block in blocks]), whole)
    restored = mx.dequantize(
        *expected, group_size=quant.group_size, bits=quant.bits, mode=quant.mode
    )
    assert same(dequantize(parts, quant), restored)


@pytest.mark.parametrize("bits", AFFINE_BITS)
def test_the_inverse_is_off_by_half_a_step_at_most(bits: int) -> None:
    weight = mx.random.normal((16, 128), key=mx.random.key(2))
    quant = QuantFormat(bits, 32)
    groups = np.array(weight).reshape(16, 4, 32)
    # The step is the range over the levels. MLX moves it so that the extreme value is exact, which
    # can cost another half step at the other end.
    step = (groups.max(-1) - groups.min(-1)) / (2**bits - 1)
    error = np.abs(
        np.array(dequantize(quantize(weight, quant), quant)).reshape(16, 4, 32) - groups
    ).max(-1)
    assert (error <= 1.01 * step).all()


@pytest.mark.parametrize("value", [mx.nan, mx.inf, -mx.inf])
@pytest.mark.parametrize("quant", [QuantFormat(4, 64), QuantFormat(8, 32, "mxfp8")])
def test_a_weight_that_is_not_finite_is_named(value: float, quant: QuantFormat) -> None:
    weight = mx.zeros((3, 64))
    weight[2, 5] = value
    with pytest.raises(
        ConversionError, match=r"'lm_head\.weight' holds NaN or infinity; the source is damaged"
    ):
        quantize(weight, quant, name="lm_head.weight")


def test_a_weight_whose_scales_overflow_is_named() -> None:
    weight = mx.array([3e38, -3e38] * 16)[None].astype(mx.bfloat16)
    with pytest.raises(ConversionError, match="'x' is so large"):
        quantize(weight, QuantFormat(4, 32), name="x")


def test_columns_that_groups_do_not_divide_are_named() -> None:
    with pytest.raises(
        ConversionError,
        match=r"'x' has 96 columns, which groups of 64 do not divide; .* size of 32$",
    ):
        quantize(mx.zeros((2, 96)), QuantFormat(4, 64), name="x")
    with pytest.raises(
        ConversionError, match=r"'model\.layers\.0\.mlp\.down_proj\.weight' has 96 columns"
    ):
        make_plan(make_config(), "bfloat16", ConvertOptions())


# recipes


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
def test_config_states_only_what_differs_and_reads_back(recipe: str | None) -> None:
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
            "with q_bits 16 nothing is packed; leave q_group_size and q_mode out",
        ),
        ({"q_bits": 16, "q_mode": "mxfp8"}, "with q_bits 16 nothing is packed"),
        ({"q_bits": 16, "recipe": "4bit"}, "sets the bits; leave q_bits 16 out"),
        ({"q_group_size": 16}, "groups of 16 does not exist"),
        ({"q_mode": "int4"}, "q_mode is 'int4'; known are affine"),
        ({"q_mode": "mxfp4", "q_bits": 8}, "it is 4 bits in groups of 32"),
        ({"q_method": "awq"}, "q_method is 'awq'; known are round, importance, gptq"),
        (
            {"q_method": "gptq", "q_mode": "mxfp4"},
            "q_method gptq is for affine formats, and none is written here",
        ),
        ({"q_method": "importance", "q_bits": 16}, "q_method importance is for affine formats"),
        (
            {"q_method": "round", "calibration": "x"},
            "rounding weights needs no calibration",
        ),
        ({"q_bits": 8, "calibration": "x"}, "rounding weights needs no calibration"),
        (
            {"recipe": "bits.json"},
            "one of the names 4bit, 8bit, .*, or a JSON file, and there is none of that name",
        ),
        ({"recipe": "~nobody-here/bits.json"}, "there is none of that name"),
        ({"recipe": "8bit", "q_bits": 4}, "sets the bits; leave q_bits 4 out"),
        ({"recipe": "mixed_4_6", "q_mode": "mxfp4"}, "is for q_mode affine"),
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


# plan


def test_magistral_small_in_4_bit_is_13_gb_in_a_file_for_each_layer() -> None:
    small = make_config(
        hidden_size=5120,
        intermediate_size=32768,
        num_layers=40,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        vocab_size=131072,
    )
    plan = make_plan(small, "bfloat16", ConvertOptions())
    assert plan.num_parameters == 23_572_403_200
    assert plan.tensor_bytes == pytest.approx(13.26e9, rel=1e-3)
    assert [shard.file for shard in plan.shards] == [
        f"model-{i:05}-of-00042.safetensors" for i in range(1, 43)
    ]
    assert [list(shard.sources) for shard in plan.shards] == in_order(small)
    assert [name for shard in plan.shards for name in shard.sources] == list(small.shapes)
    tied = replace(small, tie_word_embeddings=True)
    last = make_plan(tied, "bfloat16", ConvertOptions()).shards[-1]
    assert last.sources == ("model.norm.weight", "model.embed_tokens.weight")


def test_files_keep_the_order_and_the_limit() -> None:
    units = [("a", 3), ("b", 3), ("c", 9), ("d", 1), ("e", 6)]
    assert divide(units, limit=7) == [["a", "b"], ["c"], ["d", "e"]]
    plan = make_plan(WIDE, "bfloat16", ConvertOptions(), max_bytes=100_000)
    assert len(plan.shards) > 2
    for shard in plan.shards:
        assert (
            list(shard.sources) in in_order(WIDE)
            or sum(e.nbytes for e in shard.entries.values()) <= 100_000
        )
        assert all(
            {f"{s.removesuffix('.weight')}.weight"} <= set(shard.entries) for s in shard.sources
        )
    assert set(plan.index()["weight_map"].values()) == {shard.file for shard in plan.shards}


# writer


TENSORS = {
    "b.scales": mx.arange(5).astype(mx.uint8)[:, None],
    "a.weight": mx.random.normal((3, 5), key=mx.random.key(3)).astype(mx.bfloat16),
    "c.weight": mx.arange(12).reshape(4, 3).astype(mx.uint32),
    "d.weight": mx.random.normal((7,), key=mx.random.key(4)),
}
TYPES = {mx.uint8: "U8", mx.bfloat16: "BF16", mx.uint32: "U32", mx.float32: "F32"}


def test_tensors_written_by_rows_in_any_order_read_back_everywhere(tmp_path: Path) -> None:
    entries = lay_out({name: (TYPES[a.dtype], a.shape) for name, a in TENSORS.items()})
    path = tmp_path / "x.safetensors"
    writer = ShardWriter(path, entries)
    for row in (2, 0, 1):
        assert not writer.write("a.weight", TENSORS["a.weight"][row : row + 1], row)
    assert [writer.write(name, TENSORS[name]) for name in ("d.weight", "b.scales", "c.weight")] == [
        False,
        False,
        True,
    ]
    assert not path.exists()
    entry = writer.finish()
    assert entry == {
        "size": path.stat().st_size,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
    }
    loaded, metadata = mx.load(str(path), return_metadata=True)
    assert isinstance(loaded, dict)
    assert metadata == {"format": "mlx"}
    assert all(same(loaded[name], array) for name, array in TENSORS.items())
    with safe_open(path, framework="numpy") as file:
        assert sorted(file.keys()) == sorted(TENSORS)
        assert (file.get_tensor("c.weight") == np.array(TENSORS["c.weight"])).all()


def test_the_header_is_what_the_format_asks_for() -> None:
    entries = lay_out({name: (TYPES[a.dtype], a.shape) for name, a in TENSORS.items()})
    head = header_bytes(entries)
    assert len(head) % 8 == 0
    assert int.from_bytes(head[:8], "little") == len(head) - 8
    table = json.loads(head[8:])
    assert table.pop("__metadata__") == {"format": "mlx"}
    assert list(table) == ["c.weight", "d.weight", "a.weight", "b.scales"]
    offsets = [table[name]["data_offsets"] for name in table]
    assert offsets[0][0] == 0
    assert all(one[1] == two[0] for one, two in pairwise(offsets))
    for entry in entries.values():
        assert entry.begin % {"U32": 4, "F32": 4, "BF16": 2, "U8": 1}[entry.dtype] == 0


def test_the_writer_finds_our_own_mistakes(tmp_path: Path) -> None:
    entries = lay_out({"a": ("F32", (2, 3))})
    writer = ShardWriter(tmp_path / "1", entries)
    for wrong in (mx.zeros((3, 3)), mx.zeros((2, 2)), mx.zeros((2, 3), mx.float16)):
        with pytest.raises(AssertionError):
            writer.write("a", wrong)
    writer.write("a", mx.zeros((1, 3)))
    with pytest.raises(AssertionError, match="left out"):
        writer.finish()
    writer.close()
    with pytest.raises(AssertionError, match="closed"):
        writer.write("a", mx.zeros((1, 3)), 1)
    assert not (tmp_path / "1").exists()
