"""Load a checkpoint: the door of the library."""

import logging
from collections.abc import Generator
from functools import partial
from pathlib import Path
from typing import NamedTuple

from magistral_mlx.checkpoint.folder import Checkpoint, open_checkpoint
from magistral_mlx.demo import resolve_model
from magistral_mlx.engine.line import Line
from magistral_mlx.engine.magistral import Magistral
from magistral_mlx.engine.worker_stream import on_worker
from magistral_mlx.errors import in_units
from magistral_mlx.generation.speculation import Speculation, open_draft
from magistral_mlx.model.device import limit_memory
from magistral_mlx.model.load_options import DEFAULTS, LoadOptions
from magistral_mlx.model.loader import load_model
from magistral_mlx.model.memory import MemoryPlan, plan_for
from magistral_mlx.options import takes_keywords_of
from magistral_mlx.streams import Progress, streamed
from magistral_mlx.tokenizer.agreement import check_before_weights
from magistral_mlx.tokenizer.tekken import Tokenizer

log = logging.getLogger(__name__)


class PlannedModel(NamedTuple):
    """A model whose weights are not read yet."""

    checkpoint: Checkpoint
    tokenizer: Tokenizer
    draft: Checkpoint | None
    plan: MemoryPlan


@takes_keywords_of(LoadOptions)
def load(model: str | Path, options: LoadOptions) -> Magistral:
    """Load a checkpoint: a folder, a hub id such as ``org/name``, or ``"demo"``.

    The keywords are the options of LoadOptions, which the command lines have as flags.

    Raises:
        CheckpointError: the checkpoint cannot be used.
        TokenizerError: its tokenizer cannot be used.
        HubError: it cannot be fetched.
        MemoryLimitError: it does not fit; raised before its weights are read.
        OptionError: an option is out of range.
    """
    return loading(model, options).result()


@streamed
def loading(
    model: str | Path, options: LoadOptions = DEFAULTS
) -> Generator[Progress, None, Magistral]:
    """Load as ``load`` does, as a stream of the bytes loaded."""
    planned = plan_model(model, options)
    checkpoint, plan = planned.checkpoint, planned.plan
    log.debug(
        "%s: %s of weights; context %s, with a %d-bit KV cache; %s in all, %s may be used",
        checkpoint.folder,
        in_units(plan.weights_bytes),
        f"{plan.context:,}",
        plan.kv_bits or 16,
        in_units(plan.total_bytes),
        in_units(plan.budget_bytes),
    )
    return (yield from on_worker(_load(planned, options), Line()))


def plan_model(model: str | Path, options: LoadOptions, *, on_mac: bool = False) -> PlannedModel:
    """Open a model and plan for it; fetch it if need be, and read no weights. Errors: ``load``."""
    check = partial(check_before_weights, given=options.tokenizer)
    checkpoint = open_checkpoint(resolve_model(model, options.revision, check=check))
    tokenizer = Tokenizer.of_model(
        checkpoint.folder,
        checkpoint.config.vocab_size,
        options.reasoning_format,
        given=options.tokenizer,
    )
    draft = None
    if options.draft_model is not None:
        draft = open_draft(resolve_model(options.draft_model), tokenizer)
    plan = plan_for(checkpoint, options, draft=draft, on_mac=on_mac)
    return PlannedModel(checkpoint, tokenizer, draft, plan)


def _load(planned: PlannedModel, options: LoadOptions) -> Generator[Progress, None, Magistral]:
    """Read the weights as planned."""
    checkpoint, tokenizer, draft, plan = planned
    wired = plan.held_bytes if options.wired else None
    limit_memory(plan.budget_bytes, freed=plan.workspace_bytes, wired=wired)
    transformer = yield from load_model(checkpoint)
    speculation = yield from Speculation.load(
        transformer, checkpoint, plan, limit=options.num_draft_tokens, draft=draft
    )
    return Magistral(transformer, checkpoint, tokenizer, plan, speculation)
