"""Several replies to one prompt: each is the single reply with its seed, if all of them fit."""

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest

import magistral_mlx as mm
from magistral_mlx.engine.samples import plan_samples
from magistral_mlx.generation.reply import vote
from magistral_mlx.model.memory import MemoryPlan
from tests.generation.test_batch import address
from tests.support.sources import convert_quickly
from tests.support.tiny import DEMO, make_config

QUESTION, OTHER = "What is 48 + 76?", "How many r's are in strawberry?"
WILD = mm.SamplingParams(temperature=2, seed=7, max_tokens=30)


@pytest.fixture(scope="module")
def loaded() -> mm.Magistral:
    return mm.load("demo", max_kv_size=1024, prefill_step_size=16)


@pytest.fixture
def magistral(loaded: mm.Magistral) -> Iterator[mm.Magistral]:
    loaded.prefix_cache.clear()
    yield loaded
    loaded.prefix_cache.clear()


def essence(reply: mm.Reply) -> tuple[object, ...]:
    usage = reply.usage
    said = (reply.reasoning, reply.answer, reply.finish_reason, reply.reasoning_closed_by)
    return (
        *said,
        usage.prompt_tokens,
        usage.completion_tokens,
        usage.reasoning_tokens,
        usage.max_tokens,
        usage.seed,
    )


def singles(
    magistral: mm.Magistral, sampling: mm.SamplingParams, n: int, question: str = QUESTION
) -> list[object]:
    assert sampling.seed is not None
    return [
        essence(magistral.ask(question, replace(sampling, seed=sampling.seed + i)))
        for i in range(n)
    ]


@pytest.mark.parametrize(
    ("sampling", "n"),
    [
        (mm.SamplingParams(temperature=0, seed=0, max_tokens=40), 2),
        pytest.param(replace(WILD, max_tokens=20), 16, marks=pytest.mark.slow),
        pytest.param(replace(WILD, think_budget=9, max_tokens=40), 4, marks=pytest.mark.slow),
        (replace(WILD, think_budget=0, stop=("1", "e", ". ")), 6),
        (replace(WILD, max_tokens=1), 3),
        (replace(WILD, think_budget=0, logprobs=2, max_tokens=9), 3),
    ],
)
def test_replies_are_those_of_their_seeds(
    magistral: mm.Magistral, sampling: mm.SamplingParams, n: int
) -> None:
    samples = magistral.sample(QUESTION, sampling, n=n)
    assert [essence(reply) for reply in samples.replies] == singles(magistral, sampling, n)


@pytest.mark.slow
def test_what_the_last_reply_left_is_shared_too(magistral: mm.Magistral) -> None:
    magistral.ask(OTHER, replace(WILD, max_tokens=3))
    sampling = replace(WILD, max_tokens=20)
    samples = magistral.sample(QUESTION, sampling, n=3)
    assert all(reply.usage.cached_tokens > 0 for reply in samples.replies)
    magistral.prefix_cache.clear()
    assert [essence(reply) for reply in samples.replies] == singles(magistral, sampling, 3)


@pytest.mark.slow
@pytest.mark.parametrize(
    "sampling", [mm.SamplingParams(temperature=0, seed=1), mm.SamplingParams(seed=3), WILD]
)
@pytest.mark.parametrize("question", [QUESTION, OTHER, "What is 9 * 37?", "Spell banana."])
def test_sixteen_whole_replies_are_those_of_their_seeds(
    magistral: mm.Magistral, sampling: mm.SamplingParams, question: str
) -> None:
    sampling = replace(sampling, max_tokens=300)
    samples = magistral.sample(question, sampling, n=16)
    assert [essence(reply) for reply in samples.replies] == singles(
        magistral, sampling, 16, question
    )


@pytest.mark.slow
def test_one_reply_is_asked_as_any_other(magistral: mm.Magistral) -> None:
    asked = magistral.ask(QUESTION, WILD)
    magistral.prefix_cache.clear()
    (only,) = magistral.sample(QUESTION, WILD, n=1).replies
    assert (essence(only), only.usage.forward_passes) == (
        essence(asked),
        asked.usage.forward_passes,
    )


def test_a_pass_serves_all_of_them(
    magistral: mm.Magistral, monkeypatch: pytest.MonkeyPatch
) -> None:
    fed: list[tuple[int, ...]] = []
    hidden = magistral.model.hidden

    def counting(ids: mx.array, *rest: object, **options: object) -> mx.array:
        fed.append(ids.shape)
        return hidden(ids, *rest, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(magistral.model, "hidden", counting)
    samples = magistral.sample(QUESTION, replace(WILD, max_tokens=None), n=8)
    replies = samples.replies
    chunks = -(-replies[0].usage.prompt_tokens // 16)
    assert (
        samples.forward_passes == len(fed) == max(reply.usage.forward_passes for reply in replies)
    )
    assert [rows for rows, ids in fed[:chunks]] == [1] * chunks
    rows = [rows for rows, ids in fed[chunks:]]
    assert rows == sorted(rows, reverse=True)
    lengths = [reply.usage.completion_tokens for reply in replies]
    assert len(set(lengths)) > 1
    # A row leaves after the pass that was queued before its stop id was read.
    assert sum(rows) <= sum(lengths) + len(lengths)


def test_the_prompt_stays_for_the_next_request(magistral: mm.Magistral) -> None:
    magistral.ask(QUESTION, replace(WILD, max_tokens=1))
    before = [address(a) for a in magistral.prefix_cache.cache.arrays]
    samples = magistral.sample(QUESTION, WILD, n=4)
    prompt = samples.replies[0].usage.prompt_tokens
    assert {reply.usage.cached_tokens for reply in samples.replies} == {prompt - 1}
    assert len(magistral.prefix_cache.ids) == magistral.prefix_cache.cache.length == prompt
    again = magistral.ask(QUESTION, WILD)
    assert again.usage.cached_tokens == prompt - 1
    assert essence(again) == essence(samples.replies[0])
    assert [address(a) for a in magistral.prefix_cache.cache.arrays] == before


def test_a_prompt_cache_file_holds_the_prompt(magistral: mm.Magistral, tmp_path: Path) -> None:
    first = magistral.sample(QUESTION, WILD, n=2, prompt_cache_file=tmp_path / "c")
    magistral.prefix_cache.clear()
    again = magistral.sample(QUESTION, WILD, n=2, prompt_cache_file=tmp_path / "c")
    assert again.replies[0].usage.cached_tokens == first.replies[0].usage.prompt_tokens - 1
    assert list(map(essence, again.replies)) == list(map(essence, first.replies))


@pytest.mark.slow
def test_no_more_is_allocated_for_the_prompt_than_it_takes(magistral: mm.Magistral) -> None:
    """Reserve the prompt's capacity at once, in steps of 256; growing by chunks would double it."""
    magistral.sample("1 + 2 + 3 + 4 + 5 = ? " * 33, replace(WILD, max_tokens=2), n=2)
    length = magistral.prefix_cache.cache.length
    assert length > 512
    position = magistral.plan.kv_bytes // magistral.plan.context
    assert (
        magistral.prefix_cache.cache.nbytes == -(-length // 256) * 256 * position < 1024 * position
    )


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.slow
def test_packed_caches(bits: int) -> None:
    packed = mm.load("demo", max_kv_size=1024, kv_bits=bits)
    sampling = mm.SamplingParams(seed=3, max_tokens=30)
    samples = packed.sample(QUESTION, sampling, n=3)
    assert [essence(reply) for reply in samples.replies] == singles(packed, sampling, 3)


@pytest.mark.slow
def test_votes_where_replies_differ(tmp_path: Path) -> None:
    """Use two bits a weight: the demo then errs, each time in another way."""
    convert_quickly(DEMO, tmp_path / "demo-2bit", q_bits=2)
    weak = mm.load(tmp_path / "demo-2bit", max_kv_size=1024)
    sampling = mm.SamplingParams(seed=0, max_tokens=150)
    samples = weak.sample(QUESTION, sampling, n=8)
    assert [essence(reply) for reply in samples.replies] == singles(weak, sampling, 8)
    keys = [vote(reply.answer) for reply in samples.replies]
    assert len(samples.votes) > 1
    assert samples.votes == {key: keys.count(key) for key in keys if key}
    assert samples.votes[vote(samples.majority)] == max(samples.votes.values())


@pytest.mark.parametrize("at", [1, 4, pytest.param(25, marks=pytest.mark.slow)])
def test_ctrl_c_gives_what_there_is_and_goes_on(
    magistral: mm.Magistral, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    whole = {
        r.usage.seed: r.reasoning + r.answer for r in magistral.sample(QUESTION, WILD, n=3).replies
    }
    magistral.prefix_cache.clear()
    logits, passes = magistral.model.logits, iter(range(1, 999))

    def interrupting(x: mx.array) -> mx.array:
        if next(passes) == at:
            raise KeyboardInterrupt
        return logits(x)

    found: list[mm.Reply] = []
    with monkeypatch.context() as patch:
        patch.setattr(magistral.model, "logits", interrupting)
        with pytest.raises(KeyboardInterrupt):
            found.extend(magistral.stream_samples(QUESTION, WILD, n=3))
    assert sorted(reply.usage.seed for reply in found) == [7, 8, 9]
    for reply in found:
        assert reply.finish_reason == "cancelled"
        said = reply.reasoning + reply.answer
        assert ("<think>" if at < 6 else whole[reply.usage.seed]).startswith(said)
        # The prompt's pass is the first.
        assert reply.usage.completion_tokens in (max(0, at - 2), at - 1)
    again = magistral.sample(QUESTION, WILD, n=3).replies
    assert {r.usage.seed: r.reasoning + r.answer for r in again} == whole


def test_cancelling_ends_all_of_them_and_none_votes(
    magistral: mm.Magistral, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits, passes = magistral.model.logits, iter(range(1, 999))

    def cancelling(x: mx.array) -> mx.array:
        if next(passes) == 5:
            magistral.cancel()
        return logits(x)

    monkeypatch.setattr(magistral.model, "logits", cancelling)
    samples = magistral.sample(QUESTION, replace(WILD, think_budget=0), n=3)
    assert [reply.finish_reason for reply in samples.replies] == ["cancelled"] * 3
    assert [reply.usage.completion_tokens for reply in samples.replies] == [4] * 3
    assert any(reply.answer for reply in samples.replies)
    assert (samples.majority, samples.votes, next(passes)) == ("", {}, 6)
    assert magistral.sample(QUESTION, WILD, n=2).replies[0].finish_reason != "cancelled"


@pytest.mark.slow
def test_they_can_be_closed_and_a_newer_reply_ends_them(magistral: mm.Magistral) -> None:
    expected = magistral.ask(OTHER, replace(WILD, max_tokens=30))
    hot = replace(WILD, max_tokens=None)
    for is_closed in (True, False):
        replies = magistral.stream_samples(QUESTION, hot, n=4)
        next(replies)
        if is_closed:
            replies.close()
        assert essence(magistral.ask(OTHER, replace(WILD, max_tokens=30))) == essence(expected)
        if not is_closed:
            with pytest.raises(mm.OptionError, match="newer reply"):
                list(replies)
    assert essence(magistral.ask(OTHER, replace(WILD, max_tokens=30))) == essence(expected)


def test_running_out_of_memory_drops_the_cache(
    magistral: mm.Magistral, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("[metal::malloc] Out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(magistral.model, "logits", fail)
        with pytest.raises(mm.MemoryLimitError, match="dropped"):
            magistral.sample(QUESTION, WILD, n=3)
    assert magistral.prefix_cache.ids == []
    assert len(magistral.sample(QUESTION, WILD, n=2).replies) == 2


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
    fewer = re.search(r"--samples (\d+)", message)
    assert fewer is not None
    assert 1 <= int(fewer[1]) < n
    assert plan_samples(PLAN, CONFIG, 1000, int(fewer[1]), asked).max_tokens >= (asked or 256)
    with pytest.raises(mm.MemoryLimitError):
        plan_samples(PLAN, CONFIG, 1000, int(fewer[1]) + 1, asked)
    shorter = re.search(r"--max-tokens (\d+)", message)
    if asked and n < 10**6:
        assert shorter is not None
        assert plan_samples(PLAN, CONFIG, 1000, n, int(shorter[1])).max_tokens == int(shorter[1])
    assert "--kv-bits" in message


def test_one_reply_may_take_what_it_may_alone() -> None:
    tight = replace(PLAN, budget_bytes=PLAN.total_bytes)
    assert plan_samples(tight, CONFIG, 257, 1, None).max_tokens == tight.reply_tokens(257, None)


def test_the_context_bounds_each_of_them() -> None:
    with pytest.raises(mm.ContextError, match="has room for 3000"):
        plan_samples(PLAN, CONFIG, 1000, 2, 3001)


@pytest.mark.parametrize("n", [0, -3, 2.5, True])
def test_a_count_that_is_none(magistral: mm.Magistral, n: int) -> None:
    with pytest.raises(mm.OptionError, match="at least one"):
        magistral.stream_samples(QUESTION, n=n)


def test_the_library_refuses_before_any_pass(
    magistral: mm.Magistral, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = magistral.plan
    tight = replace(
        plan, budget_bytes=plan.total_bytes
    )  # the context's 1,024 positions and no more
    monkeypatch.setattr(magistral, "plan", tight)
    monkeypatch.setattr(magistral.model, "hidden", lambda *_, **__: pytest.fail("the model ran"))
    with pytest.raises(mm.MemoryLimitError, match="--samples 1"):
        magistral.sample(QUESTION, mm.SamplingParams(max_tokens=500), n=2)


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
    assert list(map(essence, samples.replies)) == list(map(essence, expected))
    assert magistral.prefix_cache.cache.nbytes == 256 * position
