"""Files that are replaced, and the demo's folder, where something goes wrong between two steps."""

from pathlib import Path

import pytest

import magistral_mlx as mm
from magistral_mlx import atomic_files
from magistral_mlx.atomic_files import replacing
from magistral_mlx.files import write_all


def test_a_save_that_is_interrupted_while_it_locks_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def interrupt(*_: object) -> bool:
        raise KeyboardInterrupt

    path = tmp_path / "file"
    with monkeypatch.context() as patch:
        patch.setattr(atomic_files, "_has_name", interrupt)
        with pytest.raises(KeyboardInterrupt), replacing(path):
            pass
    assert list(tmp_path.iterdir()) == []
    with replacing(path) as descriptor:
        write_all(descriptor, memoryview(b"whole"))
    assert path.read_bytes() == b"whole"


def test_a_cache_folder_that_cannot_be_made_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("MAGISTRAL_MLX_CACHE", str(tmp_path / "file"))
    with pytest.raises(mm.ConversionError, match="MAGISTRAL_MLX_CACHE"):
        mm.load("demo")
