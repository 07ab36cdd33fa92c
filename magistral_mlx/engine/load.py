"""Load a checkpoint: the door of the library."""

from collections.abc import Generator
from pathlib import Path

from magistral_mlx.checkpoint.folder import open_checkpoint, resolve
from magistral_mlx.checkpoint.manifest import ReasoningFormat
from magistral_mlx.demo import demo_checkpoint
from magistral_mlx.engine.chat import result_of
from magistral_mlx.engine.magistral import Magistral
from magistral_mlx.errors import CheckpointError, OptionError, quoted
from magistral_mlx.files import as_path
from magistral_mlx.generation.speculation import Speculation, check_draft_tokens, open_draft
from magistral_mlx.model.device import limit_memory
from magistral_mlx.model.loader import load_model
from magistral_mlx.model.memory import plan_for
from magistral_mlx.tokenizer.tekken import Tokenizer


def load(
    model: str | Path,
    *,
    context: int | None = None,
    kv_bits: int | None = None,
    prefill_step_size: int | None = None,
    memory_gb: float | None = None,
    wired: bool = False,
    draft: str | Path | None = None,
    num_draft_tokens: int | None = None,
    reasoning_format: ReasoningFormat | None = None,
    revision: str | None = None,
) -> Magistral:
    """Load a checkpoint: a folder, a hub id such as ``org/name``, or ``"demo"``, the embedded model.

    Args:
        context: positions to plan for; by default as many as fit, at most 40,960.
        kv_bits: 8 or 4 for a quantized cache; None or 16 for the activations' type.
        prefill_step_size: prompt ids a pass; by default as many as fit.
        memory_gb: plan for this much memory instead of what the device recommends.
        wired: keep weights and cache in a Mac's memory even when others want it; see ``device.limit_memory``.
        draft: a small model of the same vocabulary that guesses ids; by default the text so far does.
        num_draft_tokens: guesses checked in one pass at most; by default as many as pay on this device, 0 for none.
            On a CPU the reply is the same to the bit; on a GPU, whose sums may depend on the number of rows, ids
            that are nearly equally probable may fall otherwise.
        reasoning_format: "text" for traces in ``<think>`` tags, "control" for control ids; by default what the
            checkpoint's files show.
        revision: branch, tag or commit of a hub id.
    Raises:
        CheckpointError, TokenizerError, HubError: the checkpoint cannot be used or fetched.
        MemoryLimitError: it does not fit, said before its weights are read.
        OptionError: an argument is out of range.
    """
    return result_of(
        loading(
            model,
            context=context,
            kv_bits=kv_bits,
            prefill_step_size=prefill_step_size,
            memory_gb=memory_gb,
            wired=wired,
            draft=draft,
            num_draft_tokens=num_draft_tokens,
            reasoning_format=reasoning_format,
            revision=revision,
        )
    )


def loading(
    model: str | Path,
    *,
    context: int | None = None,
    kv_bits: int | None = None,
    prefill_step_size: int | None = None,
    memory_gb: float | None = None,
    wired: bool = False,
    draft: str | Path | None = None,
    num_draft_tokens: int | None = None,
    reasoning_format: ReasoningFormat | None = None,
    revision: str | None = None,
) -> Generator[tuple[int, int], None, Magistral]:
    """As ``load``, but a generator: yields (bytes loaded, bytes in all) and returns the Magistral."""
    check_draft_tokens(num_draft_tokens, has_draft=draft is not None)
    checkpoint = open_checkpoint(_folder(model, revision))
    tokenizer = Tokenizer.from_folder(checkpoint.folder, reasoning_format)
    if tokenizer.vocab_size != checkpoint.config.vocab_size:
        raise CheckpointError(
            f"{checkpoint.folder}: tekken.json has {tokenizer.vocab_size} ids, the model "
            f"{checkpoint.config.vocab_size}; they are not of the same model: download both again"
        )
    small = None if draft is None else open_draft(_folder(draft, None), tokenizer)
    plan = plan_for(
        checkpoint,
        context=context,
        kv_bits=kv_bits,
        prefill_chunk=prefill_step_size,
        memory_gb=memory_gb,
        draft=small,
    )
    limit_memory(
        plan.budget_bytes, freed=plan.workspace_bytes, wired=plan.held_bytes if wired else None
    )
    transformer = yield from load_model(checkpoint)
    speculation = yield from Speculation.of(
        transformer, checkpoint, plan, limit=num_draft_tokens, draft=small
    )
    return Magistral(transformer, checkpoint, tokenizer, plan, speculation)


def _folder(model: str | Path, revision: str | None) -> Path:
    if not isinstance(revision, str | None):
        raise OptionError(
            f"revision is {quoted(revision)}; name a branch, tag or commit of a hub id"
        )
    if model == "demo" and revision is not None:
        raise OptionError(
            f"demo is the embedded model, which has no revision {revision!r}; leave the revision out"
        )
    as_path(model, "model")
    return demo_checkpoint() if model == "demo" else resolve(model, revision=revision, layout="hf")
