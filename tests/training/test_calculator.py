"""Conversations with a calculator are encoded as by mistral-common, and hold nothing held out."""

import json
import re
from collections import Counter
from typing import Any

import pytest
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.protocol.instruct.validator import ValidationMode
from mistral_common.tokens.tokenizers.base import SpecialTokenPolicy
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from mistral_common.tokens.tokenizers.tekken import Tekkenizer

from magistral_mlx.tokenizer.tool_calls import ID, NAME
from magistral_mlx.training.demo.calculator import definition
from magistral_mlx.training.demo.evaluate import CALCULATOR, TOOLS
from magistral_mlx.training.demo.examples import WITH_TOOLS, Examples
from magistral_mlx.training.demo.problems import is_held_out
from magistral_mlx.training.demo.script import Example
from magistral_mlx.training.demo.vocabulary import CONTROL
from tests.support.tiny import DEMO

KINDS = {"+": "add", "-": "subtract", "*": "multiply"}


@pytest.fixture(scope="module")
def tekken() -> Tekkenizer:
    return Tekkenizer.from_file(DEMO / "tekken.json")


@pytest.fixture(scope="module")
def conversations(tekken: Tekkenizer) -> list[Example]:
    """Return conversations that carry a list of tools."""
    examples = Examples(tekken, 3, WITH_TOOLS)
    found = (examples.conversation() for _ in range(400))
    return [(ids, learned) for ids, learned in found if CONTROL["[AVAILABLE_TOOLS]"] in ids]


def parts_of(tekken: Tekkenizer, ids: list[int]) -> list[tuple[str, str]]:
    """Return the control ids of a conversation, each with the text after it."""
    text = tekken.decode(ids, SpecialTokenPolicy.KEEP)
    parts = re.split(r"(<s>|</s>|\[/?[A-Z_]+\])", text)
    return list(zip(parts[1::2], parts[2::2], strict=True))


def request_of(parts: list[tuple[str, str]]) -> dict[str, Any]:
    """Return the request in OpenAI's form that a conversation's parts spell."""
    messages: list[dict[str, Any]] = []
    tools = None
    for tag, text in parts:
        last = messages[-1] if messages else {}
        if tag == "[AVAILABLE_TOOLS]":
            tools = json.loads(text)
        elif tag in ("[SYSTEM_PROMPT]", "[INST]"):
            role = "system" if tag == "[SYSTEM_PROMPT]" else "user"
            messages.append({"role": role, "content": text})
        elif tag in ("[/INST]", "[/TOOL_RESULTS]"):
            messages.append({"role": "assistant", "content": text})
        elif tag == "[TOOL_CALLS]":
            last["tool_calls"] = [{"function": {"name": text}}]
        elif tag == "[CALL_ID]":
            last["tool_calls"][0]["id"] = text
        elif tag == "[ARGS]":
            last["tool_calls"][0]["function"]["arguments"] = text
        elif tag == "[TOOL_RESULTS]":
            messages.append({"role": "tool", "tool_call_id": text})
        elif tag == "[TOOL_CONTENT]":
            last["content"] = text
    return {"messages": messages, "tools": tools}


def test_calls_are_encoded_as_by_mistral_common(
    tekken: Tekkenizer, conversations: list[Example]
) -> None:
    """Cut conversations at their control ids and let mistral-common join them again."""
    reference = MistralTokenizer.from_file(
        str(DEMO / "tekken.json"), mode=ValidationMode.finetuning
    )
    counts = Counter()
    for ids, _ in conversations:
        parts = parts_of(tekken, ids)
        text = "".join(text for _, text in parts)
        # A budget that cuts a trace ends it with a blank line, which is a forced text of its own.
        if "</think>\n\n" not in text:
            request = request_of(parts)
            chat = ChatCompletionRequest.from_openai(**request)
            assert reference.encode_chat_completion(chat).tokens == ids
            counts["calls"] += text.count("call000") // 2
            counts["lists of two"] += len(request["tools"]) == 2
            counts["later turns"] += len(request["messages"]) > 6
    assert counts["calls"] > 50
    assert min(counts.values()) > 5


def test_only_replies_to_the_newest_question_are_learned(
    tekken: Tekkenizer, conversations: list[Example]
) -> None:
    """Check that no result is learned, nor a reply that could not see the list of tools."""
    for ids, learned in conversations:
        assert not any(learned[: ids.index(CONTROL["[AVAILABLE_TOOLS]"])])
        for start, end in (("[AVAILABLE_TOOLS]", "[/INST]"), ("[TOOL_RESULTS]", "[/TOOL_RESULTS]")):
            places = [i for i, token_id in enumerate(ids) if token_id == CONTROL[start]]
            for place in places:
                assert not any(learned[place : ids.index(CONTROL[end], place) + 1])


def test_calls_are_right_and_none_is_held_out(
    tekken: Tekkenizer, conversations: list[Example]
) -> None:
    for ids, _ in conversations:
        for tag, text in parts_of(tekken, ids):
            if tag == "[CALL_ID]":
                assert ID.fullmatch(text)
            elif tag == "[TOOL_CALLS]":
                assert NAME.fullmatch(text)
            elif tag == "[ARGS]":
                (expression,) = json.loads(text).values()
                a, sign, b = re.fullmatch(r"(\d+)([-+*])(\d+)", expression).groups()
                assert not is_held_out(KINDS[sign], int(a), int(b))


def test_the_definition_is_in_the_form_of_openai() -> None:
    assert [CALCULATOR.name, TOOLS] == [
        "calculator",
        [definition("calculator", "Evaluate an arithmetic expression.", "expression")],
    ]
    assert TOOLS[0]["function"]["parameters"]["required"] == ["expression"]
