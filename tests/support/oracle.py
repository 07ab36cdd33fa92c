"""The ids of a conversation by mistral-common alone, with none of our code between."""

from pathlib import Path
from typing import Any

from mistral_common.protocol.instruct.chunk import TextChunk, ThinkChunk
from mistral_common.protocol.instruct.messages import (
    AssistantMessage,
    SystemMessage,
    ToolMessage,
    UserMessage,
)
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.protocol.instruct.tool_calls import FunctionCall, Tool, ToolCall
from mistral_common.protocol.instruct.validator import ValidationMode
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

from magistral_mlx.tokenizer.release import CARD_SYSTEM_PROMPT, CONTROL_CARD_SYSTEM_PROMPT

BEFORE, _, INSIDE = CONTROL_CARD_SYSTEM_PROMPT.partition("[THINK]")
INSIDE, _, AFTER = INSIDE.partition("[/THINK]")


class Oracle:
    """The tokenizer of mistral-common for one version; it takes plain messages."""

    def __init__(self, folder: Path, version: str) -> None:
        self.version = version
        self.tokenizer = MistralTokenizer.from_file(
            str(folder / "tekken.json"), mode=ValidationMode.test
        )

    def ids(
        self, messages: list[dict[str, Any]], *, tools: Any = None, own_only: bool = False
    ) -> list[int]:
        own = [m["content"] for m in messages if m["role"] == "system"]
        made = [
            self.system(own, own_only),
            *(self.turn(m) for m in messages if m["role"] != "system"),
        ]
        defined = [Tool.model_validate(tool) for tool in tools] if tools else None
        ids: list[int] = self.tokenizer.encode_chat_completion(
            ChatCompletionRequest(messages=made, tools=defined)
        ).tokens
        return ids

    def system(self, own: list[str], own_only: bool) -> SystemMessage:
        joined = "\n\n".join(own)
        if own_only:
            return SystemMessage(content=joined)
        if self.version != "v13":
            head = CARD_SYSTEM_PROMPT.removesuffix("Problem:\n\n")
            return SystemMessage(
                content=f"{head}{joined}\n\nProblem:\n\n" if own else CARD_SYSTEM_PROMPT
            )
        last = TextChunk(text=f"{AFTER}\n\n{joined}" if own else AFTER)
        return SystemMessage(content=[TextChunk(text=BEFORE), ThinkChunk(thinking=INSIDE), last])

    def turn(self, message: dict[str, Any]) -> UserMessage | AssistantMessage | ToolMessage:
        content = message.get("content") or ""
        if message["role"] == "user":
            return UserMessage(content=content)
        if message["role"] == "tool":
            return ToolMessage(content=content, tool_call_id=message["tool_call_id"])
        calls = [
            ToolCall(id=c["id"], function=FunctionCall(**c["function"]))
            for c in message.get("tool_calls") or ()
        ] or None
        trace = message.get("reasoning") or message.get("reasoning_content")
        if not trace:
            return AssistantMessage(content=content, tool_calls=calls)
        # The form of the model card.
        if self.version != "v13":
            return AssistantMessage(
                content=f"<think>\n{trace}\n</think>\n{content}", tool_calls=calls
            )
        chunks = [ThinkChunk(thinking=trace), *([TextChunk(text=content)] if content else [])]
        return AssistantMessage(content=chunks, tool_calls=calls)
