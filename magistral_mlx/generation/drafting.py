"""Drafting: guesses of the next ids, and how many of them are worth checking in one pass.

A pass over M rows costs little more than a pass over one row where the weights are read once for
all of them. So ids are guessed ahead, fed together, and kept while the model itself draws them. A
wrong guess costs time and never an id.

Source: https://arxiv.org/abs/2211.17192 (speculative decoding).
"""

from collections.abc import Sequence
from typing import Protocol

# Most rows of a pass: MLX's kernels for a few rows end there.
MAX_ROWS = 8
# Share of all passes that wrong guesses may cost at most.
LOSS = 0.01
# Weight of the newest gain in the running mean of gains.
FADING = 0.05

# The ids that make a context, as distances back from the id to guess. A context with a gap matches
# lines that differ in a number or a name; the empty context holds the last id.
CONTEXTS: tuple[tuple[int, ...], ...] = (
    (),
    (1,),
    (1, 2),
    (1, 2, 3),
    (1, 2, 3, 4, 5),
    (2,),
    (2, 3),
    (1, 3),
)
REACH = max(max(context, default=0) for context in CONTEXTS)
# A context's right guesses in a row are counted up to this.
STREAK = 2
# The guesses that the first estimate of a context's success counts as.
PRIOR_WEIGHT = 6


class GuessSource(Protocol):
    """A source of guesses. ``cost`` is that of one guess, in passes of the model."""

    cost: float

    def push(self, token_id: int) -> None:
        """Take the id that really follows."""

    def chances(self, limit: int) -> Sequence[float]:
        """Return how likely each of the next guesses is right, at most ``limit`` of them.

        Each chance holds if the guesses before it are right.
        """

    def guess(self, count: int) -> list[int]:
        """Return the first ``count`` of the ids that ``chances`` rated, or fewer."""


class PromptLookup:
    """Guesses the id that followed these ids last time, in the prompt or in the reply.

    Each of ``CONTEXTS`` remembers the ids that followed. Its success is counted over all its
    occasions, and the most reliable context that knows the last ids guesses.
    """

    cost = 0.0

    def __init__(self, prompt: Sequence[int]) -> None:
        self.ids: list[int] = []
        # From the hash of a context to the id that followed, and its right guesses in a row.
        self._next: dict[int, tuple[int, int]] = {}
        self._rates = {(c, s): _prior(c, s) for c in CONTEXTS for s in range(STREAK + 1)}
        self._guesses: list[int] = []
        for token_id in prompt:
            self.push(token_id)

    def push(self, token_id: int) -> None:
        """Remember what an id follows, and rate the contexts that guessed it or another."""
        for context, key in _keys(self.ids):
            if (known := self._next.get(key)) is None:
                self._next[key] = token_id, 0
                continue
            guess, streak = known
            is_right = guess == token_id
            right, tried = self._rates[context, streak]
            self._rates[context, streak] = right + is_right, tried + 1
            self._next[key] = token_id, min(STREAK, streak + 1) if is_right else 0
        self.ids.append(token_id)

    def chances(self, limit: int) -> list[float]:
        """Return the rate of the context that makes each of the next guesses."""
        recent, chances = self.ids[-REACH:], list[float]()
        self._guesses = []
        while len(chances) < limit:
            known = [
                (context, self._next[key]) for context, key in _keys(recent) if key in self._next
            ]
            if not known:
                break
            rated = [
                (self._rate(context, streak), token_id) for context, (token_id, streak) in known
            ]
            chance, token_id = max(rated, key=lambda pair: pair[0])
            chances.append(chance)
            self._guesses.append(token_id)
            recent.append(token_id)
        return chances

    def guess(self, count: int) -> list[int]:
        """Return the first ``count`` of the guesses that ``chances`` made."""
        return self._guesses[:count]

    def _rate(self, context: tuple[int, ...], streak: int) -> float:
        right, tried = self._rates[context, streak]
        return right / tried


def _keys(ids: Sequence[int]) -> list[tuple[tuple[int, ...], int]]:
    """Return the contexts that ids are long enough for, each with its hash."""
    return [
        (context, hash((context, *(ids[-distance] for distance in context))))
        for context in CONTEXTS
        if not context or len(ids) >= context[-1]
    ]


def _prior(context: tuple[int, ...], streak: int) -> tuple[float, float]:
    """Return (right, tried) to begin with: more ids in a context, or a streak, make it likelier."""
    rate = min(0.95, 0.1 + 0.1 * len(context) + 0.2 * streak)
    return PRIOR_WEIGHT * rate, PRIOR_WEIGHT


class NoDrafter:
    """A drafter that guesses nothing: every pass but the first is queued ahead."""

    @property
    def wants_last_token(self) -> bool:
        """True to wait for the id that is being drawn, so that guesses can follow it."""
        return False

    def push(self, token_id: int) -> None:
        """Take an id that was drawn or forced."""

    def note_plain_pass(self, room: int) -> None:
        """Account for a plain pass, and for the gain that guesses would have had in its place."""

    def propose(self, room: int) -> list[int]:
        """Account for the next pass and return at most ``room`` guesses to check in it."""
        return []


NO_DRAFTER = NoDrafter()


class Drafter(NoDrafter):
    """Chooses how many guesses each pass of one reply checks, and accounts for their cost.

    It checks the number of guesses with the most expected ids for the pass's cost, and none where
    that is no better than a plain pass. However wrong the guesses are, all passes together cost at
    most 1 % more than plain decoding: a pass that could exceed that is not made.
    """

    def __init__(
        self,
        source: GuessSource,
        costs: Sequence[float],
        *,
        prompt_tokens: int = 0,
        kv_share: float = 0.0,
        limit: int = MAX_ROWS - 1,
    ) -> None:
        """Start the account of one reply.

        Args:
            source: makes the guesses.
            costs: of passes over 1, 2, ... rows that are waited for, in plain passes, which are
                queued ahead.
            prompt_tokens: positions that every pass attends to from the start.
            kv_share: cost of attending to one position, as a share of reading the weights.
            limit: the most guesses in one pass.
        """
        self.source = source
        self.limit = min(limit, len(costs) - 1)
        self.spent = 0.0  # plain passes
        self.tokens = 0  # ids after the prompt
        self._costs = costs
        self._prompt_tokens, self._kv_share = prompt_tokens, kv_share
        self._gain = 0.0  # running mean of the passes that waiting saves

    @property
    def wants_last_token(self) -> bool:
        """True while guesses have been worth their cost."""
        return self._gain >= 0 and self.spent + self._cost(1) <= self._affordable

    def push(self, token_id: int) -> None:
        """Take an id that was drawn or forced."""
        self.source.push(token_id)
        self.tokens += 1

    def note_plain_pass(self, room: int) -> None:
        """Account for a plain pass, and for the gain that guesses would have had in its place."""
        self.spent += 1
        self._choose_count(room)

    def propose(self, room: int) -> list[int]:
        """Account for the next pass and return at most ``room`` guesses to check in it."""
        guesses = self.source.guess(self._choose_count(room))
        self.spent += self._cost(1 + len(guesses))
        return guesses

    def _choose_count(self, room: int) -> int:
        """Return the number of guesses with the most expected ids for their cost."""
        best, count, gain = 1 / self._cost(1), 0, 1 - self._cost(1)
        expected = chance = 1.0
        for guesses, likely in enumerate(self.source.chances(min(room, self.limit)), 1):
            chance *= likely
            expected += chance
            cost = self._cost(1 + guesses)
            if expected / cost > best and self.spent + cost <= self._affordable:
                best, count, gain = expected / cost, guesses, expected - cost
        self._gain += (gain - self._gain) * FADING
        return count

    @property
    def _affordable(self) -> float:
        """The cost that all passes may have reached after the next one, if that gives one id."""
        return (1 + LOSS) * (self.tokens + 1)

    def _cost(self, rows: int) -> float:
        """Return the cost of a pass that is waited for, in plain passes. Each row attends alone."""
        attending = self._kv_share * (self._prompt_tokens + self.tokens)
        guessing = (rows - 1) * self.source.cost
        return (self._costs[rows - 1] + rows * attending) / (1 + attending) + guessing


def is_worth_drafting(costs: Sequence[float], source_cost: float = 0.0) -> bool:
    """Return True if guesses that are always right would save a tenth or more."""
    return any(rows > 1.1 * (cost + (rows - 1) * source_cost) for rows, cost in enumerate(costs, 1))
