"""A source, and its conversion by every method."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from magistral_mlx.convert.recipe.options import METHODS
from tests.support.faults.killing import in_small_pieces
from tests.support.sources import convert_quickly, write_hf


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hf(tmp_path_factory.mktemp("source") / "hf")


@pytest.fixture(scope="module")
def small_pieces() -> Iterator[None]:
    """Let conversions write several files, and calibrate on few ids."""
    with pytest.MonkeyPatch.context() as patch:
        in_small_pieces(patch.setattr)
        yield


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Convert one source by every method, in small pieces."""
    folder = tmp_path_factory.mktemp("made")
    source = write_hf(folder / "hf")
    with pytest.MonkeyPatch.context() as patch:
        in_small_pieces(patch.setattr)
        for method in METHODS:
            convert_quickly(source, folder / method, q_method=method)
    return {method: folder / method for method in METHODS}
