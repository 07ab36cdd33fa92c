"""A draft model gives the same reply in fewer passes, or is refused before any work."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

import magistral_mlx as mm
from benchmarks.runtime.drafting import M4_PRO
from magistral_mlx.errors import MagistralError, MemoryLimitError, OptionError
from magistral_mlx.generation.draft_model import DraftModel
from magistral_mlx.generation.drafting import Drafter
from magistral_mlx.generation.params import SamplingParams
from magistral_mlx.generation.row_costs import RowCosts
from magistral_mlx.generation.sampling import Sampler
from magistral_mlx.model.load_options import LoadOptions
from magistral_mlx.model.memory import plan_for
from magistral_mlx.model.transformer import Transformer
from tests.generation.test_speculation import CONFIG, FREE, GREEDY, PROMPT, SAMPLED, Run
from tests.support.tiny import DEMO, fill, make_config, make_weights, write_checkpoint


@pytest.fixture(scope="module")
def model() -> Transformer:
    return fill(Transformer(CONFIG), CONFIG, make_weights(CONFIG))


@pytest.fixture(scope="module")
def magistral() -> mm.Magistral:
    return mm.load("demo")


def draft_model(model: Transformer, sampler: Sampler, limit: int = 100) -> DraftModel:
    draft = DraftModel(model, CONFIG, limit=limit, cost=0.1)
    draft.read_prompt(PROMPT, sampler, chunk=8).result()
    return draft


@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_a_draft_model_that_is_the_model_is_always_right(
    model: Transformer, params: SamplingParams
) -> None:
    plain, sampler = Run(model, sampler=Sampler(params, 7)), Sampler(params, 7)
    draft = draft_model(model, sampler)
    drafted = Run(model, Drafter(draft, FREE), sampler=sampler)
    assert drafted.ids == plain.ids
    assert drafted.step.passes <= 2 + 8
    assert draft.chances(1)[0] > 0.8


@pytest.mark.slow
def test_a_draft_model_that_knows_nothing_changes_nothing_and_falls_silent(
    model: Transformer,
) -> None:
    other = fill(Transformer(CONFIG), CONFIG, {n: w[::-1] for n, w in make_weights(CONFIG).items()})
    plain, sampler = Run(model, max_tokens=150), Sampler(SAMPLED, 7)
    draft = draft_model(other, sampler, limit=90)  # its context ends before the reply
    drafter = Drafter(draft, M4_PRO)
    assert Run(model, drafter, sampler=sampler, max_tokens=150).ids == plain.ids
    assert drafter.spent <= 1.01 * drafter.tokens
    assert draft.chances(1) == []


def test_a_draft_model_reads_only_what_is_new(model: Transformer) -> None:
    draft = draft_model(model, Sampler(GREEDY, 0))
    assert list(draft.read_prompt(PROMPT, Sampler(GREEDY, 0), chunk=4)) == []
    assert list(
        draft.read_prompt([*PROMPT[:10], 5, 6, 7, 8, 9, 10, 11], Sampler(GREEDY, 0), chunk=4)
    ) == [4]


def test_a_draft_of_the_same_prompt_is_the_same_whatever_came_before(model: Transformer) -> None:
    sampler = Sampler(GREEDY, 0)
    fresh, used = draft_model(model, sampler), draft_model(model, sampler)
    for identity in used.guess(5)[:2]:
        used.push(identity)
    used.push(330)
    used.guess(3)
    used.read_prompt(PROMPT, sampler, chunk=8).result()
    assert used.guess(6) == fresh.guess(6)


def test_a_draft_model_beside_the_model(magistral: mm.Magistral) -> None:
    question, sampling = "What is 48 + 76?", mm.SamplingParams(seed=3)
    plain = magistral.ask(question, sampling)
    both = mm.load("demo", draft_model=DEMO, prefill_step_size=16)
    assert both.speculation.draft is not None
    assert both.plan.draft_bytes > 0
    both.speculation.costs, both.speculation.draft.cost = RowCosts(0.02, M4_PRO), 0.05
    drafted = both.ask(question, sampling)
    assert (drafted.reasoning, drafted.answer) == (plain.reasoning, plain.answer)
    assert drafted.usage.forward_passes < 0.6 * plain.usage.forward_passes


def test_a_draft_model_of_another_vocabulary_is_refused(tmp_path: Path) -> None:
    """Refuse it before weights are read: the shards are not even weights."""
    config = make_config(vocab_size=2048, tie_word_embeddings=False)
    folder = write_checkpoint(tmp_path / "draft", config, make_weights(config))
    tekken = json.loads((DEMO / "tekken.json").read_text())
    tekken["vocab"][700]["token_bytes"], tekken["vocab"][701]["token_bytes"] = (
        tekken["vocab"][701]["token_bytes"],
        tekken["vocab"][700]["token_bytes"],
    )
    (folder / "tekken.json").write_text(json.dumps(tekken))
    with pytest.raises(OptionError, match=r"another vocabulary.*draft_model"):
        mm.load("demo", draft_model=folder)
    (folder / "tekken.json").unlink()
    with pytest.raises(MagistralError, match=r"tekken\.json is missing"):
        mm.load("demo", draft_model=folder)


def test_a_draft_model_that_does_not_fit_beside_is_refused(magistral: mm.Magistral) -> None:
    """Plan memory for the draft model's weights and its cache of the same context."""
    checkpoint = magistral.checkpoint
    small = LoadOptions(max_kv_size=256, prefill_step_size=64)
    alone = plan_for(checkpoint, small)
    both = plan_for(checkpoint, small, draft=checkpoint)
    assert (
        both.total_bytes - alone.total_bytes
        == both.draft_bytes
        == alone.weights_bytes + alone.kv_bytes
    )
    between = (alone.total_bytes + both.total_bytes) / 2e9
    tight = replace(small, memory_gb=between)
    assert plan_for(checkpoint, tight).fits
    with pytest.raises(MemoryLimitError, match="draft model"):
        plan_for(checkpoint, tight, draft=checkpoint)


def test_a_draft_model_without_guesses_is_a_contradiction() -> None:
    with pytest.raises(OptionError, match="num_draft_tokens is 0"):
        mm.load("no/such", draft_model="no/such", num_draft_tokens=0)
