"""A draft model: a smaller model of the same vocabulary that guesses the next ids."""

from collections.abc import Generator, Sequence

import mlx.core as mx
import numpy as np

from magistral_mlx.checkpoint.config import ModelConfig
from magistral_mlx.generation.decoding import Stepper, prefill
from magistral_mlx.generation.sampling import Sampler
from magistral_mlx.model.kv_cache import KVCache
from magistral_mlx.model.transformer import Transformer
from magistral_mlx.streams import streamed

# The first estimate of how often a guess is right, and the guesses that it counts as.
PRIOR_RATE, PRIOR_WEIGHT = 0.7, 8.0
# Share of the counts that each token takes away, so that a model that fell silent tries again.
FADING = 0.02


class DraftModel:
    """Guesses by drawing from its own logits with the sampler, seed and step of the large model.

    Where both models have the same distribution they draw the same id, not only at temperature 0.
    """

    def __init__(self, model: Transformer, config: ModelConfig, *, limit: int, cost: float) -> None:
        """Start with an empty cache.

        Args:
            model: the draft model.
            config: its config.
            limit: the most positions its cache may hold.
            cost: cost of one of its passes, in passes of the large model.
        """
        self.cost = cost
        self._model, self._config, self._limit = model, config, min(limit, config.max_positions)
        self.reset()

    def reset(self) -> None:
        """Drop its cache."""
        self._step = Stepper(self._model, KVCache(self._config, limit=self._limit))
        # Ids in the cache. Up to the newest id of the reply, they are the reply's.
        self._fed: list[int] = []

    @streamed
    def read_prompt(
        self, prompt: Sequence[int], sampler: Sampler, *, chunk: int
    ) -> Generator[int, None, None]:
        """Read a prompt except its last id, as a stream of the ids done."""
        self._ids, self._prompt_tokens, self._sampler = list(prompt), len(prompt), sampler
        # Guesses that the large model has not checked yet.
        self._unchecked: list[int] = []
        self._right, self._tried = PRIOR_RATE * PRIOR_WEIGHT, PRIOR_WEIGHT
        unread = list(prompt[:-1]) if len(prompt) <= self._limit else []
        agreed = 0
        while self._fed[agreed : agreed + 1] == unread[agreed : agreed + 1] != []:
            agreed += 1
        self._keep(agreed)
        if unread[agreed:]:
            for done in prefill(self._step, unread[agreed:], chunk=chunk):
                self._fed += unread[len(self._fed) : agreed + done]
                yield done
            mx.eval(self._step.cache.arrays)
            self._fed = unread

    def push(self, token_id: int) -> None:
        """Take the id that the large model drew."""
        if self._unchecked:
            is_right = self._unchecked.pop(0) == token_id
            self._right, self._tried = self._right + is_right, self._tried + 1
            if not is_right:
                self._unchecked = []
        self._right += FADING * (PRIOR_RATE * PRIOR_WEIGHT - self._right)
        self._tried += FADING * (PRIOR_WEIGHT - self._tried)
        position = len(self._ids)
        if self._fed[position : position + 1] not in ([], [token_id]):
            self._keep(position)
        self._ids.append(token_id)

    def chances(self, limit: int) -> list[float]:
        """Return how often guesses were right of late; none beyond the end of the context."""
        room = self._limit - len(self._ids)
        return [self._right / self._tried] * max(0, min(limit, room))

    def guess(self, count: int) -> list[int]:
        """Return the next ``count`` ids, or fewer where a draw cannot be used."""
        self._unchecked = []
        if count == 0:
            return []
        self._keep(min(len(self._fed), len(self._ids) - 1))
        logits = self._step(mx.array([self._ids[len(self._fed) :]]))
        first = len(self._ids) - self._prompt_tokens
        draws = [self._sampler.draw_run(logits, first)]
        for number in range(first + 1, first + count):
            # A draw that is no id is cut off below.
            logits = self._step(mx.maximum(draws[-1], 0)[None])
            draws.append(self._sampler.draw_run(logits, number))
        drawn = np.array(mx.concatenate(draws)).tolist()
        usable = next((i for i, token_id in enumerate(drawn) if token_id < 0), count)
        self._fed = [*self._ids, *drawn[: count - 1]]
        self._keep(len(self._ids) + min(usable, count - 1))
        self._unchecked = drawn[:usable]
        return list(self._unchecked)

    def _keep(self, length: int) -> None:
        """Drop positions beyond ``length`` from the cache, and those an interruption left."""
        self._step.cache.trim(self._step.cache.length - length)
        del self._fed[length:]
