"""Folders that open, and folders that are no checkpoints; each error says what to do."""

import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from magistral_mlx.checkpoint.folder import Shard, open_checkpoint
from magistral_mlx.checkpoint.quant_format import QuantFormat
from tests.support.faults.edits import (
    CONFIG,
    DOWN,
    FIRST,
    INDEX,
    SECOND,
    Weights,
    edit_json,
    edit_shard,
    edit_weight_map,
    equal,
    one_file,
    refusal,
)
from tests.support.tiny import make_config, make_weights, quantize_weights, write_checkpoint


def test_a_published_folder_opens_and_its_tensors_are_those_written(
    folder: Path, weights: Weights
) -> None:
    checkpoint = open_checkpoint(folder)
    assert checkpoint.config == CONFIG
    assert checkpoint.raw_config["model_type"] == "mistral"
    assert [shard.path.name for shard in checkpoint.shards] == [FIRST, SECOND]
    assert checkpoint.nbytes == sum(w.nbytes for w in weights.values())
    assert set(checkpoint.formats) == {
        n.removesuffix(".weight") for n, w in weights.items() if w.ndim == 2
    }
    assert set(checkpoint.formats.values()) == {None}
    tensors = checkpoint.tensors()
    assert set(tensors) == set(weights)
    for name, weight in weights.items():
        assert equal(tensors[name], weight)
        assert equal(checkpoint.read(name), weight)
    assert equal(
        checkpoint.read("lm_head.weight", rows=slice(7, 13)), weights["lm_head.weight"][7:13]
    )


@pytest.mark.parametrize("dtype", [mx.float16, mx.float32])
def test_other_float_types_are_read(tmp_path: Path, dtype: mx.Dtype) -> None:
    folder = write_checkpoint(tmp_path, CONFIG, make_weights(CONFIG, dtype))
    assert open_checkpoint(folder).tensors()["model.norm.weight"].dtype == dtype


def test_a_tied_checkpoint_has_no_lm_head(tmp_path: Path) -> None:
    config = make_config(tie_word_embeddings=True)
    folder = write_checkpoint(tmp_path, config, make_weights(config, mx.bfloat16))
    assert "lm_head" not in open_checkpoint(folder).formats


@pytest.mark.parametrize(
    "quant",
    [
        QuantFormat(4, 32),
        QuantFormat(3, 32),
        QuantFormat(8, 32),
        QuantFormat(4, 32, "mxfp4"),
        QuantFormat(4, 16, "nvfp4"),
        QuantFormat(8, 32, "mxfp8"),
    ],
    ids=str,
)
def test_every_packed_format_is_read_embedding_and_all(
    tmp_path: Path, weights: Weights, quant: QuantFormat
) -> None:
    tensors, block = quantize_weights(weights, quant)
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, CONFIG, tensors, block))
    assert set(checkpoint.formats.values()) == {quant}
    assert checkpoint.nbytes == sum(tensor.nbytes for tensor in tensors.values())


def test_modules_may_differ_and_some_stay_float(tmp_path: Path, weights: Weights) -> None:
    overrides = {
        DOWN: QuantFormat(6, 32),
        "lm_head": None,
        "model.embed_tokens": QuantFormat(8, 64),
    }
    tensors, block = quantize_weights(weights, QuantFormat(4, 32), overrides)
    formats = open_checkpoint(write_checkpoint(tmp_path, CONFIG, tensors, block)).formats
    assert {path: formats[path] for path in overrides} == overrides
    assert formats["model.layers.0.mlp.down_proj"] == QuantFormat(4, 32)


def test_what_the_default_covers_may_have_stayed_float(tmp_path: Path, weights: Weights) -> None:
    """mlx-lm writes an overall format and packs what it can; scales show what it packed."""
    tensors, block = quantize_weights(weights, QuantFormat(4, 32), {DOWN: None})
    del block[DOWN]
    assert open_checkpoint(write_checkpoint(tmp_path, CONFIG, tensors, block)).formats[DOWN] is None


def test_older_layouts_of_the_community_are_read(tmp_path: Path, weights: Weights) -> None:
    """No index, no mode, and the block under its other name."""
    tensors, _ = quantize_weights(weights, QuantFormat(4, 32))
    folder = one_file(write_checkpoint(tmp_path, CONFIG, tensors), tensors)
    edit_json(folder / "config.json", quantization_config={"group_size": 32, "bits": 4})
    assert set(open_checkpoint(folder).formats.values()) == {QuantFormat(4, 32)}


def test_without_an_index_all_model_files_belong(folder: Path, weights: Weights) -> None:
    (folder / INDEX).unlink()
    assert set(open_checkpoint(folder).tensors()) == set(weights)


def test_other_files_and_links_do_no_harm(folder: Path, tmp_path: Path) -> None:
    """The hub's cache consists of links, and the repository holds the consolidated file too."""
    (folder / "consolidated.safetensors").write_bytes(b"not looked at")
    linked = tmp_path / "linked"
    linked.mkdir()
    for path in folder.iterdir():
        (linked / path.name).symlink_to(path)
    assert open_checkpoint(linked).fingerprint() == open_checkpoint(folder).fingerprint()


def test_a_missing_head_dim_is_read_off_packed_rows_too(tmp_path: Path, weights: Weights) -> None:
    tensors, block = quantize_weights(weights, QuantFormat(4, 32))
    folder = write_checkpoint(tmp_path, CONFIG, tensors, block)
    edit_json(folder / "config.json", head_dim=None, tie_word_embeddings=None)
    assert (found := open_checkpoint(folder).config).head_dim == 32
    assert not found.tie_word_embeddings


def test_weights_are_not_read_when_a_folder_is_opened(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("mx.load before validation")

    monkeypatch.setattr(mx, "load", never)
    monkeypatch.setattr(Shard, "read", never)
    open_checkpoint(folder)


def test_a_folder_that_is_none_or_not_of_this_kind(tmp_path: Path) -> None:
    assert "is no folder" in refusal(tmp_path / "none")
    assert f"{tmp_path} is empty; name a folder that holds config.json" in refusal(tmp_path)
    (tmp_path / "notes.txt").touch()
    assert "has no config.json, so it is not a checkpoint" in refusal(tmp_path)
    (tmp_path / "model.gguf").touch()
    assert "take the safetensors of the same model" in refusal(tmp_path)
    (tmp_path / "params.json").touch()
    assert f"python -m magistral_mlx.convert --hf-path {tmp_path} --mlx-path OUT" in refusal(
        tmp_path
    )


def test_a_config_without_weights(folder: Path) -> None:
    for path in folder.glob("model*"):
        path.unlink()
    assert "has a config.json but no model*.safetensors; fetch the weights" in refusal(folder)


@pytest.mark.parametrize("name", ["config.json", INDEX])
@pytest.mark.parametrize(
    "text", [b"", b"{", b"[]", b"\xff\xfe{}", b'{"a":1,"a":1}', b"[" * 100_000]
)
def test_damaged_json_is_named(folder: Path, name: str, text: bytes) -> None:
    (folder / name).write_bytes(text)
    message = refusal(folder)
    assert message.startswith(f"{folder / name} is damaged")
    assert message.endswith("Fetch or convert it again")


def test_a_huge_config_is_not_read(folder: Path) -> None:
    with (folder / "config.json").open("wb") as file:
        file.truncate(10**9)
    assert "config.json has 1000000000 bytes" in refusal(folder)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "qwen3"}, "model_type is 'qwen3'"),
        ({"rope_theta": None}, "rope_theta is missing"),
        ({"head_dim": 16}, "head_dim is 16"),
        ({"tie_word_embeddings": True}, "lm_head.weight is present"),
        ({"num_hidden_layers": 10**12}, "1000000000000 layers, but the weights are 30 tensors"),
        (
            {"quantization_config": {"quant_method": "fp8"}},
            "not an MLX format; start from the bf16 checkpoint",
        ),
    ],
)
def test_a_config_of_another_model_is_named(
    folder: Path, changes: dict[str, Any], words: str
) -> None:
    edit_json(folder / "config.json", **changes)
    message = refusal(folder)
    assert message.startswith(f"{folder / 'config.json'}: ")
    assert words in message


@pytest.mark.parametrize("weight_map", [None, [], {}, "model.safetensors", 3])
def test_an_index_without_a_table_is_refused(folder: Path, weight_map: Any) -> None:
    edit_json(folder / INDEX, weight_map=weight_map)
    message = refusal(folder)
    assert f"{folder / INDEX}: weight_map is not a table" in message
    assert "fetch the index again" in message


@pytest.mark.parametrize(
    "file",
    [
        "../model.safetensors",
        "..",
        "sub/model.safetensors",
        "/etc/passwd",
        "/model.safetensors",
        "sub\\model.safetensors",
        "model..safetensors",
        ".hidden.safetensors",
        "model.bin",
        "model.safetensors\0",
        "mod\ud800el.safetensors",
        "",
        3,
        None,
        [FIRST],
    ],
)
def test_an_index_naming_a_way_out_of_the_folder_is_refused(folder: Path, file: Any) -> None:
    edit_weight_map(folder, **{"model.norm.weight": file})
    message = refusal(folder)
    assert f"{INDEX}: tensor 'model.norm.weight' is said to be in {file!r}" in message
    assert "do not trust this checkpoint" in message


def test_an_index_naming_a_missing_file_is_refused(folder: Path) -> None:
    (folder / SECOND).unlink()
    message = refusal(folder)
    assert f"is said to be in {SECOND}, which is missing; fetch the checkpoint again" in message


def test_a_stray_model_file_is_refused(folder: Path) -> None:
    """mlx-lm merges it into the model without a warning."""
    shutil.copy(folder / FIRST, folder / "model-extra.safetensors")
    assert (
        f"model-extra.safetensors lies beside the weights, but {INDEX} does not name it; move it"
        in refusal(folder)
    )


def test_a_tensor_in_another_shard_than_the_index_says_is_refused(folder: Path) -> None:
    edit_weight_map(folder, **{"lm_head.weight": SECOND})
    message = refusal(folder)
    assert f"{INDEX}: tensor 'lm_head.weight' should be in {SECOND}, but is in {FIRST}" in message
    assert "fetch it again" in message


def test_a_tensor_that_only_the_index_has_is_refused(folder: Path) -> None:
    edit_weight_map(folder, **{"extra.weight": FIRST})
    assert f"tensor 'extra.weight' should be in {FIRST}, but is in no file" in refusal(folder)


def test_a_tensor_that_the_index_lacks_is_refused(folder: Path) -> None:
    edit_shard(folder / FIRST, lambda tensors: tensors.update({"extra.weight": mx.zeros((2,))}))
    assert f"tensor 'extra.weight' should be in no file, but is in {FIRST}" in refusal(folder)


@pytest.mark.parametrize("has_index", [False, True])
def test_a_tensor_in_two_shards_is_refused(folder: Path, weights: Weights, has_index: bool) -> None:
    edit_shard(
        folder / SECOND,
        lambda tensors: tensors.update({"lm_head.weight": weights["lm_head.weight"]}),
    )
    if not has_index:
        (folder / INDEX).unlink()
    message = refusal(folder)
    assert (
        f"{folder / SECOND}: tensor 'lm_head.weight' is also in {FIRST}; remove the file" in message
    )
