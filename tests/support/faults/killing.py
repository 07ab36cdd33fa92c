"""Kill conversions of one source by signal 9, each in its own process, and finish them.

Tests run it in a fresh interpreter: a process may fork only before MLX has started its threads.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import magistral_mlx.convert.calibration.corpus
import magistral_mlx.convert.pipeline.conversion
import magistral_mlx.convert.pipeline.prepare
import magistral_mlx.convert.pipeline.rowwise
from magistral_mlx.convert.recipe.layout import make_plan
from magistral_mlx.errors import MagistralError
from magistral_mlx.tokenizer.tekken import Tokenizer

# Calls that change a disk; each is a boundary to be killed at.
CALLS = ("pwrite", "fsync", "rename", "unlink", "rmdir", "mkdir", "open")
# Small enough for several files of the tiny source, with several blocks each.
FILE_BYTES, BLOCK_BYTES = 150_000, 60_000
# Blocks that may wait for their search while the forward pass continues.
MAX_QUEUED_BLOCKS = 3
# Ids of a calibration sequence.
WINDOW = 48


def in_small_pieces(set_attribute: Callable[[object, str, object], None] = setattr) -> None:
    """Let conversions of this process write many files and calibrate on few ids."""
    set_attribute(
        magistral_mlx.convert.pipeline.prepare,
        "make_plan",
        partial(make_plan, max_bytes=FILE_BYTES),
    )
    set_attribute(magistral_mlx.convert.pipeline.rowwise, "QUANTIZE_BLOCK_BYTES", BLOCK_BYTES)
    set_attribute(magistral_mlx.convert.pipeline.rowwise, "MAX_QUEUED_BLOCKS", MAX_QUEUED_BLOCKS)
    set_attribute(magistral_mlx.convert.calibration.corpus, "WINDOW", WINDOW)


def count_calls(at: int, then: Callable[[], None], names: Sequence[str] = CALLS) -> list[int]:
    """Count the calls of ``os`` that change a disk; before call number ``at`` do ``then``."""
    count, counting = [0], threading.Lock()

    def counted(call: Callable[..., object], *args: object, **kwargs: object) -> object:
        with counting:
            count[0] += 1
            if count[0] == at:
                then()
        return call(*args, **kwargs)

    for name in names:
        setattr(os, name, partial(counted, getattr(os, name)))
    return count


def run_in_child(work: Callable[[], None], kill_after: float | None = None) -> bool:
    """Run work in a forked child; tell if it was killed. A child that lives must succeed."""
    child = os.fork()
    if not child:
        try:
            work()
        # The parent reads the exit code alone.
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
        os._exit(0)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return True
    assert status == 0, f"a conversion ended with {status}"
    return False


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("source", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--old", type=Path)
    parser.add_argument("--method", default="round")
    parser.add_argument("--boundaries", type=int)
    parser.add_argument("--moments", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    options = parse()
    in_small_pieces()
    # Import mistral-common once, and not in every child.
    Tokenizer.from_folder(options.source)
    target = options.folder / "t" / "out"
    target.parent.mkdir()
    new, old = content(options.new), options.old and content(options.old)
    force = options.old is not None
    rng = random.Random(0)

    def convert_it() -> None:
        magistral_mlx.convert.pipeline.conversion.convert_checkpoint(
            options.source, target, q_method=options.method, tokenizer_json=False, force=force
        )

    def counting() -> None:
        count = count_calls(-1, lambda: None)
        started = time.monotonic()
        convert_it()
        (options.folder / "counted").write_text(json.dumps([count[0], time.monotonic() - started]))

    def dying(at: int) -> None:
        count_calls(at, lambda: os.kill(os.getpid(), signal.SIGKILL))
        convert_it()

    def set_up() -> None:
        shutil.rmtree(target.parent)
        target.parent.mkdir()
        if options.old:
            shutil.copytree(options.old, target)

    def check() -> None:
        """Check that the target is whole, unchanged or missing, and whole after a second run."""
        assert not target.exists() or content(target) in (new, old), "half a target"
        run_in_child(convert_it)
        assert content(target) == new, "not the same after resuming"
        assert os.listdir(target.parent) == ["out"], os.listdir(target.parent)

    set_up()
    run_in_child(counting)
    boundaries, seconds = json.loads((options.folder / "counted").read_text())
    killed = 0
    if options.moments:
        for _ in range(options.moments):
            set_up()
            killed += run_in_child(convert_it, kill_after=rng.uniform(0, seconds))
            check()
    else:
        chosen = range(1, boundaries + 1)
        for at in sorted(rng.sample(chosen, options.boundaries)) if options.boundaries else chosen:
            set_up()
            killed += run_in_child(partial(dying, at))
            check()
    print(
        json.dumps(
            {"boundaries": boundaries, "killed": killed, "milliseconds": round(1000 * seconds)}
        )
    )


if __name__ == "__main__":
    try:
        main()
    except (AssertionError, MagistralError) as error:
        sys.exit(str(error))
