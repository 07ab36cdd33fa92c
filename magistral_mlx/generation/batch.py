"""Several sequences that go on from one prompt, with one pass for the next id of all."""

from collections.abc import Generator, Sequence
from typing import Protocol

import mlx.core as mx
import numpy as np

from magistral_mlx.errors import NumericsError
from magistral_mlx.generation.decoding import Ending, Token
from magistral_mlx.generation.params import SamplingParams
from magistral_mlx.generation.sampling import INVALID, SPILLED, Sampler
from magistral_mlx.model.shared_cache import SharedCache
from magistral_mlx.model.transformer import Transformer


class Row(Protocol):
    """One of the sequences."""

    seed: int

    def take(self, token: Token) -> bool:
        """Take the next id; return False to end the sequence."""
        ...

    def forced(self, logits: mx.array, draw: mx.array) -> Sequence[int]:
        """Return the ids to force instead of the next id, whose logits [1, V] and draw are given.

        Asked after each id that was drawn.
        """
        ...


class BatchStepper:
    """A model and the sequences' cache: an id of each goes in, logits come out. Counts passes."""

    def __init__(self, model: Transformer, cache: SharedCache) -> None:
        self.model = model
        self.cache = cache
        self.passes = 0

    def __call__(self, ids: mx.array) -> mx.array:
        """Append ids [n], one to each sequence; return the logits [n, V] after them."""
        self.passes += 1
        return self.model.logits(self.model.hidden(ids[:, None], self.cache.layers))[:, 0]


class _Active:
    """The rows that have not ended, and the ids that some of them are forced to take."""

    def __init__(
        self, rows: Sequence[Row], params: SamplingParams, *, stop: frozenset[int], max_tokens: int
    ) -> None:
        self.rows, self.stop, self.max_tokens = rows, stop, max_tokens
        self.indices = list(range(len(rows)))
        self.forced: list[list[int]] = [[] for _ in rows]
        self.sampler = Sampler(params, rows[0].seed)

    def draw(self, logits: mx.array, count: int) -> mx.array:
        """Draw id number ``count`` of every row: ids [n] from logits [n, V]."""
        tokens = self.sampler.draw_each(logits, count, [self.rows[i].seed for i in self.indices])
        mx.async_eval(tokens)
        return tokens

    def impose(self, tokens: mx.array) -> mx.array:
        """Return ids [n] in which the forced ids replace the draws."""
        forced = [self.forced[i] for i in self.indices]
        if not any(forced):
            return tokens
        first = mx.array([ids[0] if ids else 0 for ids in forced], dtype=tokens.dtype)
        return mx.where(mx.array([bool(ids) for ids in forced]), first, tokens)

    def redraw(self, ids: list[int], logits: mx.array, count: int) -> list[int]:
        """Return ids in which those that spilled are drawn exactly."""
        exact = list(ids)
        for place, i in enumerate(self.indices):
            if ids[place] == SPILLED:
                row = logits[place : place + 1]
                exact[place] = np.array(
                    self.sampler.draw_each(row, count, [self.rows[i].seed], exact=True)
                ).item()
        return exact

    def hand_out(
        self, ids: list[int], logits: mx.array, count: int
    ) -> tuple[list[int], list[tuple[int, Ending]]]:
        """Give each row its id, number ``count``.

        Returns:
            The places of the rows that go on, and (row, ending) of those that ended.
        """
        places: list[int] = []
        ended: list[tuple[int, Ending]] = []
        for place, (i, token_id) in enumerate(zip(self.indices, ids, strict=True)):
            is_forced = bool(self.forced[i])
            token = Token(token_id, logits[place : place + 1], is_forced)
            is_stop = token_id in self.stop and not is_forced
            if is_stop or not self.rows[i].take(token):
                ended.append((i, "stop"))
            elif count + 1 == self.max_tokens:
                ended.append((i, "length"))
            else:
                places.append(place)
        return places, ended

    def steer(self, logits: mx.array, tokens: mx.array) -> None:
        """Ask the rows for the ids to force instead of the draws [n] from logits [n, V]."""
        for place, i in enumerate(self.indices):
            forced = self.forced[i]
            row = slice(place, place + 1)
            self.forced[i] = (
                forced[1:] if forced else list(self.rows[i].forced(logits[row], tokens[row]))
            )


def decode_rows(
    step: BatchStepper,
    logits: mx.array,
    params: SamplingParams,
    rows: Sequence[Row],
    *,
    stop: frozenset[int],
    max_tokens: int,
) -> Generator[list[tuple[int, Ending]], None, None]:
    """Decode all rows until each has ended; yield the (row, ending) pairs of every id.

    Each row gets the ids that ``decode`` would give it alone: draws have the same numbers and
    seeds. All active rows have the same length, so one position holds for all: forced ids are fed
    one a pass, while the other rows draw. As in ``decode``, the next pass is queued before the ids
    are read; a row that ended is left out of the passes after it.

    Args:
        step: the model and the rows' cache.
        logits: [1, V], after the prompt.
        params: how ids are drawn.
        rows: take the ids.
        stop: ids that end a row; consumed, not handed out.
        max_tokens: the most ids each row may take.

    Raises:
        NumericsError: the logits hold NaN.
    """
    active = _Active(rows, params, stop=stop, max_tokens=max_tokens)
    logits = mx.repeat(logits, len(rows), axis=0)  # [n, V]
    tokens = active.draw(logits, 0)  # [n]

    def feed(tokens: mx.array, count: int) -> tuple[mx.array, mx.array]:
        logits = step(tokens)
        return logits, active.draw(logits, count)

    for count in range(max_tokens):
        tokens = active.impose(tokens)
        ahead = feed(tokens, count + 1) if 0 < count < max_tokens - 1 else None
        ids = np.array(tokens).tolist()
        # Rare: a nucleus has more ids than the sampler's candidates.
        if SPILLED in ids:
            if ahead is not None:
                step.cache.trim()
            ids, ahead = active.redraw(ids, logits, count), None
            tokens = mx.array(ids)
        if INVALID in ids:
            raise NumericsError(
                "the model's logits are not numbers: its weights are damaged; "
                "verify or convert it again"
            )
        places, ended = active.hand_out(ids, logits, count)
        yield ended
        if not places:
            return
        if len(places) < len(ids):
            step.cache.keep(places)
            active.indices = [active.indices[place] for place in places]
            tokens = tokens[mx.array(places)]
            ahead = ahead and (ahead[0][mx.array(places)], ahead[1][mx.array(places)])
        logits, tokens = ahead or feed(tokens, count + 1)
        active.steer(logits, tokens)
