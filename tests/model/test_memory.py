"""The plan, against arrays that exist and numbers worked out by hand."""

import gc
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from magistral_mlx.checkpoint.folder import open_checkpoint
from magistral_mlx.checkpoint.quant_format import QuantFormat
from magistral_mlx.errors import ContextError, MemoryLimitError, OptionError
from magistral_mlx.generation.decoding import Stepper, prefill
from magistral_mlx.model import footprint
from magistral_mlx.model.footprint import kv_bytes
from magistral_mlx.model.kv_cache import KVCache
from magistral_mlx.model.kv_format import KVFormat
from magistral_mlx.model.load_options import LoadOptions
from magistral_mlx.model.loader import load_model
from magistral_mlx.model.mac import Mac
from magistral_mlx.model.mac_table import MAGISTRAL_SMALL, readme_table
from magistral_mlx.model.memory import MemoryPlan, make_plan
from magistral_mlx.model.transformer import Transformer
from tests.support.tiny import make_config, make_weights, quantize_weights, write_checkpoint

README = Path(__file__).parents[2] / "README.md"


def test_the_published_numbers_of_the_24b_model() -> None:
    assert kv_bytes(MAGISTRAL_SMALL, 1) == 160 * 1024
    assert kv_bytes(MAGISTRAL_SMALL, 40_960) == 6_710_886_400
    assert (
        kv_bytes(MAGISTRAL_SMALL, 64, kv_bits=8) / kv_bytes(MAGISTRAL_SMALL, 64) == (64 + 4) / 128
    )
    assert (
        kv_bytes(MAGISTRAL_SMALL, 64, kv_bits=4) / kv_bytes(MAGISTRAL_SMALL, 64) == (32 + 4) / 128
    )
    assert footprint.packed_bytes(MAGISTRAL_SMALL, QuantFormat(4, 64)) == pytest.approx(
        13.26e9, rel=1e-3
    )
    assert footprint.packed_bytes(MAGISTRAL_SMALL, QuantFormat(8, 64)) == pytest.approx(
        25.05e9, rel=1e-3
    )
    assert Mac(32).budget_bytes == pytest.approx(22_906e6, rel=1e-4)


@pytest.mark.parametrize("bits", [None, 8, 4])
@pytest.mark.parametrize("head_dim", [32, 64, 96])
def test_kv_bytes_are_those_of_a_full_cache(bits: int | None, head_dim: int) -> None:
    config = make_config(head_dim=head_dim)
    cache = KVCache(config, limit=300, kv_format=KVFormat.of(bits, config.head_dim))
    cache.reserve(300)
    Transformer(config)(mx.zeros((1, 3), dtype=mx.int32), cache.layers)
    assert cache.nbytes == kv_bytes(config, 300, kv_bits=bits, itemsize=4)


@pytest.mark.parametrize("quant", [None, QuantFormat(4, 32), QuantFormat(4, 32, "mxfp4")])
def test_resident_bytes_are_those_of_the_loaded_model(
    tmp_path: Path, quant: QuantFormat | None
) -> None:
    config = make_config()
    weights, block = make_weights(config, mx.bfloat16), None
    if quant is not None:
        weights, block = quantize_weights(weights, quant)
    checkpoint = open_checkpoint(write_checkpoint(tmp_path / "model", config, weights, block))
    model = load_model(checkpoint).result()
    loaded = sum(array.nbytes for _, array in tree_flatten(model.parameters()))
    on_gpu = mx.default_device().type == mx.DeviceType.gpu
    assert footprint.loaded_bytes(checkpoint, on_gpu=on_gpu) == loaded
    assert footprint.loaded_bytes(checkpoint, on_gpu=True) == checkpoint.nbytes


# Magistral's own proportions at a sixteenth, and those of the embedded model.
SMALL = {
    "hidden_size": 320,
    "intermediate_size": 2048,
    "num_heads": 4,
    "num_kv_heads": 1,
    "head_dim": 64,
}
DEMO = {
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 64,
}


@pytest.mark.parametrize(("shape", "within"), [(SMALL, 0.05), (DEMO, 0.08)])
@pytest.mark.parametrize(
    ("context", "chunk", "bits"),
    [
        (256, 64, None),
        (150, 64, None),
        pytest.param(256, 64, 8, marks=pytest.mark.slow),
        (256, 64, 4),
    ],
)
def test_the_forecast_is_the_measured_peak_within_5_percent_and_8_of_the_embedded_model_s(
    shape: dict[str, int], within: float, context: int, chunk: int, bits: int | None
) -> None:
    """MLX runs ahead more or less from run to run, which matters most beside few weights."""
    config = make_config(num_layers=4, **shape)
    model = Transformer(config)
    mx.eval(model.parameters())
    weights = sum(array.nbytes for _, array in tree_flatten(model.parameters()))
    cache = KVCache(config, limit=context, kv_format=KVFormat.of(bits, config.head_dim))
    cache.reserve(context)
    gc.collect()
    mx.clear_cache()
    others = mx.get_active_memory() - weights
    mx.reset_peak_memory()
    mx.eval(prefill(Stepper(model, cache), [i % 300 for i in range(context)], chunk=chunk).result())
    measured = mx.get_peak_memory() - others
    on_gpu = mx.default_device().type == mx.DeviceType.gpu
    workspace = footprint.workspace_bytes(
        config, chunk, context, itemsize=4, on_gpu=on_gpu, kv_bits=bits
    )
    kv = kv_bytes(config, context, kv_bits=bits, itemsize=4)
    assert weights + kv + workspace == pytest.approx(measured, rel=within)
    assert kv + workspace == pytest.approx(measured - weights, rel=0.2)


def test_a_pass_never_grows_past_what_is_planned() -> None:
    """A prompt leaves room for the reply; a reply of a given length may be shorter."""
    found = plan(1000)
    assert found.reply_tokens(744, None) == 256
    with pytest.raises(
        ContextError,
        match=r"leaves 255 of .* no given length needs 256\. .* at most 255 \(max_tokens=255\)",
    ):
        found.reply_tokens(745, None)
    assert found.reply_tokens(745, 255) == 255
    with pytest.raises(ContextError, match=r"max_tokens is 256, .* leaves 255 .* at most 255, or"):
        found.reply_tokens(745, 256)
    for asked in (1, None):
        with pytest.raises(
            ContextError, match=r"leaves 0 of .* for the reply; shorten it, or load"
        ):
            found.reply_tokens(1001, asked)
    assert plan(None, 64).reply_tokens(100, None) == 40_960 - 100


def plan(
    context: int | None = None, gb: float = 22.9, *, on_gpu: bool = True, **others: Any
) -> MemoryPlan:
    """Plan for the 24B model in 4 bit."""
    options = LoadOptions(max_kv_size=context, memory_gb=gb, **others)
    return make_plan(MAGISTRAL_SMALL, 13_260_000_000, options, on_gpu=on_gpu)


@pytest.mark.parametrize("gb", [14.5, 16.0, 17.2, 19.0, 22.9])
@pytest.mark.parametrize("bits", [None, 8, 4])
def test_nothing_larger_fits(gb: float, bits: int | None) -> None:
    found = plan(gb=gb, kv_bits=bits)
    assert found.fits
    assert (
        found.total_bytes
        == found.weights_bytes + found.kv_bytes + found.workspace_bytes
        <= gb * 1e9
    )
    assert found.context == 40_960 or found.context % 256 == 0
    if found.context < 40_960:
        with pytest.raises(MemoryLimitError):
            plan(found.context + 256, gb, kv_bits=bits)
    if found.prefill_chunk < 2048:
        with pytest.raises(MemoryLimitError):
            plan(found.context, gb, kv_bits=bits, prefill_step_size=2 * found.prefill_chunk)


def test_a_refusal_names_what_would_fit() -> None:
    with pytest.raises(MemoryLimitError) as error:
        plan(40_960, 17.2)
    message = str(error.value)
    assert f"max_kv_size={plan(None, 17.2).context})" in message
    for bits in (8, 4):
        article = {8: "an", 4: "a"}[bits]
        assert (
            f"max_kv_size={plan(None, 17.2, kv_bits=bits).context}) with {article} {bits}-bit "
            "cache" in message
        )
    with pytest.raises(
        MemoryLimitError,
        match=r"this context with weights of 3 bits \(magistral convert --q-bits 3\)",
    ):
        plan(256, 11)
    with pytest.raises(MemoryLimitError, match="nor beside 2-bit ones"):
        plan(None, 5)
    with pytest.raises(MemoryLimitError, match=r"weights 13\.26"):
        plan(256, 10)


def test_16_bits_are_a_cache_that_is_not_quantized() -> None:
    assert plan(1000, kv_bits=16) == plan(1000)


def test_what_is_asked_for_is_kept() -> None:
    found = plan(1000, kv_bits=4, prefill_step_size=7)
    assert (found.context, found.kv_bits, found.prefill_chunk) == (1000, 4, 7)
    short = replace(MAGISTRAL_SMALL, max_positions=700)
    assert make_plan(short, 10**9, LoadOptions(memory_gb=20)).context == 700
    longer, options = replace(short, max_positions=131_072), LoadOptions(memory_gb=50)
    assert make_plan(longer, 10**9, options).context == 40_960


@pytest.mark.parametrize("context", [0, 40_961])
def test_a_context_out_of_range(context: int) -> None:
    with pytest.raises(OptionError, match="1 to 40,960"):
        plan(context)
    with pytest.raises(OptionError, match="the model has 40960"):
        kv_bytes(MAGISTRAL_SMALL, 40_961)


@pytest.mark.parametrize("gb", [0, -1, float("nan"), float("inf")])
def test_a_budget_is_a_size(gb: float) -> None:
    with pytest.raises(OptionError, match="memory_gb is"):
        plan(gb=gb)


def test_other_options_out_of_range() -> None:
    with pytest.raises(OptionError, match="kv_bits is 3"):
        plan(kv_bits=3)
    with pytest.raises(OptionError, match="prefill_step_size is 0"):
        plan(prefill_step_size=0)


def test_a_score_matrix_makes_the_chunk_smaller() -> None:
    """On a CPU the kernel makes its scores: 32 heads x 256 x 40,960 x 4 bytes are 1.3 GB."""
    assert plan(gb=32).prefill_chunk == 2048
    assert plan(gb=32, on_gpu=False).prefill_chunk == 256
    assert plan(40_960, gb=21.2, on_gpu=False).prefill_chunk == 128


def test_the_table_of_the_readme_is_the_functions() -> None:
    assert readme_table() in README.read_text()
