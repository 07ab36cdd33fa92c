"""A host in C drives the bridge: no exception crosses, nothing hangs, and the process ends."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.support.host.libpython import how_to_get_it, shared_library

ROOT = Path(__file__).parents[2]
LIBRARY = shared_library()
COMPILER = shutil.which("gcc") or shutil.which("cc")

pytestmark = [
    pytest.mark.skipif(LIBRARY is None, reason=how_to_get_it()),
    pytest.mark.skipif(
        COMPILER is None, reason="no C compiler; on Debian and Ubuntu: sudo apt install gcc"
    ),
]


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Path:
    program = tmp_path_factory.mktemp("host") / "host"
    options = [
        "-std=gnu11",
        "-O1",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-fsanitize=undefined",
        "-fno-sanitize-recover",
    ]
    source = str(ROOT / "tests" / "support" / "host" / "host.c")
    subprocess.run(
        [str(COMPILER), *options, source, "-o", str(program), "-ldl", "-lpthread"], check=True
    )
    return program


def run(host: Path, folder: Path, streams: int, ending: str) -> dict[str, float]:
    """Let the host drive the bridge and return its report."""
    paths = ":".join(dict.fromkeys([sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]))
    environment = os.environ | {
        "PYTHONHOME": sys.base_prefix if sys.base_prefix == sys.base_exec_prefix else ""
    }
    done = subprocess.run(
        [str(host), str(LIBRARY), paths, str(folder), str(streams), ending],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        timeout=500,
        check=False,
    )
    report = (folder / "report").read_text()
    assert "died" not in report, report + done.stderr
    assert (done.returncode, done.stderr) == (0, ""), report
    lines = [line.split() for line in report.splitlines()]
    return {name: float(value) for name, value in lines}


def check(seen: dict[str, float], streams: int) -> None:
    assert seen["ended"] == streams
    assert seen["cancelled"] == (streams + 4) // 10
    assert seen["refused"] == 21
    assert seen["threads"] == 3
    assert seen["ended_again"] == 3
    assert seen["resumed_tokens"] > 40
    assert seen["bytes_after_close"] < 0.01 * 1_604_352  # of the model
    assert seen["ended_by_itself"] == 1


@pytest.mark.slow
def test_a_host_in_c_drives_the_bridge(host: Path, tmp_path: Path) -> None:
    seen = run(host, tmp_path, 6, "finalize")
    check(seen, 6)
    assert seen["finalized"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["finalize", "exit", "closed"])
def test_a_host_in_c_drives_a_hundred_streams(host: Path, tmp_path: Path, ending: str) -> None:
    check(run(host, tmp_path, 100, ending), 100)
