"""A source in the published layout, and its weights."""

from pathlib import Path

import mlx.core as mx
import pytest

from tests.support.sources import CONFIG, Weights, write_hf
from tests.support.tiny import make_weights


@pytest.fixture(scope="module")
def weights() -> Weights:
    return make_weights(CONFIG, mx.bfloat16)


@pytest.fixture(scope="module")
def hf_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hf(tmp_path_factory.mktemp("source") / "hf")
