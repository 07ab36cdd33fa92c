"""Checkpoints damaged at random: one clear error or a sound result, soon, in little memory."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.corpus import ALLOWED_BYTES, write_kinds

ROOT = Path(__file__).parents[2]


FOREIGN = ("hf", "community", "native")


def check(folder: Path, count: int, seed: int, *kinds: str) -> None:
    """Run in a process of its own, which a crash or a hang ends."""
    command = [
        sys.executable,
        "-m",
        "tests.support.faults.mutating",
        str(write_kinds(folder)),
        str(count),
        str(seed),
        *kinds,
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert not found["faults"], "\n".join(found["faults"][:20])
    assert sum(found["endings"].values()) == count
    assert found["endings"]["refused"] > count / 2
    assert found["endings"]["harmless"] > count / 50  # spaces, and keys in another order
    assert found["growth_bytes"] < ALLOWED_BYTES


def test_some_checkpoints_damaged_at_random(tmp_path: Path) -> None:
    check(tmp_path, 150, 0, *FOREIGN)


@pytest.mark.slow
def test_ten_thousand_checkpoints_damaged_at_random(tmp_path: Path) -> None:
    check(tmp_path, 10_000, 1, *FOREIGN)


def test_some_of_our_own_output_damaged_at_random(tmp_path: Path) -> None:
    check(tmp_path, 150, 2, "own")


@pytest.mark.slow
def test_three_thousand_of_our_own_output_damaged_at_random(tmp_path: Path) -> None:
    """Every change to a header, the index, the config or the tokenizer is noticed."""
    check(tmp_path, 3_000, 3, "own")
