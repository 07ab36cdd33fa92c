"""End conversions in every way: the target is whole or unchanged, the same command resumes."""

import errno
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import magistral_mlx.convert.pipeline.conversion
from magistral_mlx.convert import stream_conversion
from magistral_mlx.convert.output.journal import JOURNAL
from magistral_mlx.convert.output.staging import Staging
from magistral_mlx.errors import ConversionError
from magistral_mlx.streams import Stream
from tests.support.faults.killing import in_small_pieces
from tests.support.sources import CONFIG, content, convert_quickly, write_hf

CALLS = ("pwrite", "fsync", "rename", "unlink", "mkdir", "open")


QUICK: dict[str, Any] = {"q_method": "round", "tokenizer_json": False}


@pytest.fixture(scope="module", autouse=True)
def several_files() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        in_small_pieces(patch.setattr)
        yield


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hf(tmp_path_factory.mktemp("source") / "hf")


@pytest.fixture(scope="module")
def old_and_new(tmp_path_factory: pytest.TempPathFactory, source: Path) -> tuple[Path, Path]:
    """Make the old target of a forced conversion, and its new one."""
    folder = tmp_path_factory.mktemp("results")
    convert_quickly(source, folder / "old", q_bits=8)
    convert_quickly(source, folder / "new")
    return folder / "old", folder / "new"


CHANGES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_DIRECTORY


@contextmanager
def failing(call: str, at: int, error: BaseException) -> Iterator[list[int]]:
    """Let the ``at``-th of the calls ``os.<call>`` raise; yields the running count."""
    original, count, counting = getattr(os, call), [0], threading.Lock()

    def wrapped(*args: Any, **kwargs: Any) -> object:
        # To open a file for reading changes nothing, and no full disk prevents it.
        if call == "open" and not args[1] & CHANGES:
            return original(*args, **kwargs)
        with counting:
            count[0] += 1
            now = count[0] == at
        if now:
            raise error
        return original(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, call, wrapped)
        yield count


@pytest.mark.parametrize("has_target", [False, True], ids=["new", "forced"])
@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()], ids=type
)
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.slow
def test_after_a_failure_at_any_boundary_the_same_command_goes_on(
    *,
    tmp_path: Path,
    source: Path,
    old_and_new: tuple[Path, Path],
    call: str,
    error: OSError | KeyboardInterrupt,
    has_target: bool,
) -> None:
    old, new = map(content, old_and_new)
    with failing(call, -1, error) as count:
        convert_quickly(source, tmp_path / "counted")
    raised: list[BaseException] = []
    for at in sorted({1, 2, count[0] // 3, 2 * count[0] // 3, count[0] - 1, count[0]}):
        folder = tmp_path / f"{at}"
        target = folder / "out"
        if has_target:
            shutil.copytree(old_and_new[0], target)
        with failing(call, at, error):
            try:
                convert_quickly(source, target, force=has_target)
            except (ConversionError, KeyboardInterrupt) as end:
                raised.append(end)
        if has_target or target.exists():
            assert content(target) in ((old, new) if has_target else (new,))
        convert_quickly(source, target, force=has_target)
        assert content(target) == new
        assert [path.name for path in folder.iterdir()] == ["out"]
        shutil.rmtree(folder)
    assert raised
    if isinstance(error, KeyboardInterrupt):
        assert all(isinstance(end, KeyboardInterrupt) for end in raised)
    else:
        assert all("is full" in str(end) and "to resume" in str(end) for end in raised)


@pytest.mark.parametrize(
    "stage", ["build_documents", "plan_record", "write_documents", "open_checkpoint"]
)
def test_ctrl_c_in_any_phase_loses_nothing(
    tmp_path: Path, source: Path, old_and_new: tuple[Path, Path], stage: str
) -> None:
    def stop(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(magistral_mlx.convert.pipeline.conversion, stage, stop)
        with pytest.raises(KeyboardInterrupt):
            convert_quickly(source, tmp_path / "a" / "b" / "out")
    assert not (tmp_path / "a" / "b" / "out").exists()
    convert_quickly(source, tmp_path / "a" / "b" / "out")
    assert content(tmp_path / "a" / "b" / "out") == content(old_and_new[1])


def test_a_conversion_let_go_at_once_leaves_nothing(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "magistral_mlx.convert.pipeline.rowwise.QUANTIZE_BLOCK_BYTES", 5_000
    )  # so that no file is whole by the blocks begun
    steps = stream_conversion(source, tmp_path / "a" / "out", q_method="round")
    assert next(steps).name in CONFIG.shapes
    steps.close()
    assert not list(tmp_path.iterdir())


def stopped(source: Path, target: Path, files: int) -> Path:
    """Stop a conversion after some finished files; return its partial folder."""
    partial = target.with_name(target.name + ".partial")
    for _ in (steps := stream_conversion(source, target, **QUICK)):
        if len((partial / JOURNAL).read_text().splitlines()) > files:
            break
    steps.close()
    return partial


def test_finished_files_are_not_written_again(
    tmp_path: Path, source: Path, old_and_new: tuple[Path, Path]
) -> None:
    partial = stopped(source, tmp_path / "out", 2)
    kept = {path.name: path.stat().st_ino for path in partial.glob("*.safetensors")}
    assert len(kept) >= 2
    convert_quickly(source, tmp_path / "out")
    assert {name: (tmp_path / "out" / name).stat().st_ino for name in kept} == kept
    assert content(tmp_path / "out") == content(old_and_new[1])


def flip(path: Path) -> None:
    damaged = bytearray(path.read_bytes())
    damaged[-1] ^= 1
    path.write_bytes(damaged)


TAMPERED: dict[str, Callable[[Path, Path], object]] = {
    "a byte of a finished file": lambda partial, file: flip(file),
    "a finished file cut": lambda partial, file: os.truncate(file, 99),
    "a finished file gone": lambda partial, file: file.unlink(),
    "the journal's end torn": lambda partial, file: os.truncate(
        partial / JOURNAL, (partial / JOURNAL).stat().st_size - 9
    ),
    "the journal's end garbled": lambda partial, file: (
        (partial / JOURNAL).open("ab").write(b'{"file": 3}\n[\xff')
    ),
    "a stray file": lambda partial, file: (partial / "model-99999.safetensors").write_bytes(b"x"),
    "a stray folder": lambda partial, file: (partial / "config.json").mkdir(),
}


@pytest.mark.parametrize("case", TAMPERED)
def test_what_changed_in_the_partial_folder_is_made_again(
    tmp_path: Path, source: Path, old_and_new: tuple[Path, Path], case: str
) -> None:
    partial = stopped(source, tmp_path / "out", 2)
    TAMPERED[case](partial, min(partial.glob("*.safetensors")))
    convert_quickly(source, tmp_path / "out")
    assert content(tmp_path / "out") == content(old_and_new[1])


def test_another_plan_is_refused_by_name_and_given_up_by_force(
    tmp_path: Path, source: Path
) -> None:
    partial = stopped(source, tmp_path / "out", 1)
    before = content(partial)
    with pytest.raises(
        ConversionError, match=r"unfinished conversion with another q_bits: 4, now 8; finish"
    ):
        convert_quickly(source, tmp_path / "out", q_bits=8)
    other = write_hf(tmp_path / "other", seed=1)
    with pytest.raises(
        ConversionError, match=r"unfinished conversion with another source\.files.*sample_sha256"
    ):
        convert_quickly(other, tmp_path / "out")
    assert content(partial) == before
    convert_quickly(source, tmp_path / "out", q_bits=8, force=True)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization"]["bits"] == 8
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "out"]


def test_a_source_that_changed_since_is_refused(tmp_path: Path) -> None:
    """The hash of samples does not tell, but the time of the change does."""
    source = write_hf(tmp_path / "source")
    path = min(source.glob("*.safetensors"))
    old = path.stat()
    partial = stopped(source, tmp_path / "out", 1)
    before = content(partial)
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x3d")
    os.utime(path, ns=(old.st_atime_ns, old.st_mtime_ns + 1))
    with pytest.raises(ConversionError, match=rf"a source whose {path.name} was changed since"):
        convert_quickly(source, tmp_path / "out")
    assert content(partial) == before
    os.utime(path, ns=(old.st_atime_ns, old.st_mtime_ns))
    copy = shutil.copytree(source, tmp_path / "moved")  # which keeps the times
    convert_quickly(copy, tmp_path / "out")
    assert not partial.exists()


def test_a_folder_that_is_not_ours_is_left_alone(tmp_path: Path, source: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "thesis.txt").write_text("years")
    with pytest.raises(
        ConversionError, match=r"out.partial holds thesis.txt and no conversion.jsonl.*move it away"
    ):
        convert_quickly(source, tmp_path / "out", force=True)
    assert (tmp_path / "out.partial" / "thesis.txt").read_text() == "years"


def test_two_converters_are_kept_apart(tmp_path: Path, source: Path) -> None:
    steps = stream_conversion(source, tmp_path / "out", **QUICK)
    next(steps)
    with pytest.raises(ConversionError, match=r"another process is converting to .*out; wait"):
        convert_quickly(source, tmp_path / "out", force=True)
    Stream(steps).result()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_target_another_process_finished_meanwhile_is_taken(tmp_path: Path, source: Path) -> None:
    steps = stream_conversion(source, tmp_path / "out", **QUICK)
    with pytest.MonkeyPatch.context() as patch:

        def enter_late(staging: Staging) -> Staging:
            patch.undo()
            convert_quickly(source, tmp_path / "out")
            return staging.__enter__()

        patch.setattr(Staging, "__enter__", enter_late)
        assert Stream(steps).result().already_complete
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# kill -9

ROOT = Path(__file__).parents[3]
KILLER = ROOT / "tests" / "support" / "faults" / "killing.py"


def killed(source: Path, new: Path, folder: Path, *arguments: str) -> dict[str, int]:
    """Run ``killing.py`` and return its counts."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(KILLER), str(source), str(new), str(folder), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    counts: dict[str, int] = json.loads(done.stdout)
    return counts


@pytest.mark.slow
def test_killed_at_some_boundaries(
    tmp_path: Path, source: Path, old_and_new: tuple[Path, Path]
) -> None:
    counts = killed(source, old_and_new[1], tmp_path, "--boundaries", "5")
    assert counts["killed"] == 5


@pytest.mark.slow
@pytest.mark.parametrize("old", [False, True], ids=["new", "forced"])
def test_killed_at_every_boundary(
    tmp_path: Path, source: Path, old_and_new: tuple[Path, Path], *, old: bool
) -> None:
    arguments = ["--old", str(old_and_new[0])] if old else []
    counts = killed(source, old_and_new[1], tmp_path, *arguments)
    assert counts["killed"] == counts["boundaries"] > 100


@pytest.mark.slow
def test_killed_at_random_moments(
    tmp_path: Path, source: Path, old_and_new: tuple[Path, Path]
) -> None:
    counts = killed(source, old_and_new[1], tmp_path, "--moments", "200")
    assert (
        counts["killed"] >= 60
    )  # the rest were done sooner: a machine that is less busy than when it was timed


# links

Attack = Callable[
    [Path, Path], object
]  # of a conversion to ``out`` in a folder, on a folder that is not its own


def partial_with(plant: Callable[[Path, Path], object]) -> Attack:
    """Plant something in the partial folder of an abandoned conversion."""
    return lambda folder, victim: plant(folder / "out.partial", victim)


def instead(link: Path, victim: Path, make: Callable[[Path, Path], object] = os.symlink) -> None:
    link.unlink(missing_ok=True)
    make(victim, link)


ATTACKS: dict[str, Attack] = {
    "the partial folder is a link": lambda folder, victim: (
        shutil.rmtree(folder / "out.partial"),
        instead(folder / "out.partial", victim),
    ),
    "the journal is a link": partial_with(
        lambda partial, victim: instead(partial / JOURNAL, victim / "journal")
    ),
    "a finished file is a link": partial_with(
        lambda partial, victim: instead(min(partial.glob("*.safetensors")), victim / "weights")
    ),
    "a finished file is a second name": partial_with(
        lambda partial, victim: instead(
            min(partial.glob("*.safetensors")), victim / "weights", os.link
        )
    ),
    "a file to write is a link": partial_with(
        lambda partial, victim: instead(
            partial / "model-00004-of-00004.safetensors.partial", victim / "weights"
        )
    ),
    "a file to write is a link to nothing": partial_with(
        lambda partial, victim: instead(partial / "config.json.partial", victim / "new")
    ),
    "a document is a link": partial_with(
        lambda partial, victim: instead(partial / "README.md", victim / "weights")
    ),
    "a folder holds a link": partial_with(
        lambda partial, victim: ((partial / "a").mkdir(), instead(partial / "a" / "b", victim))
    ),
    "the fetched files' folder is a link": partial_with(
        lambda partial, victim: instead(partial / "source", victim)
    ),
    "what is replaced is a link": lambda folder, victim: instead(folder / ".out.replaced", victim),
    "the target is a link": lambda folder, victim: instead(folder / "out", victim),
    "the target holds a link": lambda folder, victim: (
        shutil.copytree(folder / "old", folder / "out"),
        instead(folder / "out" / "model", victim),
    ),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_nothing_is_touched_through_a_link(
    tmp_path: Path, source: Path, old_and_new: tuple[Path, Path], attack: str
) -> None:
    shutil.copytree(old_and_new[0], tmp_path / "old")
    victim = tmp_path / "victim"
    shutil.copytree(old_and_new[0], victim)  # a checkpoint, so that --force may look at it
    partial = stopped(source, tmp_path / "out", 2)
    shutil.copy(min(partial.glob("*.safetensors")), victim / "weights")
    shutil.copy(partial / JOURNAL, victim / "journal")
    before = {path.name: (path.read_bytes(), path.stat().st_ino) for path in victim.iterdir()}
    ATTACKS[attack](tmp_path, victim)
    if attack in ("the partial folder is a link", "the journal is a link"):
        with pytest.raises(
            ConversionError,
            match=r"out.partial (is no folder|holds .* and no conv).*; move it away",
        ):
            convert_quickly(source, tmp_path / "out", force=True)
    else:
        convert_quickly(source, tmp_path / "out", force=True)
        assert not (tmp_path / "out").is_symlink()
        assert content(tmp_path / "out") == content(old_and_new[1])
    assert {
        path.name: (path.read_bytes(), path.stat().st_ino) for path in victim.iterdir()
    } == before


# drives


@pytest.mark.parametrize("at", range(1, 31))
def test_a_full_disk_at_any_write_is_named_and_loses_nothing(
    tmp_path: Path, source: Path, old_and_new: tuple[Path, Path], at: int
) -> None:
    with failing("pwrite", 4 * at, OSError(errno.ENOSPC, "No space left on device")):
        with pytest.raises(
            ConversionError, match=r"the disk of .*out is full: .* needed in all.*free some space"
        ):
            convert_quickly(source, tmp_path / "out")
        assert not (tmp_path / "out").exists()
    convert_quickly(source, tmp_path / "out")
    assert content(tmp_path / "out") == content(old_and_new[1])


@pytest.mark.parametrize("call", ["pwrite", "fsync"])
def test_a_failing_drive_is_named(tmp_path: Path, source: Path, call: str) -> None:
    with (
        failing(call, 9, OSError(errno.EIO, "Input/output error")),
        pytest.raises(ConversionError, match=r"out could"),
    ):
        convert_quickly(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS])
def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path, source: Path, code: int) -> None:
    message = "out could not be written.*check the folder and the disk"
    with (
        failing("mkdir", 2, OSError(code, os.strerror(code))),
        pytest.raises(ConversionError, match=message),
    ):
        convert_quickly(source, tmp_path / "out")
    assert not list(tmp_path.iterdir())
