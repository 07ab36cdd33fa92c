"""The target of a conversion: it appears complete or not at all, and what lies there is never lost."""

import errno
import os
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

import convert.pipeline
import convert.staging
from convert import convert_checkpoint, converting
from magistral_mlx.conversation import result_of
from magistral_mlx.errors import ConversionError
from tests.sources import CONFIG, content, convert_quickly, write_hf


@pytest.fixture(scope="module")
def hf_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hf(tmp_path_factory.mktemp("source") / "hf")


# all or nothing


class Stop(BaseException):
    """Ends a conversion at a chosen moment, as Ctrl-C does, past every ``except Exception``."""


BOUNDARIES = ["pwrite", "fsync", "open", "rename", "mkdir"]


def count_and_stop(monkeypatch: pytest.MonkeyPatch, call: str, at: int, error: BaseException) -> list[int]:
    """Let ``os.<call>`` raise the ``at``-th time it is called; returns the running count."""
    original, count = getattr(os, call), [0]

    def wrapped(*args: object, **kwargs: object) -> object:
        count[0] += 1
        if count[0] == at:
            raise error
        return original(*args, **kwargs)

    monkeypatch.setattr(os, call, wrapped)
    return count


@pytest.fixture(scope="module")
def old_and_new(tmp_path_factory: pytest.TempPathFactory, hf_folder: Path) -> tuple[Path, Path]:
    """What lies at the target before a forced conversion, and what it makes."""
    folder = tmp_path_factory.mktemp("results")
    convert_quickly(hf_folder, folder / "old", q_bits=8)
    convert_quickly(hf_folder, folder / "new")
    return folder / "old", folder / "new"


@pytest.mark.parametrize("has_target", [False, True], ids=["new", "forced"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()], ids=type)
@pytest.mark.parametrize("call", BOUNDARIES)
def test_a_failure_at_any_boundary_leaves_nothing_or_the_old(
    *,
    tmp_path: Path,
    hf_folder: Path,
    old_and_new: tuple[Path, Path],
    call: str,
    error: OSError | KeyboardInterrupt,
    has_target: bool,
) -> None:
    folder = tmp_path / "a"
    target = folder / "out"
    with pytest.MonkeyPatch.context() as patch:
        count = count_and_stop(patch, call, -1, error)
        convert_quickly(hf_folder, tmp_path / "counted")
    old, new = map(content, old_and_new)
    raised: list[BaseException] = []
    for at in sorted({1, 2, count[0] // 2, count[0] - 1, count[0], count[0] + 1}):
        if has_target:
            shutil.copytree(old_and_new[0], target)
        with pytest.MonkeyPatch.context() as patch:
            count_and_stop(patch, call, at, error)
            try:
                convert_quickly(hf_folder, target, force=has_target)
            except (ConversionError, KeyboardInterrupt) as end:
                raised.append(end)
        if has_target or target.exists():
            assert [path.name for path in folder.iterdir()] == ["out"]
            assert content(target) in ((old, new) if has_target else (new,))
            shutil.rmtree(folder)
        assert not folder.exists()  # nothing of the folders made for it either
    assert raised
    if isinstance(error, KeyboardInterrupt):
        assert all(isinstance(end, KeyboardInterrupt) for end in raised)
    else:
        assert all("is full" in str(end) and "are free now" in str(end) for end in raised)


@pytest.mark.parametrize("stage", ["write_exports", "make_provenance", "open_checkpoint"])
def test_ctrl_c_in_any_phase_leaves_nothing(
    tmp_path: Path, hf_folder: Path, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*args: object, **kwargs: object) -> None:
        raise Stop

    monkeypatch.setattr(convert.pipeline, stage, stop)
    with pytest.raises(Stop):
        convert_quickly(hf_folder, tmp_path / "a" / "b" / "out")
    assert not list(tmp_path.iterdir())


def test_a_conversion_let_go_leaves_nothing(tmp_path: Path, hf_folder: Path) -> None:
    steps = converting(hf_folder, tmp_path / "out")
    done = [next(steps) for _ in range(3)]
    assert [step.name for step in done] == list(CONFIG.parameter_shapes())[:3]
    assert list(tmp_path.iterdir())
    steps.close()
    assert not list(tmp_path.iterdir())


def test_progress_counts_every_byte_of_the_source(tmp_path: Path, hf_folder: Path) -> None:
    steps = list(converting(hf_folder, tmp_path / "out"))
    total = sum(2 * int(np.prod(shape)) for shape in CONFIG.parameter_shapes().values())
    assert steps[-1].bytes_done == steps[-1].bytes_total == total
    assert all(one.bytes_done < two.bytes_done for one, two in pairwise(steps))


def test_disk_space_is_checked_before_work(tmp_path: Path, hf_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convert.staging, "free_bytes", lambda target: 500_000)
    with pytest.raises(ConversionError, match=r"needs [\d,]+ bytes, and 500,000 bytes are free"):
        convert_quickly(hf_folder, tmp_path / "out")
    assert not list(tmp_path.iterdir())


# a target that is there


def test_a_complete_target_is_left_alone(tmp_path: Path, hf_folder: Path) -> None:
    first = convert_quickly(hf_folder, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    for force in (False, True):
        again = convert_quickly(hf_folder, tmp_path / "out", force=force)
        assert again.already_complete
        assert again.bytes_out == first.bytes_out
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a file is gone": (lambda out: (out / "chat_template.jinja").unlink(), "its chat_template.jinja is missing"),
    "weights cut": (lambda out: os.truncate(out / "model.safetensors", 99), "its model.safetensors is missing or has"),
    "a file changed": (
        lambda out: (out / "SYSTEM_PROMPT.txt").write_bytes((out / "SYSTEM_PROMPT.txt").read_bytes().swapcase()),
        "its SYSTEM_PROMPT.txt was changed",
    ),
    "a stray shard": (lambda out: shutil.copy(out / "model.safetensors", out / "model-2.safetensors"), "it is damaged"),
    "no provenance": (lambda out: (out / "magistral_mlx.json").unlink(), "is not what would be made here"),
    "not JSON": (lambda out: (out / "magistral_mlx.json").write_text("{"), "it is damaged"),
    "empty JSON": (lambda out: (out / "magistral_mlx.json").write_text("{}"), "another format: none, now 1"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_target_that_is_not_complete_is_refused_and_replaced_by_force(
    tmp_path: Path, hf_folder: Path, damage: str
) -> None:
    out = tmp_path / "out"
    convert_quickly(hf_folder, out)
    good = content(out)
    change, message = DAMAGE[damage]
    change(out)
    damaged = content(out)
    with pytest.raises(ConversionError, match=message):
        convert_quickly(hf_folder, out)
    assert content(out) == damaged
    assert not convert_quickly(hf_folder, out, force=True).already_complete
    assert content(out) == good
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_other_options_or_another_source_are_named(tmp_path: Path, hf_folder: Path) -> None:
    out = tmp_path / "out"
    convert_quickly(hf_folder, out)
    with pytest.raises(ConversionError, match=r"another options\.q_bits: 4, now 8"):
        convert_quickly(hf_folder, out, q_bits=8)
    retrained = write_hf(tmp_path / "retrained", seed=1)  # the same names, shapes and sizes
    with pytest.raises(ConversionError, match=r"sample_sha256"):
        convert_quickly(retrained, out)


def test_force_replaces_a_link_and_not_what_it_points_to(tmp_path: Path, hf_folder: Path) -> None:
    convert_quickly(hf_folder, tmp_path / "old", q_bits=8)
    old = content(tmp_path / "old")
    (tmp_path / "out").symlink_to(tmp_path / "old")
    convert_quickly(hf_folder, tmp_path / "out", force=True)
    assert not (tmp_path / "out").is_symlink()
    assert content(tmp_path / "old") == old


def test_a_target_another_process_finished_meanwhile_is_taken(tmp_path: Path, hf_folder: Path) -> None:
    steps = converting(hf_folder, tmp_path / "out")
    next(steps)
    convert_checkpoint(hf_folder, tmp_path / "out")
    assert result_of(steps).already_complete
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_package_is_lazy() -> None:
    import convert as package

    assert set(package.__all__) <= {name for name in package.__all__ if getattr(package, name)}
    with pytest.raises(AttributeError, match="no attribute 'convert_model'"):
        _ = package.convert_model
