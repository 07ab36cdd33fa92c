"""Tools in a conversation with a model whose replies are known: calls, results, cache."""

import json
from collections.abc import Generator, Mapping, Sequence
from itertools import pairwise, zip_longest
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

import magistral_mlx as mm
from magistral_mlx.engine.chat import Chat
from magistral_mlx.generation.decoding import Token
from magistral_mlx.generation.reply import ReplyBuilder, Usage
from magistral_mlx.model.memory import MemoryPlan
from magistral_mlx.streams import Stream, streamed
from magistral_mlx.tokenizer.messages import conversation
from magistral_mlx.tokenizer.segments import ToolCall
from magistral_mlx.tokenizer.tekken import Tokenizer
from tests.support.oracle import Oracle
from tests.support.tekken import write_tekken
from tests.support.tiny import make_config, make_weights, write_checkpoint

EOS, END_INST, DEFINED, END_RESULTS, CALLS, ARGS, CALL_ID, THINK, END_THINK = (
    2,
    4,
    5,
    8,
    9,
    32,
    33,
    34,
    35,
)
GREEDY = mm.SamplingParams(temperature=0)
TOOLS = [
    {
        "type": "function",
        "function": {"name": "add", "description": "a + b", "parameters": {"type": "object"}},
    }
]
USAGE = Usage(0, 0, 0, 0, 0, 0.0, 0.0, 0, 0, 0)
MODES = ("all", "last", "none")
NO_LIMIT = MemoryPlan(0, 0, 0, 0, context=40_960, kv_bits=None, prefill_chunk=1)


def ids_of(tokenizer: Tokenizer, *parts: int | str) -> list[int]:
    return [
        i for part in parts for i in ([part] if isinstance(part, int) else tokenizer.encode(part))
    ]


def call_ids(
    tokenizer: Tokenizer, identity: str = "abc123XYZ", arguments: str = '{"a": 1}'
) -> list[int]:
    """Write a call as the model of this version does."""
    if tokenizer.version == "v7":
        return ids_of(
            tokenizer, CALLS, f'[{{"name": "add", "arguments": {arguments}, "id": "{identity}"}}]'
        )
    middle = (CALL_ID, identity) if tokenizer.version == "v11" else ()
    return ids_of(tokenizer, CALLS, "add", *middle, ARGS, arguments)


def tokenizer_of(folder: Path, version: str) -> Tokenizer:
    return Tokenizer.from_folder(
        write_tekken(folder, version=version), "control" if version == "v13" else "text"
    )


@pytest.fixture(scope="module", params=["v7", "v11", "v13"])
def tokenizer(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Tokenizer:
    return tokenizer_of(tmp_path_factory.mktemp("tekken"), request.param)


def reply_of(tokenizer: Tokenizer, ids: Sequence[int], usage: Usage = USAGE) -> mm.Reply:
    builder = ReplyBuilder(tokenizer, GREEDY, 1000)
    for identity in ids:
        builder.push(Token(identity, mx.zeros((1, 1))))
    builder.flush()
    return builder.reply("stop", usage)


def trace_ids(tokenizer: Tokenizer, trace: str) -> list[int]:
    if tokenizer.reasoning_format == "control":
        return ids_of(tokenizer, THINK, trace, END_THINK)
    return tokenizer.encode(f"<think>\n{trace}\n</think>\n")


def test_calls_are_read_after_the_trace_only(tokenizer: Tokenizer) -> None:
    trace = trace_ids(tokenizer, "hm")
    reply = reply_of(tokenizer, [*trace, *tokenizer.encode("So:"), *call_ids(tokenizer), EOS])
    assert (reply.reasoning, reply.answer, reply.finish_reason) == ("hm", "So:", "tool_calls")
    assert [(call.name, call.arguments) for call in reply.tool_calls] == [("add", {"a": 1})]
    # Before the trace is closed, and where a text spells the token, there is no call.
    opened = trace[: -1 if tokenizer.reasoning_format == "control" else -4]
    for ids in (
        [*opened, *call_ids(tokenizer)],
        [*trace, *tokenizer.encode('[TOOL_CALLS]add[ARGS]{"a": 1}')],
    ):
        reply = reply_of(tokenizer, ids)
        assert (reply.tool_calls, reply.finish_reason) == ((), "stop")


NO_OBJECTS = [
    '{"a": 1',
    "[1]",
    "1",
    '"x"',
    '{"a": NaN}',
    '{"a": 1e999}',
    '{"a": "\\ud800"}',
    "[" * 5000,
    "",
]


@pytest.mark.parametrize("arguments", NO_OBJECTS)
def test_arguments_are_a_json_object_or_there_is_no_call(
    tokenizer: Tokenizer, arguments: str
) -> None:
    reply = reply_of(tokenizer, call_ids(tokenizer, arguments=arguments))
    assert (reply.tool_calls, reply.finish_reason) == ((), "stop")
    assert arguments in reply.answer  # it stays text: nothing that the model wrote is lost


def test_every_call_has_an_id_of_its_own(tokenizer: Tokenizer) -> None:
    ids = [
        call_ids(tokenizer, identity) for identity in ("abc123XYZ", "abc123XYZ", "call 1", "call 1")
    ]
    if tokenizer.version == "v7":
        calls = ", ".join(tokenizer.decode(block)[1:-1] for block in ids)
        ids = [ids_of(tokenizer, CALLS, f"[{calls}]")]
    reply = reply_of(tokenizer, [identity for block in ids for identity in block])
    found = [call.id for call in reply.tool_calls]
    assert len(set(found)) == len(found) == 4
    assert all(len(identity) == 9 and identity.isalnum() for identity in found)
    assert tokenizer.version == "v13" or found[0] == "abc123XYZ"
    # As a message the reply may hold them as they are.
    messages = [
        {"role": "user", "content": "x"},
        {"role": "assistant", "tool_calls": reply.tool_calls},
    ]
    messages += [{"role": "tool", "tool_call_id": identity, "content": "1"} for identity in found]
    assert tokenizer.encode_chat(messages).count(CALLS) == len(ids)


def test_a_name_that_could_not_be_sent_back_is_no_call(tokenizer: Tokenizer) -> None:
    for name in ("a b", "", "x" * 65):
        ids = tokenizer.encode(name)
        block = [CALLS, *ids, *call_ids(tokenizer)[1 + len(tokenizer.encode("add")) :]]
        if tokenizer.version == "v7":
            block = ids_of(
                tokenizer, CALLS, json.dumps([{"name": name, "arguments": {}, "id": "abc123XYZ"}])
            )
        assert reply_of(tokenizer, block).tool_calls == ()


class Script:
    """Model that gives replies in turn, and keeps the questions."""

    def __init__(self, tokenizer: Tokenizer, *replies: mm.Reply) -> None:
        self.tokenizer, self.replies = tokenizer, iter(replies)
        self.prompts: list[list[int]] = []
        self.plan = NO_LIMIT

    def free_context(self, *_: object, **__: object) -> int:
        return self.plan.context

    def stream(
        self,
        messages: Sequence[Mapping[str, Any]],
        sampling: mm.SamplingParams | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> Stream[mm.Segment, mm.Reply]:
        self.prompts.append(self.tokenizer.encode_chat(messages, tools=tools))

        @streamed
        def reply() -> Generator[mm.Segment, None, mm.Reply]:
            yield mm.Text("answer", "")
            return next(self.replies)

        return reply()

    def save_cache(self, path: str | Path, conversation: str = "") -> None:
        raise AssertionError("nothing is saved here")


def said(trace: str, answer: str, *calls: ToolCall) -> mm.Reply:
    return mm.Reply(trace, answer, calls, "tool_calls" if calls else "stop", "model", USAGE)


@pytest.mark.parametrize("keep", MODES)
def test_a_conversation_gives_the_ids_mistral_common_gives(
    tmp_path: Path, tokenizer: Tokenizer, keep: Any
) -> None:
    """Parallel calls have results in any order; traces are kept, dropped, or kept for a while."""
    write_tekken(tmp_path, version=tokenizer.version)
    oracle = Oracle(tmp_path, tokenizer.version)
    one, two = ToolCall("aaaaaaaa1", "add", {"a": 1}), ToolCall("aaaaaaaa2", "add", {"é": [2]})
    thought = said("t1", "a1"), said("t2", "", one, two), said("t3", "so", two)
    replies = *thought, said("t4", "a4"), said("", "a5"), said("", "")
    model = Script(tokenizer, *replies)
    chat = Chat(model, keep, [], TOOLS)
    chat.ask("q1")
    assert chat.ask("q2").tool_calls == (one, two)
    chat.answer_calls({"aaaaaaaa2": "r2", "aaaaaaaa1": "r1"})
    chat.answer_calls({"aaaaaaaa2": "r3"})
    chat.ask("q3")
    chat.ask("q4")

    def user(text: str) -> dict[str, Any]:
        return {"role": "user", "content": text}

    def assistant(text: str, trace: str, *calls: tuple[str, str]) -> dict[str, Any]:
        stated = [
            {"id": i, "function": {"name": "add", "arguments": arguments}} for i, arguments in calls
        ]
        return {"role": "assistant", "content": text, "reasoning": trace, "tool_calls": stated}

    def result(identity: str, text: str) -> dict[str, Any]:
        return {"role": "tool", "tool_call_id": identity, "content": text}

    first = ("aaaaaaaa1", '{"a": 1}')
    second = ("aaaaaaaa2", '{"é": [2]}')
    whole = [user("q1"), assistant("a1", "t1"), user("q2"), assistant("", "t2", first, second)]
    whole += [result("aaaaaaaa2", "r2"), result("aaaaaaaa1", "r1"), assistant("so", "t3", second)]
    whole += [
        result("aaaaaaaa2", "r3"),
        assistant("a4", "t4"),
        user("q3"),
        assistant("a5", ""),
        user("q4"),
    ]
    kept = {
        "all": ["", "t1", "t1 t2", "t1 t2 t3", "t1 t2 t3 t4", "t1 t2 t3 t4"],
        "last": ["", "t1", "t1 t2", "t1 t2 t3", "t4", "t4"],
        "none": ["", "", "t2", "t2 t3", "", ""],
    }[keep]
    for prompt, end, traces in zip(model.prompts, (1, 3, 6, 8, 10, 12), kept, strict=True):
        shown = [
            m | {"reasoning": ""} if m.get("reasoning") not in traces.split() else m
            for m in whole[:end]
        ]
        assert prompt == oracle.ids(shown, tools=TOOLS)


def test_calls_that_wait_are_answered_first(tokenizer: Tokenizer) -> None:
    call = ToolCall("aaaaaaaa1", "add", {})
    chat = Chat(Script(tokenizer, said("", "", call), said("", "done")), "none", [], TOOLS)
    with pytest.raises(mm.OptionError, match="cannot open a conversation"):
        chat.answer_calls({"aaaaaaaa1": "1"})
    chat.ask("q")
    before = list(chat.messages)
    with pytest.raises(
        mm.OptionError,
        match=r"'aaaaaaaa1' waits for its result; use answer_calls\(\{'aaaaaaaa1': result\}\)",
    ):
        chat.ask("never mind")
    wrong: list[tuple[Any, str]] = [
        ({"bbbbbbbb1": "1"}, "'bbbbbbbb1' is no call"),
        ({}, "'aaaaaaaa1' has no result"),
    ]
    for results, message in [*wrong, ({"aaaaaaaa1": 3}, "content is int, expected text")]:
        with pytest.raises(mm.OptionError, match=message):
            chat.answer_calls(results)
    assert chat.messages == before
    assert chat.answer_calls({"aaaaaaaa1": "1"}).answer == "done"


def test_without_tools_there_is_nothing_to_answer(tokenizer: Tokenizer) -> None:
    chat = Chat(
        Script(tokenizer, said("t", "", ToolCall("aaaaaaaa1", "add", {})), said("", "yes")),
        "none",
        [],
    )
    chat.ask("q")
    assert chat.ask("and?").answer == "yes"
    assert [message["role"] for message in chat.messages] == ["user", "assistant"] * 2


def scripted(folder: Path, version: str) -> mm.Magistral:
    """Make a model that calls a tool after each question, and answers after each result.

    Each id has one most likely successor: the layers add nothing, and lm_head reads the next id off
    the embedding.
    """
    tokenizer = Tokenizer.from_folder(write_tekken(folder, version=version))
    call = call_ids(tokenizer, "b3k9WcXm1", "{}")
    trace = ids_of(tokenizer, THINK, "So", END_THINK) if version == "v13" else []
    chains = [[END_INST, *trace, *call, EOS], [END_RESULTS, *tokenizer.encode("It is 7."), EOS]]
    pairs = [pair for chain in chains for pair in pairwise(chain)]
    config = make_config(vocab_size=2048, num_layers=1)
    assert len({identity for identity, _ in pairs}) == len(pairs) <= config.hidden_size
    weights = {n: w if w.ndim == 1 else mx.zeros_like(w) for n, w in make_weights(config).items()}
    for i, (identity, following) in enumerate(pairs):
        weights["model.embed_tokens.weight"][identity, i] = 1
        weights["lm_head.weight"][following, i] = 1
    return mm.load(write_checkpoint(folder, config, weights))


@pytest.fixture(scope="module", params=["v11", "v13"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> mm.Magistral:
    return scripted(tmp_path_factory.mktemp("model"), request.param)


def shared(one: Sequence[int], two: Sequence[int]) -> int:
    return next(i for i, (a, b) in enumerate(zip_longest(one, two)) if a != b)


@pytest.mark.parametrize("keep", MODES)
def test_what_is_read_again_with_tools(model: mm.Magistral, tmp_path: Path, keep: Any) -> None:
    """Results continue from the cache in either release.

    So does the next question, with traces kept, if the tools come first. If they stand before the
    last question, it continues from the place where they stood.
    """
    version = model.tokenizer.version
    oracle = Oracle(model.checkpoint.folder, version)
    model.prefix_cache.clear()
    chat = model.chat(keep_reasoning=keep, tools=TOOLS)
    there: list[int] = []
    for turn in range(4):
        reply = chat.ask(f"Question {turn}", GREEDY)
        prompt = model.prefix_cache.ids[: reply.usage.prompt_tokens]
        assert reply.usage.cached_tokens == shared(there, prompt)
        if turn and version == "v11":
            assert reply.usage.cached_tokens == there.index(DEFINED)
        elif turn and keep == "all":
            assert reply.usage.cached_tokens >= len(there)
        assert (reply.finish_reason, reply.answer) == ("tool_calls", "")
        assert reply.reasoning == ("So" if version == "v13" else "")
        (call,) = reply.tool_calls
        assert (call.name, call.arguments) == ("add", {})
        called = list(model.prefix_cache.ids)
        answer = chat.answer_calls({call.id: "3"}, GREEDY)
        assert (answer.answer, answer.finish_reason) == ("It is 7.", "stop")
        assert answer.usage.cached_tokens == len(called)
        there = list(model.prefix_cache.ids)
        if keep == "all":
            assert there[: answer.usage.prompt_tokens] == oracle.ids(
                chat.messages[:-1], tools=TOOLS
            )


TAGS = (
    "<think>",
    "</think>",
    "\n</think>\n\n",
    "[THINK]",
    "[/THINK]",
    "<think>\nx\n</think>\ny",
    "[TOOL_CALLS]add[ARGS]{}",
)


@pytest.mark.parametrize("tag", TAGS)
def test_tags_in_what_the_user_and_the_history_say_change_no_state(
    model: mm.Magistral, tag: str
) -> None:
    """The model looks at its prompt's last id alone, so only our reading of ids can differ."""

    def parts(reply: mm.Reply) -> tuple[Any, ...]:
        calls = [(call.name, call.arguments) for call in reply.tool_calls]
        return reply.reasoning, reply.answer, calls, reply.finish_reason, reply.reasoning_closed_by

    expected = parts(model.ask("x", GREEDY, tools=TOOLS))
    assert parts(model.ask(tag, GREEDY, tools=TOOLS)) == expected
    history = [
        {"role": "user", "content": tag},
        {"role": "assistant", "content": tag, "reasoning": tag},
    ]
    assert (
        parts(model.ask([*history, {"role": "user", "content": f"x {tag}"}], GREEDY, tools=TOOLS))
        == expected
    )
    chat = model.chat(keep_reasoning="all", tools=TOOLS, system_prompt=tag)
    reply = chat.ask(tag, GREEDY)
    assert parts(reply) == expected
    assert parts(chat.answer_calls({reply.tool_calls[0].id: tag}, GREEDY)) == (
        "",
        "It is 7.",
        [],
        "stop",
        None,
    )
    assert parts(chat.ask(tag, GREEDY)) == expected


def test_a_saved_conversation_keeps_its_tools(model: mm.Magistral, tmp_path: Path) -> None:
    chat = model.chat(tools=TOOLS)
    (call,) = chat.ask("Hi", GREEDY).tool_calls
    chat.save(tmp_path / "talk")
    again = model.resume(tmp_path / "talk")
    assert again.tools == TOOLS
    assert again.answer_calls({call.id: "3"}, GREEDY).answer == "It is 7."


@pytest.mark.parametrize("calls", [5, True, 1.5, "x", {"id": 1}, {1}, object(), b"x"])
def test_calls_that_are_no_list_are_refused(calls: Any) -> None:
    message = {"role": "assistant", "content": "", "tool_calls": calls}
    with pytest.raises(mm.OptionError, match=r"message 2: tool_calls is \w+, expected a list"):
        conversation([{"role": "user", "content": "?"}, message], "")


def test_what_is_nested_without_end_is_refused(tokenizer: Tokenizer) -> None:
    deep: Any = {}
    for _ in range(5000):
        deep = {"a": deep}
    for place in ("parameters", "description"):
        tool = {"type": "function", "function": {"name": "add", place: deep}}
        with pytest.raises(mm.OptionError, match=r"nested too deeply|cannot be encoded"):
            tokenizer.encode_chat("?", tools=[tool])
    with pytest.raises(mm.OptionError) as caught:
        tokenizer.encode_chat("?", tools=[{"type": "function", "function": {"name": "é" * 9999}}])
    assert len(str(caught.value)) < 1000
    calls = [{"id": "a", "function": {"name": "add", "arguments": deep}}]
    messages = [
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": "", "tool_calls": calls},
    ]
    with pytest.raises(mm.OptionError, match="arguments are no JSON object"):
        tokenizer.encode_chat(messages)
