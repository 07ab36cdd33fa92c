"""Exact answers of the embedded model, or of a conversion of it, to problems that it was not trained on."""

from pathlib import Path
from typing import Any

from magistral_mlx.engine.load import load
from magistral_mlx.generation.params import SamplingParams
from magistral_mlx.training.demo.problems import ARITHMETIC, held_out_problems, is_correct

SEED = 2026  # as the answers of ``benchmarks memory``


def exact_answers(folder: Path, count: int) -> dict[str, Any]:
    """The share that is right, with its standard error; greedily, and the trace must have been closed by the model."""
    magistral = load(str(folder))
    right = 0
    for problem in held_out_problems(count, SEED, magistral.tokenizer.pieces, ARITHMETIC):
        reply = magistral.ask(problem.question, SamplingParams(temperature=0))
        right += is_correct(problem, reply.answer) and reply.reasoning_closed_by == "model"
    share = right / count
    return {"problems": count, "exact": share, "exact_error": (share * (1 - share) / count) ** 0.5}
