"""Checkpoints damaged by hand: one clear error, soon, in little memory."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.corpus import ALLOWED_BYTES, SOUND, faults_of, take, write_kinds
from tests.support.faults.malformed import CASES

ROOT = Path(__file__).parents[2]
HEAVY = (
    "no end",
    "zeros",
    "over its limit",
    "10 MB",
    "00,000",
    "million",
    "megabyte",
    "nested",
    "digits",
)

OPEN_ALL = """
import json, sys
from pathlib import Path
from magistral_mlx.errors import MagistralError
from tests.support.corpus import SOUND, Watch, take
kinds, cases = Path(sys.argv[1]), json.loads(sys.argv[2])
for kind, step in SOUND:
    take(step, kinds / kind)
watch = Watch()
for step, folder in cases:
    with watch.case():
        try:
            take(step, Path(folder))
        except MagistralError:
            pass
print(json.dumps(watch.figures()))
"""


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_kinds(tmp_path_factory.mktemp("kinds"))


def test_undamaged_every_kind_opens(kinds: Path) -> None:
    for kind, step in (*SOUND, ("community", "load")):
        take(step, kinds / kind)


@pytest.mark.parametrize("case", CASES)
def test_a_malformed_checkpoint_is_refused_in_one_line_that_helps(
    kinds: Path, tmp_path: Path, case: str
) -> None:
    kind, steps, damage, words = CASES[case]
    folder = shutil.copytree(kinds / kind, tmp_path / "model")
    damage(folder)
    for step in steps:
        with pytest.raises(Exception) as caught:  # noqa: PT011  # faults_of checks its type
            take(step, folder)
        assert not faults_of(caught.value, folder), f"{step}: {caught.value!r}"[:2000]
        assert words in str(caught.value), step


@pytest.mark.slow
def test_the_largest_of_them_take_little_memory_and_time(kinds: Path, tmp_path: Path) -> None:
    """Run them in a process of their own and measure its peak."""
    heavy = []
    for i, name in enumerate(CASES):
        kind, steps, damage, _ = CASES[name]
        if any(words in name for words in HEAVY):
            damage(shutil.copytree(kinds / kind, tmp_path / str(i)))
            heavy.append((steps[0], str(tmp_path / str(i))))
    assert len(heavy) > 30
    command = [sys.executable, "-c", OPEN_ALL, str(kinds), json.dumps(heavy)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert figures["growth_bytes"] < ALLOWED_BYTES
