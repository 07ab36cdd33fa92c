"""LoadOptions: how a model is loaded, each option declared once."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from magistral_mlx.checkpoint.manifest import ReasoningFormat
from magistral_mlx.errors import OptionError, named
from magistral_mlx.files import as_path
from magistral_mlx.options import FOLDER, check_count, documented, is_number, option, refused

KVBits = Literal[16, 8, 4]
MAX_MEMORY_GB = 1_000_000
# MLX's kernels for a few rows end at 8 rows: one token, and these guesses.
MAX_DRAFT_TOKENS = 7


@documented
@dataclass(frozen=True, slots=True, kw_only=True)
class LoadOptions:
    """Options of loading a model. The plan checks those that depend on the model.

    Raises:
        OptionError: a value is out of range.
    """

    revision: str | None = option(None, "Branch, tag or commit of a hub id.", metavar="R")
    max_kv_size: int | None = option(
        None,
        "Context to plan for, prompt and reply together; by default what fits, at most 40,960. "
        "A prompt that does not fit is refused, never cut.",
        metavar="N",
        aliases=("--context",),
    )
    kv_bits: KVBits | None = option(None, "Quantize the KV cache; 16 does not.", metavar="16|8|4")
    prefill_step_size: int | None = option(
        None, "Prompt tokens a pass; by default what fits.", metavar="N"
    )
    memory_gb: float | None = option(
        None,
        "Memory that may be used, in 10^9 bytes; by default what the device recommends, which is "
        "less than it has.",
        metavar="G",
    )
    wired: bool = option(
        False,
        "Keep weights and cache in a Mac's memory when other programs want it. "
        "It has been linked to kernel panics of macOS.",
    )
    draft_model: str | Path | None = option(
        None,
        "A small model of the same vocabulary that drafts tokens; by default drafts are copied "
        "from the text so far.",
        metavar="M",
        completes=(FOLDER, "demo"),
    )
    num_draft_tokens: int | None = option(
        None,
        "Most drafted tokens that one pass checks; by default as many as pay on this device, "
        "0 for none.",
        metavar="N",
    )
    tokenizer: str | Path | None = option(
        None,
        "A folder or hub id whose tekken.json is used; by default the model's own, or that of the "
        "base model that its files name.",
        metavar="T",
    )
    reasoning_format: ReasoningFormat | None = option(
        None, "The form of the model's traces, if its files show it wrongly."
    )

    def __post_init__(self) -> None:
        if not isinstance(self.revision, str | None):
            raise refused("revision", self.revision, "a branch, tag or commit of a hub id")
        if self.kv_bits is not None and not _is_kv_bits(self.kv_bits):
            raise refused(
                "kv_bits", self.kv_bits, "8 or 4, or 16 for a cache that is not quantized"
            )
        check_count("prefill_step_size", self.prefill_step_size, 1)
        memory_gb = self.memory_gb
        if memory_gb is not None and not (is_number(memory_gb) and 0 < memory_gb < MAX_MEMORY_GB):
            below = f"a number of gigabytes over 0, below {MAX_MEMORY_GB:,}"
            raise refused("memory_gb", memory_gb, below)
        if type(self.wired) is not bool:
            raise refused("wired", self.wired, "True or False")
        if self.draft_model is not None:
            as_path(self.draft_model, named("draft_model"))
        if self.tokenizer is not None:
            as_path(self.tokenizer, named("tokenizer"))
        _check_draft_tokens(self.num_draft_tokens, has_draft=self.draft_model is not None)
        formats = get_args(ReasoningFormat)
        if self.reasoning_format is not None and self.reasoning_format not in formats:
            raise refused("reasoning_format", self.reasoning_format, " or ".join(formats))


def _check_draft_tokens(count: int | None, *, has_draft: bool) -> None:
    check_count("num_draft_tokens", count, 0, MAX_DRAFT_TOKENS)
    if count == 0 and has_draft:
        raise OptionError(
            f"{named('num_draft_tokens')} is 0, so a draft model would have nothing to guess; "
            f"leave it or {named('draft_model')} out"
        )


def _is_kv_bits(value: object) -> bool:
    return type(value) is int and value in get_args(KVBits)


DEFAULTS = LoadOptions()
