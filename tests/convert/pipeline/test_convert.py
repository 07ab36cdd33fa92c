"""Whole conversions: both layouts give one result, which mlx-lm and our own runtime load."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import magistral_mlx.convert.pipeline.prepare
from magistral_mlx.checkpoint.folder import open_checkpoint
from magistral_mlx.checkpoint.quant_format import FP_FORMATS
from magistral_mlx.convert import convert_checkpoint
from magistral_mlx.convert.recipe.layout import make_plan
from magistral_mlx.convert.source.source import open_source
from magistral_mlx.errors import CheckpointError
from tests.support.sources import (
    CONFIG,
    change_json,
    content,
    convert_quickly,
    write_consolidated,
    write_hf,
)
from tests.support.tekken import write_tekken
from tests.support.tiny import make_config, make_weights, write_checkpoint


@pytest.fixture(scope="module")
def weights() -> dict[str, mx.array]:
    return make_weights(CONFIG, mx.bfloat16)


@pytest.fixture(scope="module")
def hf_folder(tmp_path_factory: pytest.TempPathFactory, weights: dict[str, mx.array]) -> Path:
    return write_hf(tmp_path_factory.mktemp("source") / "hf", weights)


# one result


@pytest.mark.parametrize(
    "beside",
    [
        pytest.param(False, marks=pytest.mark.slow, id="params.json alone"),
        pytest.param(True, id="config.json beside"),
    ],
)
def test_both_layouts_convert_to_the_same_bytes(
    tmp_path: Path, hf_folder: Path, weights: dict[str, mx.array], beside: bool
) -> None:
    native = write_consolidated(tmp_path / "native", weights)
    if beside:
        shutil.copy(hf_folder / "config.json", native)
    convert_checkpoint(hf_folder, tmp_path / "one", recipe="mixed_4_6")
    convert_checkpoint(native, tmp_path / "two", recipe="mixed_4_6")
    one, two = content(tmp_path / "one"), content(tmp_path / "two")
    records = [json.loads(files.pop("magistral_mlx.json")) for files in (one, two)]
    assert one == two
    assert {
        "tokenizer.json",
        "config.json",
        "model.safetensors",
        "model.safetensors.index.json",
    } <= set(one)
    assert [record.pop("source")["layout"] for record in records] == ["hf", "consolidated"]
    assert records[0] == records[1]
    assert not any(str(tmp_path).encode() in data for data in one.values())


def test_the_same_weights_in_other_shards_and_blocks_convert_to_the_same_bytes(
    tmp_path: Path, hf_folder: Path, weights: dict[str, mx.array], monkeypatch: pytest.MonkeyPatch
) -> None:
    convert_quickly(hf_folder, tmp_path / "one")
    other = tmp_path / "other"
    other.mkdir()
    for name in ("config.json", "tekken.json"):
        shutil.copy(hf_folder / name, other)
    backwards = {name: weights[name] for name in reversed(weights)}
    mx.save_safetensors(
        str(other / "model.safetensors"), backwards, {"format": "pt"}
    )  # no index, another order
    native = write_consolidated(tmp_path / "native", weights)
    monkeypatch.setattr(
        "magistral_mlx.convert.source.source.Source.blocks.__defaults__", (3 * 128 * 2,)
    )  # three rows, or one head
    assert len(list(open_source(other).blocks("lm_head.weight"))) == 500
    assert len(list(open_source(native).blocks("model.layers.0.self_attn.q_proj.weight"))) == 4
    for source in (other, native):
        convert_quickly(source, tmp_path / f"from-{source.name}")
        for name in ("model.safetensors", "config.json"):
            assert (tmp_path / f"from-{source.name}" / name).read_bytes() == (
                tmp_path / "one" / name
            ).read_bytes()


def test_hf_shards_are_preferred_and_layout_chooses(
    tmp_path: Path, weights: dict[str, mx.array], caplog: pytest.LogCaptureFixture
) -> None:
    both = write_consolidated(write_hf(tmp_path / "both", weights), weights)
    assert open_source(both).layout == "hf"
    assert ["the HF shards are converted" in record.message for record in caplog.records] == [True]
    caplog.clear()
    assert open_source(both, "consolidated").layout == "consolidated"
    assert open_source(both, "hf").layout == "hf"
    assert not caplog.records


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("stated", [False, True])
def test_what_params_json_leaves_out_is_read_off_the_tensors(
    tmp_path: Path, tied: bool, stated: bool
) -> None:
    config = make_config(
        hidden_size=128, intermediate_size=384, head_dim=64, num_layers=2, tie_word_embeddings=tied
    )
    leaves_out: dict[str, object] = {"tied_embeddings": tied} if stated else {"head_dim": None}
    leaves_out |= {"max_position_embeddings": None, "max_seq_len": 4096}
    folder = write_consolidated(
        tmp_path / "native", make_weights(config), vocab_size=320, **leaves_out
    )
    source = open_source(folder)
    assert source.config == config
    assert source.float_type == "float32"


# the result loads


def mlx_lm_logits(model: object, ids: mx.array) -> mx.array:
    from mlx.utils import tree_map

    floats = tree_map(
        lambda a: a.astype(mx.float32) if mx.issubdtype(a.dtype, mx.floating) else a,
        model.parameters(),  # type: ignore[attr-defined]
    )
    model.update(floats)  # type: ignore[attr-defined]
    return model(ids)  # type: ignore[operator]


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "4 bit": ({}, {"bits": 4, "group_size": 64}),
    "8 bit, groups of 32": ({"q_bits": 8, "q_group_size": 32}, {"bits": 8, "group_size": 32}),
    "3 bit, groups of 128": ({"q_bits": 3, "q_group_size": 128}, {"bits": 3, "group_size": 128}),
    "mixed_4_6": ({"recipe": "mixed_4_6"}, {"bits": 4, "group_size": 64, "recipe": "mixed_4_6"}),
    **{
        mode: ({"q_mode": mode}, {"bits": bits, "group_size": group, "mode": mode})
        for mode, (bits, group) in FP_FORMATS.items()
    },
}


@pytest.mark.parametrize("case", CASES)
def test_tensors_are_mlx_lms_and_mlx_lm_loads_them(
    tmp_path: Path, hf_folder: Path, case: str
) -> None:
    from mlx.utils import tree_flatten
    from mlx_lm.convert import mixed_quant_predicate_builder
    from mlx_lm.utils import load_model, quantize_model

    ours, theirs = CASES[case]
    target = tmp_path / "out"
    convert_quickly(hf_folder, target, **ours)
    model, config = load_model(hf_folder)
    theirs = dict(theirs)
    recipe = theirs.pop("recipe", None)
    choose = mixed_quant_predicate_builder(recipe, model) if recipe else None
    model, _ = quantize_model(model, config, **theirs, quant_predicate=choose)  # type: ignore[arg-type]
    expected = dict(tree_flatten(model.parameters()))
    found = open_checkpoint(target).tensors()
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype
        assert mx.array_equal(found[name].view(mx.uint8), array.view(mx.uint8)), name

    loaded, _ = load_model(target)
    ids = mx.array([[1, 700, 1499, 3, 20]])
    assert mx.array_equal(mlx_lm_logits(loaded, ids), mlx_lm_logits(model, ids))


def test_config_index_and_files_keep_the_contract(tmp_path: Path, hf_folder: Path) -> None:
    summary = convert_checkpoint(hf_folder, tmp_path / "out", recipe="4bit-head6")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "README.md",
        "SYSTEM_PROMPT.txt",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "magistral_mlx.json",
        "model.safetensors",
        "model.safetensors.index.json",
        "tekken.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    six = {"group_size": 64, "bits": 6, "mode": "affine"}
    expected = six | {"bits": 4, "model.embed_tokens": six, "lm_head": six}
    assert config["quantization"] == config["quantization_config"] == expected
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == summary.bytes_out
    assert index["metadata"]["total_parameters"] == sum(np.prod(s) for s in CONFIG.shapes.values())
    assert summary.bits_per_weight == pytest.approx(
        8 * summary.bytes_out / index["metadata"]["total_parameters"]
    )
    weights, published = tmp_path / "out" / "model.safetensors", hf_folder / "config.json"
    assert weights.stat().st_mode == published.stat().st_mode  # readable for whom the umask allows


def test_several_files_load(
    tmp_path: Path, hf_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert_quickly(hf_folder, tmp_path / "one")
    monkeypatch.setattr(
        magistral_mlx.convert.pipeline.prepare,
        "make_plan",
        lambda config, kind, options: make_plan(config, kind, options, max_bytes=90_000),
    )
    convert_quickly(hf_folder, tmp_path / "many")
    many = open_checkpoint(tmp_path / "many")
    assert len(many.shards) > 3
    assert [s.path.name for s in many.shards] == [
        f"model-{i:05}-of-{len(many.shards):05}.safetensors" for i in range(1, len(many.shards) + 1)
    ]
    one = open_checkpoint(tmp_path / "one").tensors()
    assert all(mx.array_equal(array, one[name]) for name, array in many.tensors().items())


def test_the_sources_own_hashes_are_recorded_when_asked_for(
    tmp_path: Path, hf_folder: Path
) -> None:
    convert_quickly(hf_folder, tmp_path / "plain")
    convert_quickly(hf_folder, tmp_path / "hashed", hash_source=True)
    plain, hashed = (
        json.loads((tmp_path / name / "magistral_mlx.json").read_text())["source"]["files"]
        for name in ("plain", "hashed")
    )
    for path in hf_folder.glob("*.safetensors"):
        assert hashed[path.name] == plain[path.name] | {
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest()
        }
    assert convert_quickly(
        hf_folder, tmp_path / "plain", hash_source=True
    ).already_complete  # the same source


def test_a_file_in_the_hubs_cache_that_is_not_what_the_hub_states_is_found(
    tmp_path: Path, hf_folder: Path
) -> None:
    cache = tmp_path / "snapshots"
    shutil.copytree(hf_folder, cache)
    shard = min(cache.glob("*.safetensors"))
    (tmp_path / "blobs").mkdir()
    blob = shard.rename(tmp_path / "blobs" / ("0" * 64))
    shard.symlink_to(blob)
    with pytest.raises(
        CheckpointError, match=rf"{shard.name} is damaged: its sha256 differs from the hub's"
    ):
        convert_quickly(cache, tmp_path / "out", hash_source=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("stated", ["bfloat16", "float16", "float32", None])
@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float32])
def test_what_is_not_packed_has_the_type_config_states(
    tmp_path: Path, dtype: mx.Dtype, stated: str | None
) -> None:
    folder = write_tekken(
        write_checkpoint(tmp_path / "in", CONFIG, make_weights(CONFIG, dtype)), 1500
    )
    change_json(folder / "config.json", torch_dtype=stated)
    convert_quickly(folder, tmp_path / "out")
    kept = getattr(mx, stated) if stated else dtype
    raw = json.loads((tmp_path / "out" / "config.json").read_text())
    assert raw["torch_dtype"] == (stated or ("bfloat16" if dtype == mx.bfloat16 else "float32"))
    found = open_checkpoint(tmp_path / "out").tensors()
    expected = make_weights(CONFIG, dtype)["lm_head.weight"].astype(kept)
    for part, array in zip(
        ("weight", "scales", "biases"), mx.quantize(expected, 64, 4), strict=True
    ):
        assert mx.array_equal(found[f"lm_head.{part}"], array)
        assert found[f"lm_head.{part}"].dtype == array.dtype
    assert found["model.norm.weight"].dtype == kept
