"""Tool calls: ids of nine letters and digits, and JSON arguments."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from magistral_mlx.errors import OptionError, quoted
from magistral_mlx.tokenizer.content import checked, fields
from magistral_mlx.tokenizer.segments import ToolCall

# mistral-common refuses any other form.
ID = re.compile("[a-zA-Z0-9]{9}")
NAME = re.compile("[a-zA-Z0-9_-]{1,64}")


def native_id(call_id: str, attempt: int = 0) -> str:
    """Return an id in Magistral's form; an id of another form becomes its hash.

    Each ``attempt`` gives another hash.
    """
    if ID.fullmatch(call_id) and not attempt:
        return call_id
    return hashlib.sha256((call_id + f" {attempt}" * (attempt > 0)).encode()).hexdigest()[:9]


def parse_call(
    name: str, call_id: str | None, arguments: str, *, taken: Mapping[str, Any]
) -> ToolCall | None:
    """Return a call that the model wrote, under an id that is not ``taken``; None if malformed.

    Without a ``call_id`` the id is a hash of the call.
    """
    name = name.strip()
    try:
        found = json_object(arguments)
    except (ValueError, RecursionError):
        return None
    if not NAME.fullmatch(name):
        return None
    free = free_id(f"{name} {arguments}" if call_id is None else call_id, taken)
    return ToolCall(free, name, found)


def parse_call_list(text: str, *, taken: Mapping[str, Any]) -> list[ToolCall]:
    """Return the calls of one JSON list, the form of a v7 tokenizer; none if it is no such list."""
    try:
        raw_calls = json_object(f'{{"calls": {text}}}')["calls"]
        written = [(raw["name"], raw.get("id"), json_text(raw["arguments"])) for raw in raw_calls]
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return []
    calls: dict[str, ToolCall] = {}
    for name, call_id, arguments in written:
        if not isinstance(name, str) or not isinstance(call_id, str | None):
            return []
        call = parse_call(name, call_id, arguments, taken={**taken, **calls})
        if call is None:
            return []
        calls[call.id] = call
    return list(calls.values())


def as_message(call: ToolCall) -> dict[str, Any]:
    """Return a call as it stands in a message, in OpenAI's form."""
    function = {"name": call.name, "arguments": json_text(call.arguments)}
    return {"id": call.id, "type": "function", "function": function}


def free_id(call_id: str, taken: Mapping[str, Any]) -> str:
    """Return the first id of ``native_id`` that is not ``taken``."""
    attempt = 0
    while (found := native_id(call_id, attempt)) in taken:
        attempt += 1
    return found


def json_object(text: str) -> dict[str, Any]:
    """Parse a JSON object that can be written again.

    Raises:
        ValueError, RecursionError: it is no such object.
    """
    found = json.loads(text)
    if not isinstance(found, dict):
        raise ValueError(f"{type(found).__name__} is no JSON object")
    json_text(found)
    return found


def json_text(value: Any) -> str:
    """Write JSON in the form that the model reads.

    Raises:
        ValueError: JSON has no such number, or the text is not valid Unicode.
    """
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    text.encode()
    return text


class CallIds:
    """Calls of a conversation's newest assistant message, by the ids that the conversation has."""

    def __init__(self) -> None:
        # Magistral's id by the caller's.
        self._ids: dict[str, str] = {}
        self._unanswered: list[str] = []

    def read(self, raw_calls: Any, where: str) -> list[dict[str, Any]]:
        """Return the calls of an assistant's message in mistral-common's form.

        Raises:
            OptionError: one is malformed, or two have the same id.
        """
        if not isinstance(raw_calls, Sequence | None) or isinstance(raw_calls, str | bytes):
            raise OptionError(f"{where}: tool_calls is {type(raw_calls).__name__}, expected a list")
        calls = [
            _read_call(raw, f"{where}: tool call {i}")
            for i, raw in enumerate(raw_calls or (), start=1)
        ]
        self._unanswered = [call_id for call_id, _ in calls]
        if twice := {
            call_id for call_id in self._unanswered if self._unanswered.count(call_id) > 1
        }:
            raise OptionError(
                f"{where}: two tool calls have the id {quoted(min(twice))}; each needs its own"
            )
        native = {call_id: call_id for call_id in self._unanswered if ID.fullmatch(call_id)}
        made: dict[str, str] = {}
        for call_id in self._unanswered:
            made[call_id] = native.get(call_id) or free_id(
                call_id, native | {v: k for k, v in made.items()}
            )
        self._ids = made
        return [{"id": made[call_id], "function": function} for call_id, function in calls]

    def answer(self, call_id: str, where: str) -> str:
        """Return Magistral's id of the call that a result answers.

        Args:
            call_id: the id of the caller, or Magistral's.
            where: the place of the message, for errors.

        Raises:
            OptionError: there is no such call, or it has a result.
        """
        caller_id_of = {native: caller for caller, native in self._ids.items()}
        caller_id_of |= {caller: caller for caller in self._ids}
        if call_id not in caller_id_of:
            known = (
                f"its ids are {', '.join(map(quoted, self._ids))}" if self._ids else "it has none"
            )
            raise OptionError(
                f"{where}: {quoted(call_id)} is no call of the assistant's message before it; "
                f"{known}"
            )
        if caller_id_of[call_id] not in self._unanswered:
            raise OptionError(f"{where}: the call {quoted(call_id)} has a result already; keep one")
        self._unanswered.remove(caller_id_of[call_id])
        return self._ids[caller_id_of[call_id]]

    def require_answered(self, where: str) -> None:
        """Raise OptionError if a call has no result yet."""
        if self._unanswered:
            raise OptionError(
                f"{where}: the tool call {quoted(self._unanswered[0])} has no result; put a "
                "message of role tool, with its tool_call_id, before anything else"
            )


def _read_call(raw: Any, what: str) -> tuple[str, dict[str, Any]]:
    """Return the id of a call, and its name and arguments."""
    raw = as_message(raw) if isinstance(raw, ToolCall) else raw
    call = fields(raw, what, "{'id': ..., 'function': {'name': ..., 'arguments': ...}}")
    function = fields(call.get("function"), f"{what}: function", "{'name': ..., 'arguments': ...}")
    call_id, name, arguments = call.get("id"), function.get("name"), function.get("arguments")
    if not isinstance(call_id, str) or not call_id or call_id == "null":
        raise OptionError(
            f"{what}: id is {quoted(call_id)}, expected the text that its result will name"
        )
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise OptionError(f"{what}: name is {quoted(name)}; use up to 64 letters, digits, - and _")
    try:
        found = json_object(arguments or "{}") if isinstance(arguments, str | None) else arguments
        if not isinstance(found, Mapping):
            raise OptionError(
                f"{what}: arguments are {type(found).__name__}, expected a JSON object"
            )
        written = json_text(dict(found))
    except (ValueError, TypeError, RecursionError) as error:
        raise OptionError(
            f"{what}: arguments are no JSON object ({type(error).__name__}: {error})"
        ) from None
    return checked(call_id, f"{what}: id"), {"name": name, "arguments": written}
