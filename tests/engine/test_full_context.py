"""Turns that are dropped from a full context."""

import logging
from collections.abc import Generator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import magistral_mlx as mm
from magistral_mlx.engine.chat import Chat
from magistral_mlx.generation.reply import Usage
from magistral_mlx.model.memory import MemoryPlan
from magistral_mlx.streams import Stream, streamed

GREEDY = mm.SamplingParams(temperature=0)
QUESTIONS = ("What is 48 + 76?", "What is 7 * 8?", "What is 90 - 13?")
CONTEXT = 600


@pytest.fixture(scope="module")
def loaded() -> mm.Magistral:
    return mm.load("demo", max_kv_size=CONTEXT)


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


@pytest.mark.slow
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
