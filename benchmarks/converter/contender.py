"""One conversion in a process of its own: ``python -m benchmarks.converter.contender WHO SOURCE TARGET BITS METHOD``.

The last line on stdout is JSON: what it took. Only the standard library is imported before the contender's
own modules, and what those take is not counted.
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

Convert = Callable[[str, str, int, str], object]  # source, target, bits, our method


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
    """Seconds, CPU seconds of all threads and children, and the peak of this process above what it held before.

    ``sync_seconds`` is how long the system then takes to put on the disk what it was given to write: a
    converter that flushes its files has waited for that itself.
    """
    rss_from = _restart_peak()
    baseline, cpu_before, started = _rss_bytes("VmRSS"), sum(os.times()[:4]), time.perf_counter()
    act()
    seconds, cpu_seconds, peak = (
        time.perf_counter() - started,
        sum(os.times()[:4]) - cpu_before,
        _rss_bytes("VmHWM"),
    )
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
    """Let the peak begin at what is resident now, where the system can; says what the peak is read from."""
    if not STATUS.exists():
        return "ru_maxrss; the baseline is its value after the imports"
    try:
        CLEAR.write_text("5")
    except OSError:
        return "VmHWM, imports included"
    return "VmHWM, restarted after the imports"


def _rss_bytes(field: str) -> int:
    """``VmRSS``, what is resident, or ``VmHWM``, its peak; where there is no /proc, the peak for both.

    Not ru_maxrss on Linux: a process inherits that of the one that started it.
    """
    if STATUS.exists():
        lines = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
        return 1024 * int(lines[field].removesuffix("kB"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )


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
