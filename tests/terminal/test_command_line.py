"""End of every command line: one form of error, exit codes, broken streams, early Ctrl-C."""

import os
import subprocess
import sys
from pathlib import Path

import click
import pytest

from magistral_mlx.errors import OptionError, named
from magistral_mlx.startup import is_command
from magistral_mlx.terminal import command_line

ROOT = Path(__file__).parents[2]


@click.command("work")
@click.option("--max-tokens", type=int, required=True)
def work(*, max_tokens: int) -> int:
    """Work."""
    raise OptionError(f"{named('max_tokens')} is {max_tokens} in \x1b[31mred")


def test_an_error_names_the_flag_and_a_terminal_obeys_nothing(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert command_line.run(work, ["--max-tokens", "0"]) == 2
    assert capsys.readouterr() == ("", "error: --max-tokens is 0 in \\x1b[31mred\n")


@pytest.mark.parametrize("arguments", [[], ["--nothing"], ["--max-tokens", "x"], ["extra"]])
def test_a_wrong_command_line_has_the_form_of_every_error(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert command_line.run(work, arguments, "work") == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.endswith("\nwork --help shows the options\n")


def test_a_message_about_what_was_typed_is_of_bounded_length(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert command_line.run(work, ["--max-tokens", "9" * 9000], "work") == 2
    assert len(capsys.readouterr().err) < 1200


def test_h_is_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line.run(work, ["-h"]) == 0
    assert "Usage: " in capsys.readouterr().out


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize(
    "redirection", ["2>/dev/full", pytest.param("2</dev/null", marks=pytest.mark.slow)]
)
def test_the_answer_arrives_though_stderr_takes_nothing(redirection: str) -> None:
    probe = (
        "import sys, click, logging; from magistral_mlx.terminal import command_line\n"
        "def work():\n"
        "    logging.getLogger('magistral_mlx').warning('w'); print('t', file=sys.stderr)\n"
        "    sys.stderr.flush(); print('answer')\n"
        "sys.exit(command_line.run(click.Command('x', callback=work), []))"
    )
    done = subprocess.run(
        ["sh", "-c", f'exec "$0" -c "$1" {redirection}', sys.executable, probe],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, b"answer\n")


def test_ctrl_c_during_the_imports_is_exit_130_without_a_traceback(tmp_path: Path) -> None:
    (tmp_path / "mlx").mkdir()
    (tmp_path / "mlx" / "__init__.py").write_text(
        "import os, signal; os.kill(os.getpid(), signal.SIGINT)"
    )
    done = subprocess.run(
        [sys.executable, "-m", "magistral_mlx.plan"],
        env=os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
        capture_output=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, b"", b"")


@pytest.mark.parametrize(
    ("argv", "original", "expected"),
    [
        (["-m"], ["python", "-X", "dev", "-m", "magistral_mlx.chat", "--model", "demo"], True),
        (["-m"], ["python", "-m", "magistral_mlx"], True),
        (["/usr/local/bin/magistral", "plan"], ["python", "/usr/local/bin/magistral"], True),
        (["-m"], ["python", "-m", "app"], False),
        (["app.py", "-m", "magistral_mlx"], ["python", "app.py", "-m", "magistral_mlx"], False),
        ([""], ["host"], False),
        ([], [], False),
    ],
)
def test_only_our_own_command_lines_end_at_once(
    argv: list[str], original: list[str], expected: bool
) -> None:
    assert is_command(argv, original) is expected
