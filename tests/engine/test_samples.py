"""Several replies to one prompt: each is the single reply with its seed, if all of them fit."""

from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest

import magistral_mlx as mm
from magistral_mlx.generation.reply import vote
from tests.generation.test_batch import address
from tests.support.sources import convert_quickly
from tests.support.tiny import DEMO

GREEDY = mm.SamplingParams(temperature=0)
QUESTION = "What is 48 + 76?"
QUESTION, OTHER = "What is 48 + 76?", "How many r's are in strawberry?"
WILD = mm.SamplingParams(temperature=2, seed=7, max_tokens=30)


@pytest.fixture(scope="module")
def loaded() -> mm.Magistral:
    return mm.load("demo", max_kv_size=1024, prefill_step_size=16)


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


@pytest.mark.slow
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


@pytest.mark.parametrize("n", [0, -3, 2.5, True])
def test_a_count_that_is_none(magistral: mm.Magistral, n: int) -> None:
    with pytest.raises(mm.OptionError, match="at least 1"):
        magistral.stream_samples(QUESTION, n=n)


def test_samples_are_the_single_replies_with_those_seeds(magistral: mm.Magistral) -> None:
    samples = magistral.sample(QUESTION, mm.SamplingParams(temperature=1.5, seed=7), n=3)
    assert [r.usage.seed for r in samples.replies] == [7, 8, 9]
    for reply in samples.replies:
        single = magistral.ask(QUESTION, mm.SamplingParams(temperature=1.5, seed=reply.usage.seed))
        assert (single.reasoning, single.answer) == (reply.reasoning, reply.answer)
    keys = [vote(r.answer) for r in samples.replies]
    assert samples.votes == {k: keys.count(k) for k in keys if k}
    assert vote(samples.majority) == max(samples.votes, key=lambda k: samples.votes[k])


@pytest.mark.parametrize(
    ("answer", "key"),
    [
        ("It is **1,234**.", "1,234"),
        ("From 3 to -7", "-7"),
        ("3.50", "3.50"),
        ("Yes,  it IS.", "yes it is"),
        ("", ""),
    ],
)
def test_votes(answer: str, key: str) -> None:
    assert vote(answer) == key


@pytest.mark.parametrize("n", [1, 3])
def test_the_tokens_so_far_are_those_of_all_replies(loaded: mm.Magistral, n: int) -> None:
    with loaded.stream_samples(QUESTION, GREEDY, n=n) as replies:
        assert loaded.tokens_so_far == 0
        samples = replies.result()
    written = sum(reply.usage.completion_tokens for reply in samples.replies)
    assert loaded.tokens_so_far == written > 0
