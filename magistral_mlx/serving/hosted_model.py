"""A model as the owner thread has it: loading, replies, saving, letting go, each a generator that the owner steps."""

import gc
from collections.abc import Generator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from magistral_mlx.checkpoint.folder import open_checkpoint
from magistral_mlx.demo import resolve_local
from magistral_mlx.engine.load import loading
from magistral_mlx.engine.magistral import Magistral
from magistral_mlx.errors import CancelledError, MemoryLimitError, OptionError, in_units
from magistral_mlx.generation.params import SamplingParams
from magistral_mlx.generation.reply import Reply
from magistral_mlx.model.device import budget_bytes, limit_memory
from magistral_mlx.model.load_options import LoadOptions
from magistral_mlx.model.memory import MemoryPlan, plan_for
from magistral_mlx.serving import events
from magistral_mlx.serving.event_queue import Channel
from magistral_mlx.serving.plain_values import plain
from magistral_mlx.tokenizer.tool_calls import as_message

Steps = Generator[None, None, None]
Messages = list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Request:
    """What a reply is asked for with; as ``Magistral.ask``."""

    messages: str | Messages
    sampling: SamplingParams
    tools: Messages | None
    system_prompt_only: bool


@dataclass(frozen=True, slots=True)
class Figures:
    """What a resident model holds, as last seen by the owner."""

    replies: int = 0
    cached_tokens: int = 0
    active_bytes: int = 0
    peak_bytes: int = 0
    freed_bytes: int = 0  # which MLX keeps for the next arrays


class Resident:
    """One model. Every method runs on the owner, save ``cancel``."""

    def __init__(self, lock: AbstractContextManager[bool]) -> None:
        self._lock = lock
        self._magistral: Magistral | None = None
        self._failure: events.Failed | None = None  # why there is no model
        # Messages and tools of the last reply that brought something.
        self._conversation: tuple[Messages, Sequence[Mapping[str, Any]] | None] | None = None
        self._under_way: Channel | None = None  # whose reply the model is giving
        self.plan: MemoryPlan | None = None  # of what is loaded, or being loaded
        self.is_ready = False
        self.figures = Figures()

    def cancel(self, channel: Channel) -> None:
        """End a load or a reply early, from any thread; one that waits its turn will not begin."""
        with self._lock:
            channel.is_cancelled = True
            if self._under_way is channel and self._magistral is not None:
                self._magistral.cancel()

    def load(
        self, channel: Channel, model: str, options: LoadOptions, others: Sequence["Resident"]
    ) -> Steps:
        """Ends in a ready event, or an error event that stands for this model from then on."""
        try:
            yield from self._load(channel, model, options, others)
        except BaseException as error:
            self._failure = events.failed(error)
        if self._failure is not None:
            self._let_go()
            channel.end(self._why_not())

    def reply(self, channel: Channel, request: Request) -> Steps:
        """Ends in a done event, or an error event."""
        if channel.is_cancelled:
            channel.end(events.never_begun())
            return
        if self._magistral is None:
            channel.end(self._why_not())
            return
        stream = self._magistral.stream(
            request.messages,
            request.sampling,
            tools=request.tools,
            system_prompt_only=request.system_prompt_only,
        )
        with self._lock:  # only now: to make a stream takes an earlier cancelling back
            self._under_way = channel
            if channel.is_cancelled:
                self._magistral.cancel()
        try:
            for segment in stream:
                channel.put(events.event_of(segment))
                yield
        finally:
            with self._lock:
                self._under_way = None
            stream.close()
            mx.synchronize()  # the pass queued ahead: a host that exits after the last event must find MLX idle
            self._measure(replies=self.figures.replies + 1)
        reply = stream.result()
        self._remember(request, reply)
        channel.end(events.done(reply))

    def save(self, channel: Channel, path: str) -> Steps:
        """Write the conversation that the last reply belongs to, its trace included, and the cache."""
        yield from ()
        if self._magistral is None:
            channel.end(self._why_not())
            return
        if self._conversation is None:
            raise OptionError("there is no conversation to save yet; ask something first")
        messages, tools = self._conversation
        chat = self._magistral.chat(keep_reasoning="all", tools=tools)
        chat.messages = messages
        chat.save(path)
        channel.end({"kind": "result", "cached_tokens": self.figures.cached_tokens})

    def resume(self, channel: Channel, path: str) -> Steps:
        """Read what ``save``, or ``Chat.save``, wrote; the next reply goes on from its cache."""
        yield from ()
        if self._magistral is None:
            channel.end(self._why_not())
            return
        chat = self._magistral.resume(path)
        self._conversation = chat.messages, chat.tools
        self._measure()
        value = {
            "messages": chat.messages,
            "tools": chat.tools,
            "cached_tokens": self.figures.cached_tokens,
        }
        channel.end({"kind": "result", **plain(value, path)})

    def release(self, channel: Channel) -> Steps:
        """Give the memory back."""
        yield from ()
        self._let_go()
        channel.end({"kind": "result", "active_bytes": mx.get_active_memory()})

    def _load(
        self, channel: Channel, model: str, options: LoadOptions, others: Sequence["Resident"]
    ) -> Steps:
        loaded = [other.plan for other in others if other.plan is not None]
        held = sum(plan.total_bytes for plan in loaded)
        folder, draft = resolve_local(model), options.draft_model
        if draft is not None:
            options = replace(options, draft_model=resolve_local(str(draft)))
        if options.memory_gb is None and held:
            options = replace(options, memory_gb=_rest(held) / 1e9)
        self.plan = plan_local(folder, options)
        steps = loading(folder, options)
        _check_not_cancelled(channel)
        for progress in steps:
            if held:  # `loading` has held MLX to this model's part, as if it were alone
                freed = sum(plan.workspace_bytes for plan in [*loaded, self.plan])
                limit_memory(held + self.plan.budget_bytes, freed=freed, wired=None)
            channel.put(events.loaded(progress.done, progress.total))
            yield
            _check_not_cancelled(channel)
        self._magistral, self.is_ready = steps.result(), True
        self._measure()
        channel.end(events.ready(model, self.plan))

    def _why_not(self) -> dict[str, Any]:
        """The error event of a load that failed; jobs come after the load."""
        assert self._failure is not None
        return {**self._failure}

    def _remember(self, request: Request, reply: Reply) -> None:
        calls = [as_message(call) for call in reply.tool_calls] if request.tools else []
        if reply.reasoning or reply.answer or calls:
            asked = request.messages
            answer: dict[str, Any] = {
                "role": "assistant",
                "content": reply.answer,
                "reasoning": reply.reasoning,
            }
            messages = [{"role": "user", "content": asked}] if isinstance(asked, str) else asked
            self._conversation = (
                [*messages, answer | ({"tool_calls": calls} if calls else {})],
                request.tools,
            )

    def _let_go(self) -> None:
        self._magistral = self.plan = self._conversation = None
        self.is_ready = False
        gc.collect()  # a cache and its layers refer to each other
        mx.clear_cache()
        self._measure()

    def _measure(self, replies: int | None = None) -> None:
        self.figures = Figures(
            replies=self.figures.replies if replies is None else replies,
            cached_tokens=0 if self._magistral is None else self._magistral.cached_tokens,
            active_bytes=mx.get_active_memory(),
            peak_bytes=mx.get_peak_memory(),
            freed_bytes=mx.get_cache_memory(),
        )


def _check_not_cancelled(channel: Channel) -> None:
    if channel.is_cancelled:
        raise CancelledError("the load was cancelled")


def _rest(held: int) -> int:
    """Bytes that other models leave of this device's budget."""
    budget = budget_bytes()
    if held >= budget:
        raise MemoryLimitError(
            f"other loaded models take {in_units(held)} of the {in_units(budget)} that may be used; close one "
            "first, or give memory_gb"
        )
    return budget - held


def plan_local(folder: Path, options: LoadOptions) -> MemoryPlan:
    """Plan for a folder and its draft model. Reads headers, no weights."""
    draft = options.draft_model
    return plan_for(
        open_checkpoint(folder),
        options,
        draft=None if draft is None else open_checkpoint(Path(draft)),
    )
