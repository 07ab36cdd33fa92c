"""Ids in, ids out: read a prompt in chunks, then decode.

Letters: B batch, T new tokens, M rows of a pass whose logits are wanted, V vocabulary, D hidden.
"""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Literal

import mlx.core as mx

from magistral_mlx.errors import NumericsError
from magistral_mlx.generation.drafting import NO_DRAFTER, NoDrafter
from magistral_mlx.generation.sampling import INVALID, SPILLED, Sampler
from magistral_mlx.model.kv_cache import KVCache
from magistral_mlx.model.transformer import Transformer
from magistral_mlx.streams import streamed

Ending = Literal["stop", "length"]

# From the next id's logits [1, V] and its draw [1] to the ids that are forced instead.
Steer = Callable[[mx.array, mx.array], Sequence[int]]


def _keep_draw(logits: mx.array, draw: mx.array) -> Sequence[int]:
    return ()


@dataclass(frozen=True, slots=True)
class Token:
    """An id of a reply and the logits [1, V] that it was drawn from, or forced in spite of."""

    id: int
    logits: mx.array
    is_forced: bool = False


class Stepper:
    """A model and its cache: ids go in, logits come out. Counts its passes."""

    def __init__(self, model: Transformer, cache: KVCache) -> None:
        self.model = model
        self.cache = cache
        self.passes = 0

    def extend(self, ids: mx.array, wanted: int = 1) -> mx.array:
        """Append ids [1, T] to the cache.

        Returns:
            The residual stream [1, M, D] after the last ``wanted`` ids, not evaluated yet.
        """
        self.passes += 1
        return self.model.hidden(ids, self.cache.layers, wanted=wanted)

    def __call__(self, ids: mx.array, wanted: int = 1) -> mx.array:
        """Append ids [1, T]; return the logits [M, V] after the last ``wanted`` of them."""
        return self.model.logits(self.extend(ids, wanted))[0]


@streamed
def prefill(step: Stepper, ids: Sequence[int], *, chunk: int) -> Generator[int, None, mx.array]:
    """Append a prompt in chunks, as a stream of the ids done, whose result is the logits [1, V].

    The last chunk yields nothing. It includes the last prompt id, so a prompt that fits one chunk
    costs one pass over the weights. Earlier chunks evaluate the cache only: their last layer's
    output is never computed.
    """
    prompt = mx.array(list(ids))[None]  # [1, T]
    last = (len(ids) - 1) // chunk * chunk
    for start in range(0, last, chunk):
        step.extend(prompt[:, start : start + chunk])
        mx.eval(step.cache.arrays)
        # Otherwise the workspaces of two chunks would be in memory at once.
        mx.clear_cache()
        yield start + chunk
    return step(prompt[:, last:])


def decode(
    step: Stepper,
    logits: mx.array,
    sampler: Sampler,
    *,
    stop: frozenset[int],
    max_tokens: int,
    steer: Steer = _keep_draw,
    drafter: NoDrafter = NO_DRAFTER,
) -> Generator[Token, None, Ending]:
    """Yield the tokens of a reply and return how it ended.

    After the end, or when closed, the cache may hold positions beyond what was yielded, or one
    less: the caller trims it.

    Args:
        step: the model and the cache of the prompt.
        logits: [1, V], after the prompt.
        sampler: draws the ids.
        stop: ids that end the reply; consumed, not yielded.
        max_tokens: the most ids to yield.
        steer: gives the ids to force instead of the next id, asked after each id that was drawn.
        drafter: guesses ids; without one, each pass has one id.

    Raises:
        NumericsError: the logits hold NaN.
    """
    decoder = _Decoder(step, sampler, drafter, max_tokens)
    current = _Pass(logits, sampler.draw(logits, 0))
    while decoder.count < max_tokens:
        # One array is fed and read: to evaluate another would wait for the pass that is queued.
        draw = current.draw
        following = decoder.queue_plain_pass(draw, current)
        token_id = _read(draw)
        if token_id == SPILLED:
            decoder.draw_exactly(current, following)
            continue
        if token_id in stop:
            return "stop"
        is_guessed = decoder.accept(token_id, current)
        if following is not None:
            drafter.note_plain_pass(decoder.room)
        elif not is_guessed and decoder.count > 1 and decoder.room >= 0:
            following = decoder.queue_guesses(token_id)
        yield Token(token_id, current.logits)
        if decoder.count == max_tokens:
            break
        if is_guessed:
            current.row += 1
        else:
            current = following or decoder.queue_guesses(token_id)
        if forced := steer(current.logits, current.draw)[: max_tokens - decoder.count]:
            current = decoder.force(forced, current)
            for token_id in forced:
                yield Token(token_id, current.logits, is_forced=True)
    return "length"


class _Pass:
    """A pass whose last ids are guesses, and the row of it that the next id is drawn from."""

    def __init__(self, logits: mx.array, draws: mx.array, guesses: Sequence[int] = ()) -> None:
        """Take the logits [M, V] of a pass with M - 1 guesses, and the draws [M] from them."""
        self._logits, self.draws, self.guesses = logits, draws, guesses
        self.row = 0

    @property
    def logits(self) -> mx.array:
        """Logits [1, V] of the next id."""
        return self._logits[self.row : self.row + 1]

    @property
    def draw(self) -> mx.array:
        """The next id [1], as the sampler drew it."""
        return self.draws[self.row : self.row + 1]

    @property
    def unchecked(self) -> int:
        """Guesses that were fed after the next id's place and are not known to be right."""
        return len(self.guesses) - self.row


class _Decoder:
    """The steps of decoding one reply: plain passes, passes with guesses, and forced ids.

    A plain pass over the next id is queued before that id is read, so that the device never waits
    for Python. The first id is handed out before: on a CPU, queueing a pass takes as long as most
    of the pass, and nobody should wait two passes for the first id. Where the drafter would rather
    guess, the id is read first, and the guesses are fed behind it. Every row of such a pass is
    drawn from as it would be alone, and kept while the guess before it was drawn itself: the ids
    are those of plain decoding.
    """

    def __init__(
        self, step: Stepper, sampler: Sampler, drafter: NoDrafter, max_tokens: int
    ) -> None:
        self.step, self.sampler, self.drafter = step, sampler, drafter
        self.max_tokens = max_tokens
        self.count = 0

    @property
    def room(self) -> int:
        """Ids that may follow the next one."""
        return self.max_tokens - self.count - 1

    def queue_plain_pass(self, draw: mx.array, current: _Pass) -> _Pass | None:
        """Queue the pass over the next id, unread; return None where it has to be read first."""
        if current.unchecked or not 0 < self.count < self.max_tokens - 1:
            return None
        if self.drafter.wants_last_token:
            return None
        return self._queue(draw[None], self.count + 1)

    def queue_guesses(self, token_id: int) -> _Pass:
        """Queue the pass over an id and the drafter's guesses behind it."""
        guesses = self.drafter.propose(self.room)
        return self._queue(mx.array([[token_id, *guesses]]), self.count, guesses)

    def draw_exactly(self, current: _Pass, following: _Pass | None) -> None:
        """Draw the next id from all ids, and take back the pass that was queued over it.

        This is rare: the nucleus is wider than the sampler's candidates.
        """
        self.step.cache.trim(int(following is not None))
        exact = self.sampler.draw_exact(current.logits, self.count)
        row, draws = current.row, current.draws
        current.draws = mx.concatenate([draws[:row], exact, draws[row + 1 :]])

    def accept(self, token_id: int, current: _Pass) -> bool:
        """Count an id; return True if the pass had guessed it, else drop the guesses left."""
        self.count += 1
        is_guessed = current.unchecked > 0 and current.guesses[current.row] == token_id
        if not is_guessed:
            self.step.cache.trim(current.unchecked)
        self.drafter.push(token_id)
        return is_guessed

    def force(self, ids: Sequence[int], current: _Pass) -> _Pass:
        """Queue one pass over ids that replace the next id."""
        self.step.cache.trim(current.unchecked)
        self.count += len(ids)
        for token_id in ids:
            self.drafter.push(token_id)
        return self._queue(mx.array([list(ids)]), self.count)

    def _queue(self, ids: mx.array, number: int, guesses: Sequence[int] = ()) -> _Pass:
        """Feed ids [1, T] that end in guesses; ``number`` is that of the first id drawn."""
        logits = self.step(ids, 1 + len(guesses))
        draws = self.sampler.draw_run(logits, number)
        mx.async_eval(draws)
        return _Pass(logits, draws, guesses)


def _read(draw: mx.array) -> int:
    """Wait for an id [1] and return it.

    Raises:
        NumericsError: its logits were not numbers.
    """
    value = draw.item()
    assert isinstance(value, int)
    if value == INVALID:
        raise NumericsError(
            "the model's logits are not numbers: its weights are damaged; "
            "verify or convert it again"
        )
    return value
