"""Who guesses for a loaded model: nobody, its own text, or a draft model. Makes the drafter of each reply."""

from collections.abc import Generator, Sequence
from pathlib import Path

from magistral_mlx.checkpoint.folder import Checkpoint, open_checkpoint
from magistral_mlx.errors import OptionError
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
from magistral_mlx.model.loader import load_model
from magistral_mlx.model.memory import MemoryPlan, kv_bytes
from magistral_mlx.model.transformer import Transformer
from magistral_mlx.tokenizer.tekken import Tokenizer


def open_draft(folder: Path, tokenizer: Tokenizer) -> Checkpoint:
    """Check a draft model's folder; read none of its weights.

    Raises:
        OptionError: its ids do not mean what the large model's mean.
        CheckpointError, TokenizerError: it cannot be used.
    """
    draft = open_checkpoint(folder)
    if draft.config.vocab_size != tokenizer.vocab_size or not tokenizer.shares_ids(draft.folder):
        raise OptionError(
            f"the draft model in {folder} has another vocabulary, so its guesses would mean other text; name one with "
            f"the {tokenizer.vocab_size} ids of the model's own tekken.json, or leave --draft-model out"
        )
    return draft


class Speculation:
    """The costs of checking guesses on this device, and the source of the guesses."""

    def __init__(self, costs: RowCosts, kv_share: float, *, limit: int | None = None) -> None:
        """
        Args:
            kv_share: what attending to one position adds to a pass, as a share of reading the weights.
            limit: guesses a pass at most; by default as many as pay.
        """
        self.costs, self.kv_share = costs, kv_share
        self.limit = MAX_ROWS - 1 if limit is None else limit
        self.draft: DraftModel | None = None

    @classmethod
    def of(
        cls,
        model: Transformer,
        checkpoint: Checkpoint,
        plan: MemoryPlan,
        *,
        limit: int | None = None,
        draft: Checkpoint | None = None,
    ) -> Generator[tuple[int, int], None, "Speculation"]:
        """Measure what rows cost, unless that is known, and load the draft model; yields (bytes loaded, in all)."""
        costs = (
            LINEAR if limit == 0 else row_costs(model, checkpoint.config, checkpoint.fingerprint())
        )
        speculation = cls(
            costs,
            kv_bytes(checkpoint.config, 1, kv_bits=plan.kv_bits) / plan.weights_bytes,
            limit=limit,
        )
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
        """Drop what a draft model remembers of the last reply."""
        if self.draft is not None:
            self.draft.reset()

    def begin(
        self, prompt: Sequence[int], sampler: Sampler, *, chunk: int, done: int
    ) -> Generator[int, None, NoDrafter]:
        """The drafter of one reply; yields ``done`` between the chunks in which a draft model reads the prompt."""
        costs = self.costs.passes[: self.limit + 1]
        if not is_worth_drafting(costs, 0.0 if self.draft is None else self.draft.cost):
            return NO_DRAFTER
        if self.draft is not None:
            for _ in self.draft.begin(prompt, sampler, chunk=chunk):
                yield done
        source = PromptLookup(prompt) if self.draft is None else self.draft
        return Drafter(source, costs, prompt_tokens=len(prompt), kv_share=self.kv_share)
