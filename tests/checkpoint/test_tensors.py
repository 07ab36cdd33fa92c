"""Tensors must be those that config.json implies; errors name the first that is not."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from magistral_mlx.checkpoint.quant_format import QuantFormat
from tests.support.faults.edits import (
    DOWN,
    NORM,
    SECOND,
    Weights,
    change,
    edit_json,
    one_file,
    packed_folder,
    refusal,
)


def test_a_damaged_shard_is_named(folder: Path) -> None:
    whole = (folder / SECOND).read_bytes()
    for content, words in (
        (whole[:-1], "cut short"),
        (whole[:9], "should take"),
        (b"", "should take"),
        (whole + b"\0", "1 bytes follow"),
    ):
        (folder / SECOND).write_bytes(content)
        message = refusal(folder)
        assert str(folder / SECOND) in message
        assert words in message
        assert message.endswith("Fetch or convert it again")


def test_the_overflow_file_never_reaches_mlx(folder: Path) -> None:
    header = json.dumps(
        {
            "model.norm.weight": {
                "dtype": "BF16",
                "shape": [2**30, 2**30, 16],
                "data_offsets": [0, 0],
            }
        }
    )
    for path in folder.glob("model*"):
        path.unlink()
    (folder / "model.safetensors").write_bytes(
        (150).to_bytes(8, "little") + header.encode().ljust(150)
    )
    assert "model.safetensors is damaged: tensor 'model.norm.weight'" in refusal(folder)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {f"{DOWN}.weight": None},
            f"1 tensors are missing, first '{DOWN}.weight'; the checkpoint is incomplete",
        ),
        (
            {"extra.weight": mx.zeros((3,))},
            "1 tensors do not belong to this model, first 'extra.weight'",
        ),
        ({f"{DOWN}.bias": mx.zeros((64,))}, f"do not belong to this model, first '{DOWN}.bias'"),
        (
            {"lm_head.weight": mx.zeros((320, 63))},
            "tensor 'lm_head.weight' is F32 [320, 63], config.json implies",
        ),
        ({"lm_head.weight": mx.zeros((319, 64))}, "implies BF16 or F16 or F32 [320, 64]"),
        ({f"{DOWN}.weight": mx.zeros((64 * 96,))}, f"tensor '{DOWN}.weight' is F32 [6144]"),
        ({f"{NORM}.weight": mx.zeros((64, 1))}, f"tensor '{NORM}.weight' is F32 [64, 1]"),
        ({f"{NORM}.weight": mx.zeros((64,), mx.int32)}, f"tensor '{NORM}.weight' is I32 [64]"),
        (
            {f"{DOWN}.weight": mx.zeros((64, 96), mx.uint32)},
            f"tensor '{DOWN}.weight' is U32 [64, 96]",
        ),
    ],
)
def test_a_tensor_missing_extra_or_not_as_configured_is_named(
    folder: Path, weights: Weights, changes: dict[str, Any], words: str
) -> None:
    message = refusal(one_file(folder, change(weights, **changes)))
    assert message.startswith(f"{folder}: ")
    assert words in message


@pytest.mark.parametrize(
    ("quant", "changes", "words"),
    [
        (
            QuantFormat(4, 32),
            {f"{DOWN}.biases": None},
            f"1 tensors are missing, first '{DOWN}.biases'",
        ),
        (
            QuantFormat(4, 32),
            {f"{DOWN}.weight": None},
            f"1 tensors are missing, first '{DOWN}.weight'",
        ),
        (
            QuantFormat(4, 32),
            {f"{DOWN}.scales": mx.zeros((64, 2))},
            f"'{DOWN}.scales' is F32 [64, 2], config.json",
        ),
        (
            QuantFormat(4, 32),
            {f"{DOWN}.scales": mx.zeros((64, 3), mx.uint8)},
            f"'{DOWN}.scales' is U8 [64, 3]",
        ),
        (
            QuantFormat(4, 32),
            {f"{DOWN}.weight": mx.zeros((64, 18), mx.uint32)},
            "implies U32 [64, 12]",
        ),
        (
            QuantFormat(4, 32),
            {f"{DOWN}.weight": mx.zeros((64, 12), mx.int32)},
            "is I32 [64, 12], config.json implies U32",
        ),
        (
            QuantFormat(4, 32),
            {f"{NORM}.scales": mx.zeros((2,))},
            f"do not belong to this model, first '{NORM}.scales'",
        ),
        (
            QuantFormat(4, 32, "mxfp4"),
            {f"{DOWN}.scales": mx.zeros((64, 3))},
            "is F32 [64, 3], config.json implies U8",
        ),
        (
            QuantFormat(4, 32, "mxfp4"),
            {f"{DOWN}.biases": mx.zeros((64, 3))},
            f"not belong to this model, first '{DOWN}.b",
        ),
        (
            QuantFormat(4, 16, "nvfp4"),
            {f"{DOWN}.weight": None},
            f"1 tensors are missing, first '{DOWN}.weight'",
        ),
    ],
)
def test_a_packed_tensor_that_is_not_as_configured_is_named(
    folder: Path, weights: Weights, quant: QuantFormat, changes: dict[str, Any], words: str
) -> None:
    assert words in refusal(packed_folder(folder, weights, quant, **changes))


@pytest.mark.parametrize(
    ("block", "words"),
    [
        (None, "'model.embed_tokens' has scales, but the quantization block does not say how"),
        (
            {"bits": 4, "group_size": 32, DOWN: False},
            f"'{DOWN}' has scales, but the quantization block",
        ),
        (
            {"bits": 8, "group_size": 32},
            "tensor 'model.embed_tokens.weight' is U32 [320, 8], config.json implies U32 [320, 16]",
        ),
        (
            {"bits": 4, "group_size": 64},
            "groups of 64 do not divide the 96 columns of 'model.layers.0.mlp.down_proj'",
        ),
        ({"bits": 4, "group_size": 32, "mode": "mxfp4"}, "first 'lm_head.biases'"),
    ],
)
def test_a_block_that_does_not_describe_the_tensors_is_refused(
    folder: Path, weights: Weights, block: dict[str, Any] | None, words: str
) -> None:
    """The format is never guessed from shapes, as mlx-swift does not guess it either."""
    packed_folder(folder, weights, QuantFormat(4, 32))
    edit_json(folder / "config.json", quantization=block)
    assert words in refusal(folder)


def test_a_module_named_by_the_block_must_be_packed(folder: Path) -> None:
    edit_json(folder / "config.json", quantization={"bits": 4, "group_size": 32, DOWN: {"bits": 8}})
    message = refusal(folder)
    assert (
        f"quantization names '{DOWN}', but the tensor '{DOWN}.scales' is missing; fetch the "
        "weights again" in message
    )
