"""Finished replies as JSON objects, and the figures of several replies."""

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from magistral_mlx.errors import counted, in_units
from magistral_mlx.generation.reply import Reply, Samples, vote
from magistral_mlx.terminal.display import ending, rate, tell
from magistral_mlx.terminal.verbosity import is_quiet, is_verbose

USAGE_KEYS = (
    "prompt_tokens",
    "completion_tokens",
    "reasoning_tokens",
    "cached_tokens",
    "forward_passes",
    "prefill_seconds",
    "decode_seconds",
    "peak_memory_bytes",
    "seed",
)
# Answers whose votes are shown.
MOST_VOTES = 5


def as_object(reply: Reply, model: str) -> dict[str, Any]:
    """Return a reply as the object that --json prints."""
    usage = asdict(reply.usage)
    return {
        "reasoning": reply.reasoning,
        "answer": reply.answer,
        "finish_reason": reply.finish_reason,
        "reasoning_closed_by": reply.reasoning_closed_by,
        **{key: usage[key] for key in USAGE_KEYS},
        "model": model,
    }


def cancelled_object(reasoning: str, answer: str, model: str) -> dict[str, Any]:
    """Return the object of a reply that Ctrl-C ended: its text so far, without figures."""
    unknown = dict.fromkeys(("reasoning_closed_by", *USAGE_KEYS))
    return {
        "reasoning": reasoning,
        "answer": answer,
        "finish_reason": "cancelled",
        **unknown,
        "model": model,
    }


def samples_object(samples: Samples, model: str, *, is_complete: bool) -> dict[str, Any]:
    """Return several replies as the object that --json prints."""
    replies = [as_object(reply, model) for reply in samples.replies]
    ended = {} if is_complete else {"finish_reason": "cancelled"}
    return asdict(samples) | {"replies": replies} | ended


def report_samples(samples: Samples) -> None:
    """Write the votes and the cost of several replies on stderr; with --verbose a line for each."""
    if is_quiet() or not samples.replies:
        return
    if is_verbose():
        for reply in samples.replies:
            tell(_short(reply), is_dim=True)
    votes = list(samples.votes.items())
    for answer, count in votes[:MOST_VOTES]:
        tell(f"{count} of {len(samples.replies)}: {answer}")
    if len(votes) > MOST_VOTES:
        tell(f"and {counted(len(votes) - MOST_VOTES, 'other answer')}")
    tell(sample_figures(samples.replies), is_dim=True)
    sys.stderr.flush()


def sample_figures(replies: Sequence[Reply]) -> str:
    """Format the cost of replies that were decoded together as one line."""
    usages = [reply.usage for reply in replies]
    first, last = usages[0], usages[-1]
    tokens = sum(usage.completion_tokens for usage in usages)
    reasoning = sum(usage.reasoning_tokens for usage in usages)
    seconds = max(usage.decode_seconds for usage in usages)
    endings = Counter(text for reply in replies if (text := ending(reply)))
    seeds = f"seed {first.seed}" if len(usages) == 1 else f"seeds {first.seed} to {last.seed}"
    return (
        f"{''.join(f'{count} {text}' for text, count in endings.items())}"
        f"prompt {counted(first.prompt_tokens, 'token')}; "
        f"{counted(len(replies), 'reply', 'replies')} of {counted(tokens, 'token')} in all "
        f"({reasoning:,} reasoning), {rate(tokens - len(replies), seconds)}; "
        f"peak memory {in_units(max(usage.peak_memory_bytes for usage in usages))}; {seeds}"
    )


def _short(reply: Reply) -> str:
    found = vote(reply.answer) or "no answer"
    tokens = counted(reply.usage.completion_tokens, "token")
    return f"seed {reply.usage.seed}: {ending(reply)}{found}; {tokens}"
