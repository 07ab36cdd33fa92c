"""Edits of a checkpoint's files, and the error that opening it gives."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from magistral_mlx.checkpoint.folder import open_checkpoint
from magistral_mlx.checkpoint.quant_format import QuantFormat
from magistral_mlx.errors import CheckpointError
from tests.support.tiny import make_config, quantize_weights

CONFIG = make_config()
INDEX = "model.safetensors.index.json"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
DOWN = "model.layers.1.mlp.down_proj"
NORM = "model.layers.1.input_layernorm"

Weights = dict[str, mx.array]


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weight_map(folder: Path, **changes: Any) -> None:
    edit_json(
        folder / INDEX, weight_map=json.loads((folder / INDEX).read_text())["weight_map"] | changes
    )


def edit_shard(path: Path, edit: Callable[[Weights], object]) -> None:
    """Load a shard, let ``edit`` change its tensors, write it back."""
    tensors = mx.load(str(path))
    assert isinstance(tensors, dict)
    mx.eval(tensors)
    edit(tensors)
    mx.save_safetensors(str(path), tensors, {"format": "pt"})


def one_file(folder: Path, weights: Weights) -> Path:
    """mlx-community publishes small models as one file without an index."""
    for path in folder.glob("model*"):
        path.unlink()
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    return folder


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder)
    return str(caught.value)


def equal(a: mx.array, b: mx.array) -> bool:
    return a.dtype == b.dtype and bool(mx.array_equal(a, b).item())


def change(weights: Weights, **changes: mx.array | None) -> Weights:
    return {name: tensor for name, tensor in (weights | changes).items() if tensor is not None}


def packed_folder(
    folder: Path, weights: Weights, quant: QuantFormat, **changes: mx.array | None
) -> Path:
    tensors, block = quantize_weights(weights, quant)
    edit_json(folder / "config.json", quantization=block)
    return one_file(folder, change(tensors, **changes))
