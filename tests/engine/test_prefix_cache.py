"""The prefix that a prompt shares with the cache is neither read again nor copied."""

from dataclasses import replace
from itertools import takewhile

import mlx.core as mx
import numpy as np
import pytest

import magistral_mlx as mm

GREEDY = mm.SamplingParams(temperature=0)
QUESTION, OTHER = "What is 48 + 76?", "What is 48 + 77?"
FIRST = [{"role": "user", "content": QUESTION}]


@pytest.fixture(scope="module")
def loaded() -> mm.Magistral:
    return mm.load("demo", max_kv_size=2048, prefill_step_size=8)


def in_common(a: list[int], b: list[int]) -> int:
    return len(list(takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False))))


def turns(answer: mm.Reply, last: str, *, with_trace: bool) -> list[dict[str, str]]:
    said = {"role": "assistant", "content": answer.answer} | (
        {"reasoning": answer.reasoning} if with_trace else {}
    )
    return [*FIRST, said, {"role": "user", "content": last}]


CASES = {
    "retry": lambda reply: FIRST,
    "edited": lambda reply: [{"role": "user", "content": OTHER}],
    "second question": lambda reply: turns(reply, OTHER, with_trace=True),
    "second question, trace dropped": lambda reply: turns(reply, OTHER, with_trace=False),
    "something else": lambda reply: [{"role": "system", "content": "Be brief."}, *FIRST],
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.slow
def test_only_what_differs_is_read(
    magistral: mm.Magistral, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    """Count the ids where the model reads them."""
    first = magistral.ask(FIRST, GREEDY)
    held, messages = list(magistral.prefix_cache.ids), CASES[case](first)
    prompt = magistral.tokenizer.encode_chat(messages)
    shared = min(in_common(held, prompt), len(prompt) - 1)
    read: list[int] = []
    hidden = magistral.model.hidden

    def counting(ids: mx.array, *rest: object, **options: object) -> mx.array:
        read.append(ids.shape[1])
        return hidden(ids, *rest, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(magistral.model, "hidden", counting)
    reply = magistral.ask(messages, replace(GREEDY, max_tokens=1))
    assert (reply.usage.cached_tokens, sum(read)) == (shared, len(prompt) - shared)
    if case == "second question":
        assert shared >= first.usage.prompt_tokens + first.usage.completion_tokens - 1
    reply = magistral.ask(messages, GREEDY)
    magistral.prefix_cache.clear()
    fresh = magistral.ask(messages, GREEDY)
    assert (fresh.reasoning, fresh.answer, fresh.usage.cached_tokens) == (
        reply.reasoning,
        reply.answer,
        0,
    )


def addresses(magistral: mm.Magistral) -> list[int]:
    return [
        np.array(a, copy=False).__array_interface__["data"][0]
        for a in magistral.prefix_cache.cache.arrays
    ]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_the_cache_is_not_copied(magistral: mm.Magistral, case: str) -> None:
    """Keep the buffers where they are, with no second copy of even one layer."""
    first = magistral.ask(FIRST, GREEDY)
    messages, before, held = CASES[case](first), addresses(magistral), mx.get_active_memory()
    mx.clear_cache()
    mx.reset_peak_memory()
    reply = magistral.ask(messages, replace(GREEDY, max_tokens=5))
    assert addresses(magistral) == before
    assert reply.usage.peak_memory_bytes - held < min(
        a.nbytes for a in magistral.prefix_cache.cache.arrays
    )
