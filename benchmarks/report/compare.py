"""Two result files held against each other: what got better or worse, and whether that is more than noise.

A file's figures are found by name. What was timed has repeats, drawn anew in both files; a share of problems has the
noise of so many throws; what is counted has none. A machine is not the same from run to run: how much slower it was
itself is seen on the peers that took turns with ours, else on the matrix that was streamed, and that much is allowed.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from benchmarks.measure import CONFIDENCE, RESAMPLES, Interval
from magistral_mlx.errors import OptionError, quoted

Better = Literal["higher", "lower"]
Kind = Literal["repeats", "share", "measured", "counted"]
Array = NDArray[np.float64]

# Facts of a result by their key: which way is better, and whether another run may give another value.
FIGURES: dict[str, tuple[Better, Kind]] = {
    "active_ratio": ("lower", "measured"),
    "bytes_per_token": ("lower", "counted"),
    "checkpoint_bytes": ("lower", "counted"),
    "bytes_per_second": ("higher", "measured"),
    "cost_per_token": ("lower", "counted"),
    "cpu_primitives": ("lower", "counted"),
    "exact": ("higher", "share"),
    "gpu_kernels": ("lower", "counted"),
    "gpu_kernels_per_layer": ("lower", "counted"),
    "highest_of_a_reply": ("lower", "counted"),
    "kl": ("lower", "measured"),
    "logits_error": ("lower", "measured"),
    "mlx_peak_bytes": ("lower", "measured"),
    "output_bytes": ("lower", "counted"),
    "passes": ("lower", "counted"),
    "passes_a_reply": ("lower", "counted"),
    "passes_per_token": ("lower", "counted"),
    "pass_at_1": ("higher", "share"),
    "peak_bytes_above_interpreter": ("lower", "measured"),
    "perplexity": ("lower", "measured"),
    "replies_equal_to_single_ones": ("higher", "counted"),
    "rss_bytes_above_imports": ("lower", "measured"),
    "shared_active_bytes": ("lower", "measured"),
    "shared_bytes": ("lower", "counted"),
    "top1_agreement": ("higher", "measured"),
}
BY_CONTENDER = {"peak_bytes_above_weights": ("lower", "measured")}  # {contender: value}
COUNTS: dict[str, Better] = {"right": "higher"}  # [of each case]
DURATIONS = ("seconds", "waits")  # {name: every repeat}
PEERS = ("mlx-lm", "mlx,", "llama.cpp")  # how the names of contenders begin that are not ours
STREAMED = "streaming matvec"  # the machine's own
SEPARATOR = " / "
THROWS = ("samples", "problems", "replies")  # of a share: the first of these beside it
LARGEST = 1e9  # of a ratio to nothing
CIRCUMSTANCES = ("chip", "cores", "memory_bytes", "os", "python", "device")
NAMES = (
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
)
SKIPPED = (
    "circumstances",
    "command",
    "repeats",
    "summary",
    "workload",
    "plan",
    "row_costs",
    "against_budget",
)


@dataclass(frozen=True, slots=True)
class Figure:
    """One measure of a file."""

    better: Better
    kind: Kind
    values: tuple[float, ...]  # every repeat; of anything else one value
    throws: int = 1  # of a share
    error: float = 0.0  # of something measured, where it is known


@dataclass(frozen=True, slots=True)
class Change:
    """What one figure became. ``ratio`` is B over A turned so that over 1 is better."""

    name: str
    better: Better
    before: float
    after: float
    ratio: Interval
    machine: (
        float  # what the machine itself became, as far as it was slower; 1 for what is not timed
    )
    is_regression: bool
    is_ours: bool

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def compare(before: Mapping[str, Any], after: Mapping[str, Any], margin: float) -> list[Change]:
    """Every figure that both have.

    Args:
        margin: what a measure may lose before it counts, beyond its own noise: between two runs a machine changes
            more than within one. What is counted may lose nothing.
    Raises:
        OptionError: they have none in common, or were taken of different checkpoints or workloads.
    """
    if not 0 <= margin < 1:
        raise OptionError(f"the margin is {margin}; use a share of 1, such as 0.05")
    first, second = figures(before), figures(after)
    common = [name for name in first if name in second]
    if not common:
        raise OptionError(
            f"the two results have no figure in common: {_summary(before, first)} against {_summary(after, second)}"
        )
    ratios = {name: _ratio(first[name], second[name]) for name in common}
    changes = []
    for name in common:
        figure, machine = first[name], _machine(name, first[name], ratios)
        allowed = 0.0 if figure.kind == "counted" else margin
        is_worse = _is_ours(name) and ratios[name].high < (1 - allowed) * machine - 1e-9
        before_median, after_median = (
            float(np.median(figure.values)),
            float(np.median(second[name].values)),
        )
        changes.append(
            Change(
                name,
                figure.better,
                before_median,
                after_median,
                ratio=ratios[name],
                machine=machine,
                is_regression=is_worse,
                is_ours=_is_ours(name),
            )
        )
    return changes


def figures(results: Mapping[str, Any]) -> dict[str, Figure]:
    """Every figure of a result file, by where it stands.

    Raises:
        OptionError: this is no result file.
    """
    if not isinstance(results, Mapping) or not any(
        isinstance(v, list | Mapping) for v in results.values()
    ):
        raise OptionError(
            "this is no result file of python -m benchmarks; those are written with --json"
        )
    found: dict[str, Figure] = {}
    for name, figure in _walk(results, ()):
        found.setdefault(name, figure)
    return found


def only_in_one(before: Mapping[str, Any], after: Mapping[str, Any]) -> tuple[int, int]:
    """How many figures the first has alone, and the second."""
    one, other = figures(before), figures(after)
    return len(one.keys() - other.keys()), len(other.keys() - one.keys())


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """What of the circumstances is not the same: such ratios are not of the code alone."""
    one, other = (results.get("circumstances", {}) for results in (before, after))
    facts = {name: (one.get(name), other.get(name)) for name in CIRCUMSTANCES}
    versions = {*one.get("versions", {}), *other.get("versions", {})}
    facts |= {
        name: (one.get("versions", {}).get(name), other.get("versions", {}).get(name))
        for name in versions
    }
    return [
        f"{name}: {quoted(a)}, then {quoted(b)}" for name, (a, b) in sorted(facts.items()) if a != b
    ]


def _walk(node: Any, path: tuple[str, ...]) -> Iterator[tuple[str, Figure]]:
    if isinstance(node, list):
        for i, item in enumerate(node):
            if isinstance(item, Mapping):
                yield from _walk(item, (*path, _name(item, i)))
        return
    repeats = node.get("repeats")
    if isinstance(repeats, Mapping):
        yield from _timed(repeats, (*path, _work(node)))
    elif isinstance(repeats, list):
        yield from _laps(repeats, (*path, _work(node)))
    for key, value in node.items():
        own = list(_stated(node, key, value, path))
        yield from own
        if not own and key not in SKIPPED and isinstance(value, Mapping | list):
            yield from _walk(value, (*path, key))


def _stated(
    node: Mapping[str, Any], key: str, value: Any, path: tuple[str, ...]
) -> Iterator[tuple[str, Figure]]:
    """What a key with a meaning says."""
    if key in FIGURES and isinstance(value, int | float) and not isinstance(value, bool):
        better, kind = FIGURES[key]
        throws = next((node[one] for one in THROWS if isinstance(node.get(one), int)), 1)
        error = float(node.get(f"{key}_error") or 0)
        yield _joined((*path, key)), Figure(better, kind, (float(value),), throws, error)
    elif key in BY_CONTENDER and isinstance(value, Mapping):
        for contender, peak in value.items():
            yield _joined((*path, contender, key)), Figure("lower", "measured", (float(peak),))
    elif key in COUNTS and isinstance(value, list):
        yield _joined((*path, key)), Figure(COUNTS[key], "measured", (float(sum(value)),))
    elif key in DURATIONS and isinstance(value, Mapping):
        for name, seconds in value.items():
            yield (
                _joined((*path, name, key)),
                Figure("lower", "repeats", tuple(map(float, seconds))),
            )


def _timed(phases: Mapping[str, Any], path: tuple[str, ...]) -> Iterator[tuple[str, Figure]]:
    for phase, contenders in phases.items():
        for contender, laps in contenders.items():
            yield from _laps(laps, (*path, phase, contender))


def _laps(laps: Sequence[Mapping[str, Any]], path: tuple[str, ...]) -> Iterator[tuple[str, Figure]]:
    speeds = tuple(lap["count"] / lap["seconds"] for lap in laps)
    yield _joined((*path, "per second")), Figure("higher", "repeats", speeds)
    peaks = [lap["peak_bytes"] for lap in laps if "peak_bytes" in lap]
    if peaks:
        yield _joined((*path, "peak bytes")), Figure("lower", "repeats", tuple(map(float, peaks)))


def _name(item: Mapping[str, Any], place: int) -> str:
    said = [str(item[key]) for key in NAMES if isinstance(item.get(key), str | int)]
    return ", ".join(said) or str(place)


def _work(node: Mapping[str, Any]) -> str:
    """Tells apart what cannot be compared: another checkpoint, another prompt."""
    workload = {k: v for k, v in (node.get("workload") or {}).items() if k != "repeats"}
    parts = [
        str(node.get("checkpoint", ""))[:8],
        *(f"{k} {v}" for k, v in workload.items() if isinstance(v, int)),
    ]
    return ", ".join(part for part in parts if part)


def _joined(path: Sequence[str]) -> str:
    return SEPARATOR.join(part for part in path if part)


def _summary(results: Mapping[str, Any], found: Mapping[str, Figure]) -> str:
    kinds = ", ".join(key for key in results if key not in SKIPPED)
    return f"{kinds or 'nothing'} ({next(iter(found), 'no figure')} ...)"


def _machine(name: str, figure: Figure, ratios: Mapping[str, Interval]) -> float:
    """By the peers of the same phase, else by the matrix streamed; at most 1."""
    if figure.kind != "repeats":
        return 1.0
    group = name.split(SEPARATOR)[:-2]
    peers = [
        r.median
        for other, r in ratios.items()
        if other.split(SEPARATOR)[:-2] == group and not _is_ours(other)
    ]
    streamed = [ratio.median for other, ratio in ratios.items() if STREAMED in other]
    return min(1.0, float(np.median(peers or streamed or [1.0])))


def _is_ours(name: str) -> bool:
    return not any(part.startswith((*PEERS, STREAMED)) for part in name.split(SEPARATOR))


def _ratio(before: Figure, after: Figure) -> Interval:
    """The ratio of the medians, over 1 where ``after`` is better, and its 95 % bootstrap interval."""
    one, other = _draws(before, 0), _draws(after, 1)
    middle = _divide(np.median(after.values), np.median(before.values))
    ratios = _divide(other, one)
    if before.better == "lower":
        middle, ratios = _divide(1.0, middle), _divide(1.0, ratios)
    low, high = np.quantile(ratios, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Interval(float(middle), float(low), float(high))


def _draws(figure: Figure, seed: int) -> Array:
    rng = np.random.default_rng(seed)
    values = np.array(figure.values)
    if figure.kind == "share":
        return (
            rng.binomial(figure.throws, min(1.0, max(0.0, float(values[0]))), RESAMPLES)
            / figure.throws
        )
    if figure.error:
        return np.maximum(rng.normal(values[0], figure.error, RESAMPLES), 0)
    drawn = rng.integers(0, len(values), (RESAMPLES, len(values)))
    return np.median(values[drawn], axis=1)


def _divide(one: Any, other: Any) -> Any:
    """Nothing over nothing is 1."""
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.divide(one, other)
    return np.nan_to_num(ratio, nan=1.0, posinf=LARGEST)
