"""Programs in answers: found, run without a network and within limits, and held against the tests."""

import sys
from dataclasses import replace
from typing import Any

import pytest

from benchmarks.reasoning import sandbox as sandbox_module
from benchmarks.reasoning.programs import code_in, passes, program_of, same_output
from benchmarks.reasoning.sandbox import Sandbox, find_sandbox, resident_bytes
from magistral_mlx.errors import OptionError
from tests.support import published


@pytest.fixture(scope="module")
def sandbox() -> Sandbox:
    try:
        return find_sandbox()
    except OptionError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        ("```python\nprint(1)\n```", "print(1)\n"),
        ("```\nprint(1)\n```\n", "print(1)\n"),
        ("First\n```python\na\n```\nno:\n```py\nb\n```\ndone", "b\n"),
        ("1. so:\n   ```python\n   x = 1\n   ```", "   x = 1\n"),
        ("print(1)", None),
        ("```python\nprint(1)\n", None),
        ("use `print(1)`", None),
    ],
)
def test_the_last_block_is_the_program(answer: str, code: str | None) -> None:
    assert code_in(answer) == code


@pytest.mark.parametrize(
    ("printed", "wanted", "is_same"),
    [
        ("5\n", "5", True),
        ("  5  \n\n", "5\n", True),
        ("5.0", "5", True),
        ("0.50 1e2", "0.5 100", True),
        ("yes", "Yes", False),
        ("5\n6", "5 6", False),
        ("", "", True),
        ("5", "", False),
        ("nan", "x", False),
    ],
)
def test_output_is_held_line_by_line(printed: str, wanted: str, is_same: bool) -> None:
    assert same_output(printed, wanted) is is_same


FROM_STDIN, CALLED = (program_of(row, 1) for row in published.livecodebench_rows())


def block(code: str) -> str:
    return f"The idea is simple.\n\n```python\n{code}\n```\n"


@pytest.mark.parametrize(
    ("program", "code", "is_right"),
    [
        (FROM_STDIN, "a, b = map(int, input().split())\nprint(a + b)", True),
        (FROM_STDIN, "print(5)", False),  # passes the first test alone
        (FROM_STDIN, "print(", False),
        (CALLED, published.STARTER + "return [factor * v for v in values]", True),
        (
            CALLED,
            "def scale(values, factor):\n    print('noise')\n    return [factor * v for v in values]",
            True,
        ),
        (CALLED, published.STARTER + "return values", False),
        (CALLED, "class Solution:\n    pass", False),
    ],
)
def test_a_program_must_pass_every_test(
    sandbox: Sandbox, program: Any, code: str, is_right: bool
) -> None:
    assert passes(block(code), program, sandbox) is is_right


def test_an_answer_without_a_program_runs_nothing() -> None:
    assert not passes("print(5)", FROM_STDIN, Sandbox("none"))


CONNECT = """
import socket
try:
    socket.socket(socket.AF_INET, socket.SOCK_STREAM).connect(("127.0.0.1", {port}))
    print("connected")
except OSError:
    print("refused")
"""


def test_a_program_has_no_network(sandbox: Sandbox) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        socket.create_connection(("127.0.0.1", port)).close()  # from here it can be reached
        assert sandbox.run(CONNECT.format(port=port), "") == "refused\n"


def test_time_and_memory_are_limited(sandbox: Sandbox) -> None:
    short = replace(sandbox, seconds=0.3)
    assert short.run("while True: pass", "") is None
    assert (
        short.run(
            "import subprocess, sys\nsubprocess.run([sys.executable, '-c', 'while True: pass'])", ""
        )
        is None
    )
    small = replace(sandbox, memory_bytes=200 * 2**20)
    assert small.run("held = bytearray(10**7)\nprint(len(held))", "") == "10000000\n"
    assert small.run("held = bytearray(10**9)\nprint(len(held))", "") is None


def test_where_the_system_sets_no_limit_the_parent_watches(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a Mac: the command is this system's, the watching that of sandbox-exec."""
    confined = sandbox_module._confined
    monkeypatch.setattr(
        sandbox_module, "_confined", lambda kind, folder: confined(sandbox.kind, folder)
    )
    monkeypatch.setattr(
        sandbox_module,
        "START",
        sandbox_module.START.replace("resource.RLIMIT_AS", "resource.RLIMIT_CORE"),
    )
    watched = Sandbox("sandbox-exec", seconds=5, memory_bytes=150 * 2**20)
    assert (
        watched.run("import time\nheld = b'x' * (400 * 2**20)\ntime.sleep(4)\nprint(len(held))", "")
        is None
    )
    assert watched.run("print(7)", "") == "7\n"


def test_resident_bytes_are_of_this_process_and_its_children() -> None:
    import os

    assert resident_bytes(os.getpid()) > 2**24
    assert resident_bytes(2**30) == 0


@pytest.mark.parametrize("platform", ["linux", "darwin"])
def test_without_a_sandbox_nothing_is_run(monkeypatch: pytest.MonkeyPatch, platform: str) -> None:
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(OptionError, match="it is not on the PATH"):
        find_sandbox()


def test_a_sandbox_that_does_not_work_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: name)
    monkeypatch.setattr(sandbox_module, "_confined", lambda kind, folder: ["false"])
    with pytest.raises(OptionError, match="could not run a program without the network"):
        find_sandbox()


def test_a_mac_s_profile_denies_the_network_and_other_folders(tmp_path: Any) -> None:
    tool, flag, profile = sandbox_module._confined("sandbox-exec", tmp_path)
    assert (tool, flag) == ("sandbox-exec", "-p")
    assert "(deny network*)" in profile
    assert f'(deny file-write*)(allow file-write* (subpath "{tmp_path}"))' in profile
