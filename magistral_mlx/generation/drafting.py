"""What may come next, guessed without the model, and whether checking the guess in one pass is worth it.

A pass over M rows costs little more than one over a single row where the weights are read once for all of
them. So ids are guessed ahead, fed together, and kept while the model itself draws them. A wrong guess costs
time and never an id. Source: https://arxiv.org/abs/2211.17192 (speculative decoding).
"""

from collections.abc import Sequence
from typing import Protocol

from magistral_mlx.model.load_options import MAX_DRAFT_TOKENS

MAX_ROWS = 1 + MAX_DRAFT_TOKENS  # a token, and the guesses after it
LOSS = 0.01  # of all passes, what wrong guesses may cost at most
FADING = 0.05  # weight of the newest gain among those of late

# The ids that a context is made of, as distances back from the id to guess. Those with a gap see through a
# number or a name that differs from line to line; the empty one holds the last id.
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
STREAK = 2  # times a context has been right in a row, counted up to this
PRIOR_WEIGHT = 6  # guesses that the first estimate of how often a context is right counts as


class GuessSource(Protocol):
    """Where guesses come from."""

    cost: float  # of one guess, in passes of the model

    def push(self, identity: int) -> None:
        """The id that really follows."""

    def chances(self, limit: int) -> Sequence[float]:
        """How likely each of the next guesses is right, given that those before it are; at most ``limit``."""

    def guess(self, count: int) -> list[int]:
        """The next ids: ``count`` of those that ``chances`` promised, or fewer."""


class PromptLookup:
    """Guesses what followed the last time that the last ids were these, in the prompt or in the reply.

    Each of ``CONTEXTS`` remembers what followed, and how often it was right is counted over all of its
    occasions: of those that know the present context the most reliable one guesses.
    """

    cost = 0.0

    def __init__(self, prompt: Sequence[int]) -> None:
        self.ids: list[int] = []
        self._next: dict[
            int, tuple[int, int]
        ] = {}  # hash of a context -> the id that followed, times right in a row
        self._rates = {(c, s): _prior(c, s) for c in CONTEXTS for s in range(STREAK + 1)}
        self._guesses: list[int] = []
        for identity in prompt:
            self.push(identity)

    def push(self, identity: int) -> None:
        for context, key in _keys(self.ids):
            if (known := self._next.get(key)) is None:
                self._next[key] = identity, 0
                continue
            guess, streak = known
            is_right = guess == identity
            right, tried = self._rates[context, streak]
            self._rates[context, streak] = right + is_right, tried + 1
            self._next[key] = identity, min(STREAK, streak + 1) if is_right else 0
        self.ids.append(identity)

    def chances(self, limit: int) -> list[float]:
        recent, chances = self.ids[-REACH:], list[float]()
        self._guesses = []
        while len(chances) < limit:
            known = [
                (context, self._next[key]) for context, key in _keys(recent) if key in self._next
            ]
            if not known:
                break
            rated = [
                (self._rate(context, streak), identity) for context, (identity, streak) in known
            ]
            chance, identity = max(rated, key=lambda pair: pair[0])
            chances.append(chance)
            self._guesses.append(identity)
            recent.append(identity)
        return chances

    def guess(self, count: int) -> list[int]:
        return self._guesses[:count]

    def _rate(self, context: tuple[int, ...], streak: int) -> float:
        right, tried = self._rates[context, streak]
        return right / tried


def _keys(ids: Sequence[int]) -> list[tuple[tuple[int, ...], int]]:
    """The contexts that ids are long enough for, each with its hash."""
    return [
        (context, hash((context, *(ids[-distance] for distance in context))))
        for context in CONTEXTS
        if not context or len(ids) >= context[-1]
    ]


def _prior(context: tuple[int, ...], streak: int) -> tuple[float, float]:
    """(Times right, times tried) to begin with: the more ids agree and the oftener it was right, the likelier."""
    rate = min(0.95, 0.1 + 0.1 * len(context) + 0.2 * streak)
    return PRIOR_WEIGHT * rate, PRIOR_WEIGHT


class NoDrafter:
    """Guesses nothing: every pass but the first is queued ahead."""

    @property
    def wants_last_token(self) -> bool:
        """Whether to wait for the id that is being drawn, so that guesses can follow it in the next pass."""
        return False

    def push(self, identity: int) -> None:
        """The id that was drawn, or forced."""

    def note_plain_pass(self, room: int) -> None:
        """Account for a plain pass that was queued ahead, and see what guesses would have gained in its place."""

    def propose(self, room: int) -> list[int]:
        """Account for the next pass, and give the guesses to check in it, as many as ``room`` at most."""
        return []


NO_DRAFTER = NoDrafter()


class Drafter(NoDrafter):
    """Decides for every pass of one reply how many guesses to check in it, and keeps account of what that cost.

    It checks as many as make the expected number of ids largest in relation to the pass's cost, none where that
    is no better than without. However wrong the guesses are, all passes together cost at most 1 % more than
    plain decoding: a pass that could exceed that is not made.
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
        """
        Args:
            costs: of passes over 1, 2, ... rows that are waited for, in plain passes, which are queued ahead.
            kv_share: what attending to one position adds to a pass, as a share of reading the weights.
            limit: guesses in one pass at most.
        """
        self.source = source
        self.limit = min(limit, len(costs) - 1)
        self.spent = 0.0  # in plain passes
        self.tokens = 0  # ids since the prompt
        self._costs = costs
        self._prompt_tokens, self._kv_share = prompt_tokens, kv_share
        self._gain = 0.0  # passes saved by waiting, a pass, of late

    @property
    def wants_last_token(self) -> bool:
        return self._gain >= 0 and self.spent + self._cost(1) <= self._affordable

    def push(self, identity: int) -> None:
        self.source.push(identity)
        self.tokens += 1

    def note_plain_pass(self, room: int) -> None:
        self.spent += 1
        self._worth(room)

    def propose(self, room: int) -> list[int]:
        guesses = self.source.guess(self._worth(room))
        self.spent += self._cost(1 + len(guesses))
        return guesses

    def _worth(self, room: int) -> int:
        """How many guesses are worth their cost."""
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
        """What all passes may have cost after the next one, should it give a single id."""
        return (1 + LOSS) * (self.tokens + 1)

    def _cost(self, rows: int) -> float:
        """Of a pass that is waited for, in plain passes; each row attends for itself."""
        attending = self._kv_share * (self._prompt_tokens + self.tokens)
        return (self._costs[rows - 1] + rows * attending) / (1 + attending) + (
            rows - 1
        ) * self.source.cost


def is_worth_drafting(costs: Sequence[float], source_cost: float = 0.0) -> bool:
    """Whether guesses that are always right would save a tenth at least."""
    return any(rows > 1.1 * (cost + (rows - 1) * source_cost) for rows, cost in enumerate(costs, 1))
