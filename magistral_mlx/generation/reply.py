"""What comes back: replies, what they cost, and how a reply is put together while its ids arrive."""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Literal

import mlx.core as mx
import numpy as np

from magistral_mlx.generation.loop_detector import LoopDetector
from magistral_mlx.generation.params import SamplingParams
from magistral_mlx.generation.sampling import top_logprobs
from magistral_mlx.generation.think_budget import ThinkBudget
from magistral_mlx.tokenizer.reasoning import THINK_CLOSE, Splitter, StopStrings
from magistral_mlx.tokenizer.segments import Text, ToolCall
from magistral_mlx.tokenizer.tekken import TextStream, Tokenizer

FinishReason = Literal["stop", "length", "tool_calls", "loop", "cancelled"]
ClosedBy = Literal["model", "budget", "loop"]
TAIL = len(THINK_CLOSE)  # characters of a reply's end that tell how to close it


@dataclass(frozen=True, slots=True)
class Usage:
    """What a reply cost."""

    prompt_tokens: int
    completion_tokens: int
    reasoning_tokens: int  # of these, until the trace closed, tags included
    cached_tokens: int  # of the prompt, found in the cache
    forward_passes: (
        int  # over all the weights, prefill included; of several replies, also those it shared
    )
    prefill_seconds: float  # to the first id
    decode_seconds: float  # from the first id on
    peak_memory_bytes: int  # MLX's, weights included
    max_tokens: int  # what the reply was allowed
    seed: int  # asks for this very reply again, on this machine
    dropped_turns: int = (
        0  # of a conversation, the oldest, left out of the prompt because the context is full
    )


@dataclass(frozen=True, slots=True)
class Reply:
    """One finished reply. ``reasoning_closed_by`` is None when no trace was closed."""

    reasoning: str
    answer: str
    tool_calls: tuple[ToolCall, ...]
    finish_reason: FinishReason
    reasoning_closed_by: ClosedBy | None
    usage: Usage


@dataclass(frozen=True, slots=True)
class Samples:
    """Several replies to one prompt, and the answer most of them agree on (self-consistency).

    ``votes`` counts the replies by their answer's last number, else by its normalized text; one that has
    no answer, or was cancelled, has no vote. ``majority`` is the answer of the first reply with the most votes.
    """

    replies: tuple[Reply, ...]  # by their seeds
    majority: str
    votes: dict[str, int]
    forward_passes: int  # for all of them together: each reply counts those it shared

    @classmethod
    def from_replies(cls, replies: Iterable[Reply]) -> "Samples":
        """Those that were taken together."""
        ordered = tuple(sorted(replies, key=lambda reply: reply.usage.seed))
        keys = [
            "" if reply.finish_reason == "cancelled" else vote(reply.answer) for reply in ordered
        ]
        votes = Counter(key for key in keys if key).most_common()
        majority = ordered[keys.index(votes[0][0])].answer if votes else ""
        # The last to end took part in every pass.
        return cls(
            ordered,
            majority,
            dict(votes),
            max((r.usage.forward_passes for r in ordered), default=0),
        )


def vote(answer: str) -> str:
    """What two answers must share to agree: the last number, else the words in lower case."""
    numbers = re.findall(r"-?\d+(?:[.,]\d+)*", answer.replace("\u2212", "-"))
    return numbers[-1] if numbers else " ".join(re.findall(r"\w+", answer.casefold()))


def best_of(logits: mx.array, k: int) -> dict[int, float]:
    """The k most probable ids of logits [1, V], best first, and their log-probabilities."""
    ids, values = top_logprobs(logits, k)
    return dict(zip(map(int, np.array(ids[0])), map(float, np.array(values[0])), strict=True))


@dataclass
class ReplyBuilder:
    """Ids in, segments out, and in the end the reply: detokenizer, splitter, stop strings, budget."""

    tokenizer: Tokenizer
    sampling: SamplingParams
    max_tokens: int
    is_stopped: bool = False  # a stop string was reached: the caller ends the reply
    tokens: int = 0
    _text: TextStream = field(init=False)
    _splitter: Splitter = field(init=False)
    _stop: StopStrings = field(init=False)
    _segments: list[Text] = field(default_factory=list)
    _logprobs: list[dict[int, float]] = field(default_factory=list)
    _call_ids: list[int] = field(default_factory=list)  # from the first [TOOL_CALLS] on
    _calls: list[ToolCall] = field(default_factory=list)
    _tokens_before_answer: int = 0
    _closed_by: ClosedBy = "model"
    _budget: ThinkBudget = field(init=False)
    _tail: str = ""  # of the reply's text
    _loops: LoopDetector = field(default_factory=LoopDetector)
    _is_looping: bool = False
    _forced_ahead: int = 0  # ids still to come that nobody drew

    def __post_init__(self) -> None:
        self._budget = ThinkBudget(self.tokenizer, self.sampling, self.max_tokens)
        self._text = self.tokenizer.stream()
        self._splitter = self.tokenizer.splitter(thinking=self.sampling.think_budget != 0)
        self._stop = StopStrings(self.sampling.stop)

    @property
    def reasoning_tokens(self) -> int:
        """Tokens until the trace closed, its tags included; none without a trace."""
        return self._tokens_before_answer if self._splitter.was_opened else 0

    def push(self, identity: int, logits: mx.array) -> list[Text]:
        """Take one id and the logits [1, V] it was drawn from, which mean nothing where ``forced`` gave it."""
        self.tokens += 1
        self._tokens_before_answer += self._splitter.state != "answer"
        if self.sampling.logprobs:
            self._logprobs.append(
                {} if self._forced_ahead else best_of(logits, self.sampling.logprobs)
            )
        self._forced_ahead = max(0, self._forced_ahead - 1)
        if self._call_ids or (
            identity == self.tokenizer.tool_calls_id and self._splitter.state != "reasoning"
        ):
            self._call_ids.append(identity)
            return []
        text = self._text.push(identity)
        self._tail = (self._tail + text)[-TAIL:]
        segments = self._splitter.push(text)
        if identity == self.tokenizer.open_id:
            self._splitter.open()
        elif identity == self.tokenizer.close_id:
            self._splitter.close()
        segments = self._emit(segments)
        self._watch(identity)
        return segments

    def flush(self) -> list[Text | ToolCall]:
        """What was held back, once no more ids come, and the tool calls."""
        self._calls, rest = self.tokenizer.tool_calls(self._call_ids)
        segments = self._emit(self._splitter.push(self._text.flush() + rest)) + self._emit(
            self._splitter.flush()
        )
        held = "" if self.is_stopped else self._stop.flush()
        is_call_rated = self._calls and self._logprobs and not segments
        last = [Text("answer", held)] if held or is_call_rated else []
        return [*segments, *self._keep(last), *self._calls]

    def forced(self, logits: mx.array, drawn: mx.array) -> list[int]:
        """The ids that close a trace which repeats itself, or whose budget ends, else none.

        Args:
            logits, drawn: [1, V] and [1], of the id that comes otherwise.
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
        elif self._budget.is_line_enough(self.tokens, self._tail, logits, drawn):
            self._closed_by = "budget"
        else:
            return []
        ids = self.tokenizer.closing(self._tail, line)
        self._loops, self._is_looping = LoopDetector(), False
        self._forced_ahead = len(ids)
        return ids

    def _watch(self, identity: int) -> None:
        """Look for a loop; one in the answer ends the reply, and so does one in the trace if that was asked for."""
        if self.sampling.on_loop == "ignore" or self.is_stopped:
            return
        self._is_looping = self._loops.push(self.tokenizer.decode([identity]))
        self.is_stopped = self._is_looping and (
            self._splitter.state != "reasoning" or self.sampling.on_loop == "stop"
        )

    def reply(self, finish_reason: FinishReason, usage: Usage) -> Reply:
        def text(kind: str) -> str:
            return "".join(s.text for s in self._segments if s.kind == kind)

        closed_by: ClosedBy | None = None
        if self._splitter.state == "answer":
            if self.sampling.think_budget == 0:
                closed_by = "budget"
            elif self._splitter.was_opened:
                closed_by = self._closed_by
        if self._is_looping and self.is_stopped:
            finish_reason = "loop"
        elif self._calls and finish_reason == "stop":
            finish_reason = "tool_calls"
        return Reply(
            text("reasoning"), text("answer"), tuple(self._calls), finish_reason, closed_by, usage
        )

    def _emit(self, segments: list[Text]) -> list[Text]:
        """Pass answers through the stop strings and attach the log-probabilities waiting for a segment."""
        out: list[Text] = []
        for segment in segments:
            if segment.kind != "answer":
                out.append(segment)
            elif not self.is_stopped:
                text, self.is_stopped = self._stop.push(segment.text)
                out += [Text("answer", text)] if text else []
        return self._keep(out)

    def _keep(self, segments: list[Text]) -> list[Text]:
        if segments and self._logprobs:
            segments[0] = replace(segments[0], logprobs=tuple(self._logprobs))
            self._logprobs.clear()
        self._segments += segments
        return segments
