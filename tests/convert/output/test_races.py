"""Another process may rename or delete what a conversion looks at, at any moment."""

import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from magistral_mlx import demo, disk_space, files
from magistral_mlx.convert.output import journal, target
from magistral_mlx.convert.output.journal import JOURNAL
from magistral_mlx.convert.output.staging import Staging, begun_commit, partial_of
from magistral_mlx.errors import ConversionError


def first_do(monkeypatch: pytest.MonkeyPatch, name: str, act: Callable[[], object]) -> None:
    """Let another process act just before the first call of a function such as ``os.lstat``."""
    module, _, attribute = name.rpartition(".")
    owner: Any = {"os": os, "fcntl": fcntl, "journal": journal}[module]
    call, pending = getattr(owner, attribute), [act]

    def after_act(*args: Any, **keywords: Any) -> Any:
        if pending:
            pending.pop()()
        return call(*args, **keywords)

    monkeypatch.setattr(owner, attribute, after_act)


def write_partial(folder: Path) -> Path:
    folder.mkdir()
    (folder / "a").write_bytes(b"12345")
    (folder / "b").write_bytes(b"123")
    return folder


def test_the_size_of_a_folder_counts_no_file_that_disappears(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_partial(tmp_path / "out.partial")
    first_do(monkeypatch, "os.lstat", (folder / "a").unlink)
    assert target.folder_bytes(folder) in (3, 5)
    monkeypatch.undo()
    (folder / "a").write_bytes(b"12345")
    monkeypatch.setattr(os, "lstat", lambda _: (_ for _ in ()).throw(FileNotFoundError()))
    assert target.folder_bytes(folder) == 0


def test_the_size_of_a_folder_that_is_published_meanwhile_is_zero(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_partial(tmp_path / "out.partial")
    first_do(monkeypatch, "os.lstat", lambda: os.rename(folder, tmp_path / "out"))
    assert target.folder_bytes(folder) == 0
    assert target.folder_bytes(tmp_path / "never") == 0


def test_free_space_is_asked_of_the_nearest_folder_that_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, real = tmp_path / "made", shutil.disk_usage
    made.mkdir()

    def usage(path: Path) -> Any:
        if path == made:
            made.rmdir()
        return real(path)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    assert disk_space.free_bytes(made / "out") > 0
    assert not made.exists()


@pytest.mark.parametrize("force", [False, True])
def test_a_target_that_is_moved_away_is_not_in_the_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, force: bool
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    first_do(monkeypatch, "os.listdir", out.rmdir)
    target.check_replaceable(out, force=force)


def test_a_journal_that_is_published_meanwhile_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = partial_of(tmp_path / "out") / JOURNAL
    path.parent.mkdir()
    path.write_text("{}\n")

    def is_own_file(path: Path) -> bool:
        path.unlink()
        return True

    monkeypatch.setattr(journal, "is_own_file", is_own_file)
    assert begun_commit(tmp_path / "out", "org/name") is None


def test_parents_that_another_process_deletes_are_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "a" / "b" / "out"
    out.parent.mkdir(parents=True)

    def fail_elsewhere() -> None:
        out.parent.rmdir()
        out.parent.parent.rmdir()

    first_do(monkeypatch, "os.mkdir", fail_elsewhere)
    with Staging(out, {}, is_complete=lambda _: False) as held:
        assert held.folder.is_dir()


def test_two_processes_may_delete_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, file = write_partial(tmp_path / "folder"), tmp_path / "file"
    file.touch()
    first_do(monkeypatch, "os.unlink", file.unlink)
    files.discard(file)
    real = shutil.rmtree

    def rmtree(path: Path) -> None:
        real(path)
        raise FileNotFoundError(str(path))

    monkeypatch.setattr(shutil, "rmtree", rmtree)
    files.discard(folder)
    files.discard(folder)
    assert not list(tmp_path.iterdir())


def test_the_demo_is_converted_once_when_two_processes_use_it_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check that a second process finds the folder that the first one has made."""
    monkeypatch.setenv("MAGISTRAL_MLX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("magistral_mlx.convert.convert_checkpoint", None, raising=False)
    first_do(monkeypatch, "fcntl.flock", demo.demo_folder().mkdir)
    assert demo.demo_checkpoint() == demo.demo_folder()


def test_parents_that_never_stay_end_in_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def mkdir(path: Path, *_: object) -> None:
        raise FileNotFoundError(path)

    monkeypatch.setattr(os, "mkdir", mkdir)
    staging = Staging(tmp_path / "out", {}, is_complete=lambda _: False)
    with pytest.raises(ConversionError, match="vanishes"):
        staging.__enter__()
