"""What a model writes itself, to calibrate on: replies to our questions, kept in a file a line each."""

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
from magistral_mlx.convert.recipe.options import Options
from magistral_mlx.errors import CheckpointError
from magistral_mlx.files import append_to_file, is_own_file, write_file
from magistral_mlx.generation.decoding import Stepper, decode, prefill
from magistral_mlx.generation.params import SamplingParams
from magistral_mlx.generation.reply import ReplyBuilder
from magistral_mlx.generation.sampling import Sampler
from magistral_mlx.model.device import on_gpu
from magistral_mlx.model.kv_cache import KVCache
from magistral_mlx.model.loader import load_model
from magistral_mlx.model.memory import MemoryPlan, make_plan, packed_bytes, plan_for
from magistral_mlx.model.transformer import Transformer
from magistral_mlx.tokenizer.segments import Text
from magistral_mlx.tokenizer.tekken import Tokenizer

FILE = "calibration.jsonl"  # in the target
SAMPLING = SamplingParams(
    think_budget=256, max_tokens=384
)  # of each reply: the card's, but short, so that all languages come
ROUNDED = Options(
    q_bits=4, q_method="round", tokenizer_json=False
)  # what writes where no model is named


@dataclass(frozen=True, slots=True)
class Traces:
    """A calibration that is yet to be written, enough replies for ``windows`` of 512 ids.

    Reply number i is to question i, again from the first after the last, and drawn with seed i; so each is the same
    whatever came before it, and one process goes on where another ended.
    """

    tokenizer: Tokenizer
    windows: int
    writer: Checkpoint | None  # None: the source, rounded

    def as_json(self) -> dict[str, Any]:
        """As the provenance file keeps it: what the replies follow from, which are in FILE themselves."""
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
        """What the writer needs; ``config`` is the source's. Raises MemoryLimitError where it does not fit."""
        longest = max(len(self._prompt(number)) for number in range(len(questions())))
        context = longest + (SAMPLING.max_tokens or 0)
        if self.writer is not None:
            return plan_for(self.writer, context=context)
        quant = ROUNDED.default
        assert quant is not None
        return make_plan(
            config,
            packed_bytes(config, quant),
            context=context,
            itemsize=2 if on_gpu() else 4,
            on_gpu=on_gpu(),
        )

    def read(self, path: Path) -> list[list[int]]:
        """Ids of the replies in a file, up to the first line that is not whole."""
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
        """``[windows, WINDOW]`` int32 of the conversation of all questions and ``replies``; None while it is too short.

        The system prompt comes once.
        """
        conversation: list[int] = []
        for number, reply in enumerate(replies):
            prompt = self._prompt(number)
            controls = [
                i for i, identity in enumerate(prompt) if self.tokenizer.is_control(identity)
            ]
            conversation += prompt[controls[-2] if number else 1 :] + reply
        if len(conversation) < self.windows * (WINDOW - 1):
            return None
        return windows_of(self.tokenizer, conversation, self.windows, spread=False)

    def writing(self, checkpoint: Checkpoint, path: Path) -> Generator[str, None, mx.array]:
        """Have a model write what is missing in a file; yields what is done, returns ``ids``.

        Raises:
            MemoryLimitError: the model does not fit.
            NumericsError: it is damaged.
        """
        replies = self.read(path)
        kept = path.read_bytes().splitlines(keepends=True)[: len(replies)] if replies else []
        write_file(path, b"".join(kept))
        plan = plan_for(checkpoint, context=self.plan(checkpoint.config).context)
        loading = load_model(checkpoint)
        model: Transformer | None = None
        while (ids := self.ids(replies)) is None:
            while model is None:
                try:
                    next(loading)
                except StopIteration as end:
                    model = end.value
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
        """One reply, as its line."""
        prompt, most = self._prompt(number), SAMPLING.max_tokens
        assert most is not None
        step = Stepper(model, KVCache(config, limit=len(prompt) + most))
        reading = prefill(step, prompt, chunk=plan.prefill_chunk)
        logits: mx.array | None = None
        while logits is None:
            try:
                next(reading)
            except StopIteration as end:
                logits = end.value
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
        for identity, drawn_from in steps:
            ids.append(identity)
            for segment in builder.push(identity, drawn_from):
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
    """Raises CheckpointError where the model that is to write has other ids."""
    if not tokenizer.shares_ids(writer.folder):
        raise CheckpointError(
            f"{writer.folder} has another vocabulary than the source; name a conversion of the same model, or "
            "--calibration self"
        )
