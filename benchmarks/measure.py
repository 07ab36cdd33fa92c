"""Times taken side by side, what their ratio says, and the machine they were taken on."""

import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

OURS = "magistral-mlx"
CONFIDENCE = 0.95
RESAMPLES = 4000
PACKAGES = ("magistral-mlx", "mlx", "mlx-lm", "numpy", "transformers")


def report(line: str) -> None:
    """Print a line of progress to stderr."""
    print(line, file=sys.stderr, flush=True)


@dataclass(frozen=True, slots=True)
class Lap:
    """The time that ``count`` tokens or calls took, on the clock and summed over all cores."""

    seconds: float
    cpu_seconds: float
    count: int

    @property
    def per_second(self) -> float:
        return self.count / self.seconds

    def __str__(self) -> str:
        return f"{self.seconds:.3g} s"


class Stopwatch:
    """A watch that starts when it is made; each lap starts where the last one ended."""

    def __init__(self) -> None:
        self._mark = self._now()

    @staticmethod
    def _now() -> tuple[float, float]:
        return time.perf_counter(), time.process_time()

    def lap(self, count: int) -> Lap:
        before, self._mark = self._mark, self._now()
        return Lap(self._mark[0] - before[0], self._mark[1] - before[1], count)


@dataclass(frozen=True, slots=True)
class Interval:
    """A middle value with its lower and upper end."""

    median: float
    low: float
    high: float

    def scaled(self, factor: float) -> "Interval":
        return Interval(factor * self.median, factor * self.low, factor * self.high)

    def inverse(self) -> "Interval":
        return Interval(1 / self.median, 1 / self.high, 1 / self.low)

    def __str__(self) -> str:
        median, low, high = (
            f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
            for value in (self.median, self.low, self.high)
        )
        return median if self.low == self.high else f"{median} ({low} to {high})"


Run = Callable[[], Mapping[str, Lap]]  # one repeat of a contender: its laps by phase


def interleave(
    contenders: Mapping[str, Run], repeats: int, *, warm_up: bool = True
) -> Iterator[tuple[int, str, Mapping[str, Lap]]]:
    """Run A B C, A B C, ..., so that other work on the machine meets all of them alike.

    Yields (repeat, contender, laps). Repeat 0 is the warm-up, which is not counted.
    """
    for repeat in range(0 if warm_up else 1, repeats + 1):
        for name, run in contenders.items():
            yield repeat, name, run()


def spread(laps: Sequence[Lap]) -> Interval:
    """Return units a second: the median, the slowest and the fastest repeat."""
    speeds = [lap.per_second for lap in laps]
    return Interval(float(np.median(speeds)), min(speeds), max(speeds))


def speedup(ours: Sequence[Lap], theirs: Sequence[Lap], seed: int = 0) -> Interval:
    """Return our speed over theirs: the ratio of medians and its 95 % bootstrap interval.

    Repeats are drawn in pairs, as they were taken, so noise that met both cancels.
    """
    mine, other = (np.array([lap.per_second for lap in laps]) for laps in (ours, theirs))
    drawn = np.random.default_rng(seed).integers(0, len(mine), (RESAMPLES, len(mine)))
    ratios = np.median(mine[drawn], axis=1) / np.median(other[drawn], axis=1)
    low, high = np.quantile(ratios, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Interval(float(np.median(mine) / np.median(other)), float(low), float(high))


@dataclass(slots=True)
class Comparison:
    """Every repeat of every contender by phase (phase -> contender -> laps), and the facts."""

    title: str
    facts: dict[str, Any]
    laps: dict[str, dict[str, list[Lap]]] = field(default_factory=dict)

    def add(self, contender: str, laps: Mapping[str, Lap]) -> None:
        for phase, lap in laps.items():
            self.laps.setdefault(phase, {}).setdefault(contender, []).append(lap)

    def run(
        self, contenders: Mapping[str, Run], repeats: int, *, warm_up: bool = True
    ) -> "Comparison":
        """Interleave the contenders and add every repeat but the warm-up."""
        for repeat, name, laps in interleave(contenders, repeats, warm_up=warm_up):
            turn = f"{repeat}/{repeats}" if repeat else "warm-up"
            times = ", ".join(f"{phase} {lap}" for phase, lap in laps.items())
            report(f"{self.title}: {turn} {name}: {times}")
            if repeat:
                self.add(name, laps)
        return self

    def rows(self) -> Iterator[tuple[str, str, Interval, float, Interval | None]]:
        """Yield (phase, contender, units a second, CPU seconds a unit, our speed over theirs)."""
        for phase, contenders in self.laps.items():
            for name, laps in contenders.items():
                cpu = float(np.median([lap.cpu_seconds / lap.count for lap in laps]))
                ratio = None if name == OURS else speedup(contenders[OURS], laps)
                yield phase, name, spread(laps), cpu, ratio

    def as_dict(self) -> dict[str, Any]:
        summary = [
            {
                "phase": phase,
                "contender": name,
                "per_second": asdict(speed),
                "cpu_seconds_per_unit": cpu,
                "ours_times_as_fast": None if ratio is None else asdict(ratio),
            }
            for phase, name, speed, cpu, ratio in self.rows()
        ]
        repeats = {
            phase: {name: [asdict(lap) for lap in laps] for name, laps in contenders.items()}
            for phase, contenders in self.laps.items()
        }
        return {"title": self.title, **self.facts, "summary": summary, "repeats": repeats}


@dataclass(frozen=True, slots=True)
class Finding:
    """Facts that are measured once."""

    title: str
    facts: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        return {"title": self.title, **self.facts}


def circumstances() -> dict[str, Any]:
    """Return the machine, memory, system, versions and commit that a figure belongs to."""
    return {
        "machine": platform.machine(),
        "chip": chip_name(),
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "os": platform.platform(),
        "python": platform.python_version(),
        "device": str(mx.default_device()),
        "versions": {name: _version(name) for name in PACKAGES},
        "commit": _git("rev-parse", "HEAD"),
        "is_modified": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "load_average": list(os.getloadavg()),
        "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def chip_name() -> str:
    if sys.platform == "darwin":
        return _output("sysctl", "-n", "machdep.cpu.brand_string")
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str:
    return _output("git", "-C", str(Path(__file__).parent), *arguments)


def _output(*command: str) -> str:
    """Return what a command prints, or nothing if it fails or does not exist."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
