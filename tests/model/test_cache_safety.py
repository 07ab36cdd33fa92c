"""Cache files that somebody made, files that must not be replaced, and several savers of one."""

import hashlib
import os
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from magistral_mlx import atomic_files
from magistral_mlx.checkpoint.safetensors_header import header_bytes, place
from magistral_mlx.errors import CheckpointError, OverwriteError
from magistral_mlx.model.cache_file import Saved, check_cache_file, load_cache, save_cache
from magistral_mlx.model.cache_header import FORMAT
from magistral_mlx.model.kv_cache import KVCache
from magistral_mlx.model.kv_format import UNQUANTIZED
from tests.support.faults import racing_saves
from tests.support.tiny import make_config

CONFIG = make_config(num_layers=1)
ROOT = Path(__file__).parents[2]
KV = np.zeros((1, 2 * CONFIG.num_kv_heads, 2, CONFIG.head_dim), np.float32)
RIGHT: Mapping[str, np.ndarray] = {
    "layer.0.0": KV,
    "ids": np.array([7, 8], np.int32),
    "chat": np.frombuffer(b"{}", np.uint8),
}
TYPES = {"float32": "F32", "int32": "I32", "uint8": "U8", "float16": "F16", "int64": "I64"}


def forge(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Write a cache file by hand, with a right hash."""
    metadata = {"format": FORMAT, "fingerprint": "f", "kv_bits": "0", "type": "F32"}
    placed = {name: (TYPES[str(a.dtype)], a.shape) for name, a in tensors.items()}
    head = header_bytes(place(placed | {"sha256": ("U8", (32,))}), metadata)
    pieces = [head, *(a.tobytes() for a in tensors.values() if a.size)]
    digest = hashlib.sha256(b"".join(hashlib.sha256(piece).digest() for piece in pieces)).digest()
    path.write_bytes(b"".join(pieces) + digest)


def load(path: Path) -> Saved:
    return load_cache(
        path, CONFIG, limit=256, fingerprint="f", kv_format=UNQUANTIZED, dtype=mx.float32
    )


def save(path: Path, chat: str, replaces: bytes = b"") -> bytes:
    return save_cache(
        path,
        KVCache(CONFIG, limit=256),
        [],
        fingerprint="f",
        dtype=mx.float32,
        chat=chat,
        may_replace=lambda stamp: stamp == replaces,
    )


def filled(value: float) -> np.ndarray:
    wrong = KV.copy()
    wrong[0, 1, 1, 3] = value
    return wrong


WRONG: Mapping[str, Mapping[str, np.ndarray]] = {
    "ids in two dimensions": {"ids": np.array([[7, 8]], np.int32)},
    "ids that are no integers": {"ids": np.array([7, np.inf], np.float32)},
    "ids of 64 bits": {"ids": np.array([7, 8], np.int64)},
    "a negative id": {"ids": np.array([7, -1], np.int32)},
    "an id over the vocabulary": {"ids": np.array([7, CONFIG.vocab_size], np.int32)},
    "a layer of another type": {"layer.0.0": KV.astype(np.float16)},
    "a layer of another shape": {"layer.0.0": KV[:, :-1]},
    "a layer of other dimensions": {"layer.0.0": KV[0]},
    "more positions than ids": {"ids": np.array([7], np.int32)},
    "NaN": {"layer.0.0": filled(np.nan)},
    "infinity": {"layer.0.0": filled(np.inf)},
    "a chat in two dimensions": {"chat": np.zeros((2, 2), np.uint8)},
    "a chat that is no UTF-8": {"chat": np.array([255], np.uint8)},
    "a chat of another type": {"chat": np.zeros(2, np.int32)},
}


@pytest.mark.parametrize("case", WRONG)
def test_a_crafted_file_with_a_right_hash_is_refused(tmp_path: Path, case: str) -> None:
    file = tmp_path / "talk"
    forge(file, RIGHT)
    assert load(file).ids == [7, 8]
    forge(file, {**RIGHT, **WRONG[case]})
    with pytest.raises(CheckpointError, match=r"talk is damaged .*; name another file"):
        load(file)


@pytest.mark.parametrize("content", [b"precious", b"x" * 4000, b"\x05\0\0\0\0\0\0\0[1,2]"])
def test_what_is_no_cache_file_is_never_replaced(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "notes.txt"
    file.write_bytes(content)
    for chat in ("", "{}"):
        with pytest.raises(OverwriteError, match=r"notes.txt is something else.*name another file"):
            save_cache(
                file,
                KVCache(CONFIG, limit=256),
                [],
                fingerprint="f",
                dtype=mx.float32,
                chat=chat,
                may_replace=lambda _: True,
            )
    assert file.read_bytes() == content
    with pytest.raises(CheckpointError, match="name another file") as refused:
        load(file)
    assert "elete" not in str(refused.value)
    assert os.listdir(tmp_path) == ["notes.txt"]


def test_weights_are_no_cache_file(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    mx.save_safetensors(str(file), {"a": mx.zeros(3)}, {"format": "mlx"})
    with pytest.raises(OverwriteError, match="something else"):
        save(file, "{}")


def test_a_conversation_is_replaced_by_who_knows_it(tmp_path: Path) -> None:
    file = tmp_path / "talk"
    file.touch()  # an empty file holds nothing
    first = save(file, "one")
    second = save(file, "two", first)
    for chat, stamp in (("three", first), ("", b"")):
        with pytest.raises(OverwriteError, match="talk holds another conversation"):
            save(file, chat, stamp)
    assert load(file).chat == "two"
    assert load(file).stamp == second
    save(tmp_path / "prompt", "")
    save(tmp_path / "prompt", "")
    with pytest.raises(OverwriteError, match="prompt holds a prompt cache"):
        save(tmp_path / "prompt", "three")


def test_a_file_replaced_while_it_is_read_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "talk"
    stamp = save(file, "one")
    original, replaced = load_cache.__globals__["open_cache"], []

    def replace_after(*args: object) -> object:
        shard = original(*args)
        if not replaced:
            replaced.append(save(file, "two, and longer", stamp))
        return shard

    monkeypatch.setitem(load_cache.__globals__, "open_cache", replace_after)
    assert load(file).chat == "two, and longer"


def test_a_file_that_changes_while_its_successor_is_written_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "talk"
    stamp, newer = save(file, "one"), []
    create = atomic_files._create_locked

    def meanwhile(*args: object) -> int:
        if not newer:
            newer.append(b"")
            newer.append(save(file, "newer", stamp))
        return create(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(atomic_files, "_create_locked", meanwhile)
    with pytest.raises(OverwriteError):
        save(file, "older", stamp)
    assert load(file).chat == "newer"
    assert os.listdir(tmp_path) == ["talk"]


def test_threads_that_save_one_file_at_a_time_all_succeed(tmp_path: Path) -> None:
    file, failed = tmp_path / "talk", []

    def work() -> None:
        try:
            for _ in range(5):
                save(file, "")
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert load(file).chat == ""
    assert os.listdir(tmp_path) == ["talk"]


@pytest.mark.slow
def test_no_save_is_lost_whoever_else_saves(tmp_path: Path) -> None:
    file, saves = tmp_path / "talk", 50
    racing_saves.save(file, 0, b"")
    command = [sys.executable, "-m", racing_saves.__name__, str(file), str(saves)]
    running = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) for _ in range(4)]
    refused = [int(process.communicate()[0]) for process in running]
    assert racing_saves.read(file)[0] == 4 * saves
    assert sum(refused) > 0
    assert os.listdir(tmp_path) == ["talk"]


def test_the_root_folder_is_no_place_for_a_file() -> None:
    with pytest.raises(Exception, match=r"could not be written: .*no plain file"):
        save(Path("/"), "{}")
    with pytest.raises(Exception, match="no plain file"):
        check_cache_file(Path("/"))
