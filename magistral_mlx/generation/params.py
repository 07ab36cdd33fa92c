"""SamplingParams: the options of choosing a reply's ids, and of ending it."""

import sys
from dataclasses import dataclass, field
from typing import Literal, get_args

from magistral_mlx.options import check_count, documented, explained, is_number, option, refused

OnLoop = Literal["close", "stop", "ignore"]
MAX_LOGPROBS = 20  # the limit of OpenAI's interface
MAX_MESSAGE = 200  # characters


@documented
@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """The options of sampling a reply. The defaults are the model card's.

    Raises:
        OptionError: a value is out of range.
    """

    temperature: float = option(0.7, "Randomness of the reply; 0 is greedy.", aliases=("--temp",))
    top_p: float = option(0.95, "Probability mass kept, in (0, 1]; applied after the temperature.")
    max_tokens: int | None = option(
        None,
        "Tokens of the reply at most; by default 40,960, or what the context leaves.",
        metavar="N",
        aliases=("-m",),
    )
    seed: int | None = option(
        None, "The same seed gives the same reply on the same machine.", metavar="N"
    )
    stop: tuple[str, ...] = option((), "Text that ends the answer; may be repeated.", metavar="S")
    think_budget: int | None = option(
        None, "Reasoning tokens at most; then the trace is closed. 0: no reasoning.", metavar="N"
    )
    think_budget_message: str = option(
        "",
        "The last line of a trace that is cut off at its budget, such as "
        "'Time is up, so I answer now.'",
        metavar="TEXT",
    )
    on_loop: OnLoop = option(
        "close",
        "When the model repeats itself: close its trace so that it answers, stop the reply, "
        "or ignore it. In an answer close stops as well.",
    )
    logprobs: int = field(
        default=0,
        metadata=explained(
            "Report so many of the most probable ids for every token, at most 20, in "
            "``Text.logprobs`` and ``Reply.logprobs``."
        ),
    )

    @property
    def thinks(self) -> bool:
        """True unless ``think_budget`` is 0, which asks for a reply without a trace."""
        return self.think_budget != 0

    def __post_init__(self) -> None:
        # A whole number may be too large for a float.
        if not is_number(self.temperature) or not 0 <= self.temperature <= sys.float_info.max:
            raise refused("temperature", self.temperature, "0 (greedy) or a number over 0")
        if not is_number(self.top_p) or not 0 < self.top_p <= 1:
            raise refused("top_p", self.top_p, "a number in (0, 1], 1 to turn the filter off")
        check_count("max_tokens", self.max_tokens, 1)
        check_count("seed", self.seed, 0)
        check_count("think_budget", self.think_budget, 0)
        if type(self.logprobs) is not int or not 0 <= self.logprobs <= MAX_LOGPROBS:
            raise refused("logprobs", self.logprobs, f"a whole number from 0 to {MAX_LOGPROBS}")
        if self.on_loop not in get_args(OnLoop):
            raise refused("on_loop", self.on_loop, f"one of {', '.join(get_args(OnLoop))}")
        if not _is_line(self.think_budget_message):
            raise refused(
                "think_budget_message",
                self.think_budget_message,
                f"one line of at most {MAX_MESSAGE} characters, without tags",
            )
        if not isinstance(self.stop, tuple) or not all(
            isinstance(text, str) and text for text in self.stop
        ):
            raise refused("stop", self.stop, "texts in a tuple, none of them empty")


def _is_line(text: object) -> bool:
    return (
        isinstance(text, str)
        and len(text) <= MAX_MESSAGE
        and text.isprintable()
        and "think>" not in text
    )
