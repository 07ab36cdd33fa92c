"""How a model is loaded: memory, cache, drafting and reasoning format."""

from dataclasses import dataclass
from typing import Literal

from magistral_mlx.checkpoint.manifest import ReasoningFormat
from magistral_mlx.options import option


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadOptions:
    """How a model is loaded. What depends on the model is checked against it when it is planned."""

    revision: str | None = option(None, "Branch, tag or commit of a hub id.", metavar="R")
    max_kv_size: int | None = option(
        None,
        "Context to plan for, prompt and reply together; by default what fits, at most 40,960. "
        "A prompt that does not fit is refused, never cut.",
        metavar="N",
    )
    kv_bits: Literal[16, 8, 4] | None = option(
        None, "Quantize the KV cache; 16 does not.", metavar="16|8|4"
    )
    prefill_step_size: int | None = option(
        None, "Prompt tokens a pass; by default what fits.", metavar="N"
    )
    memory_gb: float | None = option(
        None, "Memory to plan for, in 10^9 bytes; by default the device's.", metavar="G"
    )
    wired: bool = option(
        False,
        "Keep weights and cache in a Mac's memory when others want it. "
        "Implicated in kernel panics of macOS.",
    )
    draft_model: str | None = option(
        None,
        "A small model of the same vocabulary that guesses ahead; by default the text so far does.",
        metavar="M",
    )
    num_draft_tokens: int | None = option(
        None,
        "Guesses checked in one pass at most; by default as many as pay on this device, "
        "0 for none.",
        metavar="N",
    )
    reasoning_format: ReasoningFormat | None = option(
        None, "How the model writes its traces, where its files show that wrongly."
    )
