"""A source's tensors by blocks of rows, its identity, and its float types."""

import hashlib
import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from magistral_mlx.checkpoint.folder import Shard, open_checkpoint
from magistral_mlx.convert.source.source import Source, open_source
from magistral_mlx.errors import CheckpointError
from tests.support.sources import CONFIG, change_json, convert_quickly, write_consolidated, write_hf
from tests.support.tiny import make_weights

# 256 rows of 128, in heads of 64.
Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def weights() -> dict[str, mx.array]:
    return make_weights(CONFIG, mx.bfloat16)


@pytest.fixture(scope="module", params=["hf", "consolidated"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Source:
    write = {"hf": write_hf, "consolidated": write_consolidated}[request.param]
    return open_source(write(tmp_path_factory.mktemp("source") / request.param))


def bits(array: mx.array) -> np.ndarray:
    return np.array(array.view(mx.uint8))


# blocks


def test_blocks_are_the_tensor_in_hugging_faces_order(
    source: Source, weights: dict[str, mx.array]
) -> None:
    for name, weight in weights.items():
        blocks = list(source.blocks(name, block_bytes=700))
        joined = mx.concatenate([block for _, block in blocks])
        assert joined.dtype == weight.dtype
        assert (bits(joined) == bits(weight)).all(), name
        assert [row for row, _ in blocks] == [
            i * source.row_step(name, 700) for i in range(len(blocks))
        ]


def test_a_block_has_whole_heads_where_rows_are_reordered(source: Source) -> None:
    row_bytes = 128 * 2
    assert source.row_step("lm_head.weight", 5 * row_bytes + 1) == 5
    assert source.row_step("lm_head.weight", 1) == 1
    is_native = source.layout == "consolidated"
    assert source.row_step(Q, 130 * row_bytes) == (128 if is_native else 130)
    assert source.row_step(Q, 3 * row_bytes) == (64 if is_native else 3)
    assert source.row_step(Q.replace("q_proj", "v_proj"), 3 * row_bytes) == 3
    assert source.row_step("model.norm.weight", 10) == 5


def test_blocks_are_read_from_many_threads_at_once(
    source: Source, weights: dict[str, mx.array]
) -> None:
    jobs = [
        (n, row) for n in weights for row in range(0, weights[n].shape[0], source.row_step(n, 4000))
    ]

    def read(job: tuple[str, int]) -> np.ndarray:
        name, row = job
        with mx.stream(mx.cpu):
            return bits(source.read(name, slice(row, row + source.row_step(name, 4000))))

    with ThreadPoolExecutor(8) as pool:
        for (name, row), found in zip(jobs, pool.map(read, jobs), strict=True):
            assert (found == bits(weights[name][row : row + source.row_step(name, 4000)])).all(), (
                name,
                row,
            )


# identity


def test_the_hubs_hash_is_taken_from_its_cache_alone(tmp_path: Path) -> None:
    """Check the hash of a cached weight file, which is a link to ../../blobs/SHA256.

    Files in git have shorter names there.
    """
    plain, blobs, snapshot = (
        write_hf(tmp_path / "plain"),
        tmp_path / "hub" / "blobs",
        tmp_path / "hub" / "snap" / "c",
    )
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    hashes = {}
    for path in plain.iterdir():
        content = path.read_bytes()
        is_large = path.suffix == ".safetensors"
        name = (
            hashlib.sha256(content).hexdigest() if is_large else hashlib.sha1(content).hexdigest()
        )
        hashes |= {path.name: name} if is_large else {}
        shutil.copy(path, blobs / name)
        (snapshot / path.name).symlink_to(f"../../blobs/{name}")
    here, there = open_source(plain).identity()["files"], open_source(snapshot).identity()["files"]
    assert {name: there[name].pop("sha256") for name in hashes} == hashes
    assert here == there
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for path in plain.iterdir():
        # Looks like a hash, but is not the hub's.
        target = tmp_path / hashlib.sha256(path.name.encode()).hexdigest()
        shutil.copy(path, target)
        (elsewhere / path.name).symlink_to(target)
    assert open_source(elsewhere).identity()["files"] == here


def test_a_fine_tune_is_another_source(tmp_path: Path) -> None:
    folder = write_hf(tmp_path / "hf")
    before = open_source(folder).identity()
    assert open_source(folder).identity() == before
    shard = next(shard for shard in open_source(folder).shards if Q in shard.header)
    entry, content = shard.header[Q], bytearray(shard.path.read_bytes())
    content[shard.data_start + (entry.begin + entry.end) // 2] ^= 1
    shard.path.write_bytes(content)
    after = open_source(folder).identity()
    assert after["files"].pop(shard.path.name) != before["files"].pop(shard.path.name)
    assert after == before


# types


def retyped(weights: dict[str, mx.array], kind: str) -> dict[str, mx.array]:
    """Cast all weights; ``mixed`` has bf16 matrices and float32 norms, like some fine-tunes."""
    if kind != "mixed":
        return {name: weight.astype(getattr(mx, kind)) for name, weight in weights.items()}
    return {
        name: weight if weight.ndim == 2 else weight.astype(mx.float32)
        for name, weight in weights.items()
    }


@pytest.mark.parametrize("named", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("kind", ["bfloat16", "float16", "float32", "mixed"])
def test_every_float_type_converts_as_mlx_lm_does(tmp_path: Path, kind: str, named: str) -> None:
    from mlx.utils import tree_flatten, tree_map
    from mlx_lm.utils import load_model, quantize_model

    folder = write_hf(tmp_path / "in", retyped(make_weights(CONFIG), kind))
    change_json(folder / "config.json", torch_dtype=named)
    convert_quickly(folder, tmp_path / "out")
    theirs, config = load_model(folder)
    # Like mlx_lm.convert, which needs a tokenizer as well.
    theirs.update(tree_map(lambda array: array.astype(getattr(mx, named)), theirs.parameters()))
    theirs, _ = quantize_model(theirs, config, 64, 4)
    expected, found = (
        dict(tree_flatten(theirs.parameters())),
        open_checkpoint(tmp_path / "out").tensors(),
    )
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype
        assert (bits(found[name]) == bits(array)).all(), name


def make_fp8(path: Path, name: str) -> None:
    """Rewrite a weight file so that one matrix is fp8."""
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + size]), content[8 + size :]
    begin, end = header[name]["data_offsets"]
    half = (end - begin) // 2
    for entry in header.values():
        if "data_offsets" in entry:
            entry["data_offsets"] = [
                offset - half * (offset >= end) for offset in entry["data_offsets"]
            ]
    header[name]["dtype"] = "F8_E4M3"
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[:begin] + data[begin + half :])


BLOCK = {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None}
WAY_OUT = "start from the bf16 checkpoint"


@pytest.mark.parametrize("write", [write_hf, write_consolidated])
def test_fp8_weights_are_refused(tmp_path: Path, write: Callable[[Path], Path]) -> None:
    folder = write(tmp_path / "fp8")
    name = "lm_head.weight" if write is write_hf else "output.weight"
    path = next(path for path in folder.glob("*.safetensors") if name in Shard.open(path).header)
    make_fp8(path, name)
    with pytest.raises(
        CheckpointError, match=f"'{name}' has dtype 'F8_E4M3', which is fp8: rounded .*; {WAY_OUT}"
    ):
        open_source(folder)


@pytest.mark.slow
def test_fp8_by_its_config_or_its_scales_alone_is_refused(
    tmp_path: Path, weights: dict[str, mx.array]
) -> None:
    folder = write_hf(tmp_path / "config")
    change_json(folder / "config.json", quantization_config=BLOCK)
    with pytest.raises(
        CheckpointError, match=f"quantized with 'fp8', which is not an MLX format; {WAY_OUT}"
    ):
        open_source(folder)
    for kind in ("weight_scale_inv", "activation_scale", "input_scale"):
        scale = Q.replace("weight", kind)
        scaled = write_hf(tmp_path / kind, weights | {scale: mx.ones((1,))})
        with pytest.raises(
            CheckpointError, match=f"'{scale}' is a scale of weights in fp8: rounded .*; {WAY_OUT}"
        ):
            open_source(scaled)
    native = write_consolidated(tmp_path / "native", quantization={"qformat_weight": "fp8_e4m3"})
    with pytest.raises(
        CheckpointError, match=rf"quantization is .*fp8_e4m3.* are fp8: rounded .*; {WAY_OUT}"
    ):
        open_source(native)
