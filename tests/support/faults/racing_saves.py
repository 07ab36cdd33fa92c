"""Save one conversation many times, beside other processes that save the same one.

Each save adds one to a count that the file holds, and is refused if the file has changed since it
was read. Then it is read again. So the count at the end is the number of saves, if none is lost.
"""

import sys
from pathlib import Path

import mlx.core as mx

from magistral_mlx.errors import OverwriteError
from magistral_mlx.model.cache_file import load_cache, save_cache
from magistral_mlx.model.kv_cache import KVCache
from magistral_mlx.model.kv_format import UNQUANTIZED
from tests.support.tiny import make_config

CONFIG = make_config()


def save(path: Path, count: int, stamp: bytes) -> None:
    """Write the count over the file with this stamp."""
    empty = KVCache(CONFIG, limit=256)
    save_cache(
        path,
        empty,
        [],
        fingerprint="f",
        dtype=mx.float32,
        chat=str(count),
        may_replace=lambda found: found == stamp,
    )


def read(path: Path) -> tuple[int, bytes]:
    """Return the count in the file, and the file's stamp."""
    saved = load_cache(
        path, CONFIG, limit=256, fingerprint="f", kv_format=UNQUANTIZED, dtype=mx.float32
    )
    return int(saved.chat), saved.stamp


def main() -> None:
    path, saves = Path(sys.argv[1]), int(sys.argv[2])
    done = refused = 0
    while done < saves:
        count, stamp = read(path)
        try:
            save(path, count + 1, stamp)
        except OverwriteError:
            refused += 1
        else:
            done += 1
    print(refused)


if __name__ == "__main__":
    main()
