"""The nucleus against float64 NumPy, the draws against their distribution."""

import itertools
import math
from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from magistral_mlx.errors import OptionError
from magistral_mlx.generation import sampling
from magistral_mlx.generation.params import SamplingParams
from magistral_mlx.generation.sampling import (
    INVALID,
    SPILLED,
    Nucleus,
    Sampler,
    nucleus,
    top_logprobs,
)

V = 131_072
# Share of the mass that float32 weights may move the boundary by: a quarter of a flat row's id.
TOLERANCE = 2e-6


def distributions(count: int) -> Iterator[np.ndarray]:
    """Return logits [V] float32: peaked, flat, tied or with -inf, in turn."""
    rng = np.random.default_rng(5)
    for i in range(count):
        noise = rng.normal(size=V).astype(np.float32)
        peaks = rng.integers(0, V, 30)
        match i % 6:
            case 0:  # a model that is sure
                noise[peaks] += rng.uniform(8, 20, 30)
            case 1:  # flat
                noise *= rng.uniform(0, 0.2)
            case 2:  # tied: a few values only
                noise[peaks] += 12
                noise = np.round(noise)
            case 3:  # tied through bfloat16, likely ids side by side
                noise[1000:1200] += np.linspace(14, 8, 200)
                noise = np.array(mx.array(noise).astype(mx.bfloat16).astype(mx.float32))
            case 4:  # -inf nearly everywhere
                noise[rng.random(V) < rng.choice([0.5, 0.999])] = -np.inf
                noise[7] = 1
            case 5:  # Zipf
                noise = (-rng.uniform(0.8, 2) * np.log1p(rng.permutation(V))).astype(np.float32)
        yield noise


def reference(x: np.ndarray, temperature: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return ids [V] in order, their probabilities and the mass before each, in float64."""
    order = np.argsort(-x, kind="stable")
    scaled = x[order].astype(np.float64)
    p = np.exp((scaled - scaled[0]) / temperature)
    p /= p.sum()
    return order, p, np.concatenate([[0.0], np.cumsum(p)[:-1]])


def make_nucleus(
    x: np.ndarray, temperature: float, top_p: float, *, exact: bool = False
) -> Nucleus:
    row = mx.array(x)
    row = row[None] if row.ndim == 1 else row
    return nucleus(row, mx.max(row, axis=-1, keepdims=True), temperature, top_p, exact=exact)


def kept(found: Nucleus, row: int = 0) -> list[int]:
    return np.array(found.ids[row])[np.array(found.weights[row]) > 0].tolist()


def check_kept_sets(count: int) -> None:
    settings = itertools.cycle([(0.7, 0.95), (1.0, 0.5), (0.3, 0.99), (1.7, 0.8), (0.7, 0.05)])
    spilled = 0
    for x, (temperature, top_p) in zip(distributions(count), settings, strict=False):
        order, p, before = reference(x, temperature)
        found = make_nucleus(x, temperature, top_p)
        if found.spilled.item():
            spilled += 1
            assert before[256] < top_p + TOLERANCE  # that many always fit
            found = make_nucleus(x, temperature, top_p, exact=True)
        ids = kept(found)
        assert ids == order[: len(ids)].tolist()
        last = len(ids) - 1
        assert before[last] < top_p + TOLERANCE
        assert before[last + 1] > top_p - TOLERANCE
        weights = np.array(found.weights[0])[: last + 1]
        np.testing.assert_allclose(
            weights / weights.sum(), p[: last + 1] / p[: last + 1].sum(), rtol=1e-5
        )
    assert 0 < spilled < count / 2


def test_the_kept_set_is_that_of_a_full_sort_in_float64() -> None:
    check_kept_sets(60)


@pytest.mark.slow
def test_the_kept_set_is_that_of_a_full_sort_in_float64_1000_times() -> None:
    check_kept_sets(1000)


def test_temperature_comes_before_top_p() -> None:
    x = np.log(np.array([0.5, 0.3, 0.12, 0.05, 0.03], np.float32))
    assert kept(make_nucleus(x, 0.7, 0.95)) == [0, 1, 2]
    assert kept(make_nucleus(x, 1.0, 0.95)) == [0, 1, 2, 3]


@pytest.mark.parametrize("top_p", [0.25, 0.5, 0.75])
def test_equals_are_kept_by_lower_id(top_p: float) -> None:
    found = make_nucleus(np.zeros(V, np.float32), 0.7, top_p, exact=True)
    assert kept(found) == list(range(int(top_p * V)))


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make blocks so small that few ids take the path of a large vocabulary."""
    monkeypatch.setattr(sampling, "BLOCK", 4)
    monkeypatch.setattr(sampling, "LEADERS", 3)
    monkeypatch.setattr(sampling, "CANDIDATES", 8)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("size", [45, 61, 64, 67])
def test_candidates_hold_the_nucleus_or_say_that_it_spilled(size: int) -> None:
    rng = np.random.default_rng(size)
    x = rng.integers(-3, 4, (2000, size)).astype(np.float32) * 1.5  # nearly everything is tied
    x[::3, ::5] = -np.inf
    x[(x == 0) & (rng.random(x.shape) < 0.5)] = -0.0  # equals zero
    few, all_ids = make_nucleus(x, 1.0, 0.4), make_nucleus(x, 1.0, 0.4, exact=True)
    spilled = np.array(few.spilled[:, 0])
    assert 0.05 < spilled.mean() < 0.95
    assert not np.array(all_ids.spilled).any()
    for row in np.flatnonzero(~spilled):
        assert kept(few, row) == kept(all_ids, row)
    for row in np.flatnonzero(spilled):
        assert len(kept(all_ids, row)) > 3  # at least as many as there are leading blocks fit
    sampler = Sampler(SamplingParams(temperature=1, top_p=0.4), seed=3)
    drawn, drawn_exact = (
        np.array(draw(mx.array(x), 9)) for draw in (sampler.draw, sampler.draw_exact)
    )
    assert ((drawn == SPILLED) == spilled).all()
    assert (drawn[~spilled] == drawn_exact[~spilled]).all()
    assert (drawn_exact >= 0).all()


@pytest.mark.parametrize("size", [1, 2, 31, 2048, 20_001, V])
@pytest.mark.parametrize("top_p", [0.95, 1.0])
def test_draw_and_draw_exact_agree(size: int, top_p: float) -> None:
    x = mx.array(4 * np.random.default_rng(size).normal(size=(3, size)).astype(np.float32))
    sampler = Sampler(SamplingParams(temperature=0.4, top_p=top_p), seed=11)
    for step in range(4):
        ids = sampler.draw(x, step)
        assert ids.shape == (3,)
        assert ids.dtype == mx.int32
        assert ids.tolist() == sampler.draw_exact(x, step).tolist()


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("top_p", [0.6, 1.0])
@pytest.mark.parametrize("method", ["draw", "draw_exact"])
def test_draws_follow_the_distribution(top_p: float, method: str) -> None:
    """Test chi-square on 100,000 draws: 10 steps of 10,000 rows."""
    x = np.random.default_rng(1).normal(size=53).astype(np.float32) * 2
    order, p, before = reference(x, 0.7)
    expected = np.zeros(53)
    inside = before < top_p
    expected[order[inside]] = 100_000 * p[inside] / p[inside].sum()
    sampler = Sampler(SamplingParams(top_p=top_p), seed=2)
    rows = mx.broadcast_to(mx.array(x), (10_000, 53))
    ids = np.concatenate([np.array(getattr(sampler, method)(rows, step)) for step in range(10)])
    counts = np.bincount(ids, minlength=53)
    assert counts[expected == 0].sum() == 0
    common = expected >= 5  # the rest in one bin
    observed = np.append(counts[common], counts[~common].sum())
    wanted = np.append(expected[common], expected[~common].sum())
    observed, wanted = observed[wanted > 0], wanted[wanted > 0]
    freedom = len(wanted) - 1
    statistic = ((observed - wanted) ** 2 / wanted).sum()
    assert abs(statistic - freedom) < 4 * math.sqrt(2 * freedom)


def test_a_seed_gives_the_same_ids_again() -> None:
    x = mx.array(np.random.default_rng(4).normal(size=(8, 500)).astype(np.float32))

    def ids(seed: int, rows: int = 8) -> list[Any]:
        return [Sampler(SamplingParams(), seed).draw(x[:rows], step).tolist() for step in range(3)]

    assert ids(1) == ids(1)
    assert ids(1) != ids(2)
    assert len({tuple(step) for step in ids(1)}) == 3
    assert [step[:1] for step in ids(1)] == ids(
        1, rows=1
    )  # a row does not depend on how many there are


def test_mlx_random_state_is_left_alone() -> None:
    x = mx.zeros((1, 100))
    mx.random.seed(7)
    expected = mx.random.uniform().item()
    mx.random.seed(7)
    mx.eval(Sampler(SamplingParams(), 1).draw(x, 0))
    assert mx.random.uniform().item() == expected


def test_drawing_is_lazy() -> None:
    x = mx.zeros((4, V)) + 1
    before = mx.get_active_memory()
    ids = [
        Sampler(SamplingParams(top_p=p, temperature=t), 1).draw(x, 0)
        for p, t in [(0.9, 1), (1, 1), (0.9, 0)]
    ]
    assert mx.get_active_memory() - before < V
    mx.eval(ids)


@pytest.mark.parametrize("size", [40, V + 5])
@pytest.mark.parametrize("params", [{}, {"top_p": 1}, {"temperature": 0}], ids=str)
def test_what_is_not_a_distribution_is_invalid(size: int, params: dict[str, float]) -> None:
    x = np.zeros((5, size), np.float32)
    x[0, size - 1] = np.nan
    x[1, 0] = np.nan
    x[2] = -np.inf
    x[3, 5] = np.inf
    x[4] = -np.inf
    x[4, size - 2] = -1000  # one finite logit is enough
    sampler = Sampler(SamplingParams(**params), 0)  # type: ignore[arg-type]
    for draw in (sampler.draw, sampler.draw_exact):
        assert draw(mx.array(x), 0).tolist() == [INVALID] * 4 + [size - 2]


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_greedy_takes_the_lowest_of_the_best(dtype: mx.Dtype) -> None:
    x = mx.array([[1.0, 3.0, 3.0, -math.inf], [0.0, -0.0, -1.0, 0.0]]).astype(dtype)
    sampler = Sampler(SamplingParams(temperature=0), 0)
    assert sampler.draw(x, 0).tolist() == [1, 0]


@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1e-30, 1e-3])
@pytest.mark.parametrize("top_p", [0.95, 1.0])
def test_a_tiny_temperature_is_greedy(temperature: float, top_p: float) -> None:
    x = mx.array([[80.0, 99.0, -3e38, 98.0, -math.inf]])
    assert Sampler(SamplingParams(temperature=temperature, top_p=top_p), 0).draw(x, 0).tolist() == [
        1
    ]


def test_extreme_options_still_draw() -> None:
    x = mx.array([[1.0, 2.0, -math.inf]])
    assert Sampler(SamplingParams(top_p=1e-300), 0).draw(x, 0).tolist() == [1]
    hot = Sampler(SamplingParams(temperature=1e300, top_p=1), 0)
    assert {hot.draw(x, step).item() for step in range(50)} == {0, 1}


@pytest.mark.parametrize("size", [30, 5000, V])
def test_top_logprobs_are_the_best_in_order(size: int) -> None:
    x = np.round(np.random.default_rng(size).normal(size=(3, size)) * 4).astype(np.float32)  # tied
    ids, logprobs = top_logprobs(mx.array(x), 7)
    for row in range(3):
        order, p, _ = reference(x[row], 1.0)
        assert ids[row].tolist() == order[:7].tolist()
        np.testing.assert_allclose(np.array(logprobs[row]), np.log(p[:7]), atol=2e-6)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", True),
        ("top_p", 0),
        ("top_p", 1.01),
        ("top_p", math.nan),
        ("max_tokens", 0),
        ("max_tokens", 1.5),
        ("seed", -1),
        ("seed", "1"),
        ("think_budget", -1),
        ("logprobs", -1),
        ("logprobs", 21),
        ("stop", "text"),
        ("stop", ("a", "")),
    ],
)
def test_an_option_out_of_range_is_named(name: str, value: object) -> None:
    with pytest.raises(OptionError, match=name):
        SamplingParams(**{name: value})  # type: ignore[arg-type]


def test_the_defaults_are_the_cards() -> None:
    assert SamplingParams() == SamplingParams(
        temperature=0.7, top_p=0.95, max_tokens=None, seed=None, stop=()
    )
