"""Run one conversion: ``python -m benchmarks.converter.contender WHO SOURCE TARGET BITS METHOD``.

The last line on stdout is JSON with its time and memory. Imports are not counted, and nothing but
the standard library is imported before the contender's own modules.
"""

import json
import os
import resource
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

GROUP_SIZE = 64
STATUS = Path("/proc/self/status")  # Linux
CLEAR = Path("/proc/self/clear_refs")

Convert = Callable[[str, str, int, Any], object]  # source, target, bits, method


def load_ours() -> Convert:
    from magistral_mlx.convert import convert_checkpoint

    return lambda source, target, bits, method: convert_checkpoint(
        source, target, q_bits=bits, q_group_size=GROUP_SIZE, q_method=method
    )


def load_mlx_lm() -> Convert:
    from mlx_lm import convert

    return lambda source, target, bits, _: convert(
        hf_path=source, mlx_path=target, quantize=True, q_group_size=GROUP_SIZE, q_bits=bits
    )


LOADERS: dict[str, Callable[[], Convert]] = {"magistral-mlx": load_ours, "mlx-lm": load_mlx_lm}


def measured(act: Callable[[], object]) -> dict[str, Any]:
    """Return seconds, CPU seconds of all threads and children, and this process's peak memory.

    ``baseline_rss_bytes`` is the memory before. ``sync_seconds`` is the time that the system then
    takes to put the written files on the disk, which is short if ``act`` flushed them itself.
    """
    rss_from = _restart_peak()
    baseline, cpu_before, started = _rss_bytes("VmRSS"), sum(os.times()[:4]), time.perf_counter()
    act()
    seconds, cpu_seconds = time.perf_counter() - started, sum(os.times()[:4]) - cpu_before
    peak = _rss_bytes("VmHWM")
    started = time.perf_counter()
    os.sync()
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "sync_seconds": time.perf_counter() - started,
        "baseline_rss_bytes": baseline,
        "peak_rss_bytes": peak,
        "rss_from": rss_from,
    }


def _restart_peak() -> str:
    """Reset the peak to the memory in use, if the system can, and return the peak's source."""
    if not STATUS.exists():
        return "ru_maxrss; the baseline is its value after the imports"
    try:
        CLEAR.write_text("5")
    except OSError:
        return "VmHWM, imports included"
    return "VmHWM, restarted after the imports"


def _rss_bytes(field: str) -> int:
    """Return ``VmRSS`` (in use) or ``VmHWM`` (its peak); without /proc the peak for both.

    Linux does not use ru_maxrss, which a process inherits from its parent.
    """
    if STATUS.exists():
        lines = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
        return 1024 * int(lines[field].removesuffix("kB"))
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main(argv: Sequence[str]) -> int:
    who, source, target, bits, method = argv
    started = time.perf_counter()
    convert = LOADERS[who]()
    import_seconds = time.perf_counter() - started
    result = measured(lambda: convert(source, target, int(bits), method))
    print(json.dumps(result | {"import_seconds": import_seconds}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
