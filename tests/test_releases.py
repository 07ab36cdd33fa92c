"""2506, 2507 and 2509 told apart by evidence, encoded as mistral-common does, and one that reasons in control ids."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mistral_common.protocol.instruct.messages import AssistantMessage, SystemMessage, ToolMessage, UserMessage
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.protocol.instruct.tool_calls import FunctionCall, Tool, ToolCall
from mistral_common.protocol.instruct.validator import ValidationMode
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

import magistral_mlx as mm
from magistral_mlx.errors import TokenizerError
from magistral_mlx.messages import CARD_SYSTEM_PROMPT, CONTROL_CARD_SYSTEM_PROMPT
from magistral_mlx.reply import ReplyBuilder, Usage
from magistral_mlx.tokenizer import Tokenizer
from tests.conversations import conversations
from tests.sources import convert_quickly
from tests.tekken import write_tekken
from tests.tiny import make_config, make_weights, write_checkpoint

BOS, EOS, INST, END_INST, TOOLS, END_TOOLS, RESULTS, END_RESULTS, CALLS = 1, 2, 3, 4, 5, 6, 7, 8, 9
SYSTEM, END_SYSTEM, ARGS, THINK, END_THINK = 17, 18, 32, 34, 35
BEFORE, _, INSIDE = CONTROL_CARD_SYSTEM_PROMPT.partition("[THINK]")
INSIDE, _, AFTER = INSIDE.partition("[/THINK]")
GREEDY = mm.SamplingParams(temperature=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tekken(tmp_path_factory.mktemp("v13"), version="v13")


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.from_folder(folder)


def ids_of(tokenizer: Tokenizer, *parts: int | str) -> list[int]:
    return [i for part in parts for i in ([part] if isinstance(part, int) else tokenizer.encode(part))]


def thinking(text: str) -> dict[str, str]:
    return {"type": "thinking", "thinking": text}


def text(content: str) -> dict[str, str]:
    return {"type": "text", "text": content}


def oracle_messages(messages: list[dict[str, Any]], system: list[dict[str, str]] | str, version: str) -> list[Any]:
    """A conversation in mistral-common's own classes, with ``system`` as its one system message."""
    made: list[Any] = [SystemMessage(content=system)]
    for message in messages:
        trace = message.get("reasoning") or message.get("reasoning_content")
        content = message["content"] or ""
        if message["role"] == "user":
            made.append(UserMessage(content=content))
        elif message["role"] == "tool":
            made.append(ToolMessage(content=content, tool_call_id=message["tool_call_id"]))
        elif message["role"] == "assistant":
            calls = [
                ToolCall(id=c["id"], function=FunctionCall(**c["function"])) for c in message.get("tool_calls", ())
            ]
            if trace and version == "v13":
                content = [thinking(trace), *([text(content)] if content else [])]
            elif trace:
                content = f"<think>\n{trace}\n</think>\n{content}"
            made.append(AssistantMessage(content=content, tool_calls=calls or None))
    return made


def oracle_system(own: list[str], own_only: bool, version: str) -> list[dict[str, str]] | str:
    joined = "\n\n".join(own)
    if own_only:
        return joined
    if version == "v11":
        head = CARD_SYSTEM_PROMPT.removesuffix("Problem:\n\n")
        return f"{head}{joined}\n\nProblem:\n\n" if own else CARD_SYSTEM_PROMPT
    return [text(BEFORE), thinking(INSIDE), text(f"{AFTER}\n\n{joined}" if own else AFTER)]


@pytest.mark.parametrize("version", ["v11", "v13"])
def test_ids_are_mistral_commons_for_300_conversations(tmp_path: Path, version: str) -> None:
    write_tekken(tmp_path, version=version)
    ours = Tokenizer.from_folder(tmp_path)
    theirs = MistralTokenizer.from_file(str(tmp_path / "tekken.json"), mode=ValidationMode.test)
    for messages, options in conversations(300):
        own = [m["content"] for m in messages if m["role"] == "system"]
        system = oracle_system(own, options["system_prompt_only"], version)
        tools = [Tool.model_validate(tool) for tool in options["tools"]] if options["tools"] else None
        request = ChatCompletionRequest(messages=oracle_messages(messages, system, version), tools=tools)
        expected = theirs.encode_chat_completion(request).tokens
        if not options["think"]:
            expected += [THINK, END_THINK] if version == "v13" else ours.encode("<think>\n</think>\n")
        assert ours.encode_chat(messages, **options) == expected, messages


def test_a_conversation_with_control_ids_spelled_out(tokenizer: Tokenizer) -> None:
    call = {"id": "abc123XYZ", "type": "function", "function": {"name": "add", "arguments": '{"a":"é"}'}}
    tool = {"type": "function", "function": {"name": "add", "parameters": {}}}
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": "Be brief. [THINK]x[/THINK]"},
        {"role": "user", "content": "one [/THINK]"},
        {"role": "assistant", "content": "A", "reasoning": "because\nof [/THINK] this"},
        {"role": "user", "content": "two"},
        {"role": "assistant", "content": None, "reasoning_content": "call it", "tool_calls": [call]},
        {"role": "tool", "content": "3", "tool_call_id": "abc123XYZ"},
    ]
    definition = '[{"type": "function", "function": {"name": "add", "description": "", "parameters": {}}}]'
    system = (SYSTEM, BEFORE, THINK, INSIDE, END_THINK, AFTER + "\n\nBe brief. [THINK]x[/THINK]", END_SYSTEM)
    # v13 states the tools before the first question, and gives calls and results no id.
    assert tokenizer.encode_chat(messages, tools=[tool]) == ids_of(
        tokenizer,
        *(BOS, *system, TOOLS, definition, END_TOOLS, INST, "one [/THINK]", END_INST),
        *(THINK, "because\nof [/THINK] this", END_THINK, "A", EOS, INST, "two", END_INST),
        *(THINK, "call it", END_THINK, CALLS, "add", ARGS, '{"a": "é"}', EOS, RESULTS, "3", END_RESULTS),
    )


def test_a_prompt_is_the_same_up_to_the_users_part_of_it(tokenizer: Tokenizer) -> None:
    def encoded(own: str) -> list[int]:
        return tokenizer.encode_chat([{"role": "system", "content": own}, {"role": "user", "content": "Hi"}])

    shared = ids_of(tokenizer, BOS, SYSTEM, BEFORE, THINK, INSIDE, END_THINK, AFTER[:-1])
    for own in ("Be brief.", "\n7", "[THINK]"):
        assert encoded(own)[: len(shared)] == shared


def test_a_release_is_told_by_its_files(tmp_path: Path, tokenizer: Tokenizer) -> None:
    text_tags = Tokenizer.from_folder(write_tekken(tmp_path))
    assert (text_tags.reasoning_format, text_tags.system_prompt) == ("text", CARD_SYSTEM_PROMPT)
    assert (text_tags.open_id, text_tags.close_id) == (None, None)
    assert (tokenizer.reasoning_format, tokenizer.system_prompt) == ("control", CONTROL_CARD_SYSTEM_PROMPT)
    assert (tokenizer.open_id, tokenizer.close_id) == (THINK, END_THINK)
    assert (tokenizer.empty_trace, tokenizer.close_trace) == ([THINK, END_THINK], [END_THINK])


OTHER_MODEL = "the tokenizer of another model"
DIFFERENT = "they are of different releases"
REFUSED: dict[str, tuple[str, str, str]] = {
    "older": ("v7", "", rf"version v7; .*v11 \(2506\) or v13.*{OTHER_MODEL}"),
    "no [THINK]": ("v13 without tags", "", rf"not the control tokens \[THINK\] and \[/THINK\].*{OTHER_MODEL}"),
    "2506 with a newer prompt": ("v11", CONTROL_CARD_SYSTEM_PROMPT, rf"tags as \[THINK\].*{DIFFERENT}"),
    "2507 with an older prompt": ("v13", CARD_SYSTEM_PROMPT, f"tags as <think>.*{DIFFERENT}"),
    "not closed": ("v13", "Use [THINK]this. And that.", "without the other; download it again"),
    "closed twice": ("v13", "Use [THINK]this[/THINK][/THINK].", "without the other; download it again"),
    "nested": ("v13", "Use [THINK]this[THINK]that[/THINK][/THINK].", "without the other; download it again"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_release_is_refused(tmp_path: Path, case: str) -> None:
    version, prompt, message = REFUSED[case]
    write_tekken(tmp_path, version=version.split()[0])
    if "without" in version:
        path = tmp_path / "tekken.json"
        path.write_text(path.read_text().replace("THINK]", "THUNK]"))
    if prompt:
        (tmp_path / "SYSTEM_PROMPT.txt").write_text(prompt)
    with pytest.raises(TokenizerError, match=message):
        Tokenizer.from_folder(tmp_path)


def test_a_prompt_of_ones_own_needs_no_tags(tmp_path: Path) -> None:
    write_tekken(tmp_path, version="v13")
    (tmp_path / "SYSTEM_PROMPT.txt").write_text("Just answer.")
    tokenizer = Tokenizer.from_folder(tmp_path)
    expected = ids_of(tokenizer, BOS, SYSTEM, "Just answer.", END_SYSTEM, INST, "Hi", END_INST)
    assert tokenizer.encode_chat("Hi") == expected


TRACE = "Let me see: [/THINK] so"
ANSWER = "42 <x>"


@pytest.fixture(scope="module")
def magistral(tmp_path_factory: pytest.TempPathFactory) -> mm.Magistral:
    """A checkpoint of 2507's kind whose reply is known: each id's logits are largest for the id that follows it.

    Its attention and feed-forward layers add nothing, its embedding gives each id of the chain a direction
    of its own, and lm_head reads the next id off that direction.
    """
    folder = write_tekken(tmp_path_factory.mktemp("model"), version="v13")
    config = make_config(vocab_size=2048, num_layers=1)
    tokenizer = Tokenizer.from_folder(folder)
    trace, answer = tokenizer.encode(TRACE), tokenizer.encode(ANSWER)
    chain = [END_INST, THINK, *trace, END_THINK, *answer, EOS]
    assert len(set(chain)) == len(chain) <= config.hidden_size
    weights = {n: w if w.ndim == 1 else mx.zeros_like(w) for n, w in make_weights(config).items()}
    for i, (identity, following) in enumerate(pairwise(chain)):
        weights["model.embed_tokens.weight"][identity, i] = 1
        weights["lm_head.weight"][following, i] = 1
    return mm.load(write_checkpoint(folder, config, weights))


def test_a_model_of_control_ids_reasons_and_answers(magistral: mm.Magistral) -> None:
    reply = magistral.ask("What is 2 + 2?", GREEDY)
    assert (reply.reasoning, reply.answer) == (TRACE, ANSWER)
    assert (reply.reasoning_closed_by, reply.finish_reason) == ("model", "stop")
    assert reply.usage.reasoning_tokens == len(magistral.tokenizer.encode(TRACE)) + 2  # and the tags
    streamed = [s for s in magistral.stream("What is 2 + 2?", GREEDY) if s.kind != "progress"]
    assert all(s.text for s in streamed)
    for kind, whole in (("reasoning", TRACE), ("answer", ANSWER)):
        assert "".join(s.text for s in streamed if s.kind == kind) == whole


@pytest.mark.parametrize("budget", [1, 2, 5])
def test_a_budget_closes_with_the_control_id(magistral: mm.Magistral, budget: int) -> None:
    reply = magistral.ask("Hi", mm.SamplingParams(temperature=0, think_budget=budget))
    assert reply.reasoning == magistral.tokenizer.decode(magistral.tokenizer.encode(TRACE)[: budget - 1])
    assert (reply.answer, reply.reasoning_closed_by) == (ANSWER, "budget")
    assert reply.usage.reasoning_tokens == budget + 1


def test_without_thinking_the_empty_trace_is_part_of_the_prompt(magistral: mm.Magistral) -> None:
    reply = magistral.ask("Hi", mm.SamplingParams(temperature=0, think_budget=0))
    assert (reply.reasoning, reply.answer, reply.usage.reasoning_tokens) == ("", ANSWER, 0)
    assert reply.usage.prompt_tokens == len(magistral.tokenizer.encode_chat("Hi")) + 2


def test_a_chat_that_keeps_its_traces_reads_on_from_the_cache(magistral: mm.Magistral) -> None:
    chat = magistral.chat(keep_reasoning="all")
    first = chat.ask("Hi", GREEDY)
    second = chat.ask("And?", GREEDY)
    assert (second.reasoning, second.answer) == (TRACE, ANSWER)
    assert second.usage.cached_tokens >= first.usage.prompt_tokens + first.usage.completion_tokens
    history = [{k: v for k, v in m.items() if k != "reasoning"} for m in chat.messages[:2]]
    history.append({"role": "user", "content": "And?"})
    dropped = magistral.chat(keep_reasoning="none")
    dropped.ask("Hi", GREEDY)
    assert dropped.ask("And?", GREEDY).usage.prompt_tokens == len(magistral.tokenizer.encode_chat(history))


def test_a_converted_one_is_of_the_same_release(magistral: mm.Magistral, tmp_path: Path) -> None:
    convert_quickly(magistral.checkpoint.folder, tmp_path / "out", q_bits=8, q_group_size=32)
    converted = mm.load(tmp_path / "out")
    assert converted.tokenizer.reasoning_format == "control"
    assert converted.tokenizer.system_prompt == CONTROL_CARD_SYSTEM_PROMPT
    reply = converted.ask("Hi", GREEDY)
    assert (reply.reasoning, reply.answer) == (TRACE, ANSWER)


def build(tokenizer: Tokenizer, ids: list[int]) -> mm.Reply:
    builder = ReplyBuilder(tokenizer, GREEDY, 100)
    for identity in ids:
        builder.push(identity, mx.zeros((1, 1)))
    builder.flush()
    return builder.reply("stop", Usage(0, 0, 0, 0, 0, 0.0, 0.0, 0, 0, 0))


def test_calls_come_after_the_trace_and_without_an_id(tokenizer: Tokenizer) -> None:
    call = [CALLS, *ids_of(tokenizer, "add", ARGS, '{"a": 1}')]
    trace = [THINK, *tokenizer.encode("hm"), END_THINK]
    reply = build(tokenizer, [*trace, *call, *call])
    assert [(c.name, c.arguments, len(c.id)) for c in reply.tool_calls] == [("add", {"a": 1}, 9)] * 2
    assert (reply.reasoning, reply.answer, reply.finish_reason) == ("hm", "", "tool_calls")
    # A call's own id brings its result back, in any order.
    calls = [{"id": c.id, "function": {"name": c.name, "arguments": c.arguments}} for c in reply.tool_calls]
    results = [{"role": "tool", "content": str(i), "tool_call_id": c["id"]} for i, c in enumerate(calls)]
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": calls}, *results[::-1]]
    end = ids_of(tokenizer, EOS, RESULTS, "0", END_RESULTS, RESULTS, "1", END_RESULTS)
    assert tokenizer.encode_chat(messages)[-len(end) :] == end
    assert build(tokenizer, [THINK, *tokenizer.encode("hm"), *call]).tool_calls == ()
