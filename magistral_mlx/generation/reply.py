"""Replies, their usage, and the builder that puts a reply together while its ids arrive."""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

import mlx.core as mx
import numpy as np

from magistral_mlx.generation.decoding import Token
from magistral_mlx.generation.loop_detector import LoopDetector
from magistral_mlx.generation.params import SamplingParams
from magistral_mlx.generation.sampling import top_logprobs
from magistral_mlx.generation.think_budget import ThinkBudget
from magistral_mlx.tokenizer.detokenizer import Detokenizer
from magistral_mlx.tokenizer.reasoning import THINK_CLOSE, Splitter, StopStrings
from magistral_mlx.tokenizer.segments import Text, ToolCall
from magistral_mlx.tokenizer.tekken import Tokenizer

FinishReason = Literal["stop", "length", "tool_calls", "loop", "cancelled"]
ClosedBy = Literal["model", "budget", "loop"]
# Characters of a reply's end that tell how to close its trace.
TAIL = len(THINK_CLOSE)
# Characters of an answer in the representation of a reply.
MAX_SHOWN = 100


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens, passes, seconds and bytes that a reply took.

    Attributes:
        prompt_tokens: tokens of the prompt, cached ones included.
        completion_tokens: tokens of the reply.
        reasoning_tokens: completion tokens until the trace closed, tags included.
        cached_tokens: prompt tokens that were found in the cache.
        forward_passes: passes over all the weights, prefill included; a reply that is one of
            several counts the passes it shared.
        prefill_seconds: time to the first id.
        decode_seconds: time from the first id on.
        peak_memory_bytes: MLX's peak, weights included.
        max_tokens: the most tokens that the reply was allowed.
        seed: the seed that gives this very reply again, on this machine.
        dropped_turns: the oldest turns of a conversation that are left out of the prompt because
            the context is full.
    """

    prompt_tokens: int
    completion_tokens: int
    reasoning_tokens: int
    cached_tokens: int
    forward_passes: int
    prefill_seconds: float
    decode_seconds: float
    peak_memory_bytes: int
    max_tokens: int
    seed: int
    dropped_turns: int = 0


@dataclass(frozen=True, slots=True)
class Reply:
    """One finished reply. ``str(reply)`` is its answer.

    Attributes:
        reasoning: the trace; "" without one.
        answer: the text after the trace.
        tool_calls: functions that the model wants called; see ``Chat.answer_calls``.
        finish_reason: what ended it: "stop" the model or a stop string, "length" its limit of
            tokens, "tool_calls" their end, "loop" a repetition, "cancelled" somebody.
        reasoning_closed_by: what closed the trace: "model", "budget" or "loop"; None if nothing.
        usage: what it took.
        logprobs: with ``SamplingParams.logprobs``, for every token of the reply its most probable
            ids with their log-probabilities, best first; {} for a token that was forced.
    """

    reasoning: str
    answer: str
    tool_calls: tuple[ToolCall, ...]
    finish_reason: FinishReason
    reasoning_closed_by: ClosedBy | None
    usage: Usage
    logprobs: tuple[dict[int, float], ...] = ()

    def __str__(self) -> str:
        return self.answer

    def __repr__(self) -> str:
        shown = [f"answer={shortened(self.answer)}"]
        shown += [f"reasoning=<{len(self.reasoning):,} characters>"] if self.reasoning else []
        shown += [f"tool_calls={self.tool_calls}"] if self.tool_calls else []
        shown += [f"finish_reason={self.finish_reason!r}"]
        return f"Reply({', '.join(shown)}, <{self.usage.completion_tokens:,} tokens>)"


@dataclass(frozen=True, slots=True)
class Samples:
    """Several replies to one prompt, and the answer most of them agree on (self-consistency).

    ``str(samples)`` is that answer.

    Attributes:
        replies: the replies in the order of their seeds.
        majority: the answer of the first reply with the most votes.
        votes: how many replies have the same last number in their answer, else the same normalized
            text; a reply without an answer, or a cancelled one, has no vote.
        forward_passes: passes for all replies together.
    """

    replies: tuple[Reply, ...]
    majority: str
    votes: dict[str, int]
    forward_passes: int

    def __str__(self) -> str:
        return self.majority

    def __repr__(self) -> str:
        return (
            f"Samples(majority={shortened(self.majority)}, votes={self.votes}, "
            f"<{len(self.replies)} replies>)"
        )

    @classmethod
    def from_replies(cls, replies: Iterable[Reply]) -> "Samples":
        """Count the votes of replies that were decoded together."""
        ordered = tuple(sorted(replies, key=lambda reply: reply.usage.seed))
        keys = [
            "" if reply.finish_reason == "cancelled" else vote(reply.answer) for reply in ordered
        ]
        votes = Counter(key for key in keys if key).most_common()
        majority = ordered[keys.index(votes[0][0])].answer if votes else ""
        # The last reply to end took part in every pass.
        passes = max((reply.usage.forward_passes for reply in ordered), default=0)
        return cls(ordered, majority, dict(votes), passes)


def shortened(text: str) -> str:
    """Return the representation of a text, without its middle if it is long."""
    return repr(text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN - 20]} ... {text[-15:]}")


def vote(answer: str) -> str:
    """Return what agreeing answers share: the last number, else the words in lower case."""
    numbers = re.findall(r"-?\d+(?:[.,]\d+)*", answer.replace("\u2212", "-"))
    return numbers[-1] if numbers else " ".join(re.findall(r"\w+", answer.casefold()))


def best_of(logits: mx.array, k: int) -> dict[int, float]:
    """Return the k most probable ids of logits [1, V], best first, with their log-probabilities."""
    ids, values = top_logprobs(logits, k)
    return dict(zip(map(int, np.array(ids[0])), map(float, np.array(values[0])), strict=True))


class ReplyBuilder:
    """Turns ids into text segments, and in the end into the reply.

    It holds the detokenizer, the splitter of trace and answer, the stop strings, the thinking
    budget and the loop detector.

    Attributes:
        tokens: ids taken.
        is_stopped: a stop string or a loop was reached: the caller ends the reply.
    """

    def __init__(self, tokenizer: Tokenizer, sampling: SamplingParams, max_tokens: int) -> None:
        self.tokenizer, self.sampling = tokenizer, sampling
        self.tokens = 0
        self.is_stopped = False
        self._budget = ThinkBudget(tokenizer, sampling, max_tokens)
        self._text: Detokenizer = tokenizer.detokenizer()
        self._splitter: Splitter = tokenizer.splitter(thinking=sampling.thinks)
        self._stop = StopStrings(sampling.stop)
        self._loops = LoopDetector()
        self._is_looping = False
        self._texts: list[Text] = []
        # Log probabilities of ids without a segment yet.
        self._logprobs: list[dict[int, float]] = []
        self._call_ids: list[int] = []  # from the first [TOOL_CALLS] on
        self._calls: list[ToolCall] = []
        self._tokens_before_answer = 0
        self._closed_by: ClosedBy = "model"
        self._tail = ""

    @property
    def reasoning_tokens(self) -> int:
        """Tokens until the trace closed, its tags included; none without a trace."""
        return self._tokens_before_answer if self._splitter.was_opened else 0

    def push(self, token: Token) -> list[Text]:
        """Take the next id; return the texts that are certain by now."""
        self.tokens += 1
        self._tokens_before_answer += self._splitter.state != "answer"
        if k := self.sampling.logprobs:
            self._logprobs.append({} if token.is_forced else best_of(token.logits, k))
        if self._call_ids or (
            token.id == self.tokenizer.tool_calls_id and self._splitter.state != "reasoning"
        ):
            self._call_ids.append(token.id)
            return []
        text = self._text.push(token.id)
        self._tail = (self._tail + text)[-TAIL:]
        texts = self._splitter.push(text)
        if token.id == self.tokenizer.open_id:
            self._splitter.open()
        elif token.id == self.tokenizer.close_id:
            self._splitter.close()
        texts = self._emit(texts)
        self._watch(token.id)
        return texts

    def flush(self) -> list[Text | ToolCall]:
        """Return the texts that were held back, and the tool calls, once no more ids come."""
        self._calls, rest = self.tokenizer.tool_calls(self._call_ids)
        texts = self._emit(self._splitter.push(self._text.flush() + rest))
        texts += self._emit(self._splitter.flush())
        held = "" if self.is_stopped else self._stop.flush()
        carries_logprobs = self._calls and self._logprobs and not texts
        if held or carries_logprobs:
            texts += self._keep([Text("answer", held)])
        return [*texts, *self._calls]

    def forced(self, logits: mx.array, draw: mx.array) -> list[int]:
        """Return the ids that close a trace which repeats itself or whose budget ends, else none.

        Args:
            logits: [1, V], of the id that comes otherwise.
            draw: [1], that id.
        """
        if self._splitter.state != "reasoning" or self.is_stopped:
            return []
        line = ""
        if self._is_looping:
            self._closed_by = "loop"
        elif self._budget.is_used_up(
            self.tokens, is_inside_character=self._text.is_inside_character
        ):
            self._closed_by, line = "budget", self.sampling.think_budget_message
        elif self._budget.is_line_enough(self.tokens, self._tail, logits, draw):
            self._closed_by = "budget"
        else:
            return []
        self._loops, self._is_looping = LoopDetector(), False
        return self.tokenizer.closing(self._tail, line)

    def reply(self, finish_reason: FinishReason, usage: Usage) -> Reply:
        """Return the reply; ``finish_reason`` is what ended its ids."""
        closed_by: ClosedBy | None = None
        if self._splitter.state == "answer":
            if not self.sampling.thinks:
                closed_by = "budget"
            elif self._splitter.was_opened:
                closed_by = self._closed_by
        if self._is_looping and self.is_stopped:
            finish_reason = "loop"
        elif self._calls and finish_reason == "stop":
            finish_reason = "tool_calls"
        return Reply(
            self._joined("reasoning"),
            self._joined("answer"),
            tuple(self._calls),
            finish_reason,
            closed_by,
            usage,
            (*(found for text in self._texts for found in text.logprobs), *self._logprobs),
        )

    def _joined(self, kind: str) -> str:
        return "".join(text.text for text in self._texts if text.kind == kind)

    def _watch(self, token_id: int) -> None:
        """Look for a loop; one in the answer ends the reply, one in the trace if so asked."""
        if self.sampling.on_loop == "ignore" or self.is_stopped:
            return
        self._is_looping = self._loops.push(self.tokenizer.decode([token_id]))
        self.is_stopped = self._is_looping and (
            self._splitter.state != "reasoning" or self.sampling.on_loop == "stop"
        )

    def _emit(self, texts: list[Text]) -> list[Text]:
        """Pass answers through the stop strings."""
        out: list[Text] = []
        for text in texts:
            if text.kind != "answer":
                out.append(text)
            elif not self.is_stopped:
                certain, self.is_stopped = self._stop.push(text.text)
                out += [Text("answer", certain)] if certain else []
        return self._keep(out)

    def _keep(self, texts: list[Text]) -> list[Text]:
        """Attach the log-probabilities that wait for a segment, and remember the texts."""
        if texts and self._logprobs:
            texts[0] = replace(texts[0], logprobs=tuple(self._logprobs))
            self._logprobs.clear()
        self._texts += texts
        return texts
