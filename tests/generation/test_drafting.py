"""Guesses by prompt lookup, and their account: wrong guesses cost 1 % of all passes at most."""

import json
import random
from collections.abc import Sequence
from pathlib import Path

import pytest

import benchmarks
from benchmarks.__main__ import main
from benchmarks.runtime.drafting import LINEAR, M4_PRO, count, count_all, numbers, scripted
from magistral_mlx.generation.drafting import (
    MAX_ROWS,
    NO_DRAFTER,
    Drafter,
    PromptLookup,
    is_worth_drafting,
)
from magistral_mlx.tokenizer.tekken import Tokenizer
from tests.support.tiny import DEMO

FREE = (1.0,) * MAX_ROWS
BUBBLE = (1.08, 1.1, 1.2, 1.5, 1.9, 2.2, 2.6, 2.9)  # waiting for an id costs as well


def test_what_followed_is_guessed_again() -> None:
    text = numbers(random.Random(1), 40)
    source = PromptLookup([*text, 3, *text[:5]])
    assert len(source.chances(7)) == 7
    assert source.guess(7) == text[5:12]
    for token_id in text[5:9]:
        source.push(token_id)
    assert source.chances(3)[0] > 0.5
    assert source.guess(3) == text[9:12]


def test_a_gap_is_seen_through() -> None:
    """Guess across a number: lines that differ in a number go on alike."""
    source = PromptLookup([9, 41, 8, 9, 52, 8, 9, 63, 8, 9, 77])
    source.chances(1)
    assert source.guess(1) == [8]


def test_a_context_that_was_right_is_believed_and_one_that_was_wrong_is_not() -> None:
    steady, fickle = PromptLookup([1, 2] * 30), PromptLookup(numbers(random.Random(2), 600, 1, 6))
    assert steady.chances(1)[0] > 0.9
    assert fickle.chances(1)[0] < 0.4


def test_an_empty_prompt_has_nothing_to_guess() -> None:
    assert PromptLookup([]).chances(5) == []


class Oracle:
    """A source that guesses given ids with given chances."""

    cost = 0.0

    def __init__(self, chances: Sequence[float]) -> None:
        self.sure = list(chances)

    def push(self, token_id: int) -> None:
        pass

    def chances(self, limit: int) -> list[float]:
        return self.sure[:limit]

    def guess(self, count: int) -> list[int]:
        return list(range(count))


@pytest.mark.parametrize(
    ("costs", "chance", "guesses"),
    [
        (M4_PRO, 0.3, 1),  # a second row is free
        (M4_PRO, 0.9, 2),
        (FREE, 0.01, 7),
        (LINEAR, 0.99, 0),
        ((1.0, 1.5, 1.9, 2.3), 0.49, 0),
        ((1.0, 1.5, 2.0, 2.5), 0.51, 1),
    ],
)
def test_as_many_are_checked_as_give_most_ids_for_their_cost(
    costs: Sequence[float], chance: float, guesses: int
) -> None:
    drafter = Drafter(Oracle([chance] * 7), costs)
    drafter.tokens = 1000  # enough to afford anything
    assert len(drafter.propose(7)) == guesses
    by_hand = [sum(chance**i for i in range(rows)) / cost for rows, cost in enumerate(costs, 1)]
    assert guesses == max(range(len(costs)), key=lambda i: (by_hand[i] > by_hand[0], by_hand[i]))


def test_there_are_no_more_guesses_than_room() -> None:
    assert [len(Drafter(Oracle([0.9] * 7), FREE).propose(room)) for room in (0, 1, 3, 9)] == [
        0,
        1,
        3,
        7,
    ]
    assert len(Drafter(Oracle([0.9] * 7), FREE, limit=2).propose(9)) == 2


def test_a_row_that_attends_to_a_long_past_costs_more() -> None:
    """Count reads: M rows over n positions read the weights once and the positions M times."""
    near, far = (Drafter(Oracle([0.2]), FREE, prompt_tokens=n, kv_share=1e-4) for n in (0, 10_000))
    assert len(near.propose(1)) == 1
    assert far.propose(1) == []
    assert far._cost(2) == pytest.approx((1 + 2 * 1) / (1 + 1))


@pytest.mark.parametrize(
    ("costs", "expected"), [(M4_PRO, True), (FREE, True), (LINEAR, False), (BUBBLE, True)]
)
def test_whether_guessing_can_pay_at_all(costs: Sequence[float], expected: bool) -> None:
    assert is_worth_drafting(costs) is expected
    assert not is_worth_drafting(costs, source_cost=1.0)


def test_silence_waits_for_nothing() -> None:
    NO_DRAFTER.push(3)
    assert (NO_DRAFTER.wants_last_token, NO_DRAFTER.propose(9)) == (False, [])


@pytest.mark.parametrize("costs", [M4_PRO, FREE, LINEAR, BUBBLE, (1.0, 1.6, 2.1, 2.7)])
@pytest.mark.parametrize("chance", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("trust", [0.5, 0.99])
def test_guesses_however_wrong_cost_at_most_one_percent(
    costs: Sequence[float], chance: float, trust: float
) -> None:
    """Replay decoding against a source that lies about its chances, and add up the costs."""
    rng = random.Random(5)
    drafter = Drafter(Oracle([trust] * 7), costs)
    spent, tokens = 0.0, 0
    while tokens < 2000:
        if not drafter.wants_last_token:
            spent, tokens = spent + 1, tokens + 1
            drafter.push(0)
            drafter.note_plain_pass(9)
        else:
            guesses = len(drafter.propose(9))
            right = next((i for i in range(guesses) if rng.random() >= chance), guesses)
            spent += costs[guesses]
            for _ in range(right + 1):
                drafter.push(0)
                tokens += 1
        assert spent <= 1.01 * tokens + 1e-6
    if chance == 1.0 and trust == 0.99 and is_worth_drafting(costs):
        assert spent < 0.9 * tokens


def test_silence_ends_when_guesses_become_good() -> None:
    text = numbers(random.Random(7), 300)
    assert count([3], [*numbers(random.Random(8), 300), *text, *text], BUBBLE).cost_per_token < 0.9


COUNTED = json.loads(
    (Path(benchmarks.__file__).parent / "results" / "drafting-counts.json").read_text()
)


@pytest.mark.slow
def test_counts_on_record_are_those_of_this_code() -> None:
    texts = {
        kind: text[:2]
        for kind, text in scripted(Tokenizer.from_folder(DEMO)).items()
        if kind != "hostile"
    }
    few = count_all(texts, {"M4 Pro": M4_PRO})["M4 Pro"]
    assert few["prose"] == COUNTED["drafting"]["M4 Pro"]["prose"]
    assert max(few[kind]["highest_of_a_reply"] for kind in ("copies", "edits")) <= 0.45


def test_counts_on_record_meet_their_goals() -> None:
    goals = {
        kind: row["goal"] for kind, row in COUNTED["drafting"]["M4 Pro"].items() if row["goal"] < 1
    }
    assert goals == {"reasoning": 0.85, "copies": 0.45, "edits": 0.45}
    for kinds in COUNTED["drafting"].values():
        for kind, row in kinds.items():
            assert row["cost_per_token"] <= row["goal"], kind
            assert row["highest_of_a_reply"] <= 1.02, kind


@pytest.mark.slow
def test_counts_of_everything(tmp_path: Path) -> None:
    """Count the demo's 120 traces and all scripted texts; machines may differ in a few ids."""
    assert main(["drafting", "--json", str(tmp_path / "counts.json")]) == 0
    found = json.loads((tmp_path / "counts.json").read_text())
    assert found["row_costs"] == COUNTED["row_costs"]
    for name, kinds in found["drafting"].items():
        recorded = COUNTED["drafting"][name]
        assert kinds.pop("reasoning")["cost_per_token"] == pytest.approx(
            recorded["reasoning"]["cost_per_token"], abs=0.01
        )
        assert kinds == {kind: row for kind, row in recorded.items() if kind != "reasoning"}


def test_a_copy_that_is_cut_short_by_other_text_is_given_up() -> None:
    """Pay one pass an id for a reply that no longer repeats anything."""
    text = numbers(random.Random(3), 300)
    other = [2 * i for i in range(200, 500)]
    assert count([3, *text, 4], [*text[:100], *other]).cost <= 100 * 0.45 + 300 * 1.02
