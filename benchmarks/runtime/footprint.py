"""Make one reply in a process of its own: ``python -m benchmarks.runtime.footprint FOLDER TOKENS``.

The last line on stdout is JSON: the forecast, MLX's peak, and the process's memory above imports.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx

import magistral_mlx as mm
from benchmarks.process import measured
from magistral_mlx.tokenizer.tekken import Tokenizer

QUESTION = "How many r's are in strawberry?"


def main(argv: Sequence[str]) -> int:
    folder, max_tokens = Path(argv[0]), int(argv[1])
    # The first reply imports modules and compiles kernels.
    mm.load("demo").ask(QUESTION, mm.SamplingParams(max_tokens=1))
    mx.clear_cache()
    context = len(Tokenizer.from_folder(folder).encode_chat(QUESTION)) + max_tokens
    found: dict[str, Any] = {}

    def act() -> None:
        magistral = mm.load(folder, max_kv_size=context)
        sampling = mm.SamplingParams(temperature=0, max_tokens=max_tokens)
        usage = magistral.ask(QUESTION, sampling).usage
        found["forecast_bytes"] = magistral.plan.total_bytes
        found["mlx_peak_bytes"] = usage.peak_memory_bytes
        found["tokens"] = usage.prompt_tokens + usage.completion_tokens

    rss = measured(act)
    found["rss_bytes_above_imports"] = rss["peak_rss_bytes"] - rss["baseline_rss_bytes"]
    print(json.dumps(found | {"rss_from": rss["rss_from"]}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
