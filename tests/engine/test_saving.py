"""Conversations and prompt caches in files: continued, and never overwritten by mistake."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import mlx.core as mx
import pytest

import magistral_mlx as mm
from tests.support.tiny import DEMO

GREEDY = mm.SamplingParams(temperature=0)
QUESTION = "What is 48 + 76?"


def test_a_chat_is_saved_and_resumed_with_its_cache(
    magistral: mm.Magistral, tmp_path: Path
) -> None:
    chat = magistral.chat(keep_reasoning="all")
    chat.ask(QUESTION, GREEDY)
    chat.save(tmp_path / "chat.cache")
    expected = chat.ask("What is 7 * 8?", GREEDY)
    magistral.prefix_cache.clear()
    resumed = magistral.resume(tmp_path / "chat.cache").ask("What is 7 * 8?", GREEDY)
    assert (resumed.reasoning, resumed.answer) == (expected.reasoning, expected.answer)
    assert resumed.usage.cached_tokens == expected.usage.cached_tokens > 0


def test_a_prompt_cache_file_is_reused_and_belongs_to_its_checkpoint(
    magistral: mm.Magistral, tmp_path: Path
) -> None:
    file = tmp_path / "prompt.cache"
    first = magistral.ask(QUESTION, GREEDY, prompt_cache_file=file)
    magistral.prefix_cache.clear()
    again = magistral.ask(QUESTION, GREEDY, prompt_cache_file=file)
    assert again.usage.cached_tokens == first.usage.prompt_tokens - 1
    assert again.reasoning == first.reasoning
    with pytest.raises(mm.OptionError, match="no conversation"):
        magistral.resume(file)
    with pytest.raises(mm.OptionError, match="no such prompt cache"):
        magistral.resume(tmp_path / "none")
    with pytest.raises(mm.OptionError, match="kv_bits"):
        mm.load("demo", kv_bits=8).ask(QUESTION, prompt_cache_file=file)
    with pytest.raises(mm.OptionError, match="was made with another model"):
        mm.load(DEMO).ask(QUESTION, prompt_cache_file=file)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(mm.CheckpointError, match=r"cut short.*; name another file"):
        magistral.ask(QUESTION, prompt_cache_file=file)


def test_a_single_reply_never_overwrites_a_conversation(
    magistral: mm.Magistral, tmp_path: Path
) -> None:
    chat = magistral.chat()
    chat.ask(QUESTION, GREEDY)
    chat.save(tmp_path / "talk")
    before = (tmp_path / "talk").read_bytes()
    for ask in (magistral.ask, partial(magistral.sample, n=1), partial(magistral.sample, n=2)):
        with pytest.raises(
            mm.OptionError, match="talk holds a conversation, which a single reply would overwrite"
        ):
            ask(QUESTION, GREEDY, prompt_cache_file=tmp_path / "talk")
    assert (tmp_path / "talk").read_bytes() == before
    assert magistral.resume(tmp_path / "talk").messages == chat.messages


def test_a_cache_that_could_not_be_written_is_refused_before_the_reply(
    magistral: mm.Magistral, tmp_path: Path
) -> None:
    with pytest.raises(mm.OptionError, match="no prompt cache can be written there"):
        magistral.stream(QUESTION, prompt_cache_file=tmp_path / "none" / "c")


@pytest.mark.parametrize(
    "state",
    [
        *("{", "[]", "1", '{"messages": []}', "[" * 100_000),
        '{"keep_reasoning": "some", "messages": [], "tools": null, "forgotten": 0}',
        '{"keep_reasoning": "all", "messages": 3, "tools": null, "forgotten": 0}',
        '{"keep_reasoning": "all", "messages": [{}], "tools": null, "forgotten": 0}',
        '{"keep_reasoning": "all", "messages": [], "tools": null, "forgotten": "1"}',
        '{"keep_reasoning": "all", "messages": [], "tools": [3], "forgotten": 0}',
        '{"keep_reasoning": "all", "messages": [], "tools": [{}], "forgotten": 0}',
        '{"keep_reasoning": ["all"], "messages": [], "tools": null, "forgotten": 0}',
        '{"keep_reasoning": "all", "messages": [{"role": "user", "content": 5}], "tools": null, '
        '"forgotten": 0}',
        '{"keep_reasoning": "all", "messages": [{"role": "user", "content": "?"}, '
        '{"role": "assistant", "tool_calls": [5]}], "tools": null, "forgotten": 0}',
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
    assert chat.ask(QUESTION, GREEDY).answer


def test_the_cache_of_a_single_sample_is_saved_before_it_is_yielded(
    magistral: mm.Magistral, tmp_path: Path
) -> None:
    file = tmp_path / "cache"
    stream = magistral.stream_samples("What is 4 + 5?", n=1, prompt_cache_file=file)
    next(stream)
    assert file.exists()


def test_a_chat_replaces_its_own_file_and_no_other(magistral: mm.Magistral, tmp_path: Path) -> None:
    notes, file = tmp_path / "notes.txt", tmp_path / "talk"
    notes.write_text("precious")
    chat, other = (magistral.chat(system_prompt=text) for text in ("Be brief.", "Be long."))
    for overwrite in (False, True):
        with pytest.raises(mm.OptionError, match=r"notes.txt is something else .* name another"):
            chat.save(notes, overwrite=overwrite)
    assert notes.read_text() == "precious"
    chat.save(file)
    chat.save(file)
    with pytest.raises(mm.OverwriteError, match="talk holds another conversation"):
        other.save(file)
    first, second = magistral.resume(file), magistral.resume(file)
    assert first.system_prompt == "Be brief."
    (tmp_path / "link").symlink_to(file)
    first.save(tmp_path / "link")
    with pytest.raises(mm.OverwriteError, match="talk holds another conversation"):
        second.save(file)
    second.save(file, overwrite=True)
    second.save(file)
    with pytest.raises(mm.OverwriteError):
        magistral.save_cache(file)
    magistral.save_cache(tmp_path / "prompt")
    magistral.save_cache(tmp_path / "prompt")


def test_a_conversation_with_tools_that_are_objects_is_saved(
    magistral: mm.Magistral, tmp_path: Path
) -> None:
    from mistral_common.protocol.instruct.tool_calls import Function, Tool

    tool = Tool(function=Function(name="add", parameters={"type": "object", "properties": {}}))
    chat = magistral.chat(tools=[tool])
    chat.ask(QUESTION, replace(GREEDY, max_tokens=4))
    chat.save(tmp_path / "talk")
    resumed = magistral.resume(tmp_path / "talk")
    asked = [*chat.messages, {"role": "user", "content": QUESTION}]
    free = [magistral.free_context(asked, tools=each.tools) for each in (chat, resumed)]
    assert free[0] == free[1] != magistral.free_context(asked)
    chat.tools = [{"type": "function", "function": {"name": "add", "parameters": object()}}]
    with pytest.raises(mm.OptionError, match=r"the conversation cannot be saved: .*object"):
        chat.save(tmp_path / "talk")


@pytest.mark.parametrize("path", ["/", "\ud800", "a\0b", ""])
def test_a_path_that_cannot_be_a_file_is_refused(magistral: mm.Magistral, path: str) -> None:
    with pytest.raises(mm.OptionError):
        magistral.chat().save(path)
    with pytest.raises(mm.OptionError):
        magistral.stream(QUESTION, prompt_cache_file=path)


def test_a_cache_whose_values_are_not_numbers_does_not_stay(magistral: mm.Magistral) -> None:
    short = replace(GREEDY, max_tokens=4)
    expected = magistral.ask(QUESTION, short).reasoning
    cache = magistral.prefix_cache.cache
    for layer in cache.layers:
        layer.buffer.arrays = [mx.full(a.shape, float("nan"), a.dtype) for a in layer.buffer.arrays]
        mx.eval(layer.buffer.arrays)  # here, because the worker cannot
    with pytest.raises(mm.NumericsError):
        magistral.ask(QUESTION, short)
    assert magistral.ask(QUESTION, short).reasoning == expected


def test_a_file_that_cannot_be_opened_leaves_the_cache(
    magistral: mm.Magistral, tmp_path: Path
) -> None:
    magistral.ask(QUESTION, replace(GREEDY, max_tokens=1))
    cached = magistral.cached_tokens
    (tmp_path / "notes").write_text("precious")
    for path in ("none", "notes", "."):
        with pytest.raises(mm.MagistralError):
            magistral.resume(tmp_path / path)
    assert magistral.cached_tokens == cached > 0
