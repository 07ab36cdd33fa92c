"""Editable and plain installs give the package's types to an editor in any folder."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

SCRIPT = """
from pathlib import Path
from typing import assert_type

import magistral_mlx as mm
from magistral_mlx.convert import convert_checkpoint

convert_checkpoint("source", "target", q_bits=4, q_method="round")
magistral = mm.load("demo", max_kv_size=1024, kv_bits=8)
assert_type(magistral, mm.Magistral)
reply = magistral.ask("What is 48 + 76?", mm.SamplingParams(seed=7))
assert_type(reply, mm.Reply)
assert_type(reply.usage, mm.Usage)
assert_type(magistral.ask("What is 48 + 76?", temperature=0.2, max_tokens=9), mm.Reply)
with magistral.stream([{"role": "user", "content": "And 124 * 3?"}]) as stream:
    for segment in stream:
        if isinstance(segment, mm.Text):
            assert_type(segment.text, str)
assert_type(stream.result(), mm.Reply)
samples = magistral.sample("What is 9 * 37?", n=5)
assert_type(samples, mm.Samples)


async def ask() -> None:
    async with magistral.astream("What is 48 + 76?", seed=7) as stream:
        async for segment in stream:
            assert_type(segment, mm.Segment)
    assert_type(await stream.result(), mm.Reply)
    assert_type(await magistral.aask("What is 48 + 76?"), mm.Reply)


chat = magistral.chat(keep_reasoning="none")
assert_type(chat, mm.Chat)
assert_type(chat.ask("How many r's are in strawberry?"), mm.Reply)
chat.save(Path("talk.cache"))
"""
MISTAKES = """
import magistral_mlx as mm
from magistral_mlx.convert import convert_checkpoint

mm.load("demo", kv_bits="8")
mm.load("demo", context=1024)
mm.SamplingParams(temperature="hot")
mm.load("demo").ask("What is 48 + 76?", temperature="hot")
mm.load("demo").ask("What is 48 + 76?", temp=0.2)
convert_checkpoint("source", "target", bits=4)
"""


@pytest.fixture(scope="module", params=["editable", "plain"])
def python(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the package into a new environment; return its interpreter."""
    folder = tmp_path_factory.mktemp(request.param)
    tree = folder / "tree"
    skipped = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, tree, symlinks=True, ignore=skipped)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
    found = folder / "venv" / "bin" / "python"
    site = f"python{sys.version_info.major}.{sys.version_info.minor}/site-packages"
    # The dependencies are those of this run. A path in a .pth file brings no .pth files of its own,
    # so this run's installation of the package stays out.
    (folder / "venv" / "lib" / site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    install = [sys.executable, "-m", "pip", "--python", found, "install", "--quiet", "--no-deps"]
    install += ["--no-build-isolation", "--disable-pip-version-check"]
    install += ["--editable", tree] if request.param == "editable" else [tree]
    subprocess.run(install, check=True, capture_output=True)
    return found


def run(command: list[str | Path], folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a command in a folder outside the clone, without the clone on the path."""
    without = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        command, cwd=folder, env=without, capture_output=True, text=True, check=False
    )


def check(python: Path, script: str, folder: Path) -> subprocess.CompletedProcess[str]:
    (folder / "script.py").write_text(script)
    mypy = [sys.executable, "-m", "mypy", "--strict", "--cache-dir", python.parents[2] / "mypy"]
    return run([*mypy, "--python-executable", python, "script.py"], folder)


@pytest.mark.slow
def test_a_script_outside_the_clone_is_checked_strictly(python: Path, tmp_path: Path) -> None:
    done = check(python, SCRIPT, tmp_path)
    assert "no issues found" in done.stdout, done.stdout + done.stderr


@pytest.mark.slow
def test_a_wrong_option_is_found_before_the_script_runs(python: Path, tmp_path: Path) -> None:
    done = check(python, MISTAKES, tmp_path)
    lines = {line.split(":")[1] for line in done.stdout.splitlines() if ": error:" in line}
    assert lines == {"5", "6", "7", "8", "9", "10"}, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("place", ["the clone", "elsewhere"])
def test_both_packages_are_imported_anywhere(python: Path, tmp_path: Path, place: str) -> None:
    folder = python.parents[2] / "tree" if place == "the clone" else tmp_path
    code = "import magistral_mlx.convert.verify, magistral_mlx.generate"
    done = run([python, "-c", code], folder)
    assert done.returncode == 0, done.stderr
