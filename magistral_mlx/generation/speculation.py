"""Speculative decoding of a loaded model: prompt lookup, a draft model, or neither."""

from collections.abc import Generator, Sequence
from pathlib import Path

from magistral_mlx.checkpoint.folder import Checkpoint, open_checkpoint
from magistral_mlx.errors import OptionError, named
from magistral_mlx.generation.draft_model import DraftModel
from magistral_mlx.generation.drafting import (
    MAX_ROWS,
    NO_DRAFTER,
    Drafter,
    NoDrafter,
    PromptLookup,
    is_worth_drafting,
)
from magistral_mlx.generation.row_costs import LINEAR, RowCosts, row_costs
from magistral_mlx.generation.sampling import Sampler
from magistral_mlx.model.footprint import kv_bytes
from magistral_mlx.model.loader import load_model
from magistral_mlx.model.memory import MemoryPlan
from magistral_mlx.model.transformer import Transformer
from magistral_mlx.streams import Progress, streamed
from magistral_mlx.tokenizer.tekken import Tokenizer


def open_draft(folder: Path, tokenizer: Tokenizer) -> Checkpoint:
    """Check a draft model's folder without reading its weights.

    Raises:
        OptionError: its ids do not mean what the large model's ids mean.
        CheckpointError: it cannot be used.
        TokenizerError: its tokenizer cannot be used.
    """
    draft = open_checkpoint(folder)
    if draft.config.vocab_size != tokenizer.vocab_size or not tokenizer.shares_ids(draft.folder):
        raise OptionError(
            f"the draft model in {folder} has another vocabulary, so its guesses would mean other "
            f"text; name one with the {tokenizer.vocab_size} ids of the model's own tekken.json, "
            f"or leave {named('draft_model')} out"
        )
    return draft


class Speculation:
    """The costs of checking guesses on this device, and the source of the guesses."""

    def __init__(self, costs: RowCosts, kv_share: float, *, limit: int | None = None) -> None:
        """Start without a draft model.

        Args:
            costs: of passes, by their rows.
            kv_share: cost of attending to one position, as a share of reading the weights.
            limit: the most guesses a pass; by default as many as pay.
        """
        self.costs, self.kv_share = costs, kv_share
        self.limit = MAX_ROWS - 1 if limit is None else limit
        self.draft: DraftModel | None = None

    @classmethod
    @streamed
    def load(
        cls,
        model: Transformer,
        checkpoint: Checkpoint,
        plan: MemoryPlan,
        *,
        limit: int | None = None,
        draft: Checkpoint | None = None,
    ) -> Generator[Progress, None, "Speculation"]:
        """Measure the costs of rows, unless they are known, and load the draft model.

        The stream reports the bytes that are loaded of the draft model.
        """
        costs = (
            LINEAR if limit == 0 else row_costs(model, checkpoint.config, checkpoint.fingerprint())
        )
        kv_share = kv_bytes(checkpoint.config, 1, kv_bits=plan.kv_bits) / plan.weights_bytes
        speculation = cls(costs, kv_share, limit=limit)
        if draft is not None:
            small = yield from load_model(draft)
            own = row_costs(small, draft.config, draft.fingerprint())
            share = (
                own.plain_seconds / costs.plain_seconds
                if costs.plain_seconds
                else draft.nbytes / checkpoint.nbytes
            )
            speculation.draft = DraftModel(small, draft.config, limit=plan.context, cost=share)
        return speculation

    def reset(self) -> None:
        """Drop the draft model's cache of the last reply."""
        if self.draft is not None:
            self.draft.reset()

    @streamed
    def drafter_for(
        self, prompt: Sequence[int], sampler: Sampler, *, chunk: int
    ) -> Generator[int, None, NoDrafter]:
        """Make the drafter of one reply.

        The stream reports the prompt's length after each chunk that a draft model reads: the large
        model has read all of the prompt before.
        """
        costs = self.costs.passes[: self.limit + 1]
        if not is_worth_drafting(costs, 0.0 if self.draft is None else self.draft.cost):
            return NO_DRAFTER
        if self.draft is not None:
            for _ in self.draft.read_prompt(prompt, sampler, chunk=chunk):
                yield len(prompt)
        source = PromptLookup(prompt) if self.draft is None else self.draft
        return Drafter(source, costs, prompt_tokens=len(prompt), kv_share=self.kv_share)
