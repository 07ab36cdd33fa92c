"""``quality``: the divergence of checkpoints from a reference."""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from benchmarks.command_line import json_option, quick_option, write
from benchmarks.measure import circumstances, report
from benchmarks.quality.candidates import METHODS, Conversions, Findings, Method, candidates
from benchmarks.quality.scores import reference_of, score
from benchmarks.quality.texts import demo_texts, our_texts, texts_of_file
from benchmarks.report.table import show
from benchmarks.runtime.memory import exact_answers
from magistral_mlx import demo
from magistral_mlx.checkpoint.folder import open_checkpoint, resolve
from magistral_mlx.engine.load import load
from magistral_mlx.errors import OptionError
from magistral_mlx.files import cache_dir
from magistral_mlx.tokenizer.tekken import Tokenizer

EMBEDDED = "demo"


@click.command()
@click.option(
    "--reference", default=EMBEDDED, show_default=True, metavar="demo|SRC", help="In bf16."
)
@click.option("--model", "models", multiple=True, metavar="PATH", help="A checkpoint to compare.")
@click.option("--q-bits", multiple=True, type=int, help="Convert the reference to these bits.")
@click.option(
    "--q-method",
    "methods",
    multiple=True,
    type=click.Choice(METHODS),
    help="Convert by these methods; all of them if unset.",
)
@click.option(
    "--calibration", metavar="FILE|self", help="Of those methods; the converter's own if unset."
)
@click.option(
    "--text",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Measure on windows of this file, not on our texts.",
)
@quick_option
@json_option
def quality(
    *,
    reference: str,
    models: tuple[str, ...],
    q_bits: tuple[int, ...],
    methods: tuple[Method, ...],
    calibration: str | None,
    text: Path | None,
    quick: bool,
    json_file: Path | None,
) -> None:
    """Measure KL, top-1 agreement and perplexity against a reference.

    Models run a layer at a time, so they need not fit into memory. The reference runs once; its
    predictions stay in the cache folder: of each token the 2,048 most probable ids, and the mass
    and entropy of the others. In a larger vocabulary KL is therefore a lower bound, shown with an
    upper one if that is further away. Ratios are to the first candidate of the same size:
    geometric means over texts, and the factor of their error.

    \b
    python -m benchmarks quality
    python -m benchmarks quality --q-bits 4 --q-bits 3 --q-bits 2
    python -m benchmarks quality --reference ~/2506 --model ~/magistral-4bit

    The first measures the demo in 4 bit by each method, and its answers.
    """
    if calibration is not None and methods == ("round",):
        raise OptionError("rounding does not calibrate; leave --calibration out")
    if (methods or calibration) and models and not q_bits:
        raise OptionError(
            "--q-method and --calibration are for conversions made here; name their --q-bits too"
        )
    folder = Path(demo.__file__).parent if reference == EMBEDDED else resolve(reference)
    if quick:
        methods = methods or METHODS[:1]
    tokenizer = Tokenizer.from_folder(folder)
    named = {model: resolve(model) for model in models}
    for model in named.values():
        if not tokenizer.shares_ids(model):
            raise OptionError(
                f"{model} has another vocabulary than {folder}; compare conversions of one model"
            )
    if text is not None:
        texts = texts_of_file(text, tokenizer, windows=4 if quick else 32)
    elif reference == EMBEDDED:
        texts = demo_texts(tokenizer, 8 if quick else 200)
    else:
        texts = our_texts(tokenizer, most=3 if quick else None)
    facts = circumstances()
    kept = reference_of(folder, texts, cache_dir() / "quality")
    conversions = Conversions(q_bits if q_bits or models else (4,), methods or METHODS, calibration)
    findings = Findings(texts)
    with tempfile.TemporaryDirectory(prefix="magistral-quality-") as work:
        for title, candidate in candidates(folder, named, conversions, Path(work)):
            one = findings.add(title, candidate, score(candidate, texts, kept))
            if reference == EMBEDDED:
                problems = 3 if quick else 200
                report(f"{title}: {problems} problems")
                one["answers"] = exact_answers(load(str(candidate)), problems)
    results = {
        "reference": open_checkpoint(folder).fingerprint(),
        "sequences": len(texts.ids),
        "kept_logprobs": kept.ids.shape[-1],
        "candidates": findings.found,
    }
    write("quality", facts, results, json_file)
    show(
        f"Against {reference}; KL in nats a token ± standard error; ratio to the first of a size",
        "checkpoint | bits | part",
        "tokens | KL | KL ratio | top-1 | perplexity | reference's",
        _rows(findings.found),
    )
    show(
        "Held-out problems answered exactly, greedily",
        "checkpoint",
        "problems | exact",
        [
            (
                one["title"],
                one["answers"]["problems"],
                f"{one['answers']['exact']:.1%} ± {one['answers']['exact_error']:.1%}",
            )
            for one in findings.found
            if "answers" in one
        ],
    )


def _rows(found: Sequence[Mapping[str, Any]]) -> Iterator[tuple[object, ...]]:
    for one in found:
        for part, figures in one["parts"].items():
            kl, error, ratio = figures["kl"], figures["kl_error"], figures["kl_ratio"]
            shown = f"{kl:.3g}" + ("" if error is None else f" ± {error:.1g}")
            if (upper := figures["kl_upper_bound"]) > kl * 1.001:
                shown += f" (at most {upper:.3g})"
            yield (
                one["title"],
                f"{one['bits_per_weight']:.2f}",
                part,
                f"{figures['tokens']:,}",
                shown,
                one["kl_ratio_to"] and f"{ratio['mean']:.3f} ×÷ {ratio['factor']:.2f}",
                f"{figures['top1_agreement']:.2%}",
                f"{figures['perplexity']:.4g}",
                f"{figures['reference_perplexity']:.4g}",
            )
