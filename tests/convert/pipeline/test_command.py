"""``python -m magistral_mlx.convert``: flags, output, exit codes."""

import errno
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import magistral_mlx.convert.__main__ as command_line
from magistral_mlx.convert.__main__ import main
from tests.support.sources import content, write_consolidated, write_hf


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pristine")
    write_hf(folder / "hf")
    write_consolidated(folder / "native")
    return folder


def run(source: Path, target: Path, *flags: str) -> int:
    return main(
        ["--hf-path", str(source), "--mlx-path", str(target), "--no-tokenizer-json", *flags]
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["-q", "--q-bits", "16"], "-q quantizes, and --q-bits 16 (or -d) does not"),
        (["-q", "-d"], "-q quantizes, and --q-bits 16 (or -d) does not"),
        (["-d", "--q-bits", "4"], "-d packs nothing, and --q-bits 4 does"),
        (["-d", "--recipe", "8bit"], "leave"),
        (["--quant-predicate", "mixed_2_6"], "recipe is 'mixed_2_6'; a recipe is one of"),
        (["--upload-repo", "a/b"], "--upload-repo is another program's"),
        (["--dtype", "float16"], "keep the source's type, bfloat16; leave --dtype out"),
        (["--dtype", "int8"], "'int8' is not one of"),
        (["--trust-remote-code"], "no code from a checkpoint is ever run"),
        (["--q-bits", "7"], "7 bits in groups of 64 does not exist"),
        (["--q-bits", "four"], "'four' is not a valid integer"),
        (
            ["--recipe", "bits.json"],
            "recipe is 'bits.json'; a recipe is one of the names 4bit, 8bit",
        ),
        (["--layout", "gguf"], "'gguf' is not one of 'hf', 'consolidated'"),
        (["--q-method", "awq"], "'awq' is not"),
        (["--revision", "main"], "has no revision 'main'"),
        (["lies beside the weights"], "unexpected extra argument"),
    ],
)
def test_flags_that_cannot_be_honoured_exit_2(
    pristine: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    flags: list[str],
    message: str,
) -> None:
    assert run(pristine / "hf", tmp_path / "out", *flags) == 2
    assert message in capfd.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_command_line_converts_and_says_so(
    pristine: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(pristine / "hf", tmp_path / "out", "--json") == 0
    result = json.loads(capfd.readouterr().out)
    assert result.pop("seconds") >= 0
    assert set(result) == {
        "target",
        "bytes_in",
        "bytes_out",
        "bits_per_weight",
        "already_complete",
        "gain",
    }
    assert result["target"] == str(tmp_path / "out")
    assert not result["already_complete"]
    before = content(tmp_path / "out")
    assert run(pristine / "hf", tmp_path / "out") == 0
    assert capfd.readouterr() == (
        f"{tmp_path / 'out'}: already complete (magistral verify looks at its weights)\n",
        "",
    )
    assert run(pristine / "hf", tmp_path / "out", "--q-bits", "8") == 2
    assert content(tmp_path / "out") == before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (["-q", "--dtype", "bfloat16"], []),
        (["--quantize", "--quant-predicate", "mixed_4_6"], ["--recipe", "mixed_4_6"]),
        (["-d"], ["--q-bits", "16"]),
    ],
)
def test_what_mlx_lm_users_type_is_taken(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], theirs: list[str], ours: list[str]
) -> None:
    flags = ["--mlx-path", str(tmp_path / "out"), "--no-tokenizer-json", "--dry-run", "--json"]
    assert main(["--model", "demo", *flags, *theirs]) == 0
    forecast = capfd.readouterr().out
    assert main(["--hf-path", "demo", *flags, *ours]) == 0
    assert capfd.readouterr().out == forecast


def test_a_dry_run_forecasts_exactly_and_writes_nothing(
    pristine: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    flags = ("--recipe", "4bit-head6")
    assert run(pristine / "hf", tmp_path / "out", *flags, "--dry-run") == 0
    text = capfd.readouterr().out
    assert "  lm_head       6 bit\n" in text
    assert "  down_proj     4 bit\n" in text
    assert run(pristine / "native", tmp_path / "out", *flags, "--dry-run", "--json") == 0
    forecast = json.loads(capfd.readouterr().out)
    assert not list(tmp_path.iterdir())
    assert run(pristine / "native", tmp_path / "out", *flags, "--json") == 0
    assert json.loads(capfd.readouterr().out)["bytes_out"] == forecast["bytes_out"]
    assert forecast["files"] == {
        "model.safetensors": (tmp_path / "out" / "model.safetensors").stat().st_size
    }


@pytest.mark.slow
def test_two_layouts_are_said_on_one_line(
    pristine: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for layout in ("hf", "native"):
        shutil.copytree(pristine / layout, tmp_path / "both", dirs_exist_ok=True)
    assert run(tmp_path / "both", tmp_path / "out") == 0
    assert (
        len(
            [
                line
                for line in capfd.readouterr().err.splitlines()
                if "--layout consolidated" in line
            ]
        )
        == 1
    )


@pytest.mark.parametrize(
    ("error", "code"),
    [(KeyboardInterrupt(), 130), (OSError(errno.EROFS, "Read-only file system"), 2)],
)
def test_exit_codes(
    pristine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int
) -> None:
    def stop(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr("os.pwrite", stop)
    assert run(pristine / "hf", tmp_path / "out") == code
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(command_line, "check_conversion", stop)
    if code == 130:
        assert run(pristine / "hf", tmp_path / "out") == code


def test_an_interruption_says_what_is_kept(
    pristine: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    def stop(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.pwrite", stop)
    assert run(pristine / "hf", tmp_path / "out") == 130
    assert "interrupted; nothing was finished yet" in capfd.readouterr().err
    monkeypatch.undo()
    monkeypatch.setattr(
        "magistral_mlx.convert.pipeline.conversion.write_documents", stop
    )  # all weights are there
    assert run(pristine / "hf", tmp_path / "out") == 130
    assert (
        f"interrupted; what is finished is kept in {tmp_path / 'out.partial'}; run"
        in capfd.readouterr().err
    )
    monkeypatch.undo()
    assert run(pristine / "hf", tmp_path / "out") == 0


def test_help_has_examples(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capfd.readouterr().out
    assert "Examples:" in text
    assert "mixed_4_6" in text


def test_importing_the_package_imports_no_stage() -> None:
    """Check that ``python -m`` of a module does not warn that it is imported already."""
    code = (
        "import magistral_mlx.convert, sys; "
        "sys.exit(any(name.startswith('magistral_mlx.convert.') for name in sys.modules))"
    )
    root = Path(__file__).parents[3]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0
