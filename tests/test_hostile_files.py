"""Input that an attacker makes, at random: one clear error or a sound result, in little memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.corpus import ALLOWED_BYTES

ROOT = Path(__file__).parents[1]


def check(folder: Path, count: int, seed: int) -> None:
    """Run in a process of its own, which a crash or a hang ends."""
    command = [sys.executable, "-m", "tests.support.faults.hostile"]
    done = subprocess.run(
        [*command, str(folder), str(count), str(seed)],
        cwd=ROOT,
        env=os.environ | {"RUST_BACKTRACE": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert not found["faults"], "\n".join(found["faults"][:20])
    assert sum(found["endings"].values()) == count
    assert found["growth_bytes"] < ALLOWED_BYTES


def test_some_hostile_tokenizers_names_caches_and_messages(tmp_path: Path) -> None:
    check(tmp_path, 30, 0)


@pytest.mark.slow
def test_five_thousand_hostile_tokenizers_names_caches_and_messages(tmp_path: Path) -> None:
    check(tmp_path, 5_000, 1)
