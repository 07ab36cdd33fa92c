"""The thinking budget: where a trace has to end, and where it may end a little early."""

import mlx.core as mx

from magistral_mlx.errors import OptionError, named
from magistral_mlx.generation.params import SamplingParams
from magistral_mlx.tokenizer.tekken import Tokenizer

# Tokens that a trace with a budget leaves to the answer; of a short reply, a quarter.
RESERVED = 512
# A budget is near its end in its last quarter.
NEARING = 4
# Least probability of the closing tag at the end of a line. On the embedded model, whose tag is
# never in doubt, 1e-5 to 0.3 give the answers that the budget's end gives, and less costs some.
# For the 24B model nothing is known.
LIKELY_ENOUGH = 0.01
# Ids that a character may take after its first id.
CHARACTER = 3


class ThinkBudget:
    """The limit of a reasoning trace, for one reply or several.

    In the last quarter of the budget, a trace is closed at the end of a line where the closing tag
    has a probability of 1 % or more, even if the model drew another id. At the end of the budget it
    is closed at once, after the character under way, with the user's last line if there is one. The
    closing ids come on top of the budget, and out of neither part of ``max_tokens``.
    """

    def __init__(self, tokenizer: Tokenizer, sampling: SamplingParams, max_tokens: int) -> None:
        """Set the limit.

        Raises:
            OptionError: ``max_tokens`` has no room for a last line.
        """
        self._tokenizer = tokenizer
        closing = tokenizer.closing("a", sampling.think_budget_message)
        reserved = min(RESERVED, max_tokens // 4)
        self._latest = max_tokens - reserved - len(closing)
        self._limit: int | None = None
        if sampling.thinks and sampling.think_budget is not None:
            self._limit = min(sampling.think_budget, self._latest)
            if sampling.think_budget_message and self._latest < 1:
                raise OptionError(
                    f"{named('max_tokens')} is {max_tokens}, of which "
                    f"{named('think_budget_message')} and the closing tag take "
                    f"{len(closing)} and {reserved} are kept for the answer: none is "
                    "left to think; allow more, or shorten the message"
                )
        self._tag_id = tokenizer.closing("\n")[0]

    def is_used_up(self, tokens: int, *, is_inside_character: bool) -> bool:
        """Return True if a trace of so many tokens has to end."""
        if self._limit is None or tokens < self._limit:
            return False
        return not is_inside_character or tokens >= min(self._limit + CHARACTER, self._latest)

    def is_line_enough(self, tokens: int, text: str, logits: mx.array, draw: mx.array) -> bool:
        """Return True if a trace may end here, at the end of a line.

        A closing tag that the model is about to write itself is left to the model.

        Args:
            tokens: tokens of the trace so far.
            text: the end of the trace.
            logits: [1, V], of the next id; read only where the budget nears its end.
            draw: [1], the next id.
        """
        if self._limit is None or tokens < self._limit - self._limit // NEARING:
            return False
        if not text.endswith("\n") and not self._starts_line(draw):
            return False
        if draw.item() == self._tag_id:
            return False
        probability = mx.softmax(logits.astype(mx.float32), axis=-1)[0, self._tag_id]
        return bool((probability >= LIKELY_ENOUGH).item())

    def _starts_line(self, draw: mx.array) -> bool:
        """Return True if the next id is a newline.

        A closing tag that is a control id stands before that newline, a spelled one after it.
        """
        if self._tokenizer.close_id is None:
            return False
        token_id = draw.item()
        return (
            isinstance(token_id, int)
            and token_id >= 0
            and self._tokenizer.decode([token_id]).startswith("\n")
        )
