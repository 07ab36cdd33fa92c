"""Fixtures, and the device of the suite."""

import os
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest

from magistral_mlx.checkpoint.config import ModelConfig
from tests.support.tiny import make_config, make_weights, write_checkpoint

# The CI's Mac runs the suite on its CPU.
if os.environ.get("MAGISTRAL_TEST_DEVICE") == "cpu":
    mx.set_default_device(mx.Device(mx.DeviceType.cpu))


@pytest.fixture
def tiny_config() -> ModelConfig:
    return make_config()


@pytest.fixture
def checkpoint_folder(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes an HF folder and returns its path."""

    def write(
        config: ModelConfig, weights: dict[str, mx.array] | None = None, name: str = "model"
    ) -> Path:
        return write_checkpoint(
            tmp_path / name, config, weights or make_weights(config, mx.bfloat16)
        )

    return write


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Convert the demo once for the whole run, into a temporary cache."""
    os.environ["MAGISTRAL_MLX_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    os.environ["MAGISTRAL_MLX_STATE"] = str(tmp_path_factory.mktemp("state"))
    os.environ["MAGISTRAL_CONFIG"] = str(tmp_path_factory.mktemp("config") / "config.toml")
    os.environ.pop("MAGISTRAL_MODEL", None)
