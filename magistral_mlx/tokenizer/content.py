"""Content of one message, in any form that clients write: text, parts, or an object."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from magistral_mlx.errors import OptionError, quoted

BETWEEN = "\n\n"  # what mistral-common puts between the texts of one message


class Part(NamedTuple):
    """Piece of a message: text, or the thinking of an assistant's or a system message."""

    kind: Literal["text", "thinking"]
    text: str


def checked(text: str, what: str) -> str:
    """Return ``text``, or raise OptionError about ``what`` if it is not valid Unicode.

    A file or argument that was decoded wrongly may leave half of a surrogate pair.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise OptionError(
            f"{what} is not valid Unicode; was it read as something other than UTF-8?"
        ) from None
    return text


def fields(value: Any, what: str, expected: str) -> Mapping[str, Any]:
    """Return a message, part, call or tool as a dictionary.

    Objects of mistral-common and OpenAI convert themselves.

    Raises:
        OptionError: it is neither; the message calls it ``what``.
    """
    if not isinstance(value, Mapping) and callable(dump := getattr(value, "model_dump", None)):
        value = dump()
    if not isinstance(value, Mapping):
        raise OptionError(f"{what} is {type(value).__name__}, expected {expected}")
    return value


def parts_of(content: Any, what: str, *, takes_thinking: bool) -> list[Part]:
    """Return the parts of a message's content that are not empty, in their order.

    Args:
        content: text, None, or a list of ``{"type": "text", "text": ...}`` and
            ``{"type": "thinking", "thinking": ...}``, whose thinking is text or a list of texts.
        what: name of the content, for messages.
        takes_thinking: its role may think.

    Raises:
        OptionError: a part is malformed, of another kind (images, audio), or thinking of a role
            that may not think.
    """
    if content is None:
        return []
    if isinstance(content, str):
        return [Part("text", checked(content, what))] if content else []
    if not isinstance(content, Sequence) or isinstance(content, bytes | bytearray):
        raise OptionError(f"{what} is {type(content).__name__}, expected text or a list of parts")
    found = [
        _part(raw, f"{what}, part {i}", takes_thinking) for i, raw in enumerate(content, start=1)
    ]
    return [part for part in found if part.text]


def joined(parts: Sequence[Part]) -> str:
    """Return the text of parts, without their thinking."""
    return BETWEEN.join(part.text for part in parts if part.kind == "text")


def separated(parts: Sequence[Part]) -> list[Part]:
    """Insert between two texts what mistral-common puts there."""
    found: list[Part] = []
    for part in parts:
        if found and found[-1].kind == part.kind == "text":
            found.append(Part("text", BETWEEN))
        found.append(part)
    return found


def _part(raw: Any, what: str, takes_thinking: bool) -> Part:
    part = fields(raw, what, "{'type': 'text', 'text': ...}")
    kind = part.get("type")
    if kind == "thinking" and takes_thinking:
        if part.get("closed") is False:
            raise OptionError(
                f"{what}: this thinking is not closed; only a whole reply can be part of a "
                "conversation"
            )
        return Part("thinking", _thinking(part.get("thinking"), what))
    if kind != "text":
        allowed = "text and thinking" if takes_thinking else "text"
        raise OptionError(
            f"{what} is of type {quoted(kind)}, and only {allowed} can be read here; "
            "leave it out, or put it into words"
        )
    if not isinstance(text := part.get("text"), str):
        raise OptionError(f"{what}: text is {type(text).__name__}, expected text")
    return Part("text", checked(text, what))


def _thinking(thinking: Any, what: str) -> str:
    if thinking is None:
        raise OptionError(
            f"{what} has no thinking; expected {{'type': 'thinking', 'thinking': ...}}"
        )
    if isinstance(thinking, str):
        return checked(thinking, what)
    # Mistral's API cuts one trace into pieces; nothing stands between them.
    return "".join(
        part.text for part in parts_of(thinking, f"{what}: thinking", takes_thinking=False)
    )
