"""Run one conversion: ``python -m benchmarks.converter.contender WHO SOURCE TARGET BITS METHOD``.

The last line on stdout is JSON with its time and memory. Imports are not counted, and nothing but
the standard library is imported before the contender's own modules.
"""

import json
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.process import measured

GROUP_SIZE = 64

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
