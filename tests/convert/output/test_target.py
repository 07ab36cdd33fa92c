"""Check that a target appears complete or not at all, and that nothing there is ever lost."""

import os
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

import magistral_mlx.convert.output.target
from magistral_mlx.convert import stream_conversion
from magistral_mlx.errors import ConversionError
from tests.support.sources import CONFIG, content, convert_quickly, write_hf


@pytest.fixture(scope="module")
def hf_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hf(tmp_path_factory.mktemp("source") / "hf")


@pytest.mark.slow
def test_progress_counts_every_byte_of_the_source(tmp_path: Path, hf_folder: Path) -> None:
    steps = list(stream_conversion(hf_folder, tmp_path / "out"))
    total = sum(2 * int(np.prod(shape)) for shape in CONFIG.shapes.values())
    assert steps[-1].done == steps[-1].total == total
    assert all(one.done <= two.done for one, two in pairwise(steps))


def test_disk_space_is_checked_before_work(
    tmp_path: Path, hf_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(magistral_mlx.convert.output.target, "free_bytes", lambda target: 500_000)
    with pytest.raises(ConversionError, match=r"needs [\d.]+ MB more, and 500,000 bytes are free"):
        convert_quickly(hf_folder, tmp_path / "out")
    assert not list(tmp_path.iterdir())


# a place where no target can be

NOT_A_PLACE: dict[str, tuple[Callable[[Path], Path], str]] = {
    "too long": (lambda home: home / ("a" * 250), "File name too long"),
    "under a file": (lambda home: home / "file" / "out", "Not a directory"),
    "in a loop of links": (lambda home: home / "loop" / "out", "symbolic links"),
    "not UTF-8": (lambda home: home / os.fsdecode(b"caf\xe9"), "is not UTF-8"),
    "in a checkpoint": (lambda home: home / "done" / "out", "lies in the checkpoint .*done;"),
    "deep in an unfinished one": (
        lambda home: home / "other.partial" / "a" / "out",
        "lies in the .*other.partial;",
    ),
}


@pytest.mark.parametrize("place", NOT_A_PLACE)
def test_where_no_target_can_be_is_said_before_any_work(
    tmp_path: Path, hf_folder: Path, place: str
) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to("loop")
    for folder, record in (("done", "magistral_mlx.json"), ("other.partial", "conversion.jsonl")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / record).write_text("{}")
    before = sorted(tmp_path.rglob("*"))
    at, message = NOT_A_PLACE[place]
    with pytest.raises(ConversionError, match=message):
        convert_quickly(hf_folder, at(tmp_path))
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_that_cannot_be_written_to_is_said_before_any_work(
    tmp_path: Path, hf_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "os.access", lambda path, mode: Path(path) != tmp_path
    )  # root may write anywhere
    with pytest.raises(ConversionError, match=f"{tmp_path} cannot be written to; name another"):
        convert_quickly(hf_folder, tmp_path / "new" / "out")
    assert not list(tmp_path.iterdir())


# a target that is there


def test_an_empty_folder_is_asked_to_be_removed(tmp_path: Path, hf_folder: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(ConversionError, match="out exists, empty; remove it"):
        convert_quickly(hf_folder, tmp_path / "out")


def test_a_complete_target_is_left_alone(tmp_path: Path, hf_folder: Path) -> None:
    first = convert_quickly(hf_folder, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    for force in (False, True):
        again = convert_quickly(hf_folder, tmp_path / "out", force=force)
        assert again.already_complete
        assert again.bytes_out == first.bytes_out
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a file is gone": (
        lambda out: (out / "chat_template.jinja").unlink(),
        "its chat_template.jinja is missing",
    ),
    "weights cut": (
        lambda out: os.truncate(out / "model.safetensors", 99),
        "its model.safetensors is missing or has",
    ),
    "a file changed": (
        lambda out: (out / "SYSTEM_PROMPT.txt").write_bytes(
            (out / "SYSTEM_PROMPT.txt").read_bytes().swapcase()
        ),
        "its SYSTEM_PROMPT.txt was changed",
    ),
    "a stray shard": (
        lambda out: shutil.copy(out / "model.safetensors", out / "model-2.safetensors"),
        "it is damaged",
    ),
    "no provenance": (
        lambda out: (out / "magistral_mlx.json").unlink(),
        "is not what would be made here",
    ),
    "not JSON": (lambda out: (out / "magistral_mlx.json").write_text("{"), "it is damaged"),
    "empty JSON": (
        lambda out: (out / "magistral_mlx.json").write_text("{}"),
        "another format: none, now 3",
    ),
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
    with pytest.raises(ConversionError, match=r"another q_bits: 4, now 8"):
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


def test_the_package_is_lazy() -> None:
    import magistral_mlx.convert as package

    assert set(package.__all__) <= {name for name in package.__all__ if getattr(package, name)}
    with pytest.raises(AttributeError, match="no attribute 'convert_model'"):
        _ = package.convert_model
