"""A conversation, checked and put into Magistral's form: one system prompt, then turns."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from magistral_mlx.checkpoint.manifest import ReasoningFormat
from magistral_mlx.errors import OptionError, quoted
from magistral_mlx.tokenizer.content import (
    BETWEEN,
    Part,
    checked,
    fields,
    joined,
    parts_of,
    separated,
)
from magistral_mlx.tokenizer.reasoning import CLOSE, OPEN
from magistral_mlx.tokenizer.tool_calls import CallIds

# Control tokens of 2507 and 2509; their system prompt spells them.
CONTROL_TAGS = ("[THINK]", "[/THINK]")
CONTROL_TRACE = re.compile(r"\[THINK\](.*?)\[/THINK\]", re.DOTALL)

# The keys of a message that are encoded, by role.
KEYS = {
    "system": {"content"},
    "user": {"content"},
    "assistant": {"content", "reasoning", "reasoning_content", "tool_calls"},
    "tool": {"content", "tool_call_id", "name"},
}
AFTER = {
    "": "user",
    "user": "user, assistant",
    "assistant": "user, tool",
    "tool": "user, assistant, tool",
}

Messages = str | Sequence[Mapping[str, Any]]
Content = str | list[dict[str, str]]  # of mistral-common's messages


def prompt_around(default: str) -> tuple[str, str]:
    """Split the ``default`` system prompt at the place where a user's system text is inserted.

    That is before the final ``Problem:``, between blank lines: then the beginning is the same for
    every conversation and can be cached. A prompt without ``Problem:``, like that of 2507 and 2509,
    comes first as a whole.
    """
    if not default.rstrip().endswith("Problem:"):
        return default.rstrip("\n") + "\n\n", ""
    cut = default.rindex("Problem:")
    return default[:cut].rstrip("\n") + "\n\n", "\n\n" + default[cut:]


def prompt_parts(prompt: str, form: ReasoningFormat) -> list[Part]:
    """Return the parts of a checkpoint's system prompt.

    If traces have control ids, a ``[THINK]...[/THINK]`` in the prompt is thinking. Never use this
    for a user's text, which could then write control ids.
    """
    if form == "text":
        return [Part("text", prompt)]
    pieces = enumerate(CONTROL_TRACE.split(prompt))
    return [Part("thinking" if i % 2 else "text", piece) for i, piece in pieces if piece or i % 2]


def conversation(
    messages: Messages,
    default: str,
    *,
    system_prompt_only: bool = False,
    form: ReasoningFormat = "text",
) -> list[dict[str, Any]]:
    """Return the conversation in mistral-common's form: a system message, then turns.

    Args:
        messages: a user's text, or messages; system messages may stand anywhere.
        default: the default system prompt. System messages are added to it; one that repeats it, as
            many clients send, adds nothing.
        system_prompt_only: the system messages replace the default system prompt.
        form: of traces: text, or between control ids.

    Raises:
        OptionError: a message is malformed or out of turn, or a tool call has no result.
    """
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    if not isinstance(messages, Sequence):
        raise OptionError(
            f"the messages are {quoted(messages)}; give a question's text, or a list of messages"
        )
    turns: list[dict[str, Any]] = []
    system: list[list[Part]] = []
    calls = CallIds()
    previous = ""
    for i, raw in enumerate(messages, start=1):
        where = f"message {i}"
        role, message = _read(raw, where)
        parts = parts_of(
            message.get("content"),
            f"{where}: content",
            takes_thinking=role in ("system", "assistant"),
        )
        if role in ("system", "user") and not any(part.text.strip() for part in parts):
            raise OptionError(f"{where}: content is empty")
        if role == "system":
            system.append(parts)
            continue
        if role not in AFTER[previous].split(", "):
            place = f"follow one of role {previous}" if previous else "open a conversation"
            raise OptionError(
                f"{where}: a message of role {role} cannot {place}; expected role {AFTER[previous]}"
            )
        if role == "tool":
            answered = {"tool_call_id": calls.answer(_text(message, "tool_call_id", where), where)}
            turns.append({"role": role, "content": joined(parts)} | answered)
        else:
            calls.require_answered(where)
            its = calls.read(message.get("tool_calls"), where)
            turns.append(
                _assistant(message, parts, its, where, form)
                if role == "assistant"
                else _user(parts)
            )
        previous = role
    calls.require_answered("the end of the messages")
    if previous not in ("user", "tool"):
        raise OptionError(
            "the messages end without a question; the last must be of role user or tool"
        )
    if system_prompt_only and not system:
        raise OptionError(
            "there is no system message to replace the default system prompt; give one"
        )
    return [
        {"role": "system", "content": _system(system, default, system_prompt_only, form)},
        *turns,
    ]


def _read(raw: Any, where: str) -> tuple[str, Mapping[str, Any]]:
    """Return the role of a message, and the message.

    Raises:
        OptionError: a key would be ignored and is not empty, or the role is unknown.
    """
    message = fields(raw, where, "{'role': ..., 'content': ...}")
    role = message.get("role")
    if not isinstance(role, str) or role not in KEYS:
        raise OptionError(f"{where}: role is {quoted(role)}; use one of {', '.join(KEYS)}")
    known = KEYS[role] | {"role"}
    if unknown := [quoted(key) for key, value in message.items() if value and key not in known]:
        raise OptionError(f"{where}: messages of role {role} have no {min(unknown)}; remove it")
    return str(role), message


def _system(own: list[list[Part]], default: str, own_only: bool, form: ReasoningFormat) -> Content:
    """Return the content of the system message: the default prompt and the user's ``own`` ones."""
    own = [
        prompt_parts(default, form) if _spelled(parts, form).strip() == default.strip() else parts
        for parts in own
    ]
    own = own if own_only else [parts for parts in own if parts != prompt_parts(default, form)]
    inside = [
        part
        for i, parts in enumerate(own)
        for part in [Part("text", BETWEEN)] * (i > 0) + separated(parts)
    ]
    if not own_only:
        before, after = prompt_around(default) if own else (default, "")
        inside = [*prompt_parts(before, form), *inside, Part("text", after)]
    return _spelled(inside, form) if form == "text" else _chunks(inside)


def _user(parts: list[Part]) -> dict[str, Any]:
    return {"role": "user", "content": joined(parts)}


def _assistant(
    message: Mapping[str, Any],
    parts: list[Part],
    calls: list[dict[str, Any]],
    where: str,
    form: ReasoningFormat,
) -> dict[str, Any]:
    """Return an assistant's message.

    Before v13 mistral-common takes a trace only as text. From v13 on it takes chunks and puts them
    between control ids. Tags that the text spells stay text.
    """
    traces, answer = _traces(message, parts, where), joined(parts)
    if not answer.strip() and not traces and not calls:
        raise OptionError(f"{where}: content is empty")
    content: Content = answer
    if traces and form == "text":
        content = _spelled([Part("thinking", "\n".join(traces)), Part("text", answer)], form)
    elif traces:
        content = _chunks([*(Part("thinking", trace) for trace in traces), Part("text", answer)])
    return {"role": "assistant", "content": content} | ({"tool_calls": calls} if calls else {})


def _traces(message: Mapping[str, Any], parts: list[Part], where: str) -> list[str]:
    """Return the traces of an assistant's message, which may be given in one of three ways."""
    kinds = [part.kind for part in parts]
    # Thinking must come before text.
    if kinds != sorted(kinds, reverse=True):
        raise OptionError(
            f"{where}: content has thinking after text; the trace comes before the answer"
        )
    traces = [part.text for part in parts if part.kind == "thinking"]
    found = {
        _text(message, key, where, is_optional=True) for key in ("reasoning", "reasoning_content")
    }
    found = (found | {"\n".join(traces)}) - {""}
    if len(found) > 1:
        raise OptionError(
            f"{where}: its reasoning, reasoning_content and thinking differ; keep one"
        )
    return traces or list(found)


def _spelled(parts: list[Part], form: ReasoningFormat) -> str:
    """Write parts as text, thinking between the tags of the release."""
    before, after = (f"{OPEN}\n", f"\n{CLOSE}\n") if form == "text" else CONTROL_TAGS
    return "".join(
        before + part.text + after if part.kind == "thinking" else part.text for part in parts
    )


def _chunks(parts: list[Part]) -> list[dict[str, str]]:
    """Return parts as mistral-common's chunks.

    Texts in a row become one: mistral-common would put a blank line between them.
    """
    chunks: list[dict[str, str]] = []
    for kind, text in parts:
        if kind == "text" and chunks and chunks[-1]["type"] == "text":
            chunks[-1]["text"] += text
        elif text or kind == "thinking":
            chunks.append({"type": kind, kind: text})
    return chunks


def _text(message: Mapping[str, Any], key: str, where: str, *, is_optional: bool = False) -> str:
    value = message.get(key)
    if is_optional and value is None:
        return ""
    if not isinstance(value, str):
        raise OptionError(f"{where}: {key} is {type(value).__name__}, expected text")
    if not is_optional and not value.strip():
        raise OptionError(f"{where}: {key} is empty")
    return checked(value, f"{where}: {key}")
