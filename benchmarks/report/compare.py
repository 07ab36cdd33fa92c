"""Two result files compared: which figures got better or worse beyond noise.

Figures are found by name. Timed figures have repeats, which are drawn anew from both files. A share
of problems has binomial noise, and counts have none. The machine may have changed between two runs:
the peers that took turns with ours show by how much, or else the matrix that was read.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from benchmarks.measure import CONFIDENCE, RESAMPLES, Interval
from magistral_mlx.errors import OptionError, quoted

Kind = Literal["repeats", "share", "measured", "counted"]
# Facts of a result by key, and those of them that are better when they are higher.
FACTS: dict[Kind, str] = {
    "counted": "bytes_per_token checkpoint_bytes cost_per_token cpu_primitives gpu_kernels "
    "gpu_kernels_per_layer highest_of_a_reply output_bytes passes passes_a_reply passes_per_token "
    "replies_equal_to_single_ones shared_bytes",
    "measured": "active_ratio bytes_per_second kl logits_error mlx_peak_bytes perplexity "
    "peak_bytes_above_interpreter rss_bytes_above_imports shared_active_bytes top1_agreement",
    "share": "exact pass_at_1",
}
HIGHER = (
    "exact",
    "pass_at_1",
    "bytes_per_second",
    "replies_equal_to_single_ones",
    "top1_agreement",
)
BY_CONTENDER = "peak_bytes_above_weights"  # {contender: value}
DURATIONS = ("seconds", "waits")  # {name: every repeat}
PEERS = ("mlx-lm", "mlx,", "llama.cpp")  # names of contenders that are not ours begin so
STREAMED = "streaming matvec"  # the machine's own bandwidth
SEPARATOR = " / "
TRIALS = ("samples", "problems", "replies")  # of a share: the first of these beside it
FIRST_TOKEN = "first token"  # a phase that is a latency, not a speed
LARGEST = 1e9  # stands for a ratio to zero
CIRCUMSTANCES = ("chip", "cores", "memory_bytes", "os", "python", "device")
NAMES = [
    "title",
    "task",
    "chip",
    "n",
    "kv_bits",
    "group",
    "part",
    "language",
    "prompt_tokens",
    "context",
]
SKIPPED = [
    "circumstances",
    "command",
    "repeats",
    "summary",
    "workload",
    "plan",
    "row_costs",
    "against_budget",
]


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure of a file: every repeat, or one value with its trials or standard error."""

    kind: Kind
    values: tuple[float, ...]
    is_higher_better: bool = False
    trials: int = 1
    error: float = 0.0

    @property
    def median(self) -> float:
        return float(np.median(self.values))

    def draws(self, seed: int) -> Any:
        """Return values that another run on the same machine could give."""
        rng = np.random.default_rng(seed)
        values = np.array(self.values)
        if self.kind == "share":
            return rng.binomial(self.trials, np.clip(values[0], 0, 1), RESAMPLES) / self.trials
        if self.error:
            return np.maximum(rng.normal(values[0], self.error, RESAMPLES), 0)
        drawn = rng.integers(0, len(values), (RESAMPLES, len(values)))
        return np.median(values[drawn], axis=1)


@dataclass(frozen=True, slots=True)
class Change:
    """One figure before and after.

    ``ratio`` is after over before, turned so that over 1 is better. ``machine`` is the ratio of
    the machine's own speed if that fell, else 1.
    """

    name: str
    before: float
    after: float
    ratio: Interval
    machine: float
    is_regression: bool
    is_ours: bool

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def compare(before: Mapping[str, Any], after: Mapping[str, Any], margin: float) -> list[Change]:
    """Compare every figure that both results have.

    Args:
        before: a result file.
        after: another.
        margin: the share that a measured figure may lose beyond its noise, since a machine
            changes more between two runs than within one. A counted figure may lose nothing.

    Raises:
        OptionError: they have no figure in common, or are of other checkpoints or workloads.
    """
    if not 0 <= margin < 1:
        raise OptionError(f"the margin is {margin}; use a share of 1, such as 0.05")
    first, second = figures(before), figures(after)
    ratios = {name: _ratio(first[name], second[name]) for name in first if name in second}
    if not ratios:
        raise OptionError(
            f"the two results have no figure in common: {_summary(before, first)} against "
            f"{_summary(after, second)}"
        )
    changes = []
    for name, ratio in ratios.items():
        kind = first[name].kind
        machine = _machine(name, ratios) if kind == "repeats" else 1.0
        allowed = 0.0 if kind == "counted" else margin
        is_worse = _is_ours(name) and ratio.high < (1 - allowed) * machine - 1e-9
        medians = first[name].median, second[name].median
        changes.append(Change(name, *medians, ratio, machine, is_worse, _is_ours(name)))
    return changes


def figures(results: Mapping[str, Any]) -> dict[str, Figure]:
    """Return every figure of a result file by its path.

    Raises:
        OptionError: this is no result file.
    """
    if not isinstance(results, Mapping) or not any(
        isinstance(value, list | Mapping) for value in results.values()
    ):
        raise OptionError("this is no result file of python -m benchmarks; take one with --json")
    found: dict[str, Figure] = {}
    for name, figure in _walk(results, ()):
        found.setdefault(name, figure)
    return found


def only_in_one(before: Mapping[str, Any], after: Mapping[str, Any]) -> tuple[int, int]:
    """Count the figures that only the first result has, and only the second."""
    one, other = figures(before).keys(), figures(after).keys()
    return len(one - other), len(other - one)


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Describe the circumstances that differ, which ratios depend on too."""
    one, other = ({**_circumstances(results)} for results in (before, after))
    return [
        f"{name}: {quoted(one.get(name))}, then {quoted(other.get(name))}"
        for name in sorted({*one, *other})
        if one.get(name) != other.get(name)
    ]


def _circumstances(results: Mapping[str, Any]) -> dict[str, Any]:
    facts = results.get("circumstances", {})
    return {name: facts.get(name) for name in CIRCUMSTANCES} | facts.get("versions", {})


def _walk(node: Any, path: tuple[str, ...]) -> Iterator[tuple[str, Figure]]:
    if isinstance(node, list):
        for i, item in enumerate(node):
            if isinstance(item, Mapping):
                said = [str(item[key]) for key in NAMES if isinstance(item.get(key), str | int)]
                yield from _walk(item, (*path, ", ".join(said) or str(i)))
        return
    repeats = node.get("repeats")
    if isinstance(repeats, Mapping):
        for phase, contenders in repeats.items():
            for contender, laps in contenders.items():
                yield from _laps(laps, (*path, _work(node), phase, contender))
    elif isinstance(repeats, list):
        yield from _laps(repeats, (*path, _work(node)))
    for key, value in node.items():
        own = list(_figures_of(node, key, value, path))
        yield from own
        if not own and key not in SKIPPED and isinstance(value, Mapping | list):
            yield from _walk(value, (*path, key))


def _figures_of(
    node: Mapping[str, Any], key: str, value: Any, path: tuple[str, ...]
) -> Iterator[tuple[str, Figure]]:
    """Yield the figures of a key that has a meaning."""
    kind = next((kind for kind, keys in FACTS.items() if key in keys.split()), None)
    if kind and isinstance(value, int | float) and not isinstance(value, bool):
        trials = next((node[one] for one in TRIALS if isinstance(node.get(one), int)), 1)
        error = float(node.get(f"{key}_error") or 0)
        yield _joined(*path, key), Figure(kind, (float(value),), key in HIGHER, trials, error)
    elif key == BY_CONTENDER and isinstance(value, Mapping):
        for contender, peak in value.items():
            yield _joined(*path, contender, key), Figure("measured", (float(peak),))
    elif key in DURATIONS and isinstance(value, Mapping):
        for name, seconds in value.items():
            yield _joined(*path, name, key), Figure("repeats", tuple(map(float, seconds)))


def _laps(laps: Sequence[Mapping[str, Any]], path: tuple[str, ...]) -> Iterator[tuple[str, Figure]]:
    speeds = tuple(lap["count"] / lap["seconds"] for lap in laps)
    if FIRST_TOKEN in path:
        milliseconds = tuple(1000 / speed for speed in speeds)
        yield _joined(*path, "milliseconds"), Figure("repeats", milliseconds)
    else:
        yield _joined(*path, "per second"), Figure("repeats", speeds, is_higher_better=True)
    if peaks := tuple(float(lap["peak_bytes"]) for lap in laps if "peak_bytes" in lap):
        yield _joined(*path, "peak bytes"), Figure("repeats", peaks)


def _work(node: Mapping[str, Any]) -> str:
    """Return checkpoint and workload, whose figures cannot be compared with others'."""
    workload = {k: v for k, v in (node.get("workload") or {}).items() if k != "repeats"}
    sizes = (f"{k} {v}" for k, v in workload.items() if isinstance(v, int))
    return ", ".join(part for part in (str(node.get("checkpoint", ""))[:8], *sizes) if part)


def _joined(*path: str) -> str:
    return SEPARATOR.join(part for part in path if part)


def _summary(results: Mapping[str, Any], found: Mapping[str, Figure]) -> str:
    kinds = ", ".join(key for key in results if key not in SKIPPED)
    return f"{kinds or 'nothing'} ({next(iter(found), 'no figure')} ...)"


def _machine(name: str, ratios: Mapping[str, Interval]) -> float:
    """Return the ratio of the peers in the same phase, else of the matrix; at most 1."""
    group = name.split(SEPARATOR)[:-2]
    peers = [
        ratio.median
        for other, ratio in ratios.items()
        if other.split(SEPARATOR)[:-2] == group and not _is_ours(other)
    ]
    streamed = [ratio.median for other, ratio in ratios.items() if STREAMED in other]
    return min(1.0, float(np.median(peers or streamed or [1.0])))


def _is_ours(name: str) -> bool:
    return not any(part.startswith((*PEERS, STREAMED)) for part in name.split(SEPARATOR))


def _ratio(before: Figure, after: Figure) -> Interval:
    """Return the ratio of medians, over 1 if better, and its 95 % bootstrap interval."""
    middle, ratios = _over(after.median, before.median), _over(after.draws(1), before.draws(0))
    if not before.is_higher_better:
        middle, ratios = _over(1.0, middle), _over(1.0, ratios)
    low, high = np.quantile(ratios, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Interval(float(middle), float(low), float(high))


def _over(one: Any, other: Any) -> Any:
    """Divide; zero over zero is 1."""
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.divide(one, other)
    return np.nan_to_num(ratio, nan=1.0, posinf=LARGEST)
