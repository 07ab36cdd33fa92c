"""Segments: the typed pieces in which a reply arrives."""

from dataclasses import dataclass
from typing import Any, Literal

from magistral_mlx.streams import Progress


@dataclass(frozen=True, slots=True)
class Text:
    """A piece of the reasoning trace or of the answer.

    Attributes:
        kind: "reasoning" or "answer".
        text: the characters; they may be none.
        logprobs: if asked for, an entry for each id of the piece: the best ids and their
            log-probabilities without temperature; an id that was forced has an empty entry. A
            piece without text carries the entries of a tool call.
    """

    kind: Literal["reasoning", "answer"]
    text: str
    logprobs: tuple[dict[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A function that the model asks to be called.

    Attributes:
        id: nine letters and digits, which the result refers to.
        name: the function's.
        arguments: by their names.
    """

    id: str
    name: str
    arguments: dict[str, Any]


Segment = Progress | Text | ToolCall
