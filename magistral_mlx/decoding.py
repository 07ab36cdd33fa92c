"""Ids in, ids out: prefill the prompt in chunks, then decode with the next pass already queued."""

from collections.abc import Callable, Generator, Sequence

import mlx.core as mx

from magistral_mlx.cache import KVCache
from magistral_mlx.errors import NumericsError
from magistral_mlx.model import Transformer
from magistral_mlx.sampling import INVALID, SPILLED, Sampler


class Stepper:
    """A model and its cache: ids go in, the logits after the last of them come out. Counts its passes."""

    def __init__(self, model: Transformer, cache: KVCache) -> None:
        self.model = model
        self.cache = cache
        self.passes = 0

    def extend(self, ids: mx.array) -> mx.array:
        """Append ids [1, T] to the cache; the residual stream [1, 1, D] after the last, not yet evaluated."""
        self.passes += 1
        return self.model.hidden(ids, self.cache.layers, wanted=1)

    def __call__(self, ids: mx.array) -> mx.array:
        """Append ids [1, T]; logits [1, V] after the last one, the only position they are computed for."""
        return self.model.logits(self.extend(ids))[:, 0]


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
    steer: Callable[[], Sequence[int]] = tuple,
) -> Generator[tuple[int, mx.array], None, str]:
    """Yield (id, logits [1, V] it was drawn from); returns the finish reason, "stop" or "length".

    The pass for the next id is queued before this one is read, so that the device never waits for
    Python; only the first id is handed out before: where queueing a pass takes as long as most of it, as
    on a CPU, nobody should wait two passes for it. On return, or when closed, the cache may therefore hold
    one position more than was yielded, or one less: the caller trims.

    Args:
        logits: [1, V], after the prompt.
        stop: ids that end the reply; consumed, not yielded.
        steer: asked after each id for ids to force next; they are yielded too, and fed in one pass.
    Raises:
        NumericsError: the logits hold NaN.
    """

    def queue(ids: mx.array, drawn: int) -> tuple[mx.array, mx.array]:
        logits = step(ids)
        token = sampler.draw(logits, drawn)
        mx.async_eval(token)
        return logits, token

    token = sampler.draw(logits, 0)  # [1]
    count = 0
    while count < max_tokens:
        ahead = queue(token[None], count + 1) if 0 < count < max_tokens - 1 else None
        current = _read(token)
        if current == SPILLED:  # rare: the nucleus is wider than the sampler's candidates
            step.cache.trim(int(ahead is not None))
            token = sampler.draw_exact(logits, count)
            continue
        if current == INVALID:
            raise NumericsError(
                "the model's logits are not numbers: its weights are damaged; verify or convert it again"
            )
        if current in stop:
            return "stop"
        yield current, logits
        count += 1
        if count == max_tokens:
            break
        logits, token = ahead or queue(token[None], count)
        if forced := steer()[: max_tokens - count]:
            logits, token = queue(mx.array(list(forced))[None], count + len(forced))
            for identity in forced:
                yield identity, logits
            count += len(forced)
    return "length"


def _read(token: mx.array) -> int:
    """Wait for an id [1]."""
    value = token.item()
    assert isinstance(value, int)
    return value
