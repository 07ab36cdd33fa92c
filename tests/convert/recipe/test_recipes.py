"""Every format and recipe from every kind of source, as mlx-lm loads and MLX rounds them."""

import json
import logging
import math
import os
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from magistral_mlx.checkpoint.folder import open_checkpoint
from magistral_mlx.checkpoint.quant_format import (
    AFFINE_BITS,
    AFFINE_GROUP_SIZES,
    FP_FORMATS,
    QuantFormat,
)
from magistral_mlx.convert import check_conversion, convert_checkpoint
from magistral_mlx.convert.recipe.layout import make_plan
from magistral_mlx.convert.recipe.options import ConvertOptions, make_formats
from magistral_mlx.convert.recipe.recipe_file import RecipeFile
from magistral_mlx.convert.source.source import open_source
from magistral_mlx.errors import OptionError
from tests.support.sources import (
    CONFIG,
    change_json,
    content,
    convert_quickly,
    write_hf,
    write_multimodal,
)
from tests.support.tekken import write_tekken
from tests.support.tiny import make_config, make_weights, quantize_weights, write_checkpoint

FORMATS = [QuantFormat(bits, group, mode) for mode, (bits, group) in FP_FORMATS.items()]  # type: ignore[arg-type]
FORMATS += [QuantFormat(bits, AFFINE_GROUP_SIZES[i % 3]) for i, bits in enumerate(AFFINE_BITS)]
OTHERS = {QuantFormat(bits, group) for bits in AFFINE_BITS for group in AFFINE_GROUP_SIZES} - set(
    FORMATS
)
every_format = pytest.mark.parametrize(
    "quant",
    [*FORMATS, *(pytest.param(q, marks=pytest.mark.slow) for q in sorted(OTHERS, key=str))],
    ids=str,
)
PARTS = ("weight", "scales", "biases")
MODULES = [name.removesuffix(".weight") for name, shape in CONFIG.shapes.items() if len(shape) == 2]
Weights = dict[str, mx.array]


@pytest.fixture(scope="module")
def weights() -> Weights:
    return make_weights(CONFIG, mx.bfloat16)


@pytest.fixture(scope="module")
def hf_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hf(tmp_path_factory.mktemp("source") / "hf")


def write_packed(
    folder: Path, weights: Weights, default: QuantFormat, **overrides: QuantFormat | None
) -> Path:
    """Write a packed checkpoint like mlx-lm."""
    tensors, block = quantize_weights(
        weights, default, {name.replace("/", "."): q for name, q in overrides.items()}
    )
    return write_tekken(write_checkpoint(folder, CONFIG, tensors, block), CONFIG.vocab_size)


def write_recipe(path: Path, default: Any, *rules: Any) -> str:
    path.write_text(json.dumps({"default": default, "rules": rules}))
    return str(path)


def rounded(weight: mx.array, quant: QuantFormat | None) -> dict[str, mx.array]:
    if quant is None:
        return {"weight": weight}
    packed = mx.quantize(weight, quant.group_size, quant.bits, quant.mode)
    return dict(zip(PARTS, packed, strict=False))


def restored(weight: mx.array, quant: QuantFormat | None) -> mx.array:
    if quant is None:
        return weight
    parts = mx.quantize(weight, quant.group_size, quant.bits, quant.mode)
    return mx.dequantize(*parts, group_size=quant.group_size, bits=quant.bits, mode=quant.mode)


def assert_is(found: Weights, weights: Weights, formats: dict[str, QuantFormat | None]) -> None:
    """Check that ``found`` is ``weights`` rounded by MLX, bit for bit."""
    expected = {}
    for name, weight in weights.items():
        module = name.removesuffix(".weight")
        expected |= {
            f"{module}.{part}": array
            for part, array in rounded(weight, formats.get(module)).items()
        }
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype, name
        assert mx.array_equal(found[name].view(mx.uint8), array.view(mx.uint8)), name


def read_by_mlx_lm(folder: Path) -> Weights:
    """Load with mlx-lm, which refuses tensors that config.json does not announce."""
    from mlx.utils import tree_flatten
    from mlx_lm.utils import load_model

    model, _ = load_model(folder)
    return dict(tree_flatten(model.parameters()))  # type: ignore[arg-type]


# formats


@every_format
def test_every_format_is_what_mlx_rounds_and_mlx_lm_reads(
    tmp_path: Path, hf_folder: Path, weights: Weights, quant: QuantFormat
) -> None:
    convert_quickly(
        hf_folder,
        tmp_path / "out",
        q_bits=quant.bits,
        q_group_size=quant.group_size,
        q_mode=quant.mode,
    )
    assert_is(open_checkpoint(tmp_path / "out").tensors(), weights, dict.fromkeys(MODULES, quant))
    assert_is(read_by_mlx_lm(tmp_path / "out"), weights, dict.fromkeys(MODULES, quant))


# 16 bits


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16, mx.float32])
def test_16_bits_are_a_plain_copy(tmp_path: Path, dtype: mx.Dtype) -> None:
    weights = {name: weight.astype(dtype) for name, weight in make_weights(CONFIG).items()}
    folder = write_hf(tmp_path / "in", weights)
    change_json(folder / "config.json", torch_dtype=str(dtype).removeprefix("mlx.core."))
    summary = convert_quickly(folder, tmp_path / "out", q_bits=16)
    assert summary.bytes_out == summary.bytes_in
    assert summary.bits_per_weight == dtype.size * 8
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert not {"quantization", "quantization_config"} & config.keys()
    assert_is(open_checkpoint(tmp_path / "out").tensors(), weights, {})
    assert_is(read_by_mlx_lm(tmp_path / "out"), weights, {})
    bits = check_conversion(
        folder, tmp_path / "2", ConvertOptions(q_bits=16, tokenizer_json=False)
    ).plan.bits
    assert bits == dict.fromkeys(MODULES, dtype.size * 8)


def test_a_multimodal_source_in_16_bits_is_the_text_model(tmp_path: Path, hf_folder: Path) -> None:
    results = []
    for i, source in enumerate((hf_folder, write_multimodal(tmp_path / "2509"))):
        convert_quickly(source, tmp_path / f"out{i}", q_bits=16)
        results.append(content(tmp_path / f"out{i}"))
        del results[-1]["magistral_mlx.json"]
    assert results[0] == results[1]


# packed sources


@every_format
def test_a_packed_source_is_read_as_what_mlx_restores(
    tmp_path: Path, weights: Weights, quant: QuantFormat
) -> None:
    folder = write_packed(tmp_path, weights, quant)
    source = open_source(folder)
    assert source.float_type == "bfloat16"
    for name, weight in weights.items():
        expected = restored(weight, quant if weight.ndim == 2 else None)
        blocks = list(source.blocks(name, block_bytes=101 * expected[0].nbytes + 1))
        assert {block.shape[0] for _, block in blocks[:-1]} <= {101}
        joined = mx.concatenate([block for _, block in blocks])
        assert joined.dtype == expected.dtype
        assert mx.array_equal(joined.view(mx.uint8), expected.view(mx.uint8)), name
    stored = sum(os.path.getsize(shard.path) - shard.data_start for shard in source.shards)
    assert source.nbytes == stored == sum(map(source.nbytes_of, weights))


MIXED: dict[str, QuantFormat | None] = {
    "lm_head": QuantFormat(6, 32),
    "model/embed_tokens": None,
    "model/layers/1/mlp/up_proj": QuantFormat(4, 16, "nvfp4"),
}


def test_a_packed_source_is_dequantized_by_16_bits_as_mlx_lm_does(
    tmp_path: Path, weights: Weights, caplog: pytest.LogCaptureFixture
) -> None:
    from mlx.utils import tree_flatten
    from mlx_lm.utils import dequantize_model, load_model

    folder = write_packed(tmp_path / "in", weights, QuantFormat(8, 64), **MIXED)
    convert_quickly(folder, tmp_path / "out", q_bits=16)
    assert not caplog.records
    model, _ = load_model(folder)
    expected = dict(tree_flatten(dequantize_model(model).parameters()))  # type: ignore[arg-type]
    assert_is(open_checkpoint(tmp_path / "out").tensors(), expected, {})
    assert_is(read_by_mlx_lm(tmp_path / "out"), expected, {})
    assert "quantization" not in json.loads((tmp_path / "out" / "config.json").read_text())


@pytest.mark.parametrize("overrides", [{}, MIXED], ids=["8 bit", "mixed"])
def test_rounding_again_is_allowed_with_one_warning(
    tmp_path: Path,
    weights: Weights,
    caplog: pytest.LogCaptureFixture,
    overrides: dict[str, QuantFormat | None],
) -> None:
    folder = write_packed(tmp_path / "in", weights, QuantFormat(8, 64), **overrides)
    convert_quickly(folder, tmp_path / "out")
    bits = "4 and 6 and 8" if overrides else "8"
    assert [(record.levelno, record.getMessage()) for record in caplog.records] == [
        (
            logging.WARNING,
            f"{folder} is quantized already, to {bits} bit: rounding again adds to its error; the "
            "bf16 checkpoint that it was made from gives better weights of the same size",
        )
    ]
    stored = {
        module: overrides.get(module.replace(".", "/"), QuantFormat(8, 64)) for module in MODULES
    }
    once = {
        name: restored(weight, stored.get(name.removesuffix(".weight")))
        for name, weight in weights.items()
    }
    assert_is(
        open_checkpoint(tmp_path / "out").tensors(),
        once,
        dict.fromkeys(MODULES, QuantFormat(4, 64)),
    )
    caplog.clear()
    # Reading it, like verify, gives no warning.
    open_source(folder)
    assert not caplog.records


def test_our_own_output_can_be_a_source(tmp_path: Path, hf_folder: Path, weights: Weights) -> None:
    convert_quickly(hf_folder, tmp_path / "packed", q_mode="mxfp4")
    convert_quickly(tmp_path / "packed", tmp_path / "plain", q_bits=16)
    quant = QuantFormat(4, 32, "mxfp4")
    once = {
        name: restored(weight, quant if weight.ndim == 2 else None)
        for name, weight in weights.items()
    }
    assert_is(open_checkpoint(tmp_path / "plain").tensors(), once, {})


def test_a_packed_source_without_a_stated_type_has_that_of_its_floats(tmp_path: Path) -> None:
    half = {name: weight.astype(mx.float16) for name, weight in make_weights(CONFIG).items()}
    folder = write_packed(tmp_path, half, QuantFormat(4, 64))
    change_json(folder / "config.json", torch_dtype=None)
    assert open_source(folder).float_type == "float16"


# recipe files


RULES = (
    {"match": "*.v_proj", "bits": 6},
    {"match": "lm_head", "bits": 8, "group_size": 32},
    {"match": "model.layers.0.*", "bits": 16},
    {"match": "model.layers.0.mlp.*_proj", "mode": "mxfp4"},
)


def by_hand(module: str) -> QuantFormat | None:
    """Return the format of a module by RULES, over 4 bit in groups of 64."""
    if module.startswith("model.layers.0.mlp."):
        return QuantFormat(4, 32, "mxfp4")
    if module.startswith("model.layers.0."):
        return None
    if module == "lm_head":
        return QuantFormat(8, 32)
    return QuantFormat(6 if module.endswith("v_proj") else 4, 64)


def test_the_last_rule_that_matches_holds_and_mlx_lm_reads_the_result(
    tmp_path: Path, hf_folder: Path, weights: Weights
) -> None:
    recipe = write_recipe(tmp_path / "my.json", {"bits": 4}, *RULES)
    convert_quickly(hf_folder, tmp_path / "out", recipe=recipe)
    formats = {module: by_hand(module) for module in MODULES}
    checkpoint = open_checkpoint(tmp_path / "out")
    assert checkpoint.formats == formats
    assert_is(checkpoint.tensors(), weights, formats)
    assert_is(read_by_mlx_lm(tmp_path / "out"), weights, formats)
    block = json.loads((tmp_path / "out" / "config.json").read_text())["quantization"]
    assert {key: block.pop(key) for key in ("group_size", "bits", "mode")} == {
        "group_size": 64,
        "bits": 4,
        "mode": "affine",
    }
    # Every other key is a module that differs, with a full block that mlx-swift-lm decodes.
    assert {path: QuantFormat(**value) for path, value in block.items()} == {
        path: quant for path, quant in formats.items() if quant not in (None, QuantFormat(4, 64))
    }


@pytest.mark.parametrize("default", [{"bits": 16}, {"mode": "nvfp4"}])
def test_any_default_gives_a_block_that_mlx_lm_reads(
    tmp_path: Path, hf_folder: Path, weights: Weights, default: dict[str, Any]
) -> None:
    rules = [{"match": "*.mlp.*", "bits": 5, "group_size": 32, "mode": "affine"}]
    rules += [{"match": "lm_head", "bits": 8, "mode": "affine"}]
    recipe = write_recipe(tmp_path / "my.json", default, *rules)
    convert_quickly(hf_folder, tmp_path / "out", recipe=recipe)
    other = QuantFormat(4, 16, "nvfp4") if "mode" in default else None
    formats = {m: QuantFormat(5, 32) if ".mlp." in m else other for m in MODULES} | {
        "lm_head": QuantFormat(8, 64)
    }
    assert open_checkpoint(tmp_path / "out").formats == formats
    assert_is(read_by_mlx_lm(tmp_path / "out"), weights, formats)


def test_a_recipe_of_16_bits_alone_states_no_quantization(
    tmp_path: Path, hf_folder: Path, weights: Weights
) -> None:
    recipe = write_recipe(tmp_path / "my.json", {"bits": 4}, {"match": "*", "bits": 16})
    convert_quickly(hf_folder, tmp_path / "out", recipe=recipe)
    assert "quantization" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert_is(read_by_mlx_lm(tmp_path / "out"), weights, {})


def test_the_forecast_counts_what_is_written(tmp_path: Path, hf_folder: Path) -> None:
    recipe = write_recipe(tmp_path / "my.json", {"bits": 4}, *RULES)
    plan = make_plan(CONFIG, "bfloat16", ConvertOptions(recipe=recipe))
    bits = dict.fromkeys(("weight", "norm"), 0)
    for name, shape in CONFIG.shapes.items():
        quant = by_hand(name.removesuffix(".weight")) if len(shape) == 2 else None
        per_weight = (
            16.0
            if quant is None
            else quant.bits + (8 if quant.mode == "mxfp4" else 32) / quant.group_size
        )
        bits["norm" if len(shape) == 1 else "weight"] += int(math.prod(shape) * per_weight)
    assert plan.tensor_bytes * 8 == sum(bits.values())
    assert plan.bits_per_weight == sum(bits.values()) / plan.num_parameters
    assert plan.bits["model.layers.0.self_attn.q_proj"] == 16
    assert plan.bits["model.layers.1.self_attn.v_proj"] == 6
    summary = convert_quickly(hf_folder, tmp_path / "out", recipe=recipe)
    assert summary.bytes_out == plan.tensor_bytes


def test_a_plan_is_of_the_recipes_content_not_of_its_path(tmp_path: Path, hf_folder: Path) -> None:
    one = write_recipe(tmp_path / "one.json", {"bits": 4}, *RULES)
    (tmp_path / "two.json").write_text(
        json.dumps(
            {"rules": [*RULES], "default": {"mode": "affine", "group_size": 64, "bits": 4}},
            indent=3,
        )
    )
    convert_quickly(hf_folder, tmp_path / "out", recipe=one)
    before = content(tmp_path / "out")
    assert not any(b"one.json" in data for data in before.values())
    assert convert_quickly(
        hf_folder, tmp_path / "out", recipe=str(tmp_path / "two.json")
    ).already_complete
    assert content(tmp_path / "out") == before
    write_recipe(tmp_path / "one.json", {"bits": 4}, *RULES[:-1])
    with pytest.raises(Exception, match=r"out exists, and it was made with another recipe\.rules"):
        convert_quickly(hf_folder, tmp_path / "out", recipe=one)


def test_a_table_is_asked_to_be_written_to_a_file() -> None:
    with pytest.raises(OptionError, match=r"recipe is .* write the table to a JSON file"):
        ConvertOptions(recipe={"default": {"bits": 4}})  # type: ignore[arg-type]


def test_a_recipe_is_read_once(tmp_path: Path) -> None:
    path = tmp_path / "my.json"
    options = ConvertOptions(recipe=write_recipe(path, {"bits": 8}))
    path.unlink()
    assert set(make_formats(CONFIG, options).values()) == {QuantFormat(8, 64)}
    assert options.as_json()["recipe"] == {
        "default": {"group_size": 64, "bits": 8, "mode": "affine"},
        "rules": [],
    }


def test_a_name_wins_over_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("8bit").write_text("{}")
    assert ConvertOptions(recipe="8bit").default == QuantFormat(8, 64)
    write_recipe(Path("mine"), {"bits": 3})
    assert ConvertOptions(recipe="mine").default == QuantFormat(3, 64)


BAD_FILES: dict[str, tuple[Any, str]] = {
    "not JSON": (b"{", "it is not JSON (Expecting"),
    "not UTF-8": (b"\xff\xfe{}", "it is not JSON ("),
    "nested": (b"[" * 100_000, "it is not JSON (maximum recursion"),
    "a key twice": (b'{"default":{"bits":4,"bits":5}}', "it is not JSON (a key occurs twice)"),
    "a list": ([], "it holds a JSON list; write a table with default and rules"),
    "empty": ({}, "default is no table"),
    "too long": (b" " * 1_000_001, "no plain file of at most 1000000 bytes"),
    "default is a number": (
        {"default": 4},
        'default is no table, or rules no list; write {"default": {"bits": 4}',
    ),
    "rules is a table": ({"default": {"bits": 4}, "rules": {}}, "rules no list"),
    "unknown key": (
        {"default": {"bits": 4}, "layers": []},
        "the key 'layers' is unknown; it has default and rules",
    ),
    "no bits": ({"default": {"group_size": 32}}, "default has no bits; add them"),
    "7 bits": (
        {"default": {"bits": 7}},
        "default: affine quantization with 7 bits in groups of 64 does not exist",
    ),
    "true bits": ({"default": {"bits": True}}, "default: bits is True; use a whole number"),
    "group of null": (
        {"default": {"bits": 4, "group_size": None}},
        "default: group_size is None; use a whole number",
    ),
    "16 in groups": (
        {"default": {"bits": 16, "group_size": 32}},
        "default: with 16 bits nothing is packed; leave",
    ),
    "mode unknown": ({"default": {"mode": "int4"}}, "default has no bits"),
    "mode nested": (
        {"default": {"bits": 4, "mode": ["affine"]}},
        "quantization mode is ['affine']; known are affine",
    ),
    "mxfp4 in 6": (
        {"default": {"bits": 6, "mode": "mxfp4"}},
        "mxfp4 with 6 bits in groups of 32 does not exist",
    ),
}
BAD_RULES: dict[str, tuple[Any, str]] = {
    "a text": ("lm_head", 'rule 2 is \'lm_head\'; write {"match": "*.v_proj", "bits": 6}'),
    "no match": ({"bits": 6}, "rule 2 is {'bits': 6}"),
    "match is a list": ({"match": ["lm_head"], "bits": 6}, "rule 2 is {"),
    "nothing else": (
        {"match": "lm_head"},
        "rule 2 ('lm_head') changes nothing; give its bits, group_size or mode",
    ),
    "unknown key": (
        {"match": "lm_head", "bit": 6},
        "rule 2 ('lm_head'): the key 'bit' is unknown; known are bits, gr",
    ),
    "9 bits": (
        {"match": "lm_head", "bits": 9},
        "rule 2 ('lm_head'): affine quantization with 9 bits",
    ),
    "group of 16": (
        {"match": "lm_head", "group_size": 16},
        "rule 2 ('lm_head'): affine quantization with 4 bits in",
    ),
    "bits as text": (
        {"match": "lm_head", "bits": "6"},
        "rule 2 ('lm_head'): bits is '6'; use a whole number",
    ),
    "bits of mxfp8": (
        {"match": "lm_head", "bits": 6, "mode": "mxfp8"},
        "rule 2 ('lm_head'): mxfp8 with 6 bits",
    ),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_file_that_is_no_recipe_is_refused_by_name(tmp_path: Path, case: str) -> None:
    raw, words = BAD_FILES[case]
    path = tmp_path / "my.json"
    path.write_bytes(raw if isinstance(raw, bytes) else json.dumps(raw).encode())
    with pytest.raises(OptionError) as caught:
        ConvertOptions(recipe=str(path))
    assert str(caught.value).startswith(f"recipe {path}: ")
    assert words in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("case", BAD_RULES)
def test_a_bad_rule_is_refused_by_file_and_rule(tmp_path: Path, case: str) -> None:
    rule, words = BAD_RULES[case]
    with pytest.raises(OptionError) as caught:
        RecipeFile.read(
            Path(write_recipe(tmp_path / "my.json", {"bits": 4}, {"match": "*", "bits": 8}, rule))
        )
    assert str(caught.value).startswith(f"recipe {tmp_path / 'my.json'}: ")
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "match", ["*.w1", "lm_head.weight", "LM_HEAD", "model.norm", "model.layers.2.*", ""]
)
def test_a_rule_that_matches_nothing_is_refused_before_work(
    tmp_path: Path, hf_folder: Path, match: str
) -> None:
    recipe = write_recipe(
        tmp_path / "my.json", {"bits": 4}, {"match": "*", "bits": 8}, {"match": match, "bits": 6}
    )
    with pytest.raises(OptionError) as caught:
        convert_checkpoint(hf_folder, tmp_path / "out", recipe=recipe, tokenizer_json=False)
    assert f"my.json: rule 2 ({match!r}) matches no matrix; paths look like" in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["my.json"]


def test_a_tied_model_has_no_lm_head_to_match(tmp_path: Path) -> None:
    options = ConvertOptions(
        recipe=write_recipe(tmp_path / "my.json", {"bits": 4}, {"match": "lm_head", "bits": 6})
    )
    with pytest.raises(OptionError, match="matches no matrix"):
        make_formats(make_config(tie_word_embeddings=True), options)


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "link.json").symlink_to("gone")
    for name in ("pipe.json", "link.json", "."):
        with pytest.raises(OptionError, match="it is no plain file"):
            ConvertOptions(recipe=str(tmp_path / name))


@pytest.mark.parametrize("options", [{"q_bits": 4}, {"q_group_size": 32}, {"q_mode": "mxfp4"}])
def test_a_recipe_file_sets_everything(tmp_path: Path, options: dict[str, Any]) -> None:
    recipe = write_recipe(tmp_path / "my.json", {"bits": 4})
    with pytest.raises(
        OptionError, match=r"my\.json sets the bits; leave q_bits, q_group_size and q_mode out"
    ):
        ConvertOptions(recipe=recipe, **options)
