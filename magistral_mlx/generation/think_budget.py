"""When a trace has to end: at a line that may well be its last once its budget nears, else where that is used up."""

import mlx.core as mx

from magistral_mlx.errors import OptionError
from magistral_mlx.generation.params import SamplingParams
from magistral_mlx.tokenizer.tekken import Tokenizer

RESERVED = 512  # tokens of a long reply that a trace with a budget leaves to the answer; of a shorter one a quarter
NEARING = 4  # the last quarter of a budget is near its end
# Probability of the closing tag at the end of a line. On the embedded model, whose tag is never in doubt, 1e-5 to 0.3
# give the answers that the budget's end gives, and less costs some. Of 24B nothing is
# known.
LIKELY_ENOUGH = 0.01
CHARACTER = 3  # ids that a character may take after its first


class ThinkBudget:
    """A thinking budget, for one reply or several.

    It is near its end in its last quarter: there a trace is closed at the end of a line where the closing tag has a
    probability of 1 % or more, though the model drew something else. At its end a trace is closed wherever it is, a
    character that was begun being completed, after a last line of the user's if there is one. What the closing takes
    comes on top of the budget, and out of neither part of ``max_tokens``.
    """

    def __init__(self, tokenizer: Tokenizer, sampling: SamplingParams, max_tokens: int) -> None:
        """Raises OptionError where ``max_tokens`` has no room for a last line."""
        self._tokenizer = tokenizer
        closing = tokenizer.closing("a", sampling.think_budget_message)
        reserved = min(RESERVED, max_tokens // 4)
        self._latest = max_tokens - reserved - len(closing)
        self._limit: int | None = (
            min(sampling.think_budget, self._latest) if sampling.think_budget else None
        )
        if self._limit is not None and sampling.think_budget_message and self._latest < 1:
            raise OptionError(
                f"max_tokens is {max_tokens}, of which think_budget_message and the closing tag take {len(closing)} "
                f"and {reserved} are kept for the answer: none is left to think; allow more, or shorten the message"
            )
        self._tag_id = tokenizer.closing("\n")[0]

    def is_used_up(self, tokens: int, *, is_inside_character: bool) -> bool:
        """Whether a trace of so many tokens has to end."""
        if self._limit is None or tokens < self._limit:
            return False
        return not is_inside_character or tokens >= min(self._limit + CHARACTER, self._latest)

    def is_line_enough(self, tokens: int, text: str, logits: mx.array, drawn: mx.array) -> bool:
        """Whether a trace of so many tokens, which ends in ``text``, may end with its last line.

        A tag that the model is about to write itself is left to it.

        Args:
            logits, drawn: [1, V] and [1], of the next id; read only where the budget nears its end.
        """
        if self._limit is None or tokens < self._limit - self._limit // NEARING:
            return False
        if not text.endswith("\n") and not self._ends_line(drawn):
            return False
        if drawn.item() == self._tag_id:
            return False
        probability = mx.softmax(logits.astype(mx.float32), axis=-1)[0, self._tag_id]
        return bool((probability >= LIKELY_ENOUGH).item())

    def _ends_line(self, drawn: mx.array) -> bool:
        """Whether a newline comes next: a control id would stand before it, a tag that is spelled after it."""
        if self._tokenizer.close_id is None:
            return False
        identity = drawn.item()
        return (
            isinstance(identity, int)
            and identity >= 0
            and self._tokenizer.decode([identity]).startswith("\n")
        )
