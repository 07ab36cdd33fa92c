"""A saved cache is read back or refused; a save that fails leaves the old file."""

import errno
import fcntl
import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from magistral_mlx.atomic_files import _discard_abandoned
from magistral_mlx.errors import CheckpointError, MagistralError, OptionError
from magistral_mlx.files import flush
from magistral_mlx.model import cache_file
from magistral_mlx.model.cache_file import check_cache_file, load_cache, save_cache
from magistral_mlx.model.kv_cache import KVCache
from magistral_mlx.model.kv_format import KVFormat
from tests.support.tiny import make_config

CONFIG = make_config(num_layers=2)
ROOT = Path(__file__).parents[2]
KILLER = ROOT / "tests" / "support" / "faults" / "killing_saves.py"
WRITES = 1 + 2 + 3  # the header, a tensor a layer, ids, chat, hash
CHAT = '{"é": "x"}'


def make_cache(bits: int | None = None, length: int = 5) -> KVCache:
    cache = KVCache(CONFIG, limit=256, kv_format=KVFormat.of(bits, CONFIG.head_dim))
    for i, layer in enumerate(cache.layers):
        kv = mx.random.normal(
            (1, 2 * CONFIG.num_kv_heads, length, CONFIG.head_dim), key=mx.random.key(i)
        )
        layer.append(layer.format.pack(kv))
    return cache


def save(path: Path, cache: KVCache, chat: str = CHAT) -> None:
    save_cache(
        path,
        cache,
        range(7, 7 + cache.length),
        fingerprint="f",
        dtype=mx.float32,
        chat=chat,
        may_replace=lambda _: True,
    )


def load(
    path: Path,
    *,
    bits: int | None = None,
    fingerprint: str = "f",
    dtype: mx.Dtype = mx.float32,
    limit: int = 256,
) -> tuple[KVCache, list[int], str]:
    return load_cache(
        path,
        CONFIG,
        limit=limit,
        fingerprint=fingerprint,
        kv_format=KVFormat.of(bits, CONFIG.head_dim),
        dtype=dtype,
    )[:3]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    save(tmp_path / "talk", make_cache())
    return tmp_path / "talk"


@pytest.mark.parametrize("bits", [None, 8, 4])
@pytest.mark.parametrize("length", [0, 1, 5])
def test_what_was_saved_comes_back(tmp_path: Path, bits: int | None, length: int) -> None:
    cache = make_cache(bits, 5)
    cache.trim(5 - length)
    save(tmp_path / "talk", cache)
    found, ids, chat = load(tmp_path / "talk", bits=bits)
    assert (found.length, ids, chat) == (length, list(range(7, 7 + length)), CHAT)
    pairs = zip(cache.state() if length else [], found.state(), strict=False)
    assert all(
        mx.array_equal(a, b) for one, other in pairs for a, b in zip(one, other, strict=True)
    )


def test_a_cache_that_is_ahead_of_its_ids_is_saved_as_far_as_they_go(tmp_path: Path) -> None:
    """In the middle of a reply the next pass is queued, so the cache is longer than the ids."""
    save_cache(tmp_path / "talk", make_cache(), [7, 8], fingerprint="f", dtype=mx.float32)
    cache, ids, _ = load(tmp_path / "talk")
    assert (cache.length, ids) == (2, [7, 8])
    assert mx.array_equal(cache.state()[1][0], make_cache().state(2)[1][0])


def test_of_another_kind(file: Path) -> None:
    for other in ({"bits": 8}, {"fingerprint": "g"}, {"dtype": mx.bfloat16}, {"limit": 4}):
        with pytest.raises(OptionError, match=r"kv_bits|another model|type|larger context"):
            load(file, **other)  # type: ignore[arg-type]


def test_every_damaged_byte_is_found(file: Path) -> None:
    """Flip one bit after the other; after the header the hash finds it."""
    data = file.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    step = 37
    for at in [*range(0, start, step), *range(start, len(data), step), len(data) - 1]:
        broken = bytearray(data)
        broken[at] ^= 1 << at % 8
        file.write_bytes(broken)
        with pytest.raises(MagistralError, match="not what was written" if at >= start else None):
            load(file)
    file.write_bytes(data)
    load(file)


def test_pieces_are_hashed_each_and_none_can_be_swapped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_file, "PIECE_BYTES", 128)
    file = tmp_path / "talk"
    save(file, make_cache(length=16))
    load(file)
    data = file.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    pieces = [data[i : i + 128] for i in range(start, start + 1024, 128)]
    file.write_bytes(
        data[:start] + b"".join([pieces[1], pieces[0], *pieces[2:]]) + data[start + 1024 :]
    )
    with pytest.raises(CheckpointError, match="not what was written"):
        load(file)


@pytest.mark.parametrize(
    "change", [lambda d: d[:-1], lambda d: d + b"x", lambda d: b"", lambda d: d[:9]]
)
def test_a_file_of_another_length(file: Path, change: Callable[[bytes], bytes]) -> None:
    file.write_bytes(change(file.read_bytes()))
    with pytest.raises(CheckpointError):
        load(file)


def test_no_file_or_no_cache(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="no such prompt cache"):
        load(tmp_path / "none")
    with pytest.raises(OptionError, match="is no plain file"):
        load(tmp_path)
    mx.save_safetensors(str(tmp_path / "other.safetensors"), {"a": mx.zeros(3)}, {"format": "mlx"})
    with pytest.raises(OptionError, match="not a prompt cache of this version"):
        load(tmp_path / "other.safetensors")


@contextmanager
def failing(call: str, at: int, error: BaseException) -> Iterator[None]:
    original, calls = getattr(os, call), iter(range(1, 100))

    def wrapped(*arguments: object) -> object:
        if next(calls) == at:
            raise error
        return original(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, call, wrapped)
        yield


@pytest.mark.parametrize("has_old", [True, False])
@pytest.mark.parametrize(
    ("call", "at"),
    [*(("write", at) for at in range(1, WRITES + 1)), ("open", 1), ("fsync", 1), ("rename", 1)],
)
def test_a_save_that_fails_leaves_what_was_there(
    tmp_path: Path, call: str, at: int, *, has_old: bool
) -> None:
    file = tmp_path / "talk"
    if has_old:
        save(file, make_cache(), "old")
    before = file.read_bytes() if has_old else b""
    full = OSError(errno.ENOSPC, "No space left on device")
    with (
        failing(call, at, full),
        pytest.raises(
            OptionError, match=r"talk.*full, it takes .* bytes; free .* What was there is un"
        ),
    ):
        save(file, make_cache())
    with failing(call, at, KeyboardInterrupt()), pytest.raises(KeyboardInterrupt):
        save(file, make_cache())
    with (
        failing(call, at, OSError(errno.EIO, "Input/output error")),
        pytest.raises(OptionError, match="output error"),
    ):
        save(file, make_cache())
    assert os.listdir(tmp_path) == (["talk"] if has_old else [])
    assert not has_old or file.read_bytes() == before
    save(file, make_cache())
    load(file)


def test_a_save_killed_at_any_call_leaves_the_old_file_or_the_new(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(KILLER), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    # An old file is looked at first. Before the rename it is the old file, or none. After it only
    # the folder is flushed.
    assert found == {"old": ["old"] * 16 + ["new"] * 2, "None": [None] * 12 + ["new"] * 2}


def test_mode_links_and_what_else_lies_there(file: Path, tmp_path: Path) -> None:
    file.chmod(0o644)
    (tmp_path / "link").symlink_to(file)
    (tmp_path / ".talk.x.partial").touch()
    save(tmp_path / "link", make_cache(), "by the link")
    assert (tmp_path / "link").is_symlink()
    assert load(file)[2] == "by the link"
    save(tmp_path / "new", make_cache())
    for saved in (file, tmp_path / "new"):
        assert stat.S_IMODE(saved.stat().st_mode) == 0o600
    assert sorted(os.listdir(tmp_path)) == [".talk.x.partial", "link", "new", "talk"]


def test_what_another_process_is_writing_is_left_alone(file: Path) -> None:
    partial = file.with_name(".talk.1.partial")
    with partial.open("wb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        save(file, make_cache())
        assert partial.exists()
    save(file, make_cache())
    assert not partial.exists()


def test_a_partial_file_deleted_before_it_is_locked_is_made_again(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process saves the same file and takes the unlocked one for abandoned."""
    flock, deleted = fcntl.flock, []

    def delete_first(descriptor: int, operation: int) -> None:
        partials = list(file.parent.glob(".talk.*.partial"))
        if operation == fcntl.LOCK_EX and partials and not deleted:
            deleted.extend(partials)
            _discard_abandoned(file)
            assert not deleted[0].exists()
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", delete_first)
    save(file, make_cache(), "after all")
    assert len(deleted) == 1
    assert load(file)[2] == "after all"
    assert os.listdir(file.parent) == ["talk"]


def test_a_new_partial_file_with_the_name_of_an_abandoned_one_is_kept(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between opening and locking, the process with that id begins to save again."""
    partial = file.with_name(".talk.1.partial")
    partial.touch()
    flock = fcntl.flock

    def replace_first(descriptor: int, operation: int) -> None:
        if operation & fcntl.LOCK_NB:
            partial.unlink()
            partial.write_text("newer")
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", replace_first)
    save(file, make_cache())
    assert partial.read_text() == "newer"


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo])
def test_what_is_no_plain_file_is_not_replaced(
    tmp_path: Path, make: Callable[[Path], None]
) -> None:
    make(tmp_path / "talk")
    with pytest.raises(OptionError, match="no plain file"):
        save(tmp_path / "talk", make_cache())
    with pytest.raises(
        OptionError, match=r"talk: no prompt cache can be written there .it is no plain file.; name"
    ):
        check_cache_file(tmp_path / "talk")
    with pytest.raises(OptionError, match="is no plain file"):
        load(tmp_path / "talk")


NOT_WRITABLE: dict[str, tuple[Callable[[Path], Path], str]] = {
    "under a file": (lambda home: home / "file" / "talk", "Not a directory"),
    "in no folder": (lambda home: home / "none" / "talk", "there is no folder .*none"),
    "in a loop of links": (lambda home: home / "loop" / "talk", "no folder|symbolic links"),
    "a loop of links": (lambda home: home / "loop", "symbolic links|no plain file"),
    "too long": (lambda home: home / ("a" * 300), "File name too long"),
    "too long while it is written": (lambda home: home / ("a" * 250), "File name too long"),
}


@pytest.mark.parametrize("case", NOT_WRITABLE)
def test_what_cannot_be_written_is_known_before(tmp_path: Path, case: str) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to("loop")
    before = sorted(tmp_path.iterdir())
    at, message = NOT_WRITABLE[case]
    with pytest.raises(
        OptionError, match=rf"can be written there \(.*({message}).*; name another file"
    ):
        check_cache_file(at(tmp_path))
    with pytest.raises(OptionError, match="could not be written"):
        save(at(tmp_path), make_cache())
    assert sorted(tmp_path.iterdir()) == before


def test_what_may_not_be_written_is_known_before(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_cache_file(file)
    for refused in (file, file.parent):
        monkeypatch.setattr(
            os, "access", lambda path, mode, refused=refused: Path(path) != refused
        )  # root may
        with pytest.raises(OptionError, match=r"Permission denied|may not be read and written"):
            check_cache_file(file)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="none/talk: the prompt cache could not be written"):
        save(tmp_path / "none" / "talk", make_cache())


@pytest.mark.parametrize(
    ("refusal", "calls"), [(None, ["full"]), (errno.ENOTSUP, ["full", "plain"])]
)
def test_on_macos_the_drive_itself_is_flushed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, refusal: int | None, calls: list[str]
) -> None:
    """Fcntl has F_FULLFSYNC there; a file system without it has fsync."""
    seen: list[str] = []

    def full(descriptor: int, command: int) -> None:
        assert command == 51
        seen.append("full")
        if refusal:
            raise OSError(refusal, "no")

    monkeypatch.setattr(fcntl, "F_FULLFSYNC", 51, raising=False)
    monkeypatch.setattr(fcntl, "fcntl", full)
    monkeypatch.setattr(os, "fsync", lambda descriptor: seen.append("plain"))
    flush(0)
    assert seen == calls


def test_mlx_reads_it_too(file: Path) -> None:
    found = mx.load(str(file), format="safetensors")
    assert isinstance(found, dict)
    assert mx.array_equal(found["layer.1.0"], make_cache().state()[1][0])
    assert np.array(found["chat"]).tobytes().decode() == CHAT
