"""Prefill and decode against mlx-lm, on one checkpoint; the sampler against mlx-lm's."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from benchmarks.measure import OURS, Comparison, Lap, Run, Stopwatch, interleave
from magistral_mlx.api import load
from magistral_mlx.cache import KVCache
from magistral_mlx.checkpoint import Checkpoint, open_checkpoint
from magistral_mlx.conversation import result_of
from magistral_mlx.decoding import Stepper, decode, prefill
from magistral_mlx.errors import OptionError
from magistral_mlx.loader import load_model
from magistral_mlx.reply import Usage
from magistral_mlx.sampling import Sampler, SamplingParams

VOCABULARY = 131_072
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


def compare_models(
    title: str, folder: Path, workload: Workload, *, peer: bool, report: Callable[[str], None]
) -> Comparison:
    """Prefill and decode of a 4-bit checkpoint in MLX layout, ours and (``peer``) mlx-lm's.

    All contenders are in memory at once. On a CPU mlx-lm runs twice: as it loads the checkpoint, and with
    its bf16 arrays cast to float32, which is what ours computes in there.
    """
    checkpoint = open_checkpoint(folder)
    prompt = np.random.default_rng(0).integers(0, checkpoint.config.vocab_size, workload.prompt_tokens).tolist()
    replies: dict[str, list[int]] = defaultdict(list)
    report(f"{title}: loading")
    contenders: dict[str, Run] = {OURS: _ours(checkpoint, prompt, workload, replies[OURS])}
    if peer:
        contenders["mlx-lm"] = _mlx_lm(folder, None, prompt, workload, replies["mlx-lm"])
        if mx.default_device().type == mx.DeviceType.cpu:
            name = "mlx-lm, float32"
            contenders[name] = _mlx_lm(folder, mx.float32, prompt, workload, replies[name])
    comparison = Comparison(
        title,
        {
            "workload": asdict(workload),
            "checkpoint": checkpoint.fingerprint(),
            "checkpoint_bytes": checkpoint.nbytes,
            "bytes_per_token": bytes_per_token(checkpoint),
        },
    )
    _run(comparison, contenders, workload.repeats, report)
    comparison.facts["same_ids"] = {name: ids == replies[OURS] for name, ids in replies.items()}
    return comparison


def compare_samplers(batch: int, repeats: int, *, peer: bool, report: Callable[[str], None]) -> Comparison:
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


def compare_turns(title: str, folder: Path, tokens: int, repeats: int, *, report: Callable[[str], None]) -> Comparison:
    """The first token of a second question after ``tokens`` of conversation, with and without the first's cache."""
    magistral = load(folder)
    one = SamplingParams(temperature=0, max_tokens=1)
    sentence = "What is 48 + 76? "
    length = len(magistral.tokenizer.encode(sentence))
    first = [{"role": "user", "content": sentence * (tokens // length)}]
    second = [*first, {"role": "assistant", "content": "124"}, {"role": "user", "content": "What is 7 * 8?"}]

    def run(before: Callable[[], object]) -> dict[str, Lap]:
        magistral.past.forget()
        before()
        watch = Stopwatch()
        usage.append(magistral.ask(second, one).usage)
        return {"first token": watch.lap(1)}

    usage: list[Usage] = []
    contenders: dict[str, Run] = {
        OURS: lambda: run(lambda: magistral.ask(first, one)),
        "nothing cached": lambda: run(lambda: None),
    }
    comparison = Comparison(f"second turn, {title}", {})
    _run(comparison, contenders, repeats, report)
    cached, fresh = usage[-2:]
    comparison.facts |= {
        "prompt_tokens": fresh.prompt_tokens,
        "cached_tokens": {OURS: cached.cached_tokens, "nothing cached": fresh.cached_tokens},
    }
    return comparison


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


def _run(comparison: Comparison, contenders: Mapping[str, Run], repeats: int, report: Callable[[str], None]) -> None:
    for repeat, name, laps in interleave(contenders, repeats):
        speeds = ", ".join(f"{phase} {lap.per_second:.3g}/s" for phase, lap in laps.items())
        report(f"{comparison.title}: {f'{repeat}/{repeats}' if repeat else 'warm-up'} {name}: {speeds}")
        if repeat:
            comparison.add(name, laps)


def _ours(checkpoint: Checkpoint, prompt: Sequence[int], workload: Workload, reply: list[int]) -> Run:
    model = result_of(load_model(checkpoint))
    greedy = Sampler(SamplingParams(temperature=0), seed=0)
    total = workload.decode_tokens + 1

    def run() -> dict[str, Lap]:
        watch = Stopwatch()
        cache = KVCache(checkpoint.config, limit=len(prompt) + total)
        step = Stepper(model, cache)
        logits = result_of(prefill(step, prompt, chunk=2048))
        ids = decode(step, logits, greedy, stop=frozenset(), max_tokens=total)
        return _timed((identity for identity, _ in ids), len(prompt), watch, reply)

    return run


def _mlx_lm(folder: Path, dtype: mx.Dtype | None, prompt: Sequence[int], workload: Workload, reply: list[int]) -> Run:
    from mlx_lm.generate import generate_step, generation_stream
    from mlx_lm.utils import load_model as load_theirs

    model, _ = load_theirs(folder)
    if dtype is not None:
        model.set_dtype(dtype)
        mx.eval(model.parameters())
    total = workload.decode_tokens + 1

    def run() -> dict[str, Lap]:
        watch = Stopwatch()
        ids = (identity for identity, _ in generate_step(mx.array(list(prompt)), model, max_tokens=total))
        laps = _timed(ids, len(prompt), watch, reply)
        mx.synchronize(generation_stream)  # it has queued a pass more than it yields
        return laps

    return run


def _timed(ids: Iterator[Any], prompt_tokens: int, watch: Stopwatch, reply: list[int]) -> dict[str, Lap]:
    """Prefill lasts until the first id is there, decode from then to the last."""
    reply[:] = [next(ids)]
    laps = {"prefill": watch.lap(prompt_tokens)}
    reply.extend(ids)
    return laps | {"decode": watch.lap(len(reply) - 1)}


def _calls(draw: Callable[[], mx.array]) -> Run:
    def run() -> dict[str, Lap]:
        watch = Stopwatch()
        for _ in range(SAMPLER_CALLS):
            mx.eval(draw())
        return {"draw": watch.lap(SAMPLER_CALLS)}

    return run
