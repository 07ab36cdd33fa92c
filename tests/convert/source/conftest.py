"""A hub with a small repository, and an empty folder to fetch into."""

from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import pytest

from magistral_mlx.checkpoint import hub_transfer
from tests.support.hub_files import BESIDE, HEAD_BYTES
from tests.support.hub_server import Hub, serving, use
from tests.support.tiny import make_config, make_weights, write_checkpoint


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the folder that the repository was uploaded from."""
    config = make_config(num_layers=1, vocab_size=64)
    folder = write_checkpoint(
        tmp_path_factory.mktemp("published"), config, make_weights(config, mx.bfloat16)
    )
    for name, content in BESIDE.items():
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture
def hub(published: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    state = Hub({path.name: path.read_bytes() for path in published.iterdir()})
    monkeypatch.setattr(hub_transfer, "HEAD_BYTES", HEAD_BYTES)
    monkeypatch.setattr(hub_transfer, "FIRST_PAUSE_SECONDS", 0.0)
    with serving(state) as endpoint:
        use(monkeypatch, endpoint, tmp_path)
        yield state
    # The user's own cache is never touched.
    assert not (tmp_path / "cache").exists()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "source"
