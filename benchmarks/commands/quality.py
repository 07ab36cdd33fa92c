"""``quality``: how far checkpoints' predictions are from a reference's."""

import tempfile
from pathlib import Path

import click

from benchmarks.commands.shared import json_option, plot_option, plot_results, report, write_results
from benchmarks.measure import circumstances
from benchmarks.quality.answers import exact_answers
from benchmarks.quality.candidates import METHODS, Conversions, Findings, candidates
from benchmarks.quality.scores import reference_of, score
from benchmarks.quality.texts import demo_texts, our_texts, texts_of_file
from benchmarks.report.quality_table import show_quality
from magistral_mlx import demo
from magistral_mlx.checkpoint.folder import open_checkpoint, resolve
from magistral_mlx.errors import OptionError
from magistral_mlx.files import cache_dir
from magistral_mlx.tokenizer.tekken import Tokenizer

EMBEDDED = "demo"


@click.command()
@click.option(
    "--reference",
    default=EMBEDDED,
    show_default=True,
    metavar="demo|SRC",
    help="Folder or hub id, in bf16.",
)
@click.option(
    "--model",
    "models",
    multiple=True,
    metavar="PATH",
    help="A checkpoint to compare; may be repeated.",
)
@click.option(
    "--q-bits",
    multiple=True,
    type=int,
    help="Convert the reference to these bits; may be repeated.",
)
@click.option(
    "--q-method",
    "methods",
    multiple=True,
    type=click.Choice(METHODS),
    help="By these methods; else all.",
)
@click.option(
    "--calibration",
    metavar="FILE|self",
    help="What those methods calibrate on; else the converter's own.",
)
@click.option(
    "--text",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Windows of this, not texts of our own.",
)
@click.option(
    "--windows",
    type=click.IntRange(2),
    default=32,
    show_default=True,
    help="Of 512 ids, from --text.",
)
@click.option(
    "--problems",
    type=click.IntRange(0),
    default=200,
    show_default=True,
    help="For the demo to answer.",
)
@click.option("--quick", is_flag=True, help="A few texts and problems, one method: does it run?")
@json_option
@plot_option
def quality(
    *,
    reference: str,
    models: tuple[str, ...],
    q_bits: tuple[int, ...],
    methods: tuple[str, ...],
    calibration: str | None,
    text: Path | None,
    windows: int,
    problems: int,
    quick: bool,
    json_file: Path | None,
    plot: Path | None,
) -> None:
    """KL per token, top-1 agreement and perplexity against a reference, in traces and in answers.

    Both are run a layer at a time: neither has to fit into memory. The reference runs once, and what is kept of its
    predictions lies in the cache folder for the next candidate: of each token the 2,048 most probable ids, and the
    mass and entropy of the others. Of a larger vocabulary KL is therefore a lower bound, shown with an upper one where
    that is further away. Ratios are to the first candidate of the same size: geometric means over texts, and the factor
    by which they are uncertain.

    \b
    python -m benchmarks quality                               the demo in 4 bit by each method, and its answers
    python -m benchmarks quality --q-bits 4 --q-bits 3 --q-bits 2
    python -m benchmarks quality --reference ~/Magistral-Small-2506 --model ~/magistral-4bit --model ~/other
    python -m benchmarks quality --reference ~/Magistral-Small-2506 --model ~/magistral-4bit --text book.txt
    """
    folder = Path(demo.__file__).parent if reference == EMBEDDED else resolve(reference)
    if calibration is not None and methods == ("round",):
        raise OptionError(
            "nothing is calibrated where weights are rounded; leave --calibration out"
        )
    if (methods or calibration) and models and not q_bits:
        raise OptionError(
            "--q-method and --calibration are for conversions made here; name their --q-bits, too"
        )
    if quick:
        methods, windows, problems = methods or METHODS[:1], min(windows, 4), min(problems, 3)
    tokenizer = Tokenizer.from_folder(folder)
    named = {model: resolve(model) for model in models}
    for model in named.values():
        if not tokenizer.shares_ids(model):
            raise OptionError(
                f"{model} has another vocabulary than {folder}; compare conversions of one model"
            )
    if text is not None:
        texts = texts_of_file(text, tokenizer, windows=windows)
    elif reference == EMBEDDED:
        texts = demo_texts(tokenizer, 8 if quick else 200)
    else:
        texts = our_texts(tokenizer, most=3 if quick else None)
    facts = circumstances()
    kept = reference_of(folder, texts, cache_dir() / "quality", report=report)
    conversions = Conversions(q_bits if q_bits or models else (4,), methods or METHODS, calibration)
    findings = Findings(texts)
    with tempfile.TemporaryDirectory(prefix="magistral-quality-") as work:
        for title, candidate in candidates(folder, named, conversions, Path(work), report=report):
            one = findings.add(title, candidate, score(candidate, texts, kept, report=report))
            if reference == EMBEDDED and problems:
                report(f"{title}: {problems} problems")
                one["answers"] = exact_answers(candidate, problems)
    results = {
        "reference": open_checkpoint(folder).fingerprint(),
        "sequences": len(texts.ids),
        "kept_logprobs": kept.ids.shape[-1],
        "candidates": findings.found,
    }
    plot_results(write_results("quality", facts, results, json_file), plot)
    show_quality(reference, findings.found)
