"""Kill saves of a cache by signal 9 before each call that changes a disk.

The file must be the old or the new one afterwards.

Tests run it in a fresh interpreter: a process may fork only before MLX has started its threads.
"""

import json
import os
import shutil
import signal
import sys
from functools import partial
from pathlib import Path

import mlx.core as mx

from magistral_mlx.model.cache_file import load_cache, save_cache
from magistral_mlx.model.kv_cache import KVCache
from magistral_mlx.model.kv_format import UNQUANTIZED
from tests.support.faults.killing import count_calls, run_in_child
from tests.support.tiny import make_config

CONFIG = make_config()
CALLS = ("open", "write", "fchmod", "fsync", "rename", "unlink")
LENGTHS = {"old": 3, "new": 5}


def save(path: Path, which: str) -> None:
    length = LENGTHS[which]
    cache = KVCache(CONFIG, limit=256)
    for layer in cache.layers:
        layer.append(
            [mx.full((1, 2 * CONFIG.num_kv_heads, length, CONFIG.head_dim), float(length))]
        )
    save_cache(
        path,
        cache,
        range(length),
        fingerprint="f",
        dtype=mx.float32,
        chat=which,
        may_replace=lambda _: True,
    )


def count(path: Path, told: Path) -> None:
    counted = count_calls(-1, lambda: None, CALLS)
    save(path, "new")
    calls = counted[0]
    told.write_text(str(calls))


def die(path: Path, at: int) -> None:
    count_calls(at, lambda: os.kill(os.getpid(), signal.SIGKILL), CALLS)
    save(path, "new")


def check(path: Path) -> None:
    cache, ids, which, _ = load_cache(
        path, CONFIG, limit=256, fingerprint="f", kv_format=UNQUANTIZED, dtype=mx.float32
    )
    assert cache.length == len(ids) == LENGTHS[which]
    assert all(mx.all(a == len(ids)).item() for parts in cache.state() for a in parts)


def main() -> None:
    folder = Path(sys.argv[1])
    path, told = folder / "t" / "talk", folder / "told"
    path.parent.mkdir()
    contents = {}
    for which in LENGTHS:
        run_in_child(partial(save, path, which))
        contents[which] = path.read_bytes()
    found: dict[str, list[str | None]] = {}
    for before in ("old", None):
        reset(path, contents.get(before or ""))
        run_in_child(partial(count, path, told))
        found[str(before)] = []
        for at in range(1, int(told.read_text()) + 1):
            reset(path, contents.get(before or ""))
            assert run_in_child(partial(die, path, at))
            now = path.read_bytes() if path.exists() else None
            found[str(before)].append(
                {contents["old"]: "old", contents["new"]: "new", None: None}[now]
            )
    # The last save had renamed its file already.
    assert len(os.listdir(path.parent)) == 1
    reset(path, None)
    run_in_child(partial(die, path, 5))
    (abandoned,) = os.listdir(path.parent)
    # The next save deletes the file of a killed process.
    run_in_child(partial(save, path, "new"))
    assert os.listdir(path.parent) == ["talk"], abandoned
    run_in_child(partial(check, path))
    print(json.dumps(found))


def reset(path: Path, content: bytes | None) -> None:
    shutil.rmtree(path.parent)
    path.parent.mkdir()
    if content is not None:
        path.write_bytes(content)


if __name__ == "__main__":
    main()
