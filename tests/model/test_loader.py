"""The loader: fused projections change nothing, and bad numbers are refused."""

import gc
import logging
import os
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from magistral_mlx.checkpoint.folder import open_checkpoint
from magistral_mlx.checkpoint.quant_format import QuantFormat
from magistral_mlx.errors import CheckpointError
from magistral_mlx.model.loader import load_model
from magistral_mlx.model.transformer import Transformer
from tests.support.tiny import fill, make_config, make_weights, quantize_weights, write_checkpoint

CONFIG = make_config(intermediate_size=128)
FOUR, SIX = QuantFormat(4, 32), QuantFormat(6, 32)
MIXED = {
    "all agree": {},
    "v differs": {"model.layers.0.self_attn.v_proj": SIX, "model.layers.1.mlp.down_proj": SIX},
    "k differs, between q and v": {
        "model.layers.0.self_attn.k_proj": SIX,
        "model.layers.2.mlp.up_proj": SIX,
    },
    "q is not quantized": {
        "model.layers.0.self_attn.q_proj": None,
        "lm_head": None,
        "model.embed_tokens": None,
    },
    "all differ": {
        "model.layers.0.self_attn.k_proj": SIX,
        "model.layers.0.self_attn.v_proj": QuantFormat(8, 64),
    },
}
IDS = mx.array([[3, 1, 319, 77, 5]])


def load(folder: Path) -> Transformer:
    return load_model(open_checkpoint(folder)).result()


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def replaced(path: Path) -> None:
    path.unlink()
    mx.save_safetensors(str(path), {"a": mx.zeros(8)})


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


CHANGES: list[Callable[[Path], None]] = [cut, replaced, pipe, Path.unlink, Path.touch]


@pytest.mark.parametrize("change", CHANGES)
def test_weights_that_change_after_the_check_are_refused_at_once(
    tmp_path: Path, change: Callable[[Path], None]
) -> None:
    checkpoint = open_checkpoint(write_checkpoint(tmp_path / "m", CONFIG, make_weights(CONFIG)))
    change(max(tmp_path.glob("m/*.safetensors")))
    with pytest.raises(CheckpointError, match=r"changed or replaced|cannot be (loaded|read)"):
        load_model(checkpoint).result()


def test_weights_that_are_cut_while_they_are_read_are_refused(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_checkpoint(tmp_path / "m", CONFIG, make_weights(CONFIG)))
    stream = load_model(checkpoint)
    next(stream)
    for path in tmp_path.glob("m/*.safetensors"):
        os.truncate(path, 1000)
    with pytest.raises(CheckpointError, match="changed or replaced"):
        stream.result()


def test_weights_that_are_replaced_while_they_are_read_stay_the_old_ones(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m", CONFIG, make_weights(CONFIG))
    expected = load(folder)(IDS)
    stream = load_model(open_checkpoint(folder))
    next(stream)
    for path in folder.glob("*.safetensors"):
        pipe(path)
    assert mx.array_equal(stream.result()(IDS), expected)


@pytest.mark.parametrize("overrides", MIXED.values(), ids=MIXED.keys())
@pytest.mark.parametrize("rows", [1, 7])
def test_joined_projections_equal_separate_ones_bit_for_bit(
    tmp_path: Path, overrides: dict[str, QuantFormat | None], rows: int
) -> None:
    weights, block = quantize_weights(make_weights(CONFIG), FOUR, overrides)
    model = load(write_checkpoint(tmp_path / "m", CONFIG, weights, block))
    x = mx.random.normal((1, rows, 64), key=mx.random.key(5))

    def separately(module: str) -> mx.array:
        quant = overrides.get(module, FOUR)
        if quant is None:
            return x @ weights[f"{module}.weight"].T
        packed = [weights[f"{module}.{kind}"] for kind in ("weight", "scales", "biases")]
        return mx.quantized_matmul(x, *packed, True, quant.group_size, quant.bits)

    for i, layer in enumerate(model.layers):
        path = f"model.layers.{i}"
        q, k, v = (separately(f"{path}.self_attn.{p}_proj") for p in "qkv")
        gate, up = (separately(f"{path}.mlp.{p}_proj") for p in ("gate", "up"))
        assert mx.array_equal(layer.self_attn.qkv_proj(x), mx.concatenate([q, k, v], axis=-1))
        for index, alone in enumerate((q, k, v)):
            assert mx.array_equal(layer.self_attn.qkv_proj.project(index, x), alone)
        assert mx.array_equal(layer.mlp.gate_up_proj(x), mx.concatenate([gate, up], axis=-1))
    formats = {overrides.get(f"model.layers.0.self_attn.{p}_proj", FOUR) for p in "qkv"}
    assert len(model.layers[0].self_attn.qkv_proj.parts) == len(formats)


def test_a_float_checkpoint_loads_as_it_is(tmp_path: Path) -> None:
    config = make_config(tie_word_embeddings=True)
    weights = make_weights(config, mx.bfloat16)
    model = load(write_checkpoint(tmp_path / "m", config, weights))
    by_hand = fill(
        Transformer(config), config, {n: w.astype(mx.float32) for n, w in weights.items()}
    )
    ids = mx.array([[3, 1, 319]])
    assert mx.allclose(model(ids), by_hand(ids), atol=1e-5)
    if mx.default_device().type == mx.DeviceType.cpu:
        assert model.norm.weight.dtype == mx.float32


def test_progress_counts_every_byte_once(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m", CONFIG, make_weights(CONFIG))
    steps = list(load_model(open_checkpoint(folder)))
    assert [step.done for step in steps] == sorted({step.done for step in steps})
    total = sum(w.nbytes for w in make_weights(CONFIG).values())
    assert (steps[-1].done, steps[0].total) == (total, total)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.1.mlp.up_proj.scales",
        "lm_head.biases",
        "model.norm.weight",
        "model.embed_tokens.scales",
    ],
)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scales_biases_and_norms_must_be_finite(tmp_path: Path, name: str, value: float) -> None:
    weights, block = quantize_weights(make_weights(CONFIG), FOUR)
    flat = weights[name].flatten()
    flat[-1] = value
    weights[name] = flat.reshape(weights[name].shape)
    folder = write_checkpoint(tmp_path / "m", CONFIG, weights, block)
    with pytest.raises(CheckpointError, match=rf"{name}.*NaN or infinity.*again"):
        load(folder)


def test_at_most_one_layer_is_in_memory_twice(tmp_path: Path) -> None:
    config = make_config(hidden_size=256, intermediate_size=1024, num_layers=8, vocab_size=512)
    weights, block = quantize_weights(make_weights(config), FOUR)
    folder = write_checkpoint(tmp_path / "m", config, weights, block)
    total = sum(w.nbytes for w in weights.values())
    one_layer = sum(w.nbytes for name, w in weights.items() if ".layers.3." in name)
    del weights
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    model = load(folder)
    assert mx.get_active_memory() - before <= 1.01 * total
    assert mx.get_peak_memory() - before <= 1.01 * total + one_layer
    del model


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Make MLX report a GPU such as "applegpu_g13s", while it computes where it did."""

    def pretend(architecture: str) -> None:
        monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.DeviceType.gpu))
        monkeypatch.setattr(
            mx, "device_info", lambda: {"architecture": architecture, "device_name": "Apple M"}
        )

    return pretend


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "dtype"),
    [
        ("applegpu_g13g", mx.float16),  # M1
        ("applegpu_g13d", mx.float16),  # M1 Ultra
        ("applegpu_g14s", mx.float16),  # M2 Pro
        ("applegpu_g15s", mx.bfloat16),  # M3 Pro
        ("applegpu_g16p", mx.bfloat16),
        ("applegpu_g17s", mx.bfloat16),
        ("sm_90", mx.bfloat16),
    ],
)
def test_a_gpu_without_bfloat16_gets_float16(
    tmp_path: Path,
    gpu: Callable[[str], None],
    caplog: pytest.LogCaptureFixture,
    architecture: str,
    dtype: mx.Dtype,
) -> None:
    weights, block = quantize_weights(make_weights(CONFIG, mx.bfloat16), FOUR, {"lm_head": None})
    folder = write_checkpoint(tmp_path / "m", CONFIG, weights, block)
    expected = load(folder)(IDS)
    gpu(architecture)
    with caplog.at_level(logging.INFO, "magistral_mlx"):
        model = load(folder)
    floats = [
        a.dtype for _, a in tree_flatten(model.parameters()) if mx.issubdtype(a.dtype, mx.floating)
    ]
    assert set(floats) == {dtype}
    assert ("float16 instead of bfloat16" in caplog.text) == (dtype == mx.float16)
    if (
        dtype == mx.float16
    ):  # float16 holds every one of these weights exactly, so only its rounding differs
        logits = model(IDS)
        assert logits.dtype == mx.float16
        assert mx.linalg.norm(logits - expected) <= 0.01 * mx.linalg.norm(expected)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model.layers.1.mlp.up_proj.scales", 1e5),
        ("lm_head.weight", 7e4),
        ("model.layers.0.post_attention_layernorm.weight", 6e4),  # fits; what comes of it does not
    ],
)
def test_what_overflows_float16_stays_bfloat16(
    tmp_path: Path,
    gpu: Callable[[str], None],
    caplog: pytest.LogCaptureFixture,
    name: str,
    value: float,
) -> None:
    weights, block = quantize_weights(make_weights(CONFIG, mx.bfloat16), FOUR, {"lm_head": None})
    weights[name] = mx.full(weights[name].shape, value, mx.bfloat16)
    folder = write_checkpoint(tmp_path / "m", CONFIG, weights, block)
    gpu("applegpu_g14s")
    model = load(folder)
    culprit = "an activation" if value < 65504 else f"tensor {name!r}"
    assert f"{culprit} overflows float16" in caplog.text
    assert model.norm.weight.dtype == mx.bfloat16
    assert mx.isfinite(model(IDS)).all()


def test_a_damaged_file_is_not_taken_for_an_overflow(
    tmp_path: Path, gpu: Callable[[str], None]
) -> None:
    weights = make_weights(CONFIG, mx.bfloat16)
    weights["model.norm.weight"] = mx.full((64,), float("nan"), mx.bfloat16)
    gpu("applegpu_g13s")
    with pytest.raises(CheckpointError, match="NaN or infinity"):
        load(write_checkpoint(tmp_path / "m", CONFIG, weights))


def test_a_tied_models_last_norm_is_checked_too(tmp_path: Path) -> None:
    config = make_config(tie_word_embeddings=True)
    weights = make_weights(config)
    weights["model.norm.weight"] = mx.full((64,), float("inf"))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight"):
        load(write_checkpoint(tmp_path / "m", config, weights))


def test_loading_takes_no_more_than_what_is_loaded(tmp_path: Path) -> None:
    """Gate and up are in memory twice while down and lm_head are still to come."""
    config = make_config(num_layers=2, hidden_size=256, intermediate_size=1024, vocab_size=1200)
    checkpoint = open_checkpoint(write_checkpoint(tmp_path / "m", config, make_weights(config)))
    gc.collect()
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    model = load_model(checkpoint).result()
    loaded = sum(array.nbytes for _, array in tree_flatten(model.parameters()))
    assert loaded <= mx.get_peak_memory() - before <= 1.02 * loaded
