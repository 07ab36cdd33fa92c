"""Conversations: the cached part of the next turn, and the traces that the model sees again."""

from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import magistral_mlx as mm
from magistral_mlx.engine.chat import Chat
from magistral_mlx.engine.turns import KeepReasoning

QUESTION = "What is 48 + 76?"
GREEDY = mm.SamplingParams(temperature=0)
QUESTIONS = ("What is 48 + 76?", "What is 7 * 8?", "What is 90 - 13?")
CONTEXT = 600

KEEP: list[KeepReasoning] = ["all", "last", "none"]


@pytest.fixture
def seen(
    magistral: mm.Magistral, monkeypatch: pytest.MonkeyPatch
) -> tuple[list[int], list[mx.array]]:
    """Record how many ids each pass of the model reads, and the logits it gives."""
    read: list[int] = []
    given: list[mx.array] = []
    hidden, logits = magistral.model.hidden, magistral.model.logits

    def reading(ids: mx.array, *rest: Any, **options: Any) -> mx.array:
        read.append(ids.shape[1])
        return hidden(ids, *rest, **options)

    def giving(x: mx.array) -> mx.array:
        given.append(logits(x))
        return given[-1]

    monkeypatch.setattr(magistral.model, "hidden", reading)
    monkeypatch.setattr(magistral.model, "logits", giving)
    return read, given


@pytest.mark.parametrize("keep", KEEP)
def test_a_later_turn_reads_what_is_new_and_equals_a_fresh_prefill(
    magistral: mm.Magistral, seen: tuple[list[int], list[mx.array]], keep: KeepReasoning
) -> None:
    """Read only the last answer, without its trace, and the question, if traces are dropped."""
    read, given = seen
    chat = magistral.chat(keep_reasoning=keep)
    reply = chat.ask(QUESTIONS[0], GREEDY)
    for question in QUESTIONS[1 : 3 if keep == "last" else 2]:
        before, held, same = (
            reply,
            list(magistral.prefix_cache.ids),
            Chat(magistral, keep, [*chat.messages]),
        )
        read.clear()
        given.clear()
        reply = chat.ask(question, GREEDY)
        usage = reply.usage
        new = usage.prompt_tokens - usage.cached_tokens
        assert (
            sum(read) - usage.completion_tokens - 1 == new
        )  # each id that it drew, and the stop id, was read too
        if keep == "none":
            assert usage.cached_tokens == before.usage.prompt_tokens
            answered = len(magistral.tokenizer.encode(before.answer)) + len(
                magistral.tokenizer.encode(question)
            )
            assert answered <= new <= answered + 5  # and control ids
        elif before.usage.cached_tokens == 0 or keep == "all":
            assert usage.cached_tokens >= len(held) - 1
        ours, ids = [np.array(logits[-1]) for logits in given], list(magistral.prefix_cache.ids)
        magistral.prefix_cache.clear()
        given.clear()
        fresh = same.ask(question, GREEDY)
        assert (fresh.usage.cached_tokens, magistral.prefix_cache.ids) == (0, ids)
        for a, b in zip(ours, given, strict=True):
            np.testing.assert_allclose(a, np.array(b[-1]), atol=1e-5)


@pytest.mark.parametrize(("spelled", "meant"), [(True, "all"), (False, "none"), ("last", "last")])
def test_keep_reasoning_may_be_spelled_as_a_claim(
    magistral: mm.Magistral, spelled: Any, meant: str
) -> None:
    assert magistral.chat(keep_reasoning=spelled).keep_reasoning == meant


@pytest.mark.parametrize("wrong", ["some", "True", 1, 0, None])
def test_keep_reasoning_is_one_of_few(magistral: mm.Magistral, wrong: Any) -> None:
    with pytest.raises(mm.OptionError, match="all, last, none, True or False"):
        magistral.chat(keep_reasoning=wrong)


def test_a_turn_taken_back_and_asked_again_is_the_same(magistral: mm.Magistral) -> None:
    chat = magistral.chat(system_prompt="Be brief.")
    assert chat.undo() is None
    replies = [chat.ask(question, GREEDY) for question in QUESTIONS[:2]]
    assert chat.undo() == QUESTIONS[1]
    again = chat.ask(QUESTIONS[1], GREEDY)
    assert again.answer == replies[1].answer
    assert again.usage.cached_tokens == again.usage.prompt_tokens - 1
    assert len(chat.messages) == 5
    chat.reset()
    assert chat.messages == [{"role": "system", "content": "Be brief."}]


def test_the_system_prompt_can_be_changed(magistral: mm.Magistral) -> None:
    chat = magistral.chat()
    chat.ask(QUESTIONS[0], replace(GREEDY, max_tokens=1))
    for text in ("Be brief.", "Be long.", None):
        chat.system_prompt = text
        assert chat.system_prompt == text
        assert [m["role"] for m in chat.messages] == ["system"] * (text is not None) + [
            "user",
            "assistant",
        ]


@pytest.mark.parametrize("keep", ["all", "last", "none"])
@pytest.mark.slow
def test_a_chat_keeps_or_drops_traces(magistral: mm.Magistral, keep: KeepReasoning) -> None:
    chat = magistral.chat(keep_reasoning=keep, system_prompt="Be brief.")
    first, second = chat.ask(QUESTION, GREEDY), chat.ask("What is 7 * 8?", GREEDY)
    third = chat.ask("What is 90 - 13?", GREEDY)
    kept = {"all": (True, True), "last": (False, True), "none": (False, False)}[keep]
    messages: list[dict[str, str]] = [{"role": "system", "content": "Be brief."}]
    for reply, question, is_kept in zip(
        (first, second), (QUESTION, "What is 7 * 8?"), kept, strict=True
    ):
        answer = {"role": "assistant", "content": reply.answer}
        messages += [
            {"role": "user", "content": question},
            answer | ({"reasoning": reply.reasoning} if is_kept else {}),
        ]
    messages.append({"role": "user", "content": "What is 90 - 13?"})
    magistral.prefix_cache.clear()
    fresh = magistral.ask(messages, GREEDY)
    assert (fresh.answer, fresh.usage.prompt_tokens) == (third.answer, third.usage.prompt_tokens)
    assert third.usage.cached_tokens > 0


def test_a_turn_cut_off_before_its_answer_keeps_its_trace(magistral: mm.Magistral) -> None:
    chat = magistral.chat(keep_reasoning="none")
    cut = chat.ask(QUESTION, replace(GREEDY, max_tokens=12))
    assert (cut.answer, cut.finish_reason) == ("", "length")
    assert chat.ask("What is 7 * 8?", GREEDY).answer
    assert [m["role"] for m in chat.messages] == ["user", "assistant"] * 2


def test_a_turn_closed_early_leaves_no_trace(magistral: mm.Magistral) -> None:
    chat = magistral.chat()
    stream = chat.stream(QUESTION)
    next(stream)
    stream.close()
    assert chat.messages == []


def test_what_a_chat_keeps_is_quoted_in_short(magistral: mm.Magistral) -> None:
    with pytest.raises(
        mm.OptionError, match="keep_reasoning is a number of more than 4,300 digits"
    ):
        magistral.chat(keep_reasoning=10**5000)  # type: ignore[arg-type]
