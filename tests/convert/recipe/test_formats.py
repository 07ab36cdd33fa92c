"""Every format from every kind of source, as MLX rounds it and mlx-lm loads it."""

import json
import logging
import os
from pathlib import Path

import mlx.core as mx
import pytest

from magistral_mlx.checkpoint.folder import open_checkpoint
from magistral_mlx.checkpoint.quant_format import (
    AFFINE_BITS,
    AFFINE_GROUP_SIZES,
    FP_FORMATS,
    QuantFormat,
)
from magistral_mlx.convert import check_conversion
from magistral_mlx.convert.recipe.options import ConvertOptions
from magistral_mlx.convert.source.source import open_source
from tests.support.sources import (
    CONFIG,
    MODULES,
    Weights,
    assert_is,
    change_json,
    content,
    convert_quickly,
    read_by_mlx_lm,
    restored,
    write_hf,
    write_multimodal,
    write_packed,
)
from tests.support.tiny import make_weights

FORMATS = [QuantFormat(bits, group, mode) for mode, (bits, group) in FP_FORMATS.items()]  # type: ignore[arg-type]
FORMATS += [QuantFormat(bits, AFFINE_GROUP_SIZES[i % 3]) for i, bits in enumerate(AFFINE_BITS)]
OTHERS = {QuantFormat(bits, group) for bits in AFFINE_BITS for group in AFFINE_GROUP_SIZES} - set(
    FORMATS
)
every_format = pytest.mark.parametrize(
    "quant",
    [*FORMATS, *(pytest.param(q, marks=pytest.mark.slow) for q in sorted(OTHERS, key=str))],
    ids=str,
)


# formats


@every_format
def test_every_format_is_rounded_by_mlx_and_read_by_mlx_lm(
    tmp_path: Path, hf_folder: Path, weights: Weights, quant: QuantFormat
) -> None:
    convert_quickly(
        hf_folder,
        tmp_path / "out",
        q_bits=quant.bits,
        q_group_size=quant.group_size,
        q_mode=quant.mode,
    )
    assert_is(open_checkpoint(tmp_path / "out").tensors(), weights, dict.fromkeys(MODULES, quant))
    assert_is(read_by_mlx_lm(tmp_path / "out"), weights, dict.fromkeys(MODULES, quant))


# 16 bits


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16, mx.float32])
def test_16_bits_are_a_plain_copy(tmp_path: Path, dtype: mx.Dtype) -> None:
    weights = {name: weight.astype(dtype) for name, weight in make_weights(CONFIG).items()}
    folder = write_hf(tmp_path / "in", weights)
    change_json(folder / "config.json", torch_dtype=str(dtype).removeprefix("mlx.core."))
    summary = convert_quickly(folder, tmp_path / "out", q_bits=16)
    assert summary.bytes_out == summary.bytes_in
    assert summary.bits_per_weight == dtype.size * 8
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert not {"quantization", "quantization_config"} & config.keys()
    assert_is(open_checkpoint(tmp_path / "out").tensors(), weights, {})
    assert_is(read_by_mlx_lm(tmp_path / "out"), weights, {})
    bits = check_conversion(
        folder, tmp_path / "2", ConvertOptions(q_bits=16, tokenizer_json=False)
    ).plan.bits
    assert bits == dict.fromkeys(MODULES, dtype.size * 8)


def test_a_multimodal_source_in_16_bits_is_the_text_model(tmp_path: Path, hf_folder: Path) -> None:
    results = []
    for i, source in enumerate((hf_folder, write_multimodal(tmp_path / "2509"))):
        convert_quickly(source, tmp_path / f"out{i}", q_bits=16)
        results.append(content(tmp_path / f"out{i}"))
        del results[-1]["magistral_mlx.json"]
    assert results[0] == results[1]


# packed sources


@every_format
def test_a_packed_source_is_read_as_mlx_restores_it(
    tmp_path: Path, weights: Weights, quant: QuantFormat
) -> None:
    folder = write_packed(tmp_path, weights, quant)
    source = open_source(folder)
    assert source.float_type == "bfloat16"
    for name, weight in weights.items():
        expected = restored(weight, quant if weight.ndim == 2 else None)
        blocks = list(source.blocks(name, block_bytes=101 * expected[0].nbytes + 1))
        assert {block.shape[0] for _, block in blocks[:-1]} <= {101}
        joined = mx.concatenate([block for _, block in blocks])
        assert joined.dtype == expected.dtype
        assert mx.array_equal(joined.view(mx.uint8), expected.view(mx.uint8)), name
    stored = sum(os.path.getsize(shard.path) - shard.data_start for shard in source.shards)
    assert source.nbytes == stored == sum(map(source.nbytes_of, weights))


MIXED: dict[str, QuantFormat | None] = {
    "lm_head": QuantFormat(6, 32),
    "model/embed_tokens": None,
    "model/layers/1/mlp/up_proj": QuantFormat(4, 16, "nvfp4"),
}


def test_a_packed_source_is_dequantized_by_16_bits_as_mlx_lm_does(
    tmp_path: Path, weights: Weights, caplog: pytest.LogCaptureFixture
) -> None:
    from mlx.utils import tree_flatten
    from mlx_lm.utils import dequantize_model, load_model

    folder = write_packed(tmp_path / "in", weights, QuantFormat(8, 64), **MIXED)
    convert_quickly(folder, tmp_path / "out", q_bits=16)
    assert not caplog.records
    model, _ = load_model(folder)
    expected = dict(tree_flatten(dequantize_model(model).parameters()))  # type: ignore[arg-type]
    assert_is(open_checkpoint(tmp_path / "out").tensors(), expected, {})
    assert_is(read_by_mlx_lm(tmp_path / "out"), expected, {})
    assert "quantization" not in json.loads((tmp_path / "out" / "config.json").read_text())


@pytest.mark.parametrize("overrides", [{}, MIXED], ids=["8 bit", "mixed"])
def test_rounding_again_is_allowed_with_one_warning(
    tmp_path: Path,
    weights: Weights,
    caplog: pytest.LogCaptureFixture,
    overrides: dict[str, QuantFormat | None],
) -> None:
    folder = write_packed(tmp_path / "in", weights, QuantFormat(8, 64), **overrides)
    convert_quickly(folder, tmp_path / "out")
    bits = "4 and 6 and 8" if overrides else "8"
    assert [(record.levelno, record.getMessage()) for record in caplog.records] == [
        (
            logging.WARNING,
            f"{folder} is quantized already, to {bits} bit: rounding again adds to its error; the "
            "bf16 checkpoint that it was made from gives better weights of the same size",
        )
    ]
    stored = {
        module: overrides.get(module.replace(".", "/"), QuantFormat(8, 64)) for module in MODULES
    }
    once = {
        name: restored(weight, stored.get(name.removesuffix(".weight")))
        for name, weight in weights.items()
    }
    assert_is(
        open_checkpoint(tmp_path / "out").tensors(),
        once,
        dict.fromkeys(MODULES, QuantFormat(4, 64)),
    )
    caplog.clear()
    # Reading it, like verify, gives no warning.
    open_source(folder)
    assert not caplog.records


def test_our_own_output_can_be_a_source(tmp_path: Path, hf_folder: Path, weights: Weights) -> None:
    convert_quickly(hf_folder, tmp_path / "packed", q_mode="mxfp4")
    convert_quickly(tmp_path / "packed", tmp_path / "plain", q_bits=16)
    quant = QuantFormat(4, 32, "mxfp4")
    once = {
        name: restored(weight, quant if weight.ndim == 2 else None)
        for name, weight in weights.items()
    }
    assert_is(open_checkpoint(tmp_path / "plain").tensors(), once, {})


def test_a_packed_source_without_a_type_has_that_of_its_floats(tmp_path: Path) -> None:
    half = {name: weight.astype(mx.float16) for name, weight in make_weights(CONFIG).items()}
    folder = write_packed(tmp_path, half, QuantFormat(4, 64))
    change_json(folder / "config.json", torch_dtype=None)
    assert open_source(folder).float_type == "float16"
