"""Ids in, ids out: prefill the prompt in chunks, then decode with the next pass already queued or guesses checked."""

from collections.abc import Callable, Generator, Sequence

import mlx.core as mx

from magistral_mlx.errors import NumericsError
from magistral_mlx.generation.drafting import NO_DRAFTER, NoDrafter
from magistral_mlx.generation.sampling import INVALID, SPILLED, Sampler
from magistral_mlx.model.kv_cache import KVCache
from magistral_mlx.model.transformer import Transformer

# Of the next id its logits [1, V] and its draw [1]; the ids to force instead.
Steer = Callable[[mx.array, mx.array], Sequence[int]]


def _draw_on(logits: mx.array, drawn: mx.array) -> Sequence[int]:
    return ()


class Stepper:
    """A model and its cache: ids go in, the logits after the last of them come out. Counts its passes."""

    def __init__(self, model: Transformer, cache: KVCache) -> None:
        self.model = model
        self.cache = cache
        self.passes = 0

    def extend(self, ids: mx.array, wanted: int = 1) -> mx.array:
        """Append ids [1, T] to the cache; the residual stream [1, M, D] after the last M, not yet evaluated."""
        self.passes += 1
        return self.model.hidden(ids, self.cache.layers, wanted=wanted)

    def __call__(self, ids: mx.array, wanted: int = 1) -> mx.array:
        """Append ids [1, T]; logits [M, V] after the last M, ``wanted``, the only ones they are computed for."""
        return self.model.logits(self.extend(ids, wanted))[0]


def prefill(step: Stepper, ids: Sequence[int], *, chunk: int) -> Generator[int, None, mx.array]:
    """Append a prompt in chunks; yields the ids done after each chunk but the last, returns logits [1, V].

    The last prompt id is part of the last chunk, so a prompt that fits one chunk costs one pass over
    the weights. Earlier chunks evaluate the cache only: their last layer's output is never computed.
    """
    prompt = mx.array(list(ids))[None]  # [1, T]
    last = (len(ids) - 1) // chunk * chunk
    for start in range(0, last, chunk):
        step.extend(prompt[:, start : start + chunk])
        mx.eval(step.cache.arrays)
        mx.clear_cache()  # the chunk's workspace would otherwise stay beside the next one's
        yield start + chunk
    return step(prompt[:, last:])


def decode(
    step: Stepper,
    logits: mx.array,
    sampler: Sampler,
    *,
    stop: frozenset[int],
    max_tokens: int,
    steer: Steer = _draw_on,
    drafter: NoDrafter = NO_DRAFTER,
) -> Generator[tuple[int, mx.array], None, str]:
    """Yield (id, logits [1, V] it was drawn from); returns the finish reason, "stop" or "length".

    The pass for the next id is queued before this one is read, so that the device never waits for
    Python; only the first id is handed out before: where queueing a pass takes as long as most of it, as
    on a CPU, nobody should wait two passes for it. Where a drafter would rather guess, this id is read first and
    the guesses are fed behind it, M rows in all; every row is drawn from as it would be alone, and is kept
    while the guess it follows was drawn itself. So the ids are those of plain decoding. On return, or when
    closed, the cache may hold positions beyond what was yielded, or one less: the caller trims.

    Args:
        logits: [1, V], after the prompt.
        stop: ids that end the reply; consumed, not yielded.
        steer: asked after each id for ids to force instead of the next; they are yielded too, and fed in one pass.
        drafter: guesses ids; a silent one leaves one id to each pass.
    Raises:
        NumericsError: the logits hold NaN.
    """

    def queue(
        ids: mx.array, first: int, guesses: Sequence[int] = ()
    ) -> tuple[mx.array, mx.array, Sequence[int]]:
        """Feed ids [1, T] that end in guesses; logits [M, V] and draws [M], the first of them number ``first``."""
        logits = step(ids, 1 + len(guesses))
        tokens = sampler.draw_run(logits, first)
        mx.async_eval(tokens)
        return logits, tokens, guesses

    def follow(identity: int) -> tuple[mx.array, mx.array, Sequence[int]]:
        guesses = drafter.propose(max_tokens - count - 1)
        return queue(mx.array([[identity, *guesses]]), count, guesses)

    tokens = sampler.draw(logits, 0)  # [M]
    guesses: Sequence[int] = ()  # what was fed before each of them but the first
    count = row = 0
    while count < max_tokens:
        token, ahead = tokens[row : row + 1], None
        if row == len(guesses) and 0 < count < max_tokens - 1 and not drafter.wants_last_token:
            ahead = queue(token[None], count + 1)
        current = _read(token)
        if current == SPILLED:  # rare: the nucleus is wider than the sampler's candidates
            step.cache.trim(int(ahead is not None))
            tokens = mx.concatenate(
                [tokens[:row], sampler.draw_exact(logits[row : row + 1], count), tokens[row + 1 :]]
            )
            continue
        if current in stop:
            return "stop"
        count += 1
        is_accepted = row < len(guesses) and guesses[row] == current
        if not is_accepted:
            step.cache.trim(len(guesses) - row)
        drafter.push(current)
        if ahead is not None:
            drafter.note_plain_pass(max_tokens - count - 1)
        elif not is_accepted and 1 < count < max_tokens:
            ahead = follow(current)
        yield current, logits[row : row + 1]
        if count == max_tokens:
            break
        if is_accepted:
            row += 1
        else:
            (logits, tokens, guesses), row = ahead or follow(current), 0
        if forced := steer(logits[row : row + 1], tokens[row : row + 1])[: max_tokens - count]:
            step.cache.trim(len(guesses) - row)
            count += len(forced)
            (logits, tokens, guesses), row = queue(mx.array(list(forced))[None], count), 0
            for identity in forced:
                drafter.push(identity)
                yield identity, logits
    return "length"


def _read(token: mx.array) -> int:
    """Wait for an id [1]. Raises NumericsError where its logits were not numbers."""
    value = token.item()
    assert isinstance(value, int)
    if value == INVALID:
        raise NumericsError(
            "the model's logits are not numbers: its weights are damaged; verify or convert it again"
        )
    return value
