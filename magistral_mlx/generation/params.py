"""SamplingParams: the options of choosing a reply's ids, and of ending it."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

from magistral_mlx.errors import OptionError, quoted
from magistral_mlx.options import option

OnLoop = Literal["close", "stop", "ignore"]
MAX_LOGPROBS = 20  # the limit of OpenAI's interface
MAX_MESSAGE = 200  # characters


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """The options of sampling a reply. The defaults are the model card's.

    Attributes:
        logprobs: report so many of the most probable ids for every token.

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
    logprobs: int = 0

    @property
    def thinks(self) -> bool:
        """True unless ``think_budget`` is 0, which asks for a reply without a trace."""
        return self.think_budget != 0

    def __post_init__(self) -> None:
        if not _is_number(self.temperature) or not 0 <= self.temperature < math.inf:
            raise OptionError(
                f"temperature is {self.temperature!r}; use 0 (greedy) or a number over 0"
            )
        if not _is_number(self.top_p) or not 0 < self.top_p <= 1:
            raise OptionError(
                f"top_p is {self.top_p!r}; use a number in (0, 1], 1 to turn the filter off"
            )
        _check_count("max_tokens", self.max_tokens, 1)
        _check_count("seed", self.seed, 0)
        _check_count("think_budget", self.think_budget, 0)
        if type(self.logprobs) is not int or not 0 <= self.logprobs <= MAX_LOGPROBS:
            raise OptionError(
                f"logprobs is {self.logprobs!r}; use a whole number from 0 to {MAX_LOGPROBS}"
            )
        if self.on_loop not in get_args(OnLoop):
            raise OptionError(
                f"on_loop is {self.on_loop!r}; use one of {', '.join(get_args(OnLoop))}"
            )
        if not _is_line(self.think_budget_message):
            raise OptionError(
                f"think_budget_message is {quoted(self.think_budget_message)}; use one line of "
                f"at most {MAX_MESSAGE} characters, without tags"
            )
        if not isinstance(self.stop, tuple) or not all(
            isinstance(text, str) and text for text in self.stop
        ):
            raise OptionError(f"stop is {self.stop!r}; use a tuple of texts, none of them empty")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_line(text: object) -> bool:
    return (
        isinstance(text, str)
        and len(text) <= MAX_MESSAGE
        and text.isprintable()
        and "think>" not in text
    )


def _check_count(name: str, value: int | None, least: int) -> None:
    if value is not None and (type(value) is not int or value < least):
        raise OptionError(
            f"{name} is {value!r}; use a whole number of at least {least}, or leave it out"
        )
