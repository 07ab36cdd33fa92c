"""The command ``magistral``: its commands, its exit codes and its completion."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from click.shell_completion import shell_complete

from magistral_mlx import __version__
from magistral_mlx.__main__ import COMMANDS, command, main

ROOT = Path(__file__).parents[2]


def test_the_group_offers_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    listed = capsys.readouterr().out
    assert all(f"  {name} " in listed for name in COMMANDS)
    # No summary is cut.
    assert "..." not in listed.partition("Ask:")[2]


def test_the_names_of_other_tools_work(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ls", "--help"]) == 0
    assert main(["rm", "--help"]) == 0
    out = capsys.readouterr().out
    assert "List the models" in out
    assert "Remove a model" in out


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert __version__ in capsys.readouterr().out


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_examples(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([name, "--help"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith(f"Usage: magistral {name} ")
    assert f"\n    magistral {name}" in out.partition("Examples:")[2]
    assert "Exit codes: 0" in out
    assert [line for line in out.splitlines() if len(line) > 80] == []
    assert err == ""


@pytest.mark.parametrize(
    "arguments", [[], ["nothing"], ["--nothing"], ["plan", "--nothing"], ["plan", "demo", "extra"]]
)
def test_an_unknown_command_is_exit_2(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: " if arguments else "Usage: magistral")
    assert err.endswith(" --help shows the options\n") or not arguments
    assert out == ""


@pytest.mark.parametrize(("typed", "meant"), [("chatt", "chat"), ("Run", "run")])
def test_a_misspelled_command_is_told_the_nearest(
    typed: str, meant: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([typed]) == 2
    assert f"No such command '{typed}'. Did you mean {meant}?" in capsys.readouterr().err


def test_a_command_is_imported_when_it_is_called() -> None:
    probe = (
        "import sys; from magistral_mlx.__main__ import main; main(['plan']); "
        "sys.exit(any(m in sys.modules for m in ('magistral_mlx.generate', 'magistral_mlx.chat')))"
    )
    subprocess.run([sys.executable, "-c", probe], cwd=ROOT, check=True, capture_output=True)


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("generate --max-k", "plain,--max-kv-size"),
        ("generate --model ", "dir,"),
        ("generate --model d", "dir,d plain,demo"),
        ("chat d", "dir,d plain,demo"),
        ("config top", "plain,top-p"),
        ("generate --draft-model ", "dir,"),
        ("generate --file ", "file,"),
        ("generate --prompt-cache-file ", "file,"),
        ("plan --model ", "dir,"),
        ("convert --hf-path ", "dir,"),
        ("convert --mlx-path ", "dir,"),
        ("convert --recipe m", "plain,mixed_4_6 file,m"),
        ("convert --calibration ", "plain,self file,"),
        ("verify ", "dir,"),
        ("verify --hf-path ", "dir,"),
    ],
)
def test_a_shell_completes_flags_folders_files_and_names(
    line: str,
    offered: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("MAGISTRAL_MLX_STATE", str(tmp_path))  # knows no models
    monkeypatch.setenv("COMP_WORDS", f"magistral {line}")
    monkeypatch.setenv("COMP_CWORD", str(line.count(" ") + 1))
    shell_complete(command, {}, "magistral", "_MAGISTRAL_COMPLETE", "bash_complete")
    assert capsys.readouterr().out.split("\n")[:-1] == offered.split(" ")


def test_a_reader_that_goes_away_is_no_error() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "magistral_mlx", "plan"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 0
    process.stderr.close()


def test_output_before_an_error_is_not_lost() -> None:
    probe = (
        "import sys, click; from magistral_mlx.terminal import command_line\n"
        "def work(): print('so far'); open('/no/such/file')\n"
        "sys.exit(command_line.run(click.Command('x', callback=work), []))"
    )
    done = subprocess.run(
        [sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (2, "so far\n")
    assert "/no/such/file" in done.stderr


@pytest.mark.parametrize(
    ("redirection", "code", "said"),
    [
        (">/dev/full", 2, "error: [Errno 28] No space left on device\n"),
        pytest.param(">&-", 0, "", marks=pytest.mark.slow),
        ("<&- 2>&- >out", 0, ""),
        pytest.param("2>/dev/full >out", 0, "", marks=pytest.mark.slow),
    ],
)
def test_standard_streams_that_are_full_or_closed(
    tmp_path: Path, redirection: str, code: int, said: str
) -> None:
    if "full" in redirection and not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    line = f"{shlex.quote(sys.executable)} -m magistral_mlx.plan {redirection}"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["sh", "-c", line],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (code, said)
    assert "out" not in redirection or "24 GB" in (tmp_path / "out").read_text()
