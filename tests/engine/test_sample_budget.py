"""The memory of several replies: the tokens that fit, and the refusal of more."""

import re
from dataclasses import replace

import pytest

import magistral_mlx as mm
from magistral_mlx.engine.samples import plan_samples
from magistral_mlx.model.memory import MemoryPlan
from tests.support.tiny import make_config

GREEDY = mm.SamplingParams(temperature=0)
QUESTION = "What is 48 + 76?"
WILD = mm.SamplingParams(temperature=2, seed=7, max_tokens=30)
CONFIG = make_config(num_layers=40)
PLAN = MemoryPlan(
    weights_bytes=10**9,
    kv_bytes=4000 * 10_000,
    workspace_bytes=20_000_000,
    budget_bytes=10**9 + 20_000_000 + 100_000_000,  # room for 10,000 positions
    context=4000,
    kv_bits=None,
    prefill_chunk=256,
)


@pytest.fixture(scope="module")
def loaded() -> mm.Magistral:
    return mm.load("demo", max_kv_size=1024, prefill_step_size=16)


@pytest.mark.parametrize("n", [2, 3, 16, 32])
@pytest.mark.parametrize("prompt", [1, 256, 257, 1000])
def test_replies_fit_the_budget_and_no_longer_ones_would(n: int, prompt: int) -> None:
    """Count positions of 10,000 bytes, and two layers of 40 more while the cache grows."""
    tokens = plan_samples(PLAN, CONFIG, prompt, n, None).max_tokens
    used = 10_000 * (-(-prompt // 256) * 256 + n * tokens * 1.05)
    assert used <= 100_000_000
    assert tokens == 4000 - prompt or used + n * 10_500 > 100_000_000
    assert plan_samples(PLAN, CONFIG, prompt, n, tokens).max_tokens == tokens
    assert plan_samples(PLAN, CONFIG, prompt, n, tokens).prompt_bytes >= 10_000 * prompt


@pytest.mark.parametrize(
    ("n", "asked"), [(4, 2400), (16, 1000), (64, None), (10**9, None), (10**30, 1)]
)
def test_what_does_not_fit_is_refused_with_what_does(n: int, asked: int | None) -> None:
    with pytest.raises(mm.MemoryLimitError, match=f"^{n} replies of") as error:
        plan_samples(PLAN, CONFIG, 1000, n, asked)
    message = str(error.value)
    fewer = re.search(r"n=(\d+)", message)
    assert fewer is not None
    assert 1 <= int(fewer[1]) < n
    assert plan_samples(PLAN, CONFIG, 1000, int(fewer[1]), asked).max_tokens >= (asked or 256)
    with pytest.raises(mm.MemoryLimitError):
        plan_samples(PLAN, CONFIG, 1000, int(fewer[1]) + 1, asked)
    shorter = re.search(r"max_tokens=(\d+)", message)
    if asked and n < 10**6:
        assert shorter is not None
        assert plan_samples(PLAN, CONFIG, 1000, n, int(shorter[1])).max_tokens == int(shorter[1])
    assert "kv_bits" in message


def test_one_reply_may_take_what_it_may_alone() -> None:
    tight = replace(PLAN, budget_bytes=PLAN.total_bytes)
    assert plan_samples(tight, CONFIG, 257, 1, None).max_tokens == tight.reply_tokens(257, None)


def test_the_context_bounds_each_of_them() -> None:
    with pytest.raises(mm.ContextError, match="at most 3000"):
        plan_samples(PLAN, CONFIG, 1000, 2, 3001)


def test_the_library_refuses_before_any_pass(
    magistral: mm.Magistral, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = magistral.plan
    tight = replace(plan, budget_bytes=plan.total_bytes)  # the context's positions and no more
    monkeypatch.setattr(magistral, "plan", tight)
    monkeypatch.setattr(magistral.model, "hidden", lambda *_, **__: pytest.fail("the model ran"))
    with pytest.raises(mm.MemoryLimitError, match="n=1"):
        magistral.sample(QUESTION, mm.SamplingParams(max_tokens=500), n=2)


@pytest.mark.slow
def test_spare_capacity_of_the_prompts_cache_makes_room_where_it_is_needed(
    magistral: mm.Magistral, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = magistral.sample(QUESTION, WILD, n=3).replies
    magistral.prefix_cache.clear()
    magistral.ask(QUESTION, replace(WILD, max_tokens=800, stop=("1",), think_budget=0))
    position = magistral.plan.kv_bytes // magistral.plan.context
    assert magistral.prefix_cache.cache.nbytes > 512 * position
    plan = magistral.plan
    monkeypatch.setattr(magistral, "plan", replace(plan, budget_bytes=plan.total_bytes))
    samples = magistral.sample(QUESTION, WILD, n=3)
    said = [(reply.reasoning, reply.answer) for reply in samples.replies]
    assert said == [(reply.reasoning, reply.answer) for reply in expected]
    assert magistral.prefix_cache.cache.nbytes == 256 * position
