"""The cache folder: from MAGISTRAL_MLX_CACHE, else of the platform."""

import sys
from pathlib import Path

import pytest

from magistral_mlx.errors import OptionError
from magistral_mlx.files import cache_dir


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    for variable in ("MAGISTRAL_MLX_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    ("platform", "xdg", "expected"),
    [
        ("darwin", None, "Library/Caches/magistral-mlx"),
        ("darwin", "xdg", "Library/Caches/magistral-mlx"),
        ("linux", None, ".cache/magistral-mlx"),
        ("linux", "", ".cache/magistral-mlx"),
        ("linux", "xdg", "xdg/magistral-mlx"),
    ],
)
def test_each_platform_has_its_folder(
    monkeypatch: pytest.MonkeyPatch, home: Path, platform: str, xdg: str | None, expected: str
) -> None:
    monkeypatch.setattr(sys, "platform", platform)
    if xdg is not None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(home / xdg) if xdg else "")
    assert cache_dir() == home / expected


def test_a_relative_xdg_path_is_ignored(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", "here")
    assert cache_dir() == home / ".cache" / "magistral-mlx"


@pytest.mark.parametrize("platform", ["darwin", "linux"])
def test_our_own_variable_wins_and_nothing_is_created(
    monkeypatch: pytest.MonkeyPatch, home: Path, platform: str
) -> None:
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "xdg"))
    monkeypatch.setenv("MAGISTRAL_MLX_CACHE", "~/mine")
    assert cache_dir() == home / "mine"
    assert list(home.iterdir()) == []


def test_a_relative_folder_of_ours_stays_where_it_was_meant(
    monkeypatch: pytest.MonkeyPatch, home: Path
) -> None:
    monkeypatch.chdir(home)
    monkeypatch.setenv("MAGISTRAL_MLX_CACHE", "mine")
    assert cache_dir() == home / "mine"


def test_a_home_folder_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAGISTRAL_MLX_CACHE", "~nobody-of-this-name/x")
    with pytest.raises(OptionError, match="no home folder ~nobody-of-this-name"):
        cache_dir()
