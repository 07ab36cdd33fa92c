"""The recipe of the model with outlier channels: what it begins with, and what it learns from."""

from itertools import islice
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from benchmarks.quality import outlier_model
from benchmarks.quality.outlier_model import BATCH, CONFIG, WINDOW, make_model, save, texts, windows
from magistral_mlx.convert.calibration.forward import MeanSquares, visit_linears
from magistral_mlx.convert.calibration.statistics import outlier_ratio
from magistral_mlx.convert.source.source import open_source


def test_before_it_learns_what_comes_into_q_k_and_v_has_outlier_channels(tmp_path: Path) -> None:
    save(tmp_path, make_model(seed=0))
    visitor = MeanSquares(open_source(tmp_path))
    ids = mx.array(np.random.default_rng(0).integers(3, CONFIG.vocab_size, (1, 64)))
    next(stages := visit_linears(visitor.source, ids, visitor))
    next(stages)
    assert outlier_ratio(visitor.squares["model.layers.0.self_attn.v_proj"]) > 100
    names = {
        name: array.shape for shard in visitor.source.shards for name, array in shard.header.items()
    }
    assert names == CONFIG.shapes


def test_files_are_learned_from_or_held_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(64):
        (tmp_path / f"{i}.py").write_text(f"#{i}#" * 10)
    monkeypatch.setattr(outlier_model, "files", lambda: sorted(tmp_path.iterdir()))
    learned, held_out = (set(part.split()) for part in texts(seed=1))
    assert not learned & held_out
    assert len(learned | held_out) == 64
    assert 0 < len(held_out) < 16
    assert texts(seed=1) == texts(seed=1) != texts(seed=2)


def test_a_window_is_bos_and_a_run_of_the_text() -> None:
    batches = list(islice(windows(np.arange(100, 9100, dtype=np.int32), 1, seed=0), 2))
    for batch in map(np.array, batches):
        assert batch.shape == (BATCH, WINDOW + 1)
        assert (batch[:, 0] == 1).all()
        assert (np.diff(batch[:, 1:]) == 1).all()
    assert not mx.array_equal(*batches)
