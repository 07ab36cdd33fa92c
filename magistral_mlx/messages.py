"""A conversation, checked and put into the form Magistral reads: one system prompt, traces written out."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from magistral_mlx.errors import OptionError
from magistral_mlx.reasoning import CLOSE, OPEN, ReasoningFormat

CONTROL_TAGS = ("[THINK]", "[/THINK]")  # control tokens of 2507 and 2509; their system prompt spells them
CONTROL_TRACE = re.compile(r"\[THINK\](.*?)\[/THINK\]", re.DOTALL)

# The model cards', for checkpoints that come without SYSTEM_PROMPT.txt: of 2506, and of 2507 and 2509.
CARD_SYSTEM_PROMPT = (
    "A user will ask you to solve a task. You should first draft your thinking process (inner monologue) until you "
    "have derived the final answer. Afterwards, write a self-contained summary of your thoughts (i.e. your summary "
    "should be succinct but contain all the critical steps you needed to reach the conclusion). You should use "
    "Markdown to format your response. Write both your thoughts and summary in the same language as the task posed by "
    "the user. NEVER use \\boxed{} in your response.\n\n"
    "Your thinking process must follow the template below:\n"
    "<think>\n"
    "Your thoughts or/and draft, like working through an exercise on scratch paper. Be as casual and as long as you "
    "want until you are confident to generate a correct answer.\n"
    "</think>\n\n"
    "Here, provide a concise summary that reflects your reasoning and presents a clear final answer to the user. "
    "Don't mention that this is a summary.\n\n"
    "Problem:\n\n"
)
CONTROL_CARD_SYSTEM_PROMPT = (
    "First draft your thinking process (inner monologue) until you arrive at a response. Format your response using "
    "Markdown, and use LaTeX for any mathematical equations. Write both your thoughts and the response in the same "
    "language as the input.\n\n"
    "Your thinking process must follow the template below:[THINK]Your thoughts or/and draft, like working through an "
    "exercise on scratch paper. Be as casual and as long as you want until you are confident to generate the response. "
    "Use the same language as the input.[/THINK]Here, provide a self-contained response."
)

# The keys of a message that are encoded, by role.
KEYS = {
    "system": {"content"},
    "user": {"content"},
    "assistant": {"content", "reasoning", "reasoning_content", "tool_calls"},
    "tool": {"content", "tool_call_id", "name"},
}
AFTER = {"": "user", "user": "user, assistant", "assistant": "user, tool", "tool": "user, assistant, tool"}

Messages = str | Sequence[Mapping[str, Any]]


def prompt_around(default: str) -> tuple[str, str]:
    """What comes before and after a user's system text when it joins the ``default`` system prompt.

    It goes before the final ``Problem:``, set off by blank lines, so that what comes before is the same
    for every conversation and can be cached. A prompt without ``Problem:``, as that of 2507 and 2509, comes
    first as a whole, and the user's text after it.
    """
    if not default.rstrip().endswith("Problem:"):
        return default.rstrip("\n") + "\n\n", ""
    cut = default.rindex("Problem:")
    return default[:cut].rstrip("\n") + "\n\n", "\n\n" + default[cut:]


def prompt_chunks(prompt: str) -> list[dict[str, str]]:
    """A checkpoint's system prompt in mistral-common's chunks, where a ``[THINK]...[/THINK]`` it spells is thinking.

    Never for a user's text, which could then write control ids.
    """
    parts = enumerate(CONTROL_TRACE.split(prompt))
    return [{"type": kind, kind: part} for i, part in parts if part or i % 2 for kind in [("text", "thinking")[i % 2]]]


def conversation(
    messages: Messages, default: str, *, system_prompt_only: bool = False, form: ReasoningFormat = "text"
) -> list[dict[str, Any]]:
    """The conversation in mistral-common's form: one system message, then turns that end in a question.

    Args:
        messages: a user's text, or messages; system messages may stand anywhere.
        default: the default system prompt; the system messages join it, or replace it if
            ``system_prompt_only``.
        form: whether traces are text or stand between control ids.
    Raises:
        OptionError: a message is malformed or out of turn.
    """
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    assistant = {"text": _assistant, "control": _control_assistant}[form]
    turns: list[dict[str, Any]] = []
    system: list[str] = []
    previous = ""
    for i, message in enumerate(messages, start=1):
        where = f"message {i}"
        role = _role(message, where)
        if role == "system":
            system.append(_text(message, "content", where))
            continue
        if role not in AFTER[previous].split(", "):
            place = f"follow one of role {previous}" if previous else "open a conversation"
            raise OptionError(f"{where}: a message of role {role} cannot {place}; expected role {AFTER[previous]}")
        turns.append({"user": _user, "assistant": assistant, "tool": _tool}[role](message, where))
        previous = role
    if previous not in ("user", "tool"):
        raise OptionError("the messages end without a question; the last must be of role user or tool")
    if system_prompt_only and not system:
        raise OptionError("there is no system message to replace the default system prompt; give one")
    return [{"role": "system", "content": _system("\n\n".join(system), default, system_prompt_only, form)}, *turns]


def _system(own: str, default: str, own_only: bool, form: ReasoningFormat) -> str | list[dict[str, str]]:
    """The content of the system message: ``own`` text of the user's, if any, joined to the default prompt."""
    if own_only:
        return own
    before, after = prompt_around(default) if own else (default, "")
    if form == "text":
        return before + own + after
    chunks = prompt_chunks(before)
    if own:
        chunks[-1]["text"] += own + after  # what comes before it ends in a blank line, so it is text
    return chunks


def checked(text: str, what: str) -> str:
    """``text``, if it is Unicode: half of a surrogate pair is what a wrongly decoded file or argument leaves."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise OptionError(f"{what} is not valid Unicode; was it read as something other than UTF-8?") from None
    return text


def _role(message: Mapping[str, Any], where: str) -> str:
    """The role of a message, none of whose keys may be one that would be ignored."""
    if not isinstance(message, Mapping):
        raise OptionError(f"{where} is {type(message).__name__}, expected {{'role': ..., 'content': ...}}")
    role = message.get("role")
    if not isinstance(role, str) or role not in KEYS:
        raise OptionError(f"{where}: role is {role!r}; use one of {', '.join(KEYS)}")
    unknown = {str(key) for key, value in message.items() if value is not None} - KEYS[role] - {"role"}
    if unknown:
        raise OptionError(f"{where}: messages of role {role} have no {min(unknown)!r}; remove it")
    return role


def _user(message: Mapping[str, Any], where: str) -> dict[str, Any]:
    return {"role": "user", "content": _text(message, "content", where)}


def _tool(message: Mapping[str, Any], where: str) -> dict[str, Any]:
    identity = call_id(_text(message, "tool_call_id", where))
    return {"role": "tool", "content": _text(message, "content", where, is_optional=True), "tool_call_id": identity}


def _assistant(message: Mapping[str, Any], where: str) -> dict[str, Any]:
    """An assistant's message with its trace as the text the model writes: mistral-common has no other form in v11."""
    trace, answer, calls = _reply(message, where)
    return {"role": "assistant", "content": (f"{OPEN}\n{trace}\n{CLOSE}\n" if trace else "") + answer} | calls


def _control_assistant(message: Mapping[str, Any], where: str) -> dict[str, Any]:
    """An assistant's message with its trace as a chunk, which mistral-common puts between control ids."""
    trace, answer, calls = _reply(message, where)
    if not trace:
        return {"role": "assistant", "content": answer} | calls
    chunks = [{"type": "thinking", "thinking": trace}] + ([{"type": "text", "text": answer}] if answer else [])
    return {"role": "assistant", "content": chunks} | calls


def _reply(message: Mapping[str, Any], where: str) -> tuple[str, str, dict[str, Any]]:
    """The trace, the answer and the tool calls of an assistant's message, each of which may be empty, but not all."""
    traces = {_text(message, key, where, is_optional=True) for key in ("reasoning", "reasoning_content")} - {""}
    if len(traces) > 1:
        raise OptionError(f"{where}: reasoning and reasoning_content differ; keep one")
    calls = [_tool_call(call, where) for call in message.get("tool_calls") or ()]
    answer = _text(message, "content", where, is_optional=bool(traces or calls))
    return "".join(traces), answer, {"tool_calls": calls} if calls else {}


def _tool_call(raw: Any, where: str) -> dict[str, Any]:
    try:
        identity, name, arguments = raw["id"], raw["function"]["name"], raw["function"]["arguments"]
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
        written = json.dumps(arguments, ensure_ascii=False)
    except (LookupError, TypeError, ValueError) as error:
        raise OptionError(f"{where}: a tool call is malformed: {type(error).__name__} {error}") from None
    if not isinstance(arguments, dict) or not isinstance(identity, str):
        raise OptionError(f"{where}: a tool call needs an id that is text and arguments that are a JSON object")
    function = {"name": name, "arguments": checked(written, f"{where}: a tool call's arguments")}
    return {"id": call_id(checked(identity, f"{where}: a tool call's id")), "function": function}


def call_id(identity: str) -> str:
    """A tool call's id as Magistral writes it: nine letters and digits. Any other becomes its hash, everywhere."""
    if re.fullmatch("[a-zA-Z0-9]{9}", identity):
        return identity
    return hashlib.sha256(identity.encode()).hexdigest()[:9]


def _text(message: Mapping[str, Any], key: str, where: str, *, is_optional: bool = False) -> str:
    value = message.get(key)
    if is_optional and value is None:
        return ""
    if not isinstance(value, str):
        raise OptionError(f"{where}: {key} is {type(value).__name__}, expected text")
    if not is_optional and not value.strip():
        raise OptionError(f"{where}: {key} is empty")
    return checked(value, f"{where}: {key}")
