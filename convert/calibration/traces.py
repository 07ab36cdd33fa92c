"""Calibrate on the replies of a model to our own questions, one line of a file each."""

import hashlib
import json
from collections import defaultdict
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from magistral_mlx.checkpoint.config import ModelConfig
from magistral_mlx.checkpoint.folder import Checkpoint
from magistral_mlx.convert.calibration.corpus import WINDOW, questions, windows_of
from magistral_mlx.convert.recipe.options import ConvertOptions
from magistral_mlx.errors import CheckpointError, named
from magistral_mlx.files import append_to_file, is_own_file, write_file
from magistral_mlx.generation.decoding import Stepper, decode, prefill
from magistral_mlx.generation.params import SamplingParams
from magistral_mlx.generation.reply import ReplyBuilder
from magistral_mlx.generation.sampling import Sampler
from magistral_mlx.model.device import on_gpu
from magistral_mlx.model.footprint import packed_bytes
from magistral_mlx.model.kv_cache import KVCache
from magistral_mlx.model.load_options import LoadOptions
from magistral_mlx.model.loader import load_model
from magistral_mlx.model.memory import MemoryPlan, make_plan, plan_for
from magistral_mlx.model.transformer import Transformer
from magistral_mlx.tokenizer.segments import Text
from magistral_mlx.tokenizer.tekken import Tokenizer

# The file's name in the target.
FILE = "calibration.jsonl"
# The model card's sampling; short replies, so that all questions' languages are reached.
SAMPLING = SamplingParams(think_budget=256, max_tokens=384)
# The conversion whose model writes the replies if none is named.
ROUNDED = ConvertOptions(q_bits=4, q_method="round", tokenizer_json=False)


@dataclass(frozen=True, slots=True)
class SelfCalibration:
    """Replies that a model writes to calibrate on: enough for ``windows`` of 512 ids.

    Reply i answers question i (modulo their number) with seed i. No reply depends on another, so
    a later process can add the missing ones.

    Attributes:
        writer: the model that writes; None for the source, rounded to 4 bit.
    """

    tokenizer: Tokenizer
    windows: int
    writer: Checkpoint | None

    def as_json(self) -> dict[str, Any]:
        """Return the settings that determine the replies, for the manifest."""
        asked = json.dumps(questions(), ensure_ascii=False).encode()
        return {
            "origin": "self",
            "writer": "rounded to 4 bit" if self.writer is None else self.writer.fingerprint(),
            "questions_sha256": hashlib.sha256(asked).hexdigest(),
            "sequences": self.windows,
            "tokens": WINDOW,
            "think_budget": SAMPLING.think_budget,
            "max_tokens": SAMPLING.max_tokens,
        }

    def plan(self, config: ModelConfig) -> MemoryPlan:
        """Plan the writer's memory; ``config`` is the source's.

        Raises:
            MemoryLimitError: the writer does not fit.
        """
        longest = max(len(self._prompt(number)) for number in range(len(questions())))
        context = longest + (SAMPLING.max_tokens or 0)
        if self.writer is not None:
            return plan_for(self.writer, LoadOptions(max_kv_size=context))
        quant = ROUNDED.default
        assert quant is not None
        return make_plan(
            config,
            packed_bytes(config, quant),
            LoadOptions(max_kv_size=context),
            itemsize=2 if on_gpu() else 4,
            on_gpu=on_gpu(),
        )

    def read(self, path: Path) -> list[list[int]]:
        """Read the ids of the replies in a file, up to the first incomplete line."""
        found: list[list[int]] = []
        for line in path.read_bytes().splitlines(keepends=True) if is_own_file(path) else ():
            try:
                record = json.loads(line)
            except ValueError:
                break
            if not line.endswith(b"\n") or record["seed"] != len(found):
                break
            found.append(record["ids"])
        return found

    def ids(self, replies: Sequence[list[int]]) -> mx.array | None:
        """Join questions and replies into one conversation, with the system prompt once.

        Returns:
            ``[windows, WINDOW]`` int32; None while the conversation is too short.
        """
        conversation: list[int] = []
        for number, reply in enumerate(replies):
            prompt = self._prompt(number)
            controls = [
                i for i, token_id in enumerate(prompt) if self.tokenizer.is_control(token_id)
            ]
            conversation += prompt[controls[-2] if number else 1 :] + reply
        if len(conversation) < self.windows * (WINDOW - 1):
            return None
        return windows_of(self.tokenizer, conversation, self.windows, spread=False)

    def write_missing_replies(
        self, checkpoint: Checkpoint, path: Path
    ) -> Generator[str, None, mx.array]:
        """Let a model write the replies that a file lacks; yield each one's name, return ``ids``.

        Raises:
            MemoryLimitError: the model does not fit.
            NumericsError: the model is damaged.
        """
        replies = self.read(path)
        kept = path.read_bytes().splitlines(keepends=True)[: len(replies)] if replies else []
        write_file(path, b"".join(kept))
        needed = self.plan(checkpoint.config).context
        plan = plan_for(checkpoint, LoadOptions(max_kv_size=needed))
        model: Transformer | None = None
        while (ids := self.ids(replies)) is None:
            if model is None:
                model = load_model(checkpoint).result()
            record = self._write(model, checkpoint.config, plan, len(replies))
            append_to_file(path, json.dumps(record, ensure_ascii=False).encode() + b"\n")
            replies.append(record["ids"])
            yield f"reply {len(replies)}"
        del model
        mx.clear_cache()
        return ids

    def _prompt(self, number: int) -> list[int]:
        asked = questions()
        return self.tokenizer.encode_chat(asked[number % len(asked)])

    def _write(
        self, model: Transformer, config: ModelConfig, plan: MemoryPlan, number: int
    ) -> dict[str, Any]:
        """Generate a reply and return its line of the file."""
        prompt, most = self._prompt(number), SAMPLING.max_tokens
        assert most is not None
        step = Stepper(model, KVCache(config, limit=len(prompt) + most))
        logits = prefill(step, prompt, chunk=plan.prefill_chunk).result()
        builder = ReplyBuilder(self.tokenizer, SAMPLING, most)
        sampler = Sampler(SAMPLING, number)
        ids: list[int] = []
        text: defaultdict[str, str] = defaultdict(str, reasoning="", answer="")
        steps = decode(
            step,
            logits,
            sampler,
            stop=self.tokenizer.stop_ids,
            max_tokens=most,
            steer=builder.forced,
        )
        for token in steps:
            ids.append(token.id)
            for segment in builder.push(token):
                text[segment.kind] += segment.text
            if builder.is_stopped:
                break
        else:
            if len(ids) < most:
                ids.append(min(self.tokenizer.stop_ids))
        for last in builder.flush():
            if isinstance(last, Text):
                text[last.kind] += last.text
        asked = questions()
        return {"question": asked[number % len(asked)], "seed": number, **text, "ids": ids}


def check_vocabulary(tokenizer: Tokenizer, writer: Checkpoint) -> None:
    """Raise CheckpointError unless the writing model has the source's vocabulary."""
    if not tokenizer.shares_ids(writer.folder):
        raise CheckpointError(
            f"{writer.folder} has another vocabulary than the source; name a conversion of the "
            f"same model, or {named('calibration', 'self')}"
        )
