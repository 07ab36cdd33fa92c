"""Weights, calibrations and shapes that importance and GPTQ refuse."""

import json
import os
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from numpy.typing import NDArray

from magistral_mlx.checkpoint.folder import open_checkpoint
from magistral_mlx.convert import verify_checkpoint
from magistral_mlx.errors import ConversionError, NumericsError, OptionError
from tests.support.sources import CONFIG, convert_quickly, write_hf
from tests.support.tekken import write_tekken
from tests.support.tiny import make_config, make_weights, write_checkpoint

pytestmark = pytest.mark.usefixtures("small_pieces")
Array = NDArray[np.float64]
METHODS = ("importance", "gptq")
ONE_IS_SLOW = ("importance", pytest.param("gptq", marks=pytest.mark.slow))
# Documents that differ from those of rounding.
DOCUMENTS = {"magistral_mlx.json"}


@pytest.mark.parametrize("method", ONE_IS_SLOW)
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (
            "model.layers.1.mlp.up_proj",
            mx.nan,
            r"tensor 'model\.layers\.1\.mlp\.up_proj\.weight' holds NaN",
        ),
        (
            "model.layers.1.mlp.up_proj",
            3e38,
            r"'model\.layers\.1\.mlp\.up_proj\.weight' (is so large|holds NaN)|down_proj holds NaN",
        ),
        (
            "model.layers.0.input_layernorm",
            mx.inf,
            r"input of model\.layers\.0\.self_attn\.q_proj .* holds NaN",
        ),
    ],
)
def test_weights_that_are_not_finite_are_named(
    tmp_path: Path, method: str, name: str, value: float, message: str
) -> None:
    weights = make_weights(CONFIG, mx.bfloat16)
    weights[f"{name}.weight"] = mx.full(weights[f"{name}.weight"].shape, value, mx.bfloat16)
    with pytest.raises((ConversionError, NumericsError), match=message):
        convert_quickly(write_hf(tmp_path / "hf", weights), tmp_path / "out", q_method=method)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"\xff\xfe\x00", "is not text"),
        (b"a few words", "is too short: .* at least 256"),
    ],
)
def test_a_file_that_cannot_calibrate_is_refused_before_any_work(
    tmp_path: Path, source: Path, content: bytes, message: str
) -> None:
    (tmp_path / "text").write_bytes(content)
    with pytest.raises(OptionError, match=message):
        convert_quickly(
            source, tmp_path / "out", q_method="importance", calibration=str(tmp_path / "text")
        )
    assert [path.name for path in tmp_path.iterdir()] == ["text"]


def test_a_calibration_pipe_is_refused_without_waiting(tmp_path: Path, source: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name, message in (
        ("pipe", "is no plain file"),
        ("a" * 300, "cannot be read .File name too long"),
    ):
        with pytest.raises(OptionError, match=message):
            convert_quickly(
                source, tmp_path / "out", q_method="importance", calibration=str(tmp_path / name)
            )


@pytest.mark.parametrize("method", ["round", *ONE_IS_SLOW])
def test_columns_that_no_group_divides_stay_floats_by_the_rule_in_the_message(
    tmp_path: Path, method: str
) -> None:
    # o_proj has 72 columns.
    config = make_config(head_dim=18, intermediate_size=64, num_layers=1, vocab_size=1500)
    folder = write_checkpoint(tmp_path / "hf", config, make_weights(config, mx.bfloat16))
    write_tekken(folder, config.vocab_size)
    with pytest.raises(ConversionError, match=r"o_proj[.]weight' has 72 columns") as refused:
        convert_quickly(folder, tmp_path / "out", q_method=method)
    rule = json.loads(str(refused.value).split("with the rule ")[1])
    (tmp_path / "recipe.json").write_text(json.dumps({"default": {"bits": 4}, "rules": [rule]}))
    convert_quickly(folder, tmp_path / "out", q_method=method, recipe=str(tmp_path / "recipe.json"))
    formats = open_checkpoint(tmp_path / "out").formats
    assert {m.split(".")[-1] for m, quant in formats.items() if quant is None} == {"o_proj"}
    assert verify_checkpoint(tmp_path / "out", folder).checks[-1].passed
