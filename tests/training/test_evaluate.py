"""The evaluator's own decoding gives the replies of the runtime."""

import magistral_mlx as mm
from magistral_mlx.demo import demo_checkpoint
from magistral_mlx.training.demo.evaluate import Evaluator, uniform_problems
from magistral_mlx.training.demo.problems import KINDS, held_out_problems, is_unseen

GREEDY = mm.SamplingParams(temperature=0)


def test_prompts_of_any_length_are_answered_as_by_the_runtime() -> None:
    folder = demo_checkpoint()
    evaluator, magistral = Evaluator(folder), mm.load(folder, max_kv_size=512)
    problems = held_out_problems(4, 7, evaluator.tokenizer.pieces, KINDS)
    replies = [magistral.ask(p.question, GREEDY) for p in problems]
    assert len({len(evaluator.tokenizer.encode_chat(p.question)) for p in problems}) > 1
    assert evaluator.answers(problems) == [reply.answer for reply in replies]


def test_uniform_problems_are_unseen_and_repeatable() -> None:
    for kind in KINDS[:3]:
        found = uniform_problems(("fr", kind), 50, seed=1)
        assert found == uniform_problems(("fr", kind), 50, seed=1)
        assert {(p.kind, p.language) for p in found} == {(kind, "fr")}
        assert max(abs(p.expected) for p in found) > 700
    assert not is_unseen("add", 12, 30)
