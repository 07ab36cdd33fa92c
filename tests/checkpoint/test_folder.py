"""A folder opens only if config.json, index, headers and tensors agree; errors say what to do."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from magistral_mlx.checkpoint import folder as folder_module
from magistral_mlx.checkpoint.config import ModelConfig
from magistral_mlx.checkpoint.folder import Checkpoint, Shard, open_checkpoint, resolve
from magistral_mlx.checkpoint.quant_format import QuantFormat
from magistral_mlx.errors import CheckpointError, HubError, OptionError
from tests.support.tiny import make_config, make_weights, quantize_weights, write_checkpoint

CONFIG = make_config()
INDEX = "model.safetensors.index.json"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
DOWN = "model.layers.1.mlp.down_proj"
NORM = "model.layers.1.input_layernorm"

Weights = dict[str, mx.array]


@pytest.fixture(scope="module")
def weights() -> Weights:
    return make_weights(CONFIG, mx.bfloat16)


@pytest.fixture
def folder(tmp_path: Path, weights: Weights) -> Path:
    """Make a sound checkpoint: bf16, two shards, an index."""
    return write_checkpoint(tmp_path / "model", CONFIG, weights)


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weight_map(folder: Path, **changes: Any) -> None:
    edit_json(
        folder / INDEX, weight_map=json.loads((folder / INDEX).read_text())["weight_map"] | changes
    )


def edit_shard(path: Path, edit: Callable[[Weights], object]) -> None:
    """Load a shard, let ``edit`` change its tensors, write it back."""
    tensors = mx.load(str(path))
    assert isinstance(tensors, dict)
    mx.eval(tensors)
    edit(tensors)
    mx.save_safetensors(str(path), tensors, {"format": "pt"})


def one_file(folder: Path, weights: Weights) -> Path:
    """mlx-community publishes small models as one file without an index."""
    for path in folder.glob("model*"):
        path.unlink()
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    return folder


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder)
    return str(caught.value)


def equal(a: mx.array, b: mx.array) -> bool:
    return a.dtype == b.dtype and bool(mx.array_equal(a, b).item())


# what is accepted


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


# folders that are no checkpoints


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


# index


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


# tensors


def test_a_damaged_shard_is_named(folder: Path) -> None:
    whole = (folder / SECOND).read_bytes()
    for content, words in (
        (whole[:-1], "cut short"),
        (whole[:9], "should take"),
        (b"", "should take"),
        (whole + b"\0", "1 bytes follow"),
    ):
        (folder / SECOND).write_bytes(content)
        message = refusal(folder)
        assert str(folder / SECOND) in message
        assert words in message
        assert message.endswith("Fetch or convert it again")


def test_the_overflow_file_never_reaches_mlx(folder: Path) -> None:
    header = json.dumps(
        {
            "model.norm.weight": {
                "dtype": "BF16",
                "shape": [2**30, 2**30, 16],
                "data_offsets": [0, 0],
            }
        }
    )
    for path in folder.glob("model*"):
        path.unlink()
    (folder / "model.safetensors").write_bytes(
        (150).to_bytes(8, "little") + header.encode().ljust(150)
    )
    assert "model.safetensors is damaged: tensor 'model.norm.weight'" in refusal(folder)


def change(weights: Weights, **changes: mx.array | None) -> Weights:
    return {name: tensor for name, tensor in (weights | changes).items() if tensor is not None}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {f"{DOWN}.weight": None},
            f"1 tensors are missing, first '{DOWN}.weight'; the checkpoint is incomplete",
        ),
        (
            {"extra.weight": mx.zeros((3,))},
            "1 tensors do not belong to this model, first 'extra.weight'",
        ),
        ({f"{DOWN}.bias": mx.zeros((64,))}, f"do not belong to this model, first '{DOWN}.bias'"),
        (
            {"lm_head.weight": mx.zeros((320, 63))},
            "tensor 'lm_head.weight' is F32 [320, 63], config.json implies",
        ),
        ({"lm_head.weight": mx.zeros((319, 64))}, "implies BF16 or F16 or F32 [320, 64]"),
        ({f"{DOWN}.weight": mx.zeros((64 * 96,))}, f"tensor '{DOWN}.weight' is F32 [6144]"),
        ({f"{NORM}.weight": mx.zeros((64, 1))}, f"tensor '{NORM}.weight' is F32 [64, 1]"),
        ({f"{NORM}.weight": mx.zeros((64,), mx.int32)}, f"tensor '{NORM}.weight' is I32 [64]"),
        (
            {f"{DOWN}.weight": mx.zeros((64, 96), mx.uint32)},
            f"tensor '{DOWN}.weight' is U32 [64, 96]",
        ),
    ],
)
def test_a_tensor_missing_extra_or_not_as_configured_is_named(
    folder: Path, weights: Weights, changes: dict[str, Any], words: str
) -> None:
    message = refusal(one_file(folder, change(weights, **changes)))
    assert message.startswith(f"{folder}: ")
    assert words in message


def packed_folder(
    folder: Path, weights: Weights, quant: QuantFormat, **changes: mx.array | None
) -> Path:
    tensors, block = quantize_weights(weights, quant)
    edit_json(folder / "config.json", quantization=block)
    return one_file(folder, change(tensors, **changes))


@pytest.mark.parametrize(
    ("quant", "changes", "words"),
    [
        (
            QuantFormat(4, 32),
            {f"{DOWN}.biases": None},
            f"1 tensors are missing, first '{DOWN}.biases'",
        ),
        (
            QuantFormat(4, 32),
            {f"{DOWN}.weight": None},
            f"1 tensors are missing, first '{DOWN}.weight'",
        ),
        (
            QuantFormat(4, 32),
            {f"{DOWN}.scales": mx.zeros((64, 2))},
            f"'{DOWN}.scales' is F32 [64, 2], config.json",
        ),
        (
            QuantFormat(4, 32),
            {f"{DOWN}.scales": mx.zeros((64, 3), mx.uint8)},
            f"'{DOWN}.scales' is U8 [64, 3]",
        ),
        (
            QuantFormat(4, 32),
            {f"{DOWN}.weight": mx.zeros((64, 18), mx.uint32)},
            "implies U32 [64, 12]",
        ),
        (
            QuantFormat(4, 32),
            {f"{DOWN}.weight": mx.zeros((64, 12), mx.int32)},
            "is I32 [64, 12], config.json implies U32",
        ),
        (
            QuantFormat(4, 32),
            {f"{NORM}.scales": mx.zeros((2,))},
            f"do not belong to this model, first '{NORM}.scales'",
        ),
        (
            QuantFormat(4, 32, "mxfp4"),
            {f"{DOWN}.scales": mx.zeros((64, 3))},
            "is F32 [64, 3], config.json implies U8",
        ),
        (
            QuantFormat(4, 32, "mxfp4"),
            {f"{DOWN}.biases": mx.zeros((64, 3))},
            f"not belong to this model, first '{DOWN}.b",
        ),
        (
            QuantFormat(4, 16, "nvfp4"),
            {f"{DOWN}.weight": None},
            f"1 tensors are missing, first '{DOWN}.weight'",
        ),
    ],
)
def test_a_packed_tensor_that_is_not_as_configured_is_named(
    folder: Path, weights: Weights, quant: QuantFormat, changes: dict[str, Any], words: str
) -> None:
    assert words in refusal(packed_folder(folder, weights, quant, **changes))


@pytest.mark.parametrize(
    ("block", "words"),
    [
        (
            None,
            "'model.embed_tokens' has scales, but the quantization block does not say how",
        ),
        (
            {"bits": 4, "group_size": 32, DOWN: False},
            f"'{DOWN}' has scales, but the quantization block",
        ),
        (
            {"bits": 8, "group_size": 32},
            "tensor 'model.embed_tokens.weight' is U32 [320, 8], config.json implies U32 [320, 16]",
        ),
        (
            {"bits": 4, "group_size": 64},
            "groups of 64 do not divide the 96 columns of 'model.layers.0.mlp.down_proj'",
        ),
        ({"bits": 4, "group_size": 32, "mode": "mxfp4"}, "first 'lm_head.biases'"),
    ],
)
def test_a_block_that_does_not_describe_the_tensors_is_refused(
    folder: Path, weights: Weights, block: dict[str, Any] | None, words: str
) -> None:
    """The format is never guessed from shapes, as mlx-swift does not guess it either."""
    packed_folder(folder, weights, QuantFormat(4, 32))
    edit_json(folder / "config.json", quantization=block)
    assert words in refusal(folder)


def test_a_module_named_by_the_block_must_be_packed(folder: Path) -> None:
    edit_json(folder / "config.json", quantization={"bits": 4, "group_size": 32, DOWN: {"bits": 8}})
    message = refusal(folder)
    assert (
        f"quantization names '{DOWN}', but the tensor '{DOWN}.scales' is missing; fetch the "
        "weights again" in message
    )


# fingerprint


def edit_bytes(path: Path, edit: Callable[[bytes], bytes]) -> None:
    path.write_bytes(edit(path.read_bytes()))


def flip_middle_of(checkpoint: Checkpoint, name: str) -> None:
    shard = next(s for s in checkpoint.shards if name in s.header)
    entry = shard.header[name]
    place = shard.data_start + (entry.begin + entry.end) // 2
    edit_bytes(shard.path, lambda b: b[:place] + bytes([b[place] ^ 1]) + b[place + 1 :])


CHANGES: dict[str, Callable[[Path], object]] = {
    "a byte of the config": lambda f: edit_bytes(f / "config.json", lambda b: b + b" "),
    "a value of the config": lambda f: edit_json(f / "config.json", rope_theta=1e6),
    "a byte of the index": lambda f: edit_bytes(f / INDEX, lambda b: b + b" "),
    "no index": lambda f: (f / INDEX).unlink(),
    "a header": lambda f: edit_bytes(
        f / FIRST, lambda b: b.replace(b'"format":"pt"', b'"format":"tf"')
    ),
    "a size": lambda f: edit_bytes(
        f / FIRST,
        lambda b: (
            (int.from_bytes(b[:8], "little") + 8).to_bytes(8, "little")
            + (
                b[8 : 8 + int.from_bytes(b[:8], "little")]
                + b" " * 8
                + b[8 + int.from_bytes(b[:8], "little") :]
            )
        ),
    ),
    "weights of a fine-tune": lambda f: flip_middle_of(
        open_checkpoint(f), "model.layers.2.self_attn.k_proj.weight"
    ),
    "a norm of a fine-tune": lambda f: flip_middle_of(open_checkpoint(f), "model.norm.weight"),
}


@pytest.mark.parametrize("case", CHANGES)
def test_the_fingerprint_changes_with(folder: Path, case: str) -> None:
    before = open_checkpoint(folder).fingerprint()
    CHANGES[case](folder)
    assert open_checkpoint(folder).fingerprint() != before


def test_the_fingerprint_is_that_of_the_content_not_of_the_place(
    folder: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(folder, tmp_path / "elsewhere")
    found = open_checkpoint(copy).fingerprint()
    assert found == open_checkpoint(folder).fingerprint()
    assert len(found) == 64


# resolve


def test_a_folder_resolves_to_itself(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    monkeypatch.setenv("HOME", str(folder.parent))
    assert resolve(folder) == folder
    assert resolve(str(folder)) == folder
    assert resolve("model") == Path("model")
    assert resolve("~/model") == folder


def test_a_folder_wins_over_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_module, "fetch", None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert resolve("org/name") == Path("org/name")


def test_a_hub_id_is_fetched_with_what_was_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def fetch(repo_id: str, *, revision: str | None, layout: str | None) -> Path:
        calls.append((repo_id, revision, layout))
        return tmp_path

    monkeypatch.setattr(folder_module, "fetch", fetch)
    assert (
        resolve("mistralai/Magistral-Small-2506", revision="main", layout="consolidated")
        == tmp_path
    )
    assert calls == [("mistralai/Magistral-Small-2506", "main", "consolidated")]


@pytest.mark.parametrize(
    "model",
    [
        "none",
        "./none",
        "../org/none",
        "/none/here",
        "~/none",
        "~nobody-here/x",
        "a/b/c",
        "a/",
        "/a",
        "a b/c",
        "-a/b",
        "x" * 5000,
        "org/nàme",
        "\0/x",
        "https://host/a",
        "org/name\n",
        Path("org/name"),
    ],
)
def test_what_is_neither_folder_nor_hub_id_names_the_ways(
    model: str | Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder_module, "fetch", None)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        resolve(model)
    for words in (
        str(model),
        "no such folder",
        "lmstudio-community/Magistral-Small-2506-MLX-4bit",
        "'demo'",
    ):
        assert words in str(caught.value)


def test_a_file_is_not_a_checkpoint(folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json is a file; name the folder"):
        resolve(folder / "config.json")


def test_a_folder_has_no_revision(folder: Path) -> None:
    with pytest.raises(OptionError, match="which has no revision 'main'; leave the revision out"):
        resolve(folder, revision="main")


def test_errors_of_the_hub_pass_through(monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(*_: object, **__: object) -> Path:
        raise HubError("no network")

    monkeypatch.setattr(folder_module, "fetch", fetch)
    with pytest.raises(HubError, match="no network"):
        resolve("org/name")


def test_the_config_type_is_exported_as_read(folder: Path) -> None:
    assert isinstance(open_checkpoint(folder).config, ModelConfig)
