"""Guesses change the number of passes, and no id, no logit and no cached value."""

from collections.abc import Sequence

import mlx.core as mx
import numpy as np
import pytest

import magistral_mlx as mm
from benchmarks.runtime.drafting import M4_PRO
from magistral_mlx.errors import OptionError
from magistral_mlx.generation.decoding import Stepper, decode, prefill
from magistral_mlx.generation.drafting import MAX_ROWS, NO_DRAFTER, Drafter, NoDrafter
from magistral_mlx.generation.params import SamplingParams
from magistral_mlx.generation.row_costs import LINEAR, RowCosts
from magistral_mlx.generation.sampling import SPILLED, Sampler
from magistral_mlx.model.kv_cache import KVCache
from magistral_mlx.model.kv_format import KVFormat
from magistral_mlx.model.transformer import Transformer
from tests.support.tiny import fill, make_config, make_weights

CONFIG = make_config(vocab_size=331)  # no multiple of anything
PROMPT = np.random.default_rng(3).integers(0, 331, 21).tolist()
GREEDY, SAMPLED = SamplingParams(temperature=0), SamplingParams()
FREE = (1.0,) * MAX_ROWS
on_cpu = pytest.mark.skipif(
    mx.default_device().type != mx.DeviceType.cpu, reason="claimed of a CPU only"
)


@pytest.fixture(scope="module")
def model() -> Transformer:
    return fill(Transformer(CONFIG), CONFIG, make_weights(CONFIG))


class Told:
    """A source that knows the ids to come, and gets every so-many-th of them wrong."""

    cost = 0.0

    def __init__(self, ids: Sequence[int], wrong_every: int) -> None:
        self.ids, self.wrong_every, self.done = ids, wrong_every, 0

    def push(self, token_id: int) -> None:
        self.done += 1

    def chances(self, limit: int) -> list[float]:
        return [0.9] * min(limit, len(self.ids) - self.done)

    def guess(self, count: int) -> list[int]:
        ahead = enumerate(self.ids[self.done : self.done + count], self.done)
        return [
            (token_id + 1) % 331 if i % self.wrong_every == 0 else token_id for i, token_id in ahead
        ]


class Run:
    """One reply of the tiny model, read to its end or closed after ``read`` ids."""

    def __init__(
        self,
        model: Transformer,
        drafter: NoDrafter = NO_DRAFTER,
        *,
        sampler: Sampler | None = None,
        bits: int | None = None,
        max_tokens: int = 40,
        stop: frozenset[int] = frozenset(),
        forced: Sequence[Sequence[int]] = (),
        read: int = 1000,
    ) -> None:
        self.step = Stepper(
            model,
            KVCache(
                CONFIG, limit=len(PROMPT) + max_tokens, kv_format=KVFormat.of(bits, CONFIG.head_dim)
            ),
        )
        logits = prefill(self.step, PROMPT, chunk=16).result()
        answers = iter(forced)
        stream = decode(
            self.step,
            logits,
            sampler or Sampler(SAMPLED, 7),
            stop=stop,
            max_tokens=max_tokens,
            steer=lambda *_: next(answers, ()),
            drafter=drafter,
        )
        tokens = [token for _, token in zip(range(read), stream, strict=False)]
        stream.close()
        self.ids = [token.id for token in tokens]
        self.logits = np.array(mx.concatenate([token.logits for token in tokens]))


@pytest.fixture(scope="module")
def plain(model: Transformer) -> Run:
    return Run(model)


@on_cpu
@pytest.mark.parametrize(
    ("params", "bits"), [(GREEDY, None), (SAMPLED, None), (SAMPLED, 8), (SAMPLED, 4)]
)
@pytest.mark.parametrize("wrong_every", [1, 3, pytest.param(1000, marks=pytest.mark.slow)])
def test_ids_and_logits_are_those_of_plain_decoding_to_the_bit(
    model: Transformer, bits: int | None, params: SamplingParams, wrong_every: int
) -> None:
    plain = Run(model, sampler=Sampler(params, 7), bits=bits)
    drafter = Drafter(Told(plain.ids, wrong_every), FREE)
    drafted = Run(model, drafter, sampler=Sampler(params, 7), bits=bits)
    assert drafted.ids == plain.ids
    assert (drafted.logits == plain.logits).all()
    assert (drafted.step.passes < plain.step.passes) == (wrong_every > 1)
    if wrong_every == 1000:
        assert (
            drafted.step.passes == 2 + 5
        )  # two chunks; of 39 ids after the first each pass gives 8
    assert drafter.spent == drafted.step.passes - 2


@pytest.mark.parametrize("wrong_every", [2, 5, 1000])
def test_a_stop_id_among_guesses_ends_the_reply(
    model: Transformer, plain: Run, wrong_every: int
) -> None:
    stop = frozenset({plain.ids[17]})
    ended = Run(model, Drafter(Told(plain.ids, wrong_every), FREE), stop=stop)
    assert ended.ids == plain.ids[: plain.ids.index(plain.ids[17])]


@pytest.mark.parametrize("count", [1, 2, 3, 9, 10])
def test_no_more_positions_are_fed_than_were_planned(
    model: Transformer, plain: Run, count: int
) -> None:
    """Limit the cache to prompt + max_tokens, so that a row too many would raise."""
    assert (
        Run(model, Drafter(Told(plain.ids, 1000), FREE), max_tokens=count).ids == plain.ids[:count]
    )


@pytest.mark.parametrize(
    ("wrong_every", "after"), [(1, 0), (2, 6), (1000, 0), (1000, 1), (1000, 6)]
)
def test_forced_ids_come_where_they_would_and_the_rest_follows(
    model: Transformer, plain: Run, wrong_every: int, after: int
) -> None:
    forced = [()] * after + [(40, 41, 42)]
    steered = Run(model, forced=forced, max_tokens=20)
    guesses = plain.ids if wrong_every == 2 else steered.ids
    drafted = Run(model, Drafter(Told(guesses, wrong_every), FREE), forced=forced, max_tokens=20)
    assert drafted.ids == steered.ids
    assert steered.ids[after + 1 : after + 4] == [40, 41, 42]


class Unwilling(Sampler):
    """A sampler that spills at every third step, wherever in a pass that is."""

    def draw_run(self, logits: mx.array, step: int) -> mx.array:
        rows = mx.arange(step, step + len(logits))
        return mx.where(rows % 3 == 0, SPILLED, super().draw_run(logits, step))


def test_a_spilled_row_is_drawn_again_exactly(model: Transformer, plain: Run) -> None:
    drafter = Drafter(Told(plain.ids, 4), FREE)
    assert Run(model, drafter, sampler=Unwilling(SAMPLED, 7)).ids == plain.ids
    assert Run(model, sampler=Unwilling(SAMPLED, 7)).ids == plain.ids


@pytest.mark.parametrize("read", [1, 2, 5, 9, 12])
@pytest.mark.parametrize("wrong_every", [3, 1000])
def test_a_stream_closed_anywhere_leaves_a_cache_to_trim(
    model: Transformer, plain: Run, read: int, wrong_every: int
) -> None:
    """Keep the keys and values of the ids that were read, after trimming to them."""
    closed = Run(model, Drafter(Told(plain.ids, wrong_every), FREE), read=read)
    known = [*PROMPT, *closed.ids]
    cache = closed.step.cache
    cache.trim(max(0, cache.length - len(known)))
    again = closed.step(mx.array([[*known[cache.length :], 7]]))
    assert mx.allclose(again, model(mx.array([[*known, 7]]))[:, -1], atol=1e-5)


def test_a_drafter_that_would_lose_leaves_the_loop_as_it_was(
    model: Transformer, plain: Run
) -> None:
    for costs in (LINEAR.passes, (1.5,) * MAX_ROWS):
        silent = Run(model, Drafter(Told(plain.ids, 1), costs))
        assert (silent.ids, silent.step.passes) == (plain.ids, plain.step.passes)


def test_rows_of_one_draw_are_the_draws_of_those_steps() -> None:
    logits = mx.random.normal((5, 331), key=mx.random.key(4)) * 3
    for params in (GREEDY, SAMPLED, SamplingParams(top_p=1.0), SamplingParams(temperature=30.0)):
        sampler = Sampler(params, 11)
        alone = [int(sampler.draw(logits[i : i + 1], 6 + i).item()) for i in range(5)]
        assert np.array(sampler.draw_run(logits, 6)).tolist() == alone


# The library


@pytest.fixture(scope="module")
def magistral() -> mm.Magistral:
    return mm.load("demo")


@pytest.mark.parametrize(
    "sampling",
    [
        mm.SamplingParams(temperature=0),
        mm.SamplingParams(seed=5),
        mm.SamplingParams(seed=5, think_budget=12),
        mm.SamplingParams(seed=6, stop=("answer",), logprobs=2),
        mm.SamplingParams(temperature=0, max_tokens=30),
    ],
    ids=["greedy", "seed", "budget", "stop", "length"],
)
@pytest.mark.slow
def test_a_reply_is_the_same_in_fewer_passes(
    magistral: mm.Magistral, sampling: mm.SamplingParams
) -> None:
    question = "What is 481 - 47?"
    plain = magistral.ask(question, sampling)
    magistral.prefix_cache.clear()
    magistral.speculation.costs = RowCosts(0.02, M4_PRO)
    try:
        drafted = magistral.ask(question, sampling)
        turn = magistral.prefix_cache.ids
        assert magistral.prefix_cache.cache.length in (len(turn), len(turn) - 1)
    finally:
        magistral.speculation.costs = LINEAR
        magistral.prefix_cache.clear()
    assert (drafted.reasoning, drafted.answer) == (plain.reasoning, plain.answer)
    assert drafted.finish_reason == plain.finish_reason
    assert drafted.usage.completion_tokens == plain.usage.completion_tokens
    assert drafted.usage.forward_passes < plain.usage.forward_passes


@on_cpu
def test_on_a_cpu_it_is_silent(magistral: mm.Magistral) -> None:
    """Draft nothing where a row costs a pass: one pass for each id and the stop id."""
    assert magistral.speculation.costs == LINEAR
    usage = magistral.ask("What is 48 + 76?", GREEDY).usage
    assert usage.forward_passes == usage.completion_tokens + 2


@pytest.mark.parametrize("count", [-1, 8, 1.5, True])
def test_a_number_of_guesses_that_no_pass_checks_is_refused(count: int) -> None:
    with pytest.raises(OptionError, match="num_draft_tokens"):
        mm.load("no/such", num_draft_tokens=count)


def test_no_guesses_can_be_asked_for(magistral: mm.Magistral) -> None:
    quiet = mm.load("demo", num_draft_tokens=0)
    quiet.speculation.costs = RowCosts(0.02, FREE)
    assert quiet.speculation.drafter_for(PROMPT, Sampler(GREEDY, 0), chunk=8).result() is NO_DRAFTER
