"""The writer of weight files."""

import hashlib
import json
from itertools import pairwise
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from safetensors import safe_open

from magistral_mlx.checkpoint.safetensors_header import header_bytes, lay_out
from magistral_mlx.convert.output.writer import ShardWriter


def same(a: mx.array, b: mx.array) -> bool:
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and bool(mx.array_equal(a.view(mx.uint8), b.view(mx.uint8)))
    )


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
