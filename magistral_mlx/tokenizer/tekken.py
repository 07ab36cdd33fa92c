"""Text and ids: a chat encoded by mistral-common, ids decoded without ever splitting a character."""

import codecs
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from magistral_mlx.checkpoint.manifest import ReasoningFormat
from magistral_mlx.errors import OptionError, TokenizerError
from magistral_mlx.tokenizer.content import checked, fields
from magistral_mlx.tokenizer.messages import CONTROL_TAGS, Messages, conversation
from magistral_mlx.tokenizer.reasoning import (
    EMPTY_TRACE,
    Splitter,
    TagSplitter,
    closing,
    last_line,
)
from magistral_mlx.tokenizer.release import read_system_prompt, reasoning_format
from magistral_mlx.tokenizer.segments import ToolCall
from magistral_mlx.tokenizer.tool_calls import parse_call, parse_call_list

if TYPE_CHECKING:
    from mistral_common.tokens.tokenizers.tekken import Tekkenizer

TEKKEN_FILE = "tekken.json"
BYTES = 256  # without an id for each, tiktoken panics on text that needs it
MAX_TEKKEN_BYTES = 50_000_000  # Magistral's has 19 million
# What mistral-common raises depends on where the file is damaged.
DAMAGE = (
    ValueError,
    TypeError,
    LookupError,
    AssertionError,
    AttributeError,
    OverflowError,
    RecursionError,
)


class Tokenizer:
    """Magistral Small's tokenizer, of any release. Make one with ``from_folder``.

    Attributes:
        vocab_size: ids are 0 to ``vocab_size - 1``.
        bos_id, eos_id, pad_id, tool_calls_id: control ids; ``stop_ids``: those that end a reply.
        open_id, close_id: control ids of a trace's tags; None where the release spells them.
        empty_trace: ids which, put after the prompt, ask for an answer without a trace.
        system_prompt: the default, which asks for reasoning.
        reasoning_format: how a trace is written.
        version: of tekken.json.
    """

    def __init__(self, tekken: "Tekkenizer", form: ReasoningFormat, system_prompt: str) -> None:
        from mistral_common.protocol.instruct.normalize import get_normalizer
        from mistral_common.protocol.instruct.validator import ValidationMode, get_validator
        from mistral_common.tokens.tokenizers.instruct import (
            InstructTokenizerV7,
            InstructTokenizerV11,
            InstructTokenizerV13,
        )
        from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

        self.version: str = tekken.version.value
        self.vocab_size = tekken.n_words
        self.bos_id, self.eos_id, self.pad_id = tekken.bos_id, tekken.eos_id, tekken.pad_id
        self.stop_ids = frozenset({tekken.eos_id})
        self.tool_calls_id = tekken.get_special_token("[TOOL_CALLS]")
        self.system_prompt = system_prompt
        self.reasoning_format = form
        names = (
            () if self.version == "v7" else ("[CALL_ID]", "[ARGS]")
        )  # v7 writes calls as one JSON list
        self._call_tags = [tekken.get_special_token(name) for name in names]
        self._tekken = tekken
        self.open_id: int | None = None
        self.close_id: int | None = None
        if form == "control":
            self.open_id, self.close_id = (tekken.get_special_token(tag) for tag in CONTROL_TAGS)
            self.empty_trace = [self.open_id, self.close_id]
        else:
            self.empty_trace = self.encode(EMPTY_TRACE)
        instruct = {
            "v7": InstructTokenizerV7,
            "v11": InstructTokenizerV11,
            "v13": InstructTokenizerV13,
        }[self.version]
        # Not MistralTokenizer.from_file: it would build the image encoder that tekken.json may describe.
        self._mistral: MistralTokenizer[Any, Any, Any, Any, Any] = MistralTokenizer(
            instruct(tekken),
            validator=get_validator(tekken.version, mode=ValidationMode.test),
            request_normalizer=get_normalizer(tekken.version),
        )

    @classmethod
    def from_folder(cls, folder: Path, stated: ReasoningFormat | None = None) -> "Tokenizer":
        """Read ``tekken.json`` and, where there is one, ``SYSTEM_PROMPT.txt`` of a checkpoint.

        Args:
            stated: how it writes its traces; None for what its files show.
        Raises:
            TokenizerError: tekken.json is missing, damaged or of another release; SYSTEM_PROMPT.txt is no text.
        """
        tekken, path = _open_tekken(folder)
        try:
            has_control_tags = all(map(tekken.is_special, CONTROL_TAGS))
            form = reasoning_format(
                folder, tekken.version.value, has_control_tags=has_control_tags, stated=stated
            )
            return cls(tekken, form, read_system_prompt(folder, form))
        except DAMAGE as error:
            raise _damaged(path, error) from None

    def shares_ids(self, folder: Path) -> bool:
        """Whether a checkpoint's tekken.json gives every id of text the same bytes. Errors as ``from_folder``'s."""
        ours, (theirs, _) = self._tekken, _open_tekken(folder)
        if (ours.n_words, ours.num_special_tokens) != (theirs.n_words, theirs.num_special_tokens):
            return False
        texts = range(ours.num_special_tokens, ours.n_words)
        return all(ours.id_to_byte_piece(i) == theirs.id_to_byte_piece(i) for i in texts)

    def encode_chat(
        self,
        messages: Messages,
        *,
        system_prompt_only: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        think: bool = True,
    ) -> list[int]:
        """The ids of a conversation that ends in a question, ready for the model's reply.

        Text is always text: nothing in a message or tool can add a control id; the checkpoint's own system
        prompt may. System messages join it where its beginning stays the same for every conversation: before
        its final ``Problem:`` in 2506, at the end in 2507 and 2509. A user's messages in a row are joined by
        a blank line.

        Args:
            messages: a user's text, or messages as OpenAI's, vLLM's, Mistral's API's or mistral-common's, whose
                content is text, or parts of type text. An assistant's may carry its trace as ``reasoning``,
                ``reasoning_content`` or parts of type thinking, and its ``tool_calls``; tags that its text spells
                make no trace. Every call needs a result: a message of role tool with its id, of any form.
            system_prompt_only: the system messages replace the default system prompt.
            tools: functions the model may call, as OpenAI's tool definitions.
            think: False asks for an answer without a trace.
        Raises:
            OptionError: a message or tool is malformed, or a message is out of turn.
        """
        turns = conversation(
            messages,
            self.system_prompt,
            system_prompt_only=system_prompt_only,
            form=self.reasoning_format,
        )
        from mistral_common.exceptions import MistralCommonException
        from mistral_common.protocol.instruct.request import ChatCompletionRequest
        from mistral_common.protocol.instruct.tool_calls import Tool

        try:
            defined = [
                dict(fields(tool, "a tool", "OpenAI's definition of one")) for tool in tools or ()
            ]
            checked(json.dumps(defined, ensure_ascii=False), "a tool's definition")
            request: ChatCompletionRequest[Any] = ChatCompletionRequest.model_validate(
                {"messages": turns, "tools": [Tool.from_openai(tool) for tool in defined] or None}
            )
            ids: list[int] = self._mistral.encode_chat_completion(request).tokens
        except (ValueError, TypeError, AttributeError, MistralCommonException) as error:
            reason = re.sub(r"\s+", " ", str(error).partition("For further information")[0]).strip()
            raise OptionError(f"the messages or tools cannot be encoded: {reason}") from None
        return ids if think else ids + self.empty_trace

    def encode(self, text: str) -> list[int]:
        """The ids of plain text, never a control id.

        Raises:
            OptionError: the text is no Unicode text.
        """
        return self._tekken.encode(checked(text, "the text"), bos=False, eos=False)

    def pieces(self, text: str) -> list[bytes]:
        """How the vocabulary cuts a text: the bytes of each of its ids, which may end inside a character."""
        return [self._tekken.id_to_byte_piece(identity) for identity in self.encode(text)]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; control ids give none, and bytes that form no character give U+FFFD."""
        runs = groupby(ids, self.is_control)
        return "".join(
            self._bytes(run).decode(errors="replace") for is_control, run in runs if not is_control
        )

    def stream(self) -> "TextStream":
        """A decoder that takes ids one at a time and gives the same text as ``decode``."""
        return TextStream(self)

    def splitter(self, *, thinking: bool) -> Splitter:
        """What tells the trace of a reply from its answer; ``thinking``: whether one may come."""
        return {"text": TagSplitter, "control": Splitter}[self.reasoning_format](thinking=thinking)

    def closing(self, text: str, line: str = "") -> list[int]:
        """The ids that end an open trace which so far ends in ``text``, with a last line if there is one."""
        if self.close_id is None:
            return self.encode(closing(text, line))
        return [*self.encode(last_line(text, line)), self.close_id]

    def is_control(self, identity: int) -> bool:
        """Whether an id is one of the control ids, which stand for no text.

        Raises:
            TokenizerError: it is no id of this vocabulary.
        """
        if not 0 <= identity < self.vocab_size:
            raise TokenizerError(
                f"{identity} is no id of this vocabulary, which has {self.vocab_size}"
            )
        return identity < self._tekken.num_special_tokens

    def tool_calls(self, ids: Sequence[int]) -> tuple[list[ToolCall], str]:
        """The tool calls in the ids of a reply after its trace, and the text of the rest.

        A call begins at the control id [TOOL_CALLS], never at its spelling, and is ``name [CALL_ID] id [ARGS] {json}``;
        2507 and 2509 give no id, a v7 tokenizer a JSON list of calls. What is not so written, or whose arguments are
        no JSON object, stays text. Each call has an id of its own.
        """
        calls: dict[str, ToolCall] = {}
        rest, start = [], 0
        for end in [
            *(i for i, identity in enumerate(ids) if identity == self.tool_calls_id),
            len(ids),
        ]:
            block = [i for i in ids[start:end] if i not in self.stop_ids]
            found = self._calls(block[1:], calls) if block[:1] == [self.tool_calls_id] else []
            calls |= {call.id: call for call in found}
            rest += [] if found else [self.decode(block)]
            start = end
        return list(calls.values()), "".join(rest)

    def _calls(self, block: list[int], taken: Mapping[str, ToolCall]) -> list[ToolCall]:
        controls = [identity for identity in block if self.is_control(identity)]
        texts = [
            self.decode(list(run))
            for is_control, run in groupby(block, self.is_control)
            if not is_control
        ]
        if self.version == "v7":
            return parse_call_list("".join(texts), taken=taken) if not controls else []
        if (
            controls not in (self._call_tags, self._call_tags[1:])
            or len(texts) != len(controls) + 1
        ):
            return []
        call = parse_call(
            texts[0], texts[1] if len(controls) == 2 else None, texts[-1], taken=taken
        )
        return [] if call is None else [call]

    def _bytes(self, ids: Iterable[int]) -> bytes:
        return b"".join(self._tekken.id_to_byte_piece(identity) for identity in ids)


def _open_tekken(folder: Path) -> tuple["Tekkenizer", Path]:
    path = folder / TEKKEN_FILE
    if not path.is_file():
        raise TokenizerError(
            f"{path} is missing; it is the tokenizer of every Magistral checkpoint: "
            "copy it into this folder from where the model was published"
        )
    if (size := path.stat().st_size) > MAX_TEKKEN_BYTES:
        raise TokenizerError(
            f"{path} has {size} bytes, far too many for what it is; download it again"
        )
    from mistral_common.tokens.tokenizers.tekken import Tekkenizer

    try:
        tekken = Tekkenizer.from_file(path)
    except DAMAGE as error:
        raise _damaged(path, error) from None
    if (pieces := tekken.n_words - tekken.num_special_tokens) < BYTES:
        raise TokenizerError(
            f"{path} has {pieces} ids of text, and single bytes alone are {BYTES}; its vocabulary was cut: copy it "
            "from where the model was published"
        )
    return tekken, path


def _damaged(path: Path, error: Exception) -> TokenizerError:
    reason = re.sub(r"\s+", " ", f"{type(error).__name__}: {error}")[:200]
    return TokenizerError(f"{path} is damaged or unknown; download it again ({reason})")


class TextStream:
    """Ids to text as they come: whole characters only, flushed at every control id."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    @property
    def is_inside_character(self) -> bool:
        """Whether the next id completes a character, if all is well."""
        return bool(self._decoder.getstate()[0])

    def push(self, identity: int) -> str:
        """The characters that this id completes."""
        if self._tokenizer.is_control(identity):
            return self.flush()
        return self._decoder.decode(self._tokenizer._bytes([identity]))

    def flush(self) -> str:
        """What is left at the end: nothing, or U+FFFD for a character that was never completed."""
        return self._decoder.decode(b"", final=True)
