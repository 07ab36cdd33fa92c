"""Conversations: the cached part of the next turn, and the turns dropped from a full context."""

import logging
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import magistral_mlx as mm
from magistral_mlx.engine.chat import Chat, KeepReasoning
from magistral_mlx.generation.reply import Usage
from magistral_mlx.model.memory import MemoryPlan
from magistral_mlx.streams import Stream, streamed

GREEDY = mm.SamplingParams(temperature=0)
QUESTIONS = ("What is 48 + 76?", "What is 7 * 8?", "What is 90 - 13?")
CONTEXT = 600
KEEP: list[KeepReasoning] = ["all", "last", "none"]


@pytest.fixture(scope="module")
def loaded() -> mm.Magistral:
    return mm.load("demo", max_kv_size=CONTEXT)


@pytest.fixture
def magistral(loaded: mm.Magistral) -> Iterator[mm.Magistral]:
    loaded.prefix_cache.clear()
    yield loaded
    loaded.prefix_cache.clear()


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


class Counting:
    """A model that answers "a" and counts a position a letter."""

    def __init__(self, context: int) -> None:
        self.plan = MemoryPlan(0, 0, 0, 0, context=context, kv_bits=None, prefill_chunk=1)
        self.asked: list[list[Mapping[str, Any]]] = []

    def free_context(self, messages: Sequence[Mapping[str, Any]], *_: object, **__: object) -> int:
        return self.plan.context - sum(len(message["content"]) for message in messages)

    def stream(
        self,
        messages: Sequence[Mapping[str, Any]],
        sampling: mm.SamplingParams | None = None,
        **_: object,
    ) -> Stream[mm.Segment, mm.Reply]:
        room = self.free_context(messages)
        self.plan.reply_tokens(self.plan.context - room, sampling and sampling.max_tokens)
        self.asked.append([*messages])

        @streamed
        def reply() -> Generator[mm.Segment, None, mm.Reply]:
            yield mm.Text("answer", "a")
            return mm.Reply("", "a", (), "stop", None, Usage(0, 0, 0, 0, 0, 0.0, 0.0, 0, 0, 0))

        return reply()

    def save_cache(self, path: str | Path, conversation: str = "") -> None:
        raise AssertionError("nothing is saved here")


def ask(chat: Chat, text: str, max_tokens: int | None = None) -> mm.Reply:
    return chat.ask(text, mm.SamplingParams(max_tokens=max_tokens))


@pytest.mark.parametrize("max_tokens", [None, 100, 900])
@pytest.mark.parametrize("system", [None, "s" * 70])
def test_when_the_context_is_full_the_oldest_turns_go(
    caplog: pytest.LogCaptureFixture, system: str | None, max_tokens: int | None
) -> None:
    """Drop no turn while the reply has room, then as few as free a quarter of the context more."""
    context, lengths = 2000, [299, 1, 400, 77, 250, 640, 3, 3, 3, 900, 300, 300]
    model = Counting(context)
    chat = Chat(model, "none", [] if system is None else [{"role": "system", "content": system}])
    least = max_tokens or context // 4
    kept: list[int] = []
    forgotten = 0
    for number, length in enumerate(lengths):
        kept.append(number)

        def free(kept: list[int] = kept) -> int:
            taken = (
                sum(lengths[i] for i in kept) + len(kept) - 1
            )  # each turn but the last has an answer
            return context - len(system or "") - taken

        if free() < least:
            while len(kept) > 1 and free() < least + context // 4:
                kept.pop(0)
        with caplog.at_level(logging.WARNING):
            caplog.clear()
            reply = ask(chat, chr(ord("a") + number) * length, max_tokens)
        assert (reply.usage.dropped_turns, chat.dropped_turns) == (kept[0], kept[0])
        assert len(caplog.records) == (kept[0] > forgotten)
        forgotten = kept[0]
        roles = [message["role"] for message in model.asked[-1]]
        assert roles == ["system"] * (system is not None) + ["user", "assistant"] * (
            len(kept) - 1
        ) + ["user"]
        questions = [message["content"] for message in model.asked[-1] if message["role"] == "user"]
        assert questions == [chr(ord("a") + i) * lengths[i] for i in kept]
    assert forgotten
    assert len(chat.messages) == 2 * len(lengths) + (
        system is not None
    )  # they are left out, not lost


def test_what_does_not_fit_alone_is_refused_and_nothing_is_left_out(
    caplog: pytest.LogCaptureFixture,
) -> None:
    chat = Chat(Counting(2000), "none", [{"role": "system", "content": "s" * 200}])
    for length in (300, 300):
        ask(chat, "q" * length)
    for length, max_tokens in ((1745, None), (100, 1701)):
        with pytest.raises(mm.ContextError):
            ask(chat, "q" * length, max_tokens)
    assert (chat.dropped_turns, len(chat.messages), caplog.records) == (0, 5, [])
    assert ask(chat, "q" * 1544).usage.dropped_turns == 2  # the least a reply needs, 256, is left


def test_calls_and_their_results_go_with_their_question() -> None:
    model = Counting(2000)
    chat = Chat(model, "none", [], [{"type": "function"}])
    call = {"id": "aaaaaaaa1", "function": {"name": "f", "arguments": "{}"}}
    for letter in "ab":
        chat.messages += [
            {"role": "user", "content": letter * 10},
            {"role": "assistant", "content": "", "tool_calls": [call]},
        ]
        chat.messages += [{"role": "tool", "tool_call_id": "aaaaaaaa1", "content": letter * 600}]
        chat.messages += [{"role": "assistant", "content": letter}]
    chat.messages += [
        {"role": "user", "content": "c" * 400},
        {"role": "assistant", "content": "", "tool_calls": [call]},
    ]
    chat.answer_calls({"aaaaaaaa1": "c" * 300})
    assert "".join(m["content"][:1] for m in model.asked[-1]) == "cc"
    assert chat.dropped_turns == 2


def test_a_long_conversation_goes_on_in_a_small_context(magistral: mm.Magistral) -> None:
    chat = magistral.chat(keep_reasoning="all", system_prompt="Be brief.")
    head = magistral.tokenizer.encode_chat(
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "x"}]
    )
    replies = []
    while not chat.dropped_turns:
        replies.append(chat.ask(QUESTIONS[len(replies) % 3], GREEDY))
        usage = replies[-1].usage
        assert usage.prompt_tokens <= CONTEXT - 256
        assert magistral.prefix_cache.ids[: len(head) - 2] == head[:-2]
    assert usage.dropped_turns == chat.dropped_turns < len(replies)
    assert usage.prompt_tokens <= CONTEXT - 256 - CONTEXT // 4
    assert replies[-1].answer
    following = chat.ask(QUESTIONS[0], GREEDY).usage
    assert (
        following.dropped_turns == usage.dropped_turns
    )  # a quarter is free: nothing more has to go
    assert following.cached_tokens >= usage.prompt_tokens


def test_a_saved_conversation_goes_on_with_what_was_left_out(
    magistral: mm.Magistral, tmp_path: Path
) -> None:
    chat = magistral.chat(system_prompt="Be brief.")
    for question in QUESTIONS:
        chat.ask(question, replace(GREEDY, max_tokens=2))
    chat.dropped_turns = 2
    chat.save(tmp_path / "talk")
    again = magistral.resume(tmp_path / "talk")
    assert (again.dropped_turns, again.messages, again.system_prompt) == (
        2,
        chat.messages,
        "Be brief.",
    )


@pytest.mark.parametrize(
    "state",
    [
        *("{", "[]", "1", '{"messages": []}', "[" * 100_000),
        '{"keep_reasoning": "some", "messages": [], "tools": null, "forgotten": 0}',
        '{"keep_reasoning": "all", "messages": 3, "tools": null, "forgotten": 0}',
        '{"keep_reasoning": "all", "messages": [{}], "tools": null, "forgotten": 0}',
    ],
)
def test_a_file_with_something_else_for_a_conversation(
    magistral: mm.Magistral, tmp_path: Path, state: str
) -> None:
    magistral.prefix_cache.save(tmp_path / "talk", state)
    with pytest.raises(mm.CheckpointError, match="talk holds no conversation that can be read"):
        magistral.resume(tmp_path / "talk")


def test_a_conversation_without_turns_is_saved_too(magistral: mm.Magistral, tmp_path: Path) -> None:
    magistral.chat(system_prompt="Be brief.").save(tmp_path / "talk")
    chat = magistral.resume(tmp_path / "talk")
    assert chat.messages == [{"role": "system", "content": "Be brief."}]
    assert chat.ask(QUESTIONS[0], GREEDY).answer


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
