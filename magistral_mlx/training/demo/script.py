"""Ids of one training conversation, in the form of Magistral Small 2506."""

import random

from mistral_common.tokens.tokenizers.tekken import Tekkenizer

from magistral_mlx.training.demo.vocabulary import CONTROL

# Ids, and for each of them if it is learned.
Example = tuple[list[int], list[bool]]


class Script:
    """A conversation as it is written: its ids, and which of them are learned."""

    def __init__(self, tokenizer: Tekkenizer, rng: random.Random) -> None:
        self.tokenizer, self.rng = tokenizer, rng
        self.ids = [CONTROL["<s>"]]
        self.learned = [False]
        self.calls = 0

    def encode(self, part: str) -> list[int]:
        """Return the id of a control id's name, or the ids of a text."""
        if part in CONTROL:
            return [CONTROL[part]]
        return self.tokenizer.encode(part, bos=False, eos=False)

    def add(self, *parts: str, learn: bool = False) -> None:
        """Append control ids, by their names, and texts."""
        for part in parts:
            self.extend(self.encode(part), learn=learn)

    def extend(self, ids: list[int], *, learn: bool) -> None:
        self.ids.extend(ids)
        self.learned.extend([learn] * len(ids))

    def reply(self, trace: str, parts: list[str], *, learn: bool) -> None:
        """Append a reply: a trace, then ``parts``, an answer or a call.

        A few replies that are learned have no trace, or one that a budget has cut.
        """
        draw = self.rng.random() if learn else 1
        if draw < 0.03:
            # Reasoning switched off: the answer is a guess, but well-formed.
            self.add("<think>\n</think>\n")
        elif draw < 0.07:
            # A thinking budget that ends somewhere in the trace.
            begun = self.encode(f"<think>\n{trace}")
            self.extend(begun[: self.rng.randrange(3, len(begun))], learn=True)
            self.add("\n</think>\n\n")
        else:
            self.add(f"<think>\n{trace}\n</think>\n", learn=learn)
        self.add(*parts, "</s>", learn=learn)
