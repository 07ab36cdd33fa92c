"""Settings, state and a hub's cache of each test's own."""

from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import pytest

from tests.support.hub_server import Hub, serving, use
from tests.support.tiny import make_config, make_weights, write_checkpoint


@pytest.fixture(autouse=True)
def config(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Return the path of the settings' file, which does not exist yet."""
    monkeypatch.delenv("MAGISTRAL_MODEL", raising=False)
    monkeypatch.setenv("MAGISTRAL_MLX_STATE", str(tmp_path / "state"))
    monkeypatch.setenv("MAGISTRAL_CONFIG", str(tmp_path / "settings" / "config.toml"))
    return tmp_path / "settings" / "config.toml"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """Serve a small checkpoint; its cache is empty."""
    model = make_config()
    written = write_checkpoint(tmp_path / "written", model, make_weights(model, mx.bfloat16))
    state = Hub({path.name: path.read_bytes() for path in written.iterdir()})
    state.files["tekken.json"] = b"{}"
    with serving(state) as endpoint:
        use(monkeypatch, endpoint, tmp_path)
        yield state
