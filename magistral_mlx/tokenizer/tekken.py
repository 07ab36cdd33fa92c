"""Tokenizer of tekken.json: a chat to ids by mistral-common, and ids to text."""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from magistral_mlx.checkpoint.manifest import ReasoningFormat
from magistral_mlx.errors import OptionError, TokenizerError
from magistral_mlx.tokenizer.agreement import check_agreement, other_size, share_ids
from magistral_mlx.tokenizer.content import checked, fields
from magistral_mlx.tokenizer.detokenizer import Detokenizer
from magistral_mlx.tokenizer.home import find_tokenizer
from magistral_mlx.tokenizer.messages import CONTROL_TAGS, Messages, conversation
from magistral_mlx.tokenizer.reasoning import EMPTY_TRACE, Splitter, TagSplitter, closing, last_line
from magistral_mlx.tokenizer.release import (
    SYSTEM_PROMPT_FILE,
    find_reasoning_format,
    read_system_prompt,
)
from magistral_mlx.tokenizer.segments import ToolCall
from magistral_mlx.tokenizer.tekken_file import (
    DAMAGE,
    damaged_tekken,
    open_tekken,
    panics_as_errors,
    reason_of,
)
from magistral_mlx.tokenizer.tool_calls import parse_call, parse_call_list

if TYPE_CHECKING:
    from mistral_common.tokens.tokenizers.tekken import Tekkenizer


class Tokenizer:
    """Tokenizer of Magistral Small, of any release. Make one with ``from_folder``.

    Attributes:
        vocab_size: ids are 0 to ``vocab_size - 1``.
        bos_id, eos_id, pad_id, tool_calls_id: control ids.
        stop_ids: control ids that end a reply.
        open_id, close_id: control ids of a trace's tags, or None if the release spells the tags.
        empty_trace: ids that, after the prompt, ask for an answer without a trace.
        system_prompt: default system prompt, which asks for reasoning.
        reasoning_format: form in which a trace is written.
        version: of tekken.json.
        path: of tekken.json.
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

        self.path = tekken.file_path
        self.version: str = tekken.version.value
        self.vocab_size = tekken.n_words
        self.bos_id, self.eos_id, self.pad_id = tekken.bos_id, tekken.eos_id, tekken.pad_id
        self.stop_ids = frozenset({tekken.eos_id})
        self.tool_calls_id = tekken.get_special_token("[TOOL_CALLS]")
        self.system_prompt = system_prompt
        self.reasoning_format = form
        # v7 writes calls as one JSON list.
        names = () if self.version == "v7" else ("[CALL_ID]", "[ARGS]")
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
        # MistralTokenizer.from_file would build the image encoder that tekken.json may describe.
        self._mistral: MistralTokenizer[Any, Any, Any, Any, Any] = MistralTokenizer(
            instruct(tekken),
            validator=get_validator(tekken.version, mode=ValidationMode.test),
            request_normalizer=get_normalizer(tekken.version),
        )

    @classmethod
    def from_folder(
        cls, folder: Path, reasoning_format: ReasoningFormat | None = None, home: Path | None = None
    ) -> "Tokenizer":
        """Read ``tekken.json`` of a checkpoint, and ``SYSTEM_PROMPT.txt`` if it has one.

        Args:
            folder: of the checkpoint.
            reasoning_format: form of its traces; None for what its files show.
            home: another folder that has its tekken.json, and its prompt unless ``folder`` has one.

        Raises:
            TokenizerError: tekken.json is missing, damaged or of another release, or
                SYSTEM_PROMPT.txt is no text.
        """
        home = home or folder
        tekken, path = open_tekken(home)
        with_prompt = folder if os.path.lexists(folder / SYSTEM_PROMPT_FILE) else home
        try:
            version, has_tags = tekken.version.value, all(map(tekken.is_special, CONTROL_TAGS))
            form = find_reasoning_format(
                home, version, has_control_tags=has_tags, given=reasoning_format
            )
            return cls(tekken, form, read_system_prompt(with_prompt, form))
        except DAMAGE as error:
            raise damaged_tekken(path, error) from None

    @classmethod
    def of_model(
        cls,
        folder: Path,
        vocab_size: int,
        reasoning_format: ReasoningFormat | None = None,
        *,
        given: str | Path | None = None,
    ) -> "Tokenizer":
        """Read the tokenizer of a model, and check that it has the model's vocabulary.

        ``given`` and the place of tekken.json are as for ``find_tokenizer``.

        Raises:
            CheckpointError: it has not ``vocab_size`` ids.
            TokenizerError, HubError: it cannot be found, read or fetched, or has other ids than
                a tokenizer.json in ``folder``.
        """
        home = find_tokenizer(folder, given)
        tokenizer = cls.from_folder(folder, reasoning_format, home=home)
        if home != folder:
            check_agreement(tokenizer._tekken, tokenizer.path, folder)
        if tokenizer.vocab_size != vocab_size:
            raise other_size(tokenizer.path, tokenizer.vocab_size, vocab_size)
        return tokenizer

    def shares_ids(self, folder: Path) -> bool:
        """Return whether another checkpoint's tekken.json gives every id of text the same bytes."""
        return share_ids(self._tekken, open_tekken(find_tokenizer(folder, fetches=False))[0])

    def encode_chat(
        self,
        messages: Messages,
        *,
        system_prompt_only: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        think: bool = True,
    ) -> list[int]:
        """Return the ids of a conversation that ends in a question.

        Nothing in a message or tool can add a control id; only the checkpoint's own system prompt
        may. System messages are added to it so that its beginning is the same for every
        conversation: before its final ``Problem:`` in 2506, at the end in 2507 and 2509. A blank
        line joins a user's messages in a row.

        Args:
            messages: a user's text, or messages in the form of OpenAI, vLLM, Mistral's API or
                mistral-common, with content that is text or parts of type text. An assistant's
                message may carry its trace as ``reasoning``, ``reasoning_content`` or parts of type
                thinking, and its ``tool_calls``. Tags that its text spells make no trace. Every
                call needs a result: a message of role tool with the id of the call, in any form.
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
            with panics_as_errors(self._tekken.file_path):
                ids: list[int] = self._mistral.encode_chat_completion(request).tokens
        except RecursionError:
            raise OptionError("the messages or tools are nested too deeply; flatten them") from None
        except (ValueError, TypeError, AttributeError, MistralCommonException) as error:
            raise OptionError(
                f"the messages or tools cannot be encoded: {reason_of(error)}"
            ) from None
        return ids if think else ids + self.empty_trace

    def encode(self, text: str) -> list[int]:
        """Return the ids of plain text; none is a control id.

        Raises:
            OptionError: the text is not valid Unicode.
        """
        with panics_as_errors(self._tekken.file_path):
            return self._tekken.encode(checked(text, "the text"), bos=False, eos=False)

    def pieces(self, text: str) -> list[bytes]:
        """Return the bytes of each id of a text; they may end inside a character."""
        return [self._tekken.id_to_byte_piece(token_id) for token_id in self.encode(text)]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids.

        A control id has no text. Bytes that form no character become U+FFFD.
        """
        runs = groupby(ids, self.is_control)
        return "".join(
            self.to_bytes(run).decode(errors="replace")
            for is_control, run in runs
            if not is_control
        )

    def detokenizer(self) -> Detokenizer:
        """Make a decoder that takes ids one at a time and gives the same text as ``decode``."""
        return Detokenizer(self)

    def splitter(self, *, thinking: bool) -> Splitter:
        """Make a splitter of a reply into trace and answer, or answer alone."""
        return {"text": TagSplitter, "control": Splitter}[self.reasoning_format](thinking=thinking)

    def closing(self, text: str, line: str = "") -> list[int]:
        """Return the ids that end an open trace after ``text``, with ``line`` as its last line."""
        if self.close_id is None:
            return self.encode(closing(text, line))
        return [*self.encode(last_line(text, line)), self.close_id]

    def is_control(self, token_id: int) -> bool:
        """Return whether an id is a control id, which has no text.

        Raises:
            TokenizerError: it is no id of this vocabulary.
        """
        if not 0 <= token_id < self.vocab_size:
            raise TokenizerError(
                f"{token_id} is no id of this vocabulary, which has {self.vocab_size}"
            )
        return token_id < self._tekken.num_special_tokens

    def tool_calls(self, ids: Sequence[int]) -> tuple[list[ToolCall], str]:
        """Return the tool calls in the ids of a reply after its trace, and the text of the rest.

        A call begins at the control id [TOOL_CALLS], never at its spelling, and is
        ``name [CALL_ID] id [ARGS] {json}``. 2507 and 2509 give no id; a v7 tokenizer writes a JSON
        list of calls. A call in another form, or with arguments that are no JSON object, stays
        text. Each call gets its own id.
        """
        calls: dict[str, ToolCall] = {}
        rest, start = [], 0
        for end in [
            *(i for i, token_id in enumerate(ids) if token_id == self.tool_calls_id),
            len(ids),
        ]:
            block = [i for i in ids[start:end] if i not in self.stop_ids]
            found = self._calls(block[1:], calls) if block[:1] == [self.tool_calls_id] else []
            calls |= {call.id: call for call in found}
            rest += [] if found else [self.decode(block)]
            start = end
        return list(calls.values()), "".join(rest)

    def _calls(self, block: list[int], taken: Mapping[str, ToolCall]) -> list[ToolCall]:
        controls = [token_id for token_id in block if self.is_control(token_id)]
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

    def to_bytes(self, ids: Iterable[int]) -> bytes:
        """Return the bytes of ids that are not control ids."""
        return b"".join(self._tekken.id_to_byte_piece(token_id) for token_id in ids)
