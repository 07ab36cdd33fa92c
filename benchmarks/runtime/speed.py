"""Prefill and decode against peers, on one checkpoint; the first token; the sampler against mlx-lm's."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import mlx.core as mx
import numpy as np

from benchmarks.measure import OURS, Comparison, Finding, Lap, Run, Stopwatch, interleave
from benchmarks.runtime.contenders import Job, Loaded, Memory, mlx_lm, ours
from benchmarks.runtime.lengths import times_as_long
from benchmarks.runtime.llama import llama_cpp, llama_version
from magistral_mlx.checkpoint.folder import Checkpoint, open_checkpoint
from magistral_mlx.engine.magistral import Magistral
from magistral_mlx.errors import MemoryLimitError, OptionError
from magistral_mlx.generation.params import SamplingParams
from magistral_mlx.generation.reply import Usage
from magistral_mlx.generation.sampling import Sampler
from magistral_mlx.model.device import budget_bytes
from magistral_mlx.model.load_options import LoadOptions
from magistral_mlx.model.memory import plan_for

VOCABULARY = 131_072
MLX_LM, MLX_LM_CAST = "mlx-lm", "mlx-lm, float32"
COLD, FROM_DISK = "nothing cached", "from disk"
SAMPLER_CALLS = 20  # a repeat; one call is too short to time


@dataclass(frozen=True, slots=True)
class Workload:
    """What is timed: a prompt, then greedy ids after its first; and how often."""

    prompt_tokens: int
    decode_tokens: int
    repeats: int

    def __post_init__(self) -> None:
        if self.prompt_tokens < 1 or self.decode_tokens < 1 or self.repeats < 1:
            raise OptionError(f"{self} cannot be timed; every number must be at least 1")


@dataclass(frozen=True, slots=True)
class Peers:
    """Who is measured beside ours."""

    mlx_lm: bool = False
    gguf: Path | None = None  # of llama.cpp
    in_bf16: bool = True  # mlx-lm on a CPU as it loads a checkpoint, too: seven to nine times as long as in float32


def workloads(
    checkpoint: Checkpoint, contexts: Sequence[int], workload: Workload
) -> Iterator[Workload]:
    """The workload at each context, prompt and reply together, as far as model and memory go; the last cut to that."""
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
    title: str,
    folder: Path,
    several: Sequence[Workload],
    seconds: float,
    *,
    peers: Peers,
    report: Callable[[str], None],
) -> Iterator[Comparison]:
    """``compare_models`` at every context, while one is expected to take no longer than ``seconds``.

    mlx-lm in a CPU's bf16 takes part in the first only. What the next will take follows from the last: prefill by
    its multiply-adds, decoding at most by its length.
    """
    config = open_checkpoint(folder).config
    last: Comparison | None = None
    for before, workload in zip([None, *several], several, strict=False):
        expected = 0.0
        if before is not None and last is not None:
            lengths = before.prompt_tokens, workload.prompt_tokens
            expected = _seconds(last, "prefill") * times_as_long(config, *lengths)
            expected += _seconds(last, "decode") * lengths[1] / lengths[0]
            peers = replace(peers, in_bf16=False)
        if expected > seconds:
            report(
                f"{title}: a prompt of {workload.prompt_tokens:,} and longer ones are left out: "
                f"it could take {expected / 60:.0f} minutes (--minutes)"
            )
            return
        last = compare_models(title, folder, workload, peers=peers, report=report)
        yield last


def _seconds(comparison: Comparison, phase: str) -> float:
    """What a phase takes in all repeats and a warm-up, but of mlx-lm in a CPU's bf16."""
    contenders = comparison.laps[phase]
    counted = set(contenders) - ({MLX_LM} if MLX_LM_CAST in contenders else set())
    means = [np.mean([lap.seconds for lap in contenders[name]]) for name in counted]
    return float(np.sum(means)) * (1 + len(contenders[OURS]))


def compare_models(
    title: str, folder: Path, workload: Workload, *, peers: Peers, report: Callable[[str], None]
) -> Comparison:
    """Prefill and decode of a 4-bit checkpoint in MLX layout, ours and the peers'.

    All contenders are in memory at once where two fit, else each is loaded for every repeat. On a CPU mlx-lm runs
    twice: as it loads the checkpoint, and with its bf16 arrays cast to float32, which is what ours computes in there.
    """
    checkpoint = open_checkpoint(folder)
    job = Job(
        np.random.default_rng(0)
        .integers(0, checkpoint.config.vocab_size, workload.prompt_tokens)
        .tolist(),
        workload.decode_tokens,
    )
    options = LoadOptions(max_kv_size=workload.prompt_tokens + job.total)
    plan = plan_for(checkpoint, options)
    replies: dict[str, list[int]] = defaultdict(list)
    beside: dict[str, str | int] = {}
    contenders: dict[str, Callable[[], Loaded]] = {
        OURS: lambda: ours(checkpoint, job, plan.prefill_chunk, replies[OURS])
    }
    if peers.mlx_lm:
        on_cpu = mx.default_device().type == mx.DeviceType.cpu
        if peers.in_bf16 or not on_cpu:
            contenders[MLX_LM] = lambda: mlx_lm(folder, None, job, replies[MLX_LM])
        if on_cpu:
            contenders[MLX_LM_CAST] = lambda: mlx_lm(folder, mx.float32, job, replies[MLX_LM_CAST])
    if peers.gguf is not None:
        gguf = peers.gguf
        beside = {"llama_cpp": llama_version(), "gguf_bytes": gguf.stat().st_size}
        contenders["llama.cpp"] = lambda: llama_cpp(gguf, job, replies["llama.cpp"])
    comparison = Comparison(
        title,
        {
            "workload": asdict(workload),
            "checkpoint": checkpoint.fingerprint(),
            "checkpoint_bytes": checkpoint.nbytes,
            "bytes_per_token": bytes_per_token(checkpoint),
            "kv_bytes_per_token": plan.kv_bytes * workload.prompt_tokens // plan.context,
            **beside,
        },
    )
    memory = Memory(one_at_a_time=len(contenders) > 1 and 2 * plan.total_bytes > budget_bytes())
    try:
        _run(comparison, memory.runs(contenders), workload.repeats, report)
    finally:
        memory.clear()
    comparison.facts["same_ids"] = {name: ids == replies[OURS] for name, ids in replies.items()}
    return comparison


def compare_samplers(
    batch: int, repeats: int, *, peer: bool, report: Callable[[str], None]
) -> Comparison:
    """Draws at the card's values from logits [batch, V] shaped as a model's: noise, and a few ids far above it.

    mlx-lm's sampler is given log-probabilities by its caller; taking them is not counted, ours needs none.
    """
    rng = np.random.default_rng(0)
    values = (2 * rng.normal(size=(batch, VOCABULARY))).astype(np.float32)
    for row in values:
        row[rng.integers(0, VOCABULARY, 20)] += rng.uniform(8, 16, 20)
    logits = mx.array(values)
    params = SamplingParams()
    ours = Sampler(params, seed=0)
    contenders: dict[str, Run] = {OURS: _calls(lambda: ours.draw(logits, 0))}
    if peer:
        from mlx_lm.sample_utils import make_sampler

        theirs = make_sampler(temp=params.temperature, top_p=params.top_p)
        contenders["mlx-lm"] = _calls(lambda: theirs(logits))
    comparison = Comparison(f"sampler, {batch} x {VOCABULARY:,}", {"calls_a_repeat": SAMPLER_CALLS})
    _run(comparison, contenders, repeats, report)
    return comparison


def compare_turns(
    title: str, magistral: Magistral, tokens: int, repeats: int, *, report: Callable[[str], None]
) -> Comparison:
    """The first token of a second question after ``tokens`` of conversation: cold, with the first's cache in memory,
    and with that cache read from a file."""
    one = SamplingParams(temperature=0, max_tokens=1)
    sentence = "What is 48 + 76? "
    length = len(magistral.tokenizer.encode(sentence))
    first = [{"role": "user", "content": sentence * max(1, tokens // length)}]
    second = [
        *first,
        {"role": "assistant", "content": "124"},
        {"role": "user", "content": "What is 7 * 8?"},
    ]
    usage: dict[str, Usage] = {}

    def run(
        name: str, before: Callable[[], object], within: Callable[[], object]
    ) -> dict[str, Lap]:
        magistral.prefix_cache.clear()
        before()
        watch = Stopwatch()
        within()
        usage[name] = magistral.ask(second, one).usage
        return {"first token": watch.lap(1)}

    with TemporaryDirectory(prefix="magistral-prefix-") as name:
        file = Path(name) / "prefix.cache"
        magistral.ask(first, one, prompt_cache_file=file)
        contenders: dict[str, Run] = {
            OURS: lambda: run(OURS, lambda: magistral.ask(first, one), lambda: None),
            FROM_DISK: lambda: run(
                FROM_DISK, lambda: None, lambda: magistral.prefix_cache.open(file)
            ),
            COLD: lambda: run(COLD, lambda: None, lambda: None),
        }
        comparison = Comparison(f"second turn, {title}", {"file_bytes": file.stat().st_size})
        _run(comparison, contenders, repeats, report)
    comparison.facts |= {
        "prompt_tokens": usage[COLD].prompt_tokens,
        "cached_tokens": {name: one.cached_tokens for name, one in usage.items()},
    }
    return comparison


def count_passes_per_token(
    title: str, magistral: Magistral, tokens: int, questions: Sequence[str]
) -> Finding:
    """Of greedy replies, with drafting as this device has it: below 1 where guesses pay."""
    sampling = SamplingParams(temperature=0, max_tokens=tokens)
    usages = [magistral.ask(question, sampling).usage for question in questions]
    passes, made = (
        sum(getattr(u, name) for u in usages) for name in ("forward_passes", "completion_tokens")
    )
    return Finding(
        f"passes a token, {title}",
        {
            "questions": len(questions),
            "tokens": made,
            "passes": passes,
            "passes_per_token": passes / made,
        },
    )


def bytes_per_token(checkpoint: Checkpoint) -> int:
    """Bytes of weights, as stored, that one decoded id reads: all but the embedding, of which it reads a row."""
    if checkpoint.config.tie_word_embeddings:
        return checkpoint.nbytes
    embedding = (
        entry.nbytes
        for shard in checkpoint.shards
        for name, entry in shard.header.items()
        if name.startswith("model.embed_tokens.")
    )
    return checkpoint.nbytes - sum(embedding)


def _run(
    comparison: Comparison,
    contenders: Mapping[str, Run],
    repeats: int,
    report: Callable[[str], None],
) -> None:
    for repeat, name, laps in interleave(contenders, repeats):
        speeds = ", ".join(f"{phase} {lap.per_second:.3g}/s" for phase, lap in laps.items())
        report(
            f"{comparison.title}: {f'{repeat}/{repeats}' if repeat else 'warm-up'} {name}: {speeds}"
        )
        if repeat:
            comparison.add(name, laps)


def _calls(draw: Callable[[], mx.array]) -> Run:
    def run() -> dict[str, Lap]:
        watch = Stopwatch()
        for _ in range(SAMPLER_CALLS):
            mx.eval(draw())
        return {"draw": watch.lap(SAMPLER_CALLS)}

    return run
