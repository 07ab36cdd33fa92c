"""Prefill in chunks, and decoding that leaves the cache usable wherever it ends."""

from collections.abc import Generator

import mlx.core as mx
import pytest

from magistral_mlx.errors import NumericsError
from magistral_mlx.generation.decoding import Ending, Stepper, Token, decode, prefill
from magistral_mlx.generation.params import SamplingParams
from magistral_mlx.generation.sampling import INVALID, SPILLED, Sampler
from magistral_mlx.model.kv_cache import KVCache
from magistral_mlx.model.kv_format import KVFormat
from magistral_mlx.model.transformer import Transformer
from magistral_mlx.streams import Stream
from tests.support.tiny import fill, make_config, make_weights

CONFIG = make_config()
PROMPT = [int(i) for i in mx.random.randint(0, 320, (65,), key=mx.random.key(3)).tolist()]
GREEDY = SamplingParams(temperature=0)


@pytest.fixture(scope="module")
def model() -> Transformer:
    return fill(Transformer(CONFIG), CONFIG, make_weights(CONFIG))


def stepper(model: Transformer, bits: int | None = None) -> Stepper:
    return Stepper(model, KVCache(CONFIG, limit=512, kv_format=KVFormat.of(bits, CONFIG.head_dim)))


def greedy_reference(model: Transformer, prompt: list[int], count: int) -> list[int]:
    """Return greedy ids by full recomputation: no cache, no look-ahead, no sampler."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(mx.argmax(model(mx.array([ids]))[0, -1]).item()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("chunk", [1, 2, 7, 14])
@pytest.mark.parametrize("length", [1, 2, 7, 8, 14, 15])
def test_prefill_in_chunks_equals_prefill_at_once(
    model: Transformer, chunk: int, length: int
) -> None:
    at_once, chunked = stepper(model), stepper(model)
    expected = prefill(at_once, PROMPT[:length], chunk=512).result()
    assert mx.allclose(prefill(chunked, PROMPT[:length], chunk=chunk).result(), expected, atol=1e-5)
    assert (at_once.passes, chunked.passes) == (1, -(-length // chunk))
    assert chunked.cache.length == length


def test_prefill_reports_every_chunk_but_the_last(model: Transformer) -> None:
    assert list(prefill(stepper(model), PROMPT, chunk=16)) == [16, 32, 48, 64]


def test_decode_equals_full_recomputation_and_counts_its_passes(model: Transformer) -> None:
    step = stepper(model)
    logits = prefill(step, PROMPT[:9], chunk=4).result()
    ids = [t.id for t in decode(step, logits, Sampler(GREEDY, 0), stop=frozenset(), max_tokens=12)]
    assert ids == greedy_reference(model, PROMPT[:9], 12)
    assert step.passes == 3 + 11  # the last id is not fed


@pytest.mark.parametrize("read", range(6))
def test_a_stream_closed_anywhere_leaves_a_cache_to_trim(model: Transformer, read: int) -> None:
    step = stepper(model)
    logits = prefill(step, PROMPT[:9], chunk=64).result()
    stream = decode(step, logits, Sampler(GREEDY, 0), stop=frozenset(), max_tokens=5)
    ids = [token.id for _, token in zip(range(read), stream, strict=False)]
    stream.close()
    known = [*PROMPT[:9], *ids]
    step.cache.trim(max(0, step.cache.length - len(known)))
    fed = step.cache.length
    assert len(known) - fed in (0, 1)
    again = step(mx.array([[*known[fed:], 7]]))
    assert mx.allclose(again, model(mx.array([[*known, 7]]))[:, -1], atol=1e-5)


def test_a_stop_id_ends_the_reply_and_is_not_yielded(model: Transformer) -> None:
    ids = greedy_reference(model, PROMPT[:9], 6)
    step = stepper(model)
    logits = prefill(step, PROMPT[:9], chunk=64).result()
    reason, seen = drain(
        decode(step, logits, Sampler(GREEDY, 0), stop=frozenset({ids[4]}), max_tokens=50)
    )
    assert reason == "stop"
    assert seen == ids[: ids.index(ids[4])]


def test_forced_ids_are_yielded_and_the_rest_follows_from_them(model: Transformer) -> None:
    step = stepper(model)
    logits = prefill(step, PROMPT[:9], chunk=64).result()
    answers = iter([(), (), (40, 41, 42)])
    sampler = Sampler(GREEDY, 0)
    stream = decode(
        step, logits, sampler, stop=frozenset(), max_tokens=9, steer=lambda *_: next(answers, ())
    )
    reason, seen = drain(stream)
    first = greedy_reference(model, PROMPT[:9], 3)
    assert seen[:6] == [*first, 40, 41, 42]
    assert seen[6:] == greedy_reference(model, [*PROMPT[:9], *seen[:6]], 3)
    assert reason == "length"


class Unwilling(Sampler):
    """A sampler that spills at every other draw, as with a flat distribution."""

    def draw(self, logits: mx.array, step: int) -> mx.array:
        return mx.array([SPILLED]) if step % 2 else super().draw(logits, step)


def test_a_spilled_draw_is_drawn_again_exactly(model: Transformer) -> None:
    step = stepper(model)
    logits = prefill(step, PROMPT[:9], chunk=64).result()
    _, seen = drain(decode(step, logits, Unwilling(GREEDY, 0), stop=frozenset(), max_tokens=8))
    assert seen == greedy_reference(model, PROMPT[:9], 8)


def test_nan_logits_are_an_error(model: Transformer) -> None:
    nan = mx.full((1, 320), float("nan"))
    assert int(Sampler(SamplingParams(), 0).draw(nan, 0).item()) == INVALID
    with pytest.raises(NumericsError, match="damaged"):
        drain(
            decode(
                stepper(model), nan, Sampler(SamplingParams(), 0), stop=frozenset(), max_tokens=3
            )
        )


def drain(decoding: Generator[Token, None, Ending]) -> tuple[Ending, list[int]]:
    """Return how a reply ended, and its ids."""
    stream = Stream(decoding)
    ids = [token.id for token in stream]
    return stream.result(), ids
