"""Several sequences over one prompt: each gets its own ids; the prompt is held once."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np
import pytest

from magistral_mlx.errors import NumericsError
from magistral_mlx.generation import batch
from magistral_mlx.generation.batch import BatchStepper, decode_rows
from magistral_mlx.generation.decoding import Stepper, Token, decode, prefill
from magistral_mlx.generation.params import SamplingParams
from magistral_mlx.generation.sampling import SPILLED, Sampler
from magistral_mlx.model import shared_cache
from magistral_mlx.model.kv_cache import KVCache
from magistral_mlx.model.kv_format import KVFormat
from magistral_mlx.model.shared_cache import SharedCache
from magistral_mlx.model.transformer import Transformer
from tests.support.tiny import fill, make_config, make_weights

CONFIG = make_config()
PROMPT = [int(i) for i in mx.random.randint(0, 320, (9,), key=mx.random.key(3)).tolist()]
GREEDY = SamplingParams(temperature=0)
HOT = SamplingParams(temperature=1.5, top_p=0.9)


@pytest.fixture(scope="module")
def model() -> Transformer:
    return fill(Transformer(CONFIG), CONFIG, make_weights(CONFIG))


def prompted(model: Transformer, bits: int | None = None) -> tuple[Stepper, mx.array]:
    step = Stepper(model, KVCache(CONFIG, limit=512, kv_format=KVFormat.of(bits, CONFIG.head_dim)))
    return step, prefill(step, PROMPT, chunk=64).result()


def columns(count: int, steps: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, CONFIG.vocab_size, (count, steps))


@pytest.mark.parametrize("growth", [3, 256])
@pytest.mark.parametrize(
    "leaving", [{}, {1: [0, 2, 4]}, {0: [4, 3], 4: [1]}, {2: [0, 1, 2, 3], 5: [2, 0]}]
)
def test_each_sequence_sees_the_past_and_itself(
    model: Transformer, monkeypatch: pytest.MonkeyPatch, growth: int, leaving: dict[int, list[int]]
) -> None:
    """Compare with a pass over each whole text without a cache, while sequences leave."""
    monkeypatch.setattr(shared_cache, "STEP", growth)
    ids, active = columns(5, 8), list(range(5))
    step = BatchStepper(model, SharedCache(prompted(model)[0].cache, 5, limit=8))
    for t in range(8):
        found = step(mx.array(ids[active, t]))
        texts = mx.array([[*PROMPT, *ids[i, : t + 1].tolist()] for i in active])
        assert mx.allclose(found, model(texts)[:, -1], atol=1e-5)
        if t in leaving:
            step.cache.keep(leaving[t])
            active = [active[place] for place in leaving[t]]
    assert step.passes == 8


@pytest.mark.parametrize("bits", [8, 4])
def test_packed_pasts_are_those_of_single_sequences(model: Transformer, bits: int) -> None:
    """Allow a tolerance: codes may round the other way where keys differ in the last bit."""
    ids = columns(4, 6)
    step = BatchStepper(model, SharedCache(prompted(model, bits)[0].cache, 4, limit=6))
    singles = [prompted(model, bits)[0] for _ in range(4)]
    for t in range(6):
        found = step(mx.array(ids[:, t]))
        expected = mx.concatenate(
            [single(mx.array([[int(ids[i, t])]])) for i, single in enumerate(singles)]
        )
        assert mx.allclose(found, expected, atol=1e-2)
        assert mx.median(mx.abs(found - expected)).item() < 1e-5


def test_a_step_can_be_taken_back(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_cache, "STEP", 2)
    step = BatchStepper(model, SharedCache(prompted(model)[0].cache, 2, limit=4))
    step(mx.array([1, 2]))
    step(mx.array([3, 4]))
    step.cache.keep([1])
    step(mx.array([5]))
    step.cache.trim()
    assert mx.allclose(step(mx.array([7])), model(mx.array([[*PROMPT, 2, 4, 7]]))[:, -1], atol=1e-5)


def address(array: mx.array) -> int:
    where: int = np.array(array, copy=False).__array_interface__["data"][0]
    return where


def test_nothing_is_copied_when_a_sequence_leaves(model: Transformer) -> None:
    prefix = prompted(model)[0].cache
    step = BatchStepper(model, SharedCache(prefix, 16, limit=64))
    mx.eval(step(mx.arange(16)))

    def places() -> list[int]:
        return [address(a) for layer in step.cache.layers for a in layer.arrays] + list(
            map(address, prefix.arrays)
        )

    before, held = places(), step.cache.nbytes
    step.cache.keep([0, *range(2, 16)])
    mx.eval(step(mx.arange(15)))
    step.cache.keep([3])
    mx.eval(step(mx.arange(1)))
    assert (places(), step.cache.nbytes) == (before, held)


@pytest.mark.parametrize("count", [2, 16])
def test_the_past_is_read_once_a_step_however_many_go_on_from_it(
    model: Transformer, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    prefix = prompted(model)[0].cache
    step, reads = BatchStepper(model, SharedCache(prefix, count, limit=8)), []
    for layer in prefix.layers:
        read = layer.buffer.read
        monkeypatch.setattr(
            layer.buffer, "read", lambda length, read=read: reads.append(length) or read(length)
        )
    for t in range(3):
        step(mx.arange(count))
        assert reads == [len(PROMPT)] * CONFIG.num_layers * (t + 1)


@pytest.mark.parametrize("bits", [None, 8, 4])
def test_sixteen_share_a_prompt_of_4096_in_a_quarter_of_the_memory(bits: int | None) -> None:
    """Count the bytes of 1,000 ids each from shapes; nothing is computed."""
    config = make_config(num_layers=1)
    K, d, H = config.num_kv_heads, config.head_dim, config.num_heads

    def feed(cache: KVCache | SharedCache, rows: int, ids: int) -> None:
        cache.layers[0].attend(mx.zeros((rows, H, ids, d)), mx.zeros((rows, 2 * K, ids, d)), 1.0)

    single, prefix = (
        KVCache(config, limit=8192, kv_format=KVFormat.of(bits, config.head_dim)) for _ in range(2)
    )
    single.reserve(4096 + 1000)
    prefix.reserve(4096)
    for cache in (single, prefix):
        feed(cache, 1, 4096)
    shared, held = SharedCache(prefix, 16, limit=1000), []
    for _ in range(1000):
        feed(single, 1, 1)
        feed(shared, 16, 1)
        held.append(shared.nbytes)
    assert shared.nbytes / (16 * single.nbytes) <= 0.27
    position = single.nbytes / (4096 + 1024)
    # In steps of 256, never doubled, and never beyond the limit.
    assert [held[t] / position - 4096 for t in (0, 255, 256, 599, 999)] == [
        16 * n for n in (256, 256, 512, 768, 1000)
    ]


@dataclass
class Scripted:
    """A row that takes up to ``most`` ids and forces some after given numbers of them."""

    seed: int
    most: int = 99
    forces: dict[int, list[int]] = field(default_factory=dict)  # after so many ids
    ids: list[int] = field(default_factory=list)

    def take(self, token: Token) -> bool:
        assert token.logits.shape == (1, CONFIG.vocab_size)
        self.ids.append(token.id)
        return len(self.ids) < self.most

    def forced(self, logits: mx.array, draw: mx.array) -> Sequence[int]:
        return self.forces.pop(len(self.ids), [])


def alone(
    model: Transformer, row: Scripted, params: SamplingParams, stop: frozenset[int]
) -> list[int]:
    """Return the ids of a row alone, by the loop of single replies."""
    ids: list[int] = []
    step, logits = prompted(model)
    forces = dict(row.forces)
    for token in decode(
        step,
        logits,
        Sampler(params, row.seed),
        stop=stop,
        max_tokens=12,
        steer=lambda *_: forces.pop(len(ids), []),
    ):
        ids.append(token.id)
        if len(ids) == row.most:
            break
    return ids


def several() -> list[Scripted]:
    return [
        Scripted(3),
        Scripted(4, most=5),
        Scripted(5, forces={2: [43, 44, 45]}),
        Scripted(6, forces={1: [50], 3: [60, 61]}),
        Scripted(7, forces={9: [70, 71, 72, 73, 74]}),
        Scripted(8, most=1),
        Scripted(9, forces={4: [80, 81, 82]}, most=6),
    ]


@pytest.mark.parametrize("params", [GREEDY, HOT, SamplingParams(temperature=1, top_p=1)])
@pytest.mark.parametrize(
    "stops", [frozenset(), frozenset(range(0, 320, 11)), frozenset(range(320))]
)
def test_rows_get_the_ids_they_would_get_alone(
    model: Transformer, params: SamplingParams, stops: frozenset[int]
) -> None:
    rows = several()
    expected = [alone(model, row, params, stops) for row in rows]
    step, logits = prompted(model)
    stepper = BatchStepper(model, SharedCache(step.cache, len(rows), limit=12))
    ended = [
        pair
        for pairs in decode_rows(stepper, logits, params, rows, stop=stops, max_tokens=12)
        for pair in pairs
    ]
    assert [row.ids for row in rows] == expected
    assert sorted(i for i, _ in ended) == list(range(len(rows)))
    for i, reason in ended:
        assert reason == ("length" if len(rows[i].ids) == 12 else "stop")
    assert stepper.passes <= 11


def test_a_row_that_spilled_is_drawn_again_exactly(
    model: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = several()
    expected = [alone(model, row, HOT, frozenset()) for row in rows]
    spilled: list[int] = []

    class Unwilling(Sampler):
        def draw_each(
            self, logits: mx.array, step: int, seeds: Sequence[int], *, exact: bool = False
        ) -> mx.array:
            drawn = super().draw_each(logits, step, seeds, exact=exact)
            if exact:
                spilled.append(step)
                return drawn
            return mx.array(
                [
                    SPILLED if (seed + step) % 4 == 0 else i
                    for seed, i in zip(seeds, drawn.tolist(), strict=True)
                ]
            )

    monkeypatch.setattr(batch, "Sampler", Unwilling)
    step, logits = prompted(model)
    stepper = BatchStepper(model, SharedCache(step.cache, len(rows), limit=12))
    list(decode_rows(stepper, logits, HOT, rows, stop=frozenset(), max_tokens=12))
    assert [row.ids for row in rows] == expected
    assert spilled


def test_nan_in_one_row_is_an_error(model: Transformer) -> None:
    step, logits = prompted(model)
    stepper = BatchStepper(model, SharedCache(step.cache, 2, limit=12))
    with pytest.raises(NumericsError, match="damaged"):
        list(
            decode_rows(
                stepper,
                logits * float("nan"),
                HOT,
                [Scripted(1), Scripted(2)],
                stop=frozenset(),
                max_tokens=3,
            )
        )
