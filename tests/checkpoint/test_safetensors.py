"""A file with a contradiction is refused; others read bit for bit as MLX reads them."""

import json
import random
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from safetensors import safe_open

from magistral_mlx.checkpoint.documents import parse_json
from magistral_mlx.checkpoint.safetensors import Shard
from magistral_mlx.errors import CheckpointError

F32 = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}


def write(path: Path, header: dict[str, Any] | bytes, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def bits(array: mx.array) -> bytes:
    return np.array(array if array.dtype == mx.bool_ else array.view(mx.uint8)).tobytes()


def mlx_reads(path: Path) -> dict[str, mx.array]:
    loaded = mx.load(str(path))
    assert isinstance(loaded, dict)
    return loaded


@pytest.fixture
def arrays() -> dict[str, mx.array]:
    noise = mx.random.normal((7, 5), key=mx.random.key(0))
    return {
        "bf16": noise.astype(mx.bfloat16),
        "f16": noise.astype(mx.float16),
        "f32": noise,
        "u32": mx.arange(2**32 - 35, 2**32, dtype=mx.uint32).reshape(7, 5),
        "u8": mx.arange(35, dtype=mx.uint8).reshape(7, 5),
        "i32": mx.arange(-17, 18, dtype=mx.int32).reshape(7, 5),
        "i64": mx.arange(-17, 18, dtype=mx.int64).reshape(7, 5),
        "bool": noise > 0,
        "vector": mx.array([float("nan"), float("-inf"), -0.0, 1e-45, 3.0, 4.0, 5.0]),
        "cube": noise.reshape(7, 5, 1),
    }


@pytest.mark.parametrize(
    "rows", [None, slice(0, 1), slice(2, 5), slice(3, 100), slice(-2, None), slice(5, 2)]
)
def test_reading_one_tensor_equals_mx_load_bit_for_bit(
    tmp_path: Path, arrays: dict[str, mx.array], rows: slice | None
) -> None:
    path = tmp_path / "a.safetensors"
    mx.save_safetensors(str(path), arrays, {"format": "mlx"})
    shard, loaded = Shard.open(path), mlx_reads(path)
    assert set(shard.header) == set(arrays)
    assert shard.metadata == {"format": "mlx"}
    for name, whole in loaded.items():
        expected = whole if rows is None else mx.contiguous(whole[rows])
        found = shard.read(name, rows)
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
        assert bits(found) == bits(expected), name


def test_a_scalar_and_an_empty_tensor_are_read(tmp_path: Path) -> None:
    header = {
        "scalar": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]},
        "empty": {"dtype": "BF16", "shape": [0, 3], "data_offsets": [4, 4]},
    }
    shard = Shard.open(write(tmp_path / "a.safetensors", header, b"\0\0\x80?"))
    assert shard.read("scalar").item() == 1.0
    assert shard.read("empty").shape == (0, 3)


def test_a_header_padded_with_spaces_is_fine(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", json.dumps({"a": F32}).encode() + b" " * 9, bytes(24))
    assert Shard.open(path).header["a"].shape == (2, 3)


def entry(**changes: Any) -> dict[str, Any]:
    return {"a": F32 | changes}


def two(first: tuple[int, int], second: tuple[int, int]) -> dict[str, Any]:
    return {
        name: {"dtype": "U8", "shape": [end - begin], "data_offsets": [begin, end]}
        for name, (begin, end) in {"first": first, "second": second}.items()
    }


DAMAGED: dict[
    str, tuple[dict[str, Any] | bytes, int, str]
] = {  # header, bytes of data, words of the message
    "cut short": (entry(), 23, "cut short: its tensors take 24 bytes, 23 are there"),
    "bytes behind": (entry(), 25, "1 bytes follow the last tensor"),
    "bytes behind nothing": ({}, 4, "4 bytes follow"),
    "overlap": (two((0, 6), (4, 10)), 10, "tensor 'second' overlaps 'first'"),
    "same place": (two((0, 6), (0, 6)), 6, "overlaps"),
    "hole": (two((0, 6), (8, 10)), 10, "tensor 'second' leaves a hole after 'first'"),
    "hole at the start": (
        two((2, 6), (6, 10)),
        10,
        "tensor 'first' leaves a hole after the header",
    ),
    "negative dimension": (
        entry(shape=[-2, -3]),
        24,
        "tensor 'a' has the impossible shape [-2, -3]",
    ),
    "dimension over 32 bits": (
        entry(shape=[2**32, 2**32], data_offsets=[0, 0]),
        0,
        "tensor 'a' has the impossible",
    ),
    "product overflows": (
        entry(shape=[2**22, 2**21, 2**21], data_offsets=[0, 0]),
        0,
        "tensor 'a' (F32",
    ),
    "fractional dimension": (entry(shape=[2.0, 3]), 24, "impossible shape"),
    "boolean dimension": (entry(shape=[True, 6]), 24, "impossible shape"),
    "shape is a number": (entry(shape=6), 24, "impossible shape"),
    "shape and bytes differ": (entry(shape=[2, 4]), 24, "needs 32 bytes"),
    "dtype and bytes differ": (entry(dtype="F16"), 24, "needs 12 bytes"),
    "negative offsets": (entry(data_offsets=[-24, 0]), 0, "data_offsets are [-24, 0]"),
    "offsets reversed": (entry(data_offsets=[24, 0]), 24, "data_offsets are [24, 0]"),
    "one offset": (entry(data_offsets=[24]), 24, "expected two whole numbers"),
    "offsets as text": (entry(data_offsets=["0", "24"]), 24, "expected two whole numbers"),
    "offsets missing": ({"a": {"dtype": "F32", "shape": [6]}}, 24, "is not described by"),
    "unknown field": (entry(more=1), 24, "is not described by"),
    "entry is a list": ({"a": [0, 24]}, 24, "is not described by"),
    "unknown dtype": (entry(dtype="F4"), 6, "tensor 'a' has dtype 'F4', which no Magistral"),
    "fp8": (
        entry(dtype="F8_E4M3"),
        6,
        "tensor 'a' has dtype 'F8_E4M3', which is fp8: rounded already",
    ),
    "fp8 of the other kind": (entry(dtype="F8_E5M2"), 6, "'F8_E5M2', which is fp8"),
    "dtype is a list": (entry(dtype=[]), 24, "has dtype []"),
    "metadata is no table": ({"__metadata__": [1], **entry()}, 24, "__metadata__"),
    "metadata holds a number": ({"__metadata__": {"a": 1}, **entry()}, 24, "__metadata__"),
    "a name twice": (
        b'{"a":%b,"a":%b}' % ((json.dumps(F32).encode(),) * 2),
        24,
        "the key 'a' occurs twice",
    ),
    "not UTF-8": (b'{"\xff\xfe":1}', 0, "not JSON"),
    "not JSON": (b'{"a":', 0, "not JSON"),
    "nested without end": (b'{"a":' * 100_000, 0, "not JSON"),
    "a number of 5000 digits": (b'{"a":' + b"9" * 5000 + b"}", 0, "not JSON"),
    "a list": (b"[]", 0, "does not start with"),
    "spaces first": (b" {}", 0, "does not start with"),
    "no header": (b"", 0, "does not start with"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_header_is_refused_by_name(tmp_path: Path, case: str) -> None:
    header, data_bytes, words = DAMAGED[case]
    path = write(tmp_path / "model.safetensors", header, bytes(data_bytes))
    with pytest.raises(CheckpointError) as caught:
        Shard.open(path)
    message = str(caught.value)
    assert str(path) in message
    assert words in message
    assert "again" in message or "bf16 checkpoint" in message


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "should take 0 bytes"),
        (b"\x02\0\0", "the whole file has 3"),
        ((2**63).to_bytes(8, "little") + b"{}", f"should take {2**63} bytes"),
        ((3).to_bytes(8, "little") + b"{}", "should take 3 bytes"),
    ],
)
def test_a_header_longer_than_the_file_is_refused_before_it_is_read(
    tmp_path: Path, content: bytes, words: str
) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=words):
        Shard.open(path)


def test_a_huge_header_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:  # sparse
        file.write((2 * 10**8).to_bytes(8, "little"))
        file.truncate(3 * 10**8)
    with pytest.raises(CheckpointError, match="10000000 are allowed"):
        Shard.open(path)


def test_the_overflow_file_that_crashes_mlx_is_refused(tmp_path: Path) -> None:
    """The product of this shape is 2**64, so 0 in 64 bits: MLX loads it, and indexing segfaults."""
    shape = [2**30, 2**30, 16]
    header = json.dumps(
        {"model.embed_tokens.weight": {"dtype": "BF16", "shape": shape, "data_offsets": [0, 0]}}
    )
    path = write(tmp_path / "model.safetensors", header.encode().ljust(150))
    assert path.stat().st_size == 158
    with pytest.raises(
        CheckpointError, match=r"tensor 'model.embed_tokens.weight' .* needs \d{20} bytes"
    ):
        Shard.open(path)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "none.safetensors", tmp_path):
        with pytest.raises(CheckpointError, match=r"cannot be read .*; check the file"):
            Shard.open(path)


def test_a_file_cut_short_after_it_was_opened_is_noticed(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", entry(), bytes(24))
    shard = Shard.open(path)
    path.write_bytes(path.read_bytes()[:-5])
    for use in (lambda: shard.read("a"), shard.load, shard.sample_sha256, shard.check_unchanged):
        with pytest.raises(CheckpointError, match=r"a\.safetensors was changed or replaced after"):
            use()
    path.unlink()
    with pytest.raises(CheckpointError, match="tensor 'a' cannot be read"):
        shard.read("a")


def test_metadata_that_mlx_writes_as_null_is_none(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    mx.save_safetensors(str(path), {"a": mx.zeros((2,))})
    assert b'"__metadata__":null' in path.read_bytes()
    assert Shard.open(path).metadata == {}


def test_damage_anywhere_is_refused_or_harmless(tmp_path: Path) -> None:
    """All readers read alike the headers that pass, out of 600 damaged ones."""
    header = {"__metadata__": {"format": "pt"}, **two((0, 6), (6, 10))}
    sound = write(tmp_path / "sound.safetensors", header, bytes(10)).read_bytes()
    end, chance, path, passed = len(sound) - 10, random.Random(0), tmp_path / "a.safetensors", 0
    for _ in range(600):
        content = bytearray(sound)
        for _ in range(chance.randint(1, 2)):
            content[chance.randrange(end)] = chance.choice(b'0123456789-{}[]",:aU\x00\xff')
        path.write_bytes(content)
        try:
            shard = Shard.open(path)
        except CheckpointError as error:
            assert str(path) in str(error)  # noqa: PT017
            continue
        passed += 1
        loaded = mlx_reads(path)
        with safe_open(path, framework="numpy") as reference:
            assert set(shard.header) == set(reference.keys()) == set(loaded)
            for name, found in shard.header.items():
                assert (
                    list(found.shape)
                    == reference.get_slice(name).get_shape()
                    == list(loaded[name].shape)
                )
    assert passed > 10  # names and metadata may change without harm


@pytest.mark.parametrize("text", [b"[1]", b"null", b'{"a":1,"a":2}', b"\xff", b"{'a':1}", b""])
def test_json_that_is_no_plain_object_is_refused(text: bytes) -> None:
    with pytest.raises(
        CheckpointError, match=r"config\.json is damaged: .* Fetch or convert it again"
    ):
        parse_json(text, Path("config.json"))
