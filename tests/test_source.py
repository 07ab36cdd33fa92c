"""A source's tensors by blocks of rows, from any thread, and what tells one source from another."""

import hashlib
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from convert.source import Source, open_source
from tests.sources import CONFIG, write_consolidated, write_hf
from tests.tiny import make_weights

Q = "model.layers.1.self_attn.q_proj.weight"  # 256 rows of 128, in heads of 64


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


def test_blocks_are_the_tensor_in_hugging_faces_order(source: Source, weights: dict[str, mx.array]) -> None:
    for name, weight in weights.items():
        blocks = list(source.blocks(name, block_bytes=700))
        joined = mx.concatenate([block for _, block in blocks])
        assert joined.dtype == weight.dtype
        assert (bits(joined) == bits(weight)).all(), name
        assert [row for row, _ in blocks] == [i * source.row_step(name, 700) for i in range(len(blocks))]


def test_a_block_has_whole_heads_where_rows_are_reordered(source: Source) -> None:
    row_bytes = 128 * 2
    assert source.row_step("lm_head.weight", 5 * row_bytes + 1) == 5
    assert source.row_step("lm_head.weight", 1) == 1
    is_native = source.layout == "consolidated"
    assert source.row_step(Q, 130 * row_bytes) == (128 if is_native else 130)
    assert source.row_step(Q, 3 * row_bytes) == (64 if is_native else 3)
    assert source.row_step(Q.replace("q_proj", "v_proj"), 3 * row_bytes) == 3
    assert source.row_step("model.norm.weight", 10) == 5


def test_blocks_are_read_from_many_threads_at_once(source: Source, weights: dict[str, mx.array]) -> None:
    jobs = [(n, row) for n in weights for row in range(0, weights[n].shape[0], source.row_step(n, 4000))]

    def read(job: tuple[str, int]) -> np.ndarray:
        name, row = job
        with mx.stream(mx.cpu):
            return bits(source.read(name, slice(row, row + source.row_step(name, 4000))))

    with ThreadPoolExecutor(8) as pool:
        for (name, row), found in zip(jobs, pool.map(read, jobs), strict=True):
            assert (found == bits(weights[name][row : row + source.row_step(name, 4000)])).all(), (name, row)


# identity


def test_the_hubs_hash_is_taken_from_its_cache_alone(tmp_path: Path) -> None:
    """Its snapshots are links to ../../blobs/SHA256; git's own files have shorter names."""
    plain, blobs, snapshot = write_hf(tmp_path / "plain"), tmp_path / "hub" / "blobs", tmp_path / "hub" / "snap" / "c"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    hashes = {}
    for path in plain.iterdir():
        content = path.read_bytes()
        is_large = path.suffix == ".safetensors"
        name = hashlib.sha256(content).hexdigest() if is_large else hashlib.sha1(content).hexdigest()
        hashes |= {path.name: name} if is_large else {}
        shutil.copy(path, blobs / name)
        (snapshot / path.name).symlink_to(f"../../blobs/{name}")
    here, there = open_source(plain).identity()["files"], open_source(snapshot).identity()["files"]
    assert {name: there[name].pop("sha256") for name in hashes} == hashes
    assert here == there
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for path in plain.iterdir():
        target = tmp_path / hashlib.sha256(path.name.encode()).hexdigest()  # a name, and not the hub's
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
