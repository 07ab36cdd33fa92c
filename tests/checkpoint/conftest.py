"""A sound checkpoint for the tests of this folder."""

from pathlib import Path

import mlx.core as mx
import pytest

from tests.support.faults.edits import CONFIG, Weights
from tests.support.tiny import make_weights, write_checkpoint


@pytest.fixture(scope="module")
def weights() -> Weights:
    return make_weights(CONFIG, mx.bfloat16)


@pytest.fixture
def folder(tmp_path: Path, weights: Weights) -> Path:
    """Make a sound checkpoint: bf16, two shards, an index."""
    return write_checkpoint(tmp_path / "model", CONFIG, weights)
