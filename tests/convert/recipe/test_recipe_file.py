"""Recipes in files: the formats they give, and the files that are refused."""

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest

from magistral_mlx.checkpoint.folder import open_checkpoint
from magistral_mlx.checkpoint.quant_format import QuantFormat
from magistral_mlx.convert import convert_checkpoint
from magistral_mlx.convert.recipe.formats import make_formats
from magistral_mlx.convert.recipe.layout import make_plan
from magistral_mlx.convert.recipe.options import ConvertOptions
from magistral_mlx.convert.recipe.recipe_file import RecipeFile
from magistral_mlx.errors import OptionError
from tests.support.sources import (
    CONFIG,
    MODULES,
    Weights,
    assert_is,
    content,
    convert_quickly,
    read_by_mlx_lm,
)
from tests.support.tiny import make_config


def write_recipe(path: Path, default: Any, *rules: Any) -> str:
    path.write_text(json.dumps({"default": default, "rules": rules}))
    return str(path)


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


def test_the_forecast_counts_the_bytes_written(tmp_path: Path, hf_folder: Path) -> None:
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
    "empty": ({}, "default is not a table"),
    "too long": (b" " * 1_000_001, "no plain file of at most 1000000 bytes"),
    "default is a number": (
        {"default": 4},
        'default is not a table, or rules is not a list; write {"default": {"bits": 4}',
    ),
    "rules is a table": ({"default": {"bits": 4}, "rules": {}}, "rules is not a list"),
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


def test_a_pipe_is_refused_without_waiting(tmp_path: Path) -> None:
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
