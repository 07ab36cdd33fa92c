"""Prefill and decode beside mlx-lm, the first token of a second turn, and the sampler."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import mlx.core as mx
import numpy as np

from benchmarks.measure import OURS, Comparison, Finding, Lap, Run, Stopwatch, report
from benchmarks.runtime.contenders import (
    Job,
    Pool,
    Workload,
    mlx_lm,
    ours,
    random_ids,
    times_as_long,
)
from magistral_mlx.checkpoint.folder import Checkpoint, open_checkpoint
from magistral_mlx.engine.magistral import Magistral
from magistral_mlx.errors import MemoryLimitError
from magistral_mlx.generation.params import SamplingParams
from magistral_mlx.generation.reply import Usage
from magistral_mlx.generation.sampling import Sampler
from magistral_mlx.model.device import budget_bytes
from magistral_mlx.model.footprint import bytes_per_token
from magistral_mlx.model.load_options import LoadOptions
from magistral_mlx.model.memory import plan_for

VOCABULARY = 131_072
MLX_LM, MLX_LM_CAST = "mlx-lm", "mlx-lm, float32"
COLD, FROM_DISK = "nothing cached", "from disk"
SAMPLER_CALLS = 20  # a repeat, since one call is too short to time
SAMPLER_REPEATS = 15


def workloads(
    checkpoint: Checkpoint, contexts: Sequence[int], workload: Workload
) -> Iterator[Workload]:
    """Yield the workload at each context, prompt and reply together, while it fits."""
    most = checkpoint.config.max_positions
    for context in sorted({min(context, most) for context in contexts}):
        try:
            plan_for(checkpoint, LoadOptions(max_kv_size=context))
        except MemoryLimitError:
            return
        prompt = context - workload.decode_tokens - 1
        if prompt > 0:
            yield replace(workload, prompt_tokens=prompt)


def compare_contexts(
    title: str, folder: Path, several: Sequence[Workload], seconds: float, *, peer: bool
) -> Iterator[Comparison]:
    """Compare at every context, as long as one is expected to take no more than ``seconds``.

    On a CPU mlx-lm in bf16 takes part in the first only: it takes seven to nine times as long.
    The forecast scales prefill by its multiply-adds, and decode by its length.
    """
    config = open_checkpoint(folder).config
    last: Comparison | None = None
    for before, workload in zip([None, *several], several, strict=False):
        if before is not None and last is not None:
            lengths = before.prompt_tokens, workload.prompt_tokens
            expected = _seconds(last, "prefill") * times_as_long(config, *lengths)
            expected += _seconds(last, "decode") * lengths[1] / lengths[0]
            if expected > seconds:
                report(
                    f"{title}: a prompt of {workload.prompt_tokens:,} and longer ones are left "
                    f"out: it could take {expected / 60:.0f} minutes (--minutes)"
                )
                return
        last = compare_models(title, folder, workload, peer=peer, in_bf16=last is None)
        yield last


def _seconds(comparison: Comparison, phase: str) -> float:
    """Return the time of all repeats and a warm-up, without mlx-lm in bf16 on a CPU."""
    contenders = comparison.laps[phase]
    counted = set(contenders) - ({MLX_LM} if MLX_LM_CAST in contenders else set())
    means = [np.mean([lap.seconds for lap in contenders[name]]) for name in counted]
    return float(np.sum(means)) * (1 + len(contenders[OURS]))


def compare_models(
    title: str, folder: Path, workload: Workload, *, peer: bool, in_bf16: bool = True
) -> Comparison:
    """Time prefill and decode of a checkpoint in MLX layout, ours and mlx-lm's.

    On a CPU mlx-lm runs twice: as it loads the checkpoint (``in_bf16``), and with its arrays cast
    to float32, which ours computes in there.
    """
    checkpoint = open_checkpoint(folder)
    job = Job(random_ids(checkpoint.config, workload.prompt_tokens), workload.decode_tokens)
    plan = plan_for(checkpoint, LoadOptions(max_kv_size=workload.prompt_tokens + job.total))
    replies: dict[str, list[int]] = defaultdict(list)
    contenders: dict[str, Callable[[], Run]] = {
        OURS: lambda: ours(checkpoint, job, plan.prefill_chunk, replies[OURS])
    }
    if peer:
        on_cpu = mx.default_device().type == mx.DeviceType.cpu
        if in_bf16 or not on_cpu:
            contenders[MLX_LM] = lambda: mlx_lm(folder, None, job, replies[MLX_LM])
        if on_cpu:
            contenders[MLX_LM_CAST] = lambda: mlx_lm(folder, mx.float32, job, replies[MLX_LM_CAST])
    facts = {
        "workload": asdict(workload),
        "checkpoint": checkpoint.fingerprint(),
        "checkpoint_bytes": checkpoint.nbytes,
        "bytes_per_token": bytes_per_token(checkpoint),
        "kv_bytes_per_token": plan.kv_bytes * workload.prompt_tokens // plan.context,
    }
    comparison = Comparison(title, facts)
    pool = Pool(one_at_a_time=peer and 2 * plan.total_bytes > budget_bytes())
    try:
        comparison.run(pool.runs(contenders), workload.repeats)
    finally:
        pool.clear()
    comparison.facts["same_ids"] = {name: ids == replies[OURS] for name, ids in replies.items()}
    return comparison


def compare_samplers(batch: int, repeats: int, *, peer: bool) -> Comparison:
    """Time draws at the card's values from logits [batch, V]: noise, and a few likely ids.

    mlx-lm's sampler takes log-probabilities, which its caller computes. That is not counted.
    """
    rng = np.random.default_rng(0)
    values = (2 * rng.normal(size=(batch, VOCABULARY))).astype(np.float32)
    for row in values:
        row[rng.integers(0, VOCABULARY, 20)] += rng.uniform(8, 16, 20)
    logits = mx.array(values)
    params = SamplingParams()
    sampler = Sampler(params, seed=0)
    contenders = {OURS: _draws(lambda: sampler.draw(logits, 0))}
    if peer:
        from mlx_lm.sample_utils import make_sampler

        theirs = make_sampler(temp=params.temperature, top_p=params.top_p)
        contenders[MLX_LM] = _draws(lambda: theirs(logits))
    comparison = Comparison(f"sampler, {batch} x {VOCABULARY:,}", {"calls_a_repeat": SAMPLER_CALLS})
    return comparison.run(contenders, repeats)


def _draws(draw: Callable[[], mx.array]) -> Run:
    def run() -> dict[str, Lap]:
        watch = Stopwatch()
        for _ in range(SAMPLER_CALLS):
            mx.eval(draw())
        return {"draw": watch.lap(SAMPLER_CALLS)}

    return run


def compare_turns(title: str, magistral: Magistral, tokens: int, repeats: int) -> Comparison:
    """Time the first token of a second question after ``tokens`` of conversation.

    The cache of the first is in memory, in a file, or gone.
    """
    one = SamplingParams(temperature=0, max_tokens=1)
    sentence = "What is 48 + 76? "
    length = len(magistral.tokenizer.encode(sentence))
    first = [{"role": "user", "content": sentence * max(1, tokens // length)}]
    answer = {"role": "assistant", "content": "124"}
    second = [*first, answer, {"role": "user", "content": "What is 7 * 8?"}]
    usage: dict[str, Usage] = {}

    def contender(name: str, before: Callable[[], object], within: Callable[[], object]) -> Run:
        def run() -> dict[str, Lap]:
            magistral.prefix_cache.clear()
            before()
            watch = Stopwatch()
            within()
            usage[name] = magistral.ask(second, one).usage
            return {"first token": watch.lap(1)}

        return run

    with TemporaryDirectory(prefix="magistral-prefix-") as folder:
        file = Path(folder) / "prefix.cache"
        magistral.ask(first, one, prompt_cache_file=file)
        steps: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
            OURS: (lambda: magistral.ask(first, one), lambda: None),
            FROM_DISK: (lambda: None, lambda: magistral.prefix_cache.open(file)),
            COLD: (lambda: None, lambda: None),
        }
        comparison = Comparison(f"second turn, {title}", {"file_bytes": file.stat().st_size})
        comparison.run({name: contender(name, *acts) for name, acts in steps.items()}, repeats)
    comparison.facts |= {
        "prompt_tokens": usage[COLD].prompt_tokens,
        "cached_tokens": {name: one.cached_tokens for name, one in usage.items()},
    }
    return comparison


def count_passes_per_token(
    title: str, magistral: Magistral, tokens: int, questions: Sequence[str]
) -> Finding:
    """Count passes a token of greedy replies, which is below 1 where drafting pays."""
    sampling = SamplingParams(temperature=0, max_tokens=tokens)
    usages = [magistral.ask(question, sampling).usage for question in questions]
    passes = sum(usage.forward_passes for usage in usages)
    made = sum(usage.completion_tokens for usage in usages)
    facts = {"questions": len(questions), "tokens": made, "passes": passes}
    return Finding(f"passes a token, {title}", facts | {"passes_per_token": passes / made})
