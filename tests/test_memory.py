"""The memory plan: bytes against arrays that exist, choices against the inequality they stand for."""

import mlx.core as mx
import pytest

from magistral_mlx.cache import KVCache
from magistral_mlx.errors import MemoryLimitError, OptionError
from magistral_mlx.memory import (
    MACS_GB,
    MAGISTRAL_SMALL,
    device_budget_bytes,
    kv_bytes,
    mac_table,
    make_plan,
    recommended_bytes,
    workspace_bytes,
)
from tests.tiny import make_config

GB = 10**9


@pytest.mark.parametrize("bits", [None, 8, 4])
@pytest.mark.parametrize("head_dim", [32, 64, 96])
def test_kv_bytes_are_those_of_a_real_cache(bits: int | None, head_dim: int) -> None:
    config = make_config(head_dim=head_dim)
    cache = KVCache(config, limit=300, bits=bits)
    k = mx.zeros((1, 2, 300, head_dim))
    for layer in cache.layers:
        layer.attend(mx.zeros((1, 4, 300, head_dim)), k, k, 1.0)
    assert cache.nbytes == kv_bytes(config, 300, kv_bits=bits, itemsize=4)


def test_kv_bytes_of_magistral_small() -> None:
    """Two arrays of 40 layers, 8 heads and 128 values, in bf16: 160 KiB a token."""
    assert kv_bytes(MAGISTRAL_SMALL, 1) == 163_840
    assert kv_bytes(MAGISTRAL_SMALL, 40_960) == 6_710_886_400
    assert kv_bytes(MAGISTRAL_SMALL, 1, kv_bits=8) / 163_840 == pytest.approx(0.53, abs=0.005)
    assert kv_bytes(MAGISTRAL_SMALL, 1, kv_bits=4) / 163_840 == pytest.approx(0.28, abs=0.005)
    with pytest.raises(OptionError, match="40961"):
        kv_bytes(MAGISTRAL_SMALL, 40_961)


@pytest.mark.parametrize("bits", [None, 8, 4])
@pytest.mark.parametrize("budget", [14 * GB, 15 * GB, 18 * GB, 60 * GB])
def test_a_chosen_context_fits_and_the_next_one_does_not(bits: int | None, budget: int) -> None:
    weights = 13_260_000_000
    plan = make_plan(MAGISTRAL_SMALL, weights, budget_bytes=budget, kv_bits=bits)
    assert plan.fits
    assert plan.total_bytes == plan.weights_bytes + plan.kv_bytes + plan.workspace_bytes <= budget
    if plan.context < 40_960:
        longer = plan.context + 256
        space = workspace_bytes(MAGISTRAL_SMALL, longer, 256, kv_bits=bits, itemsize=2, fused=True)
        assert weights + kv_bytes(MAGISTRAL_SMALL, longer, kv_bits=bits) + space > budget
        assert plan.prefill_chunk == 256
    else:
        assert plan.context == 40_960


def test_what_is_asked_for_is_kept_or_refused() -> None:
    plan = make_plan(MAGISTRAL_SMALL, 13 * GB, budget_bytes=60 * GB, context=1000, prefill_chunk=77)
    assert (plan.context, plan.prefill_chunk) == (1000, 77)
    with pytest.raises(MemoryLimitError) as refused:
        make_plan(MAGISTRAL_SMALL, 13 * GB, budget_bytes=16 * GB, context=40_960)
    message = str(refused.value)
    assert "40960 needs 20." in message
    for part in ("of weights", "of KV cache", "should use 16.00 GB", "a context of ", "--kv-bits 8", "--kv-bits 4"):
        assert part in message


def test_weights_that_do_not_fit_are_refused_with_the_way_out() -> None:
    with pytest.raises(MemoryLimitError, match=r"convert with fewer bits.*--memory-gb"):
        make_plan(MAGISTRAL_SMALL, 13 * GB, budget_bytes=11 * GB)


def test_a_score_matrix_makes_the_chunk_smaller() -> None:
    """On a CPU the attention kernel makes its scores: 2 x 32 heads x chunk x 40,960 x 4 bytes."""
    fused, unfused = (make_plan(MAGISTRAL_SMALL, 0, budget_bytes=20 * GB, fused=f, itemsize=4) for f in (True, False))
    assert (fused.prefill_chunk, unfused.prefill_chunk) == (2048, 512)
    assert unfused.workspace_bytes - 64 * 512 * 40_960 * 4 > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv_bits": 3}, "kv_bits is 3"),
        ({"context": 0}, "context of 0"),
        ({"context": 50_000}, "40960 positions"),
        ({"prefill_chunk": 0}, "prefill_step_size is 0"),
    ],
)
def test_options_out_of_range(options: dict[str, int], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        make_plan(MAGISTRAL_SMALL, 0, budget_bytes=GB, **options)


@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf")])
def test_a_budget_must_be_a_size(value: float) -> None:
    with pytest.raises(OptionError, match="memory_gb"):
        device_budget_bytes(value)


def test_the_device_reports_something() -> None:
    assert device_budget_bytes() > GB
    assert device_budget_bytes(2.5) == 2_500_000_000


def test_the_table_for_macs() -> None:
    assert recommended_bytes(32) // 10**6 == 22_906  # what such a Mac reports
    rows = mac_table().splitlines()
    assert len(rows) == 2 + len(MACS_GB)
    assert rows[2].startswith("| 16 GB |")
    assert "40,960" not in rows[2]
    assert rows[4].split("|")[3].strip() == "40,960"
