"""The jobs of one model: load, reply, save, resume, release; the worker takes their steps."""

import gc
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from magistral_mlx.checkpoint.folder import open_checkpoint
from magistral_mlx.demo import resolve_local
from magistral_mlx.engine.chat import Chat
from magistral_mlx.engine.load import loading
from magistral_mlx.engine.magistral import Magistral
from magistral_mlx.engine.request import Request
from magistral_mlx.engine.turns import turn_messages
from magistral_mlx.errors import CancelledError, MemoryLimitError, OptionError, in_units
from magistral_mlx.generation.reply import Reply
from magistral_mlx.model.device import budget_bytes, limit_memory
from magistral_mlx.model.load_options import LoadOptions
from magistral_mlx.model.memory import MemoryPlan, plan_for
from magistral_mlx.serving import events
from magistral_mlx.serving.event_queue import EventQueue
from magistral_mlx.serving.job import Steps
from magistral_mlx.serving.plain_values import copy_plain
from magistral_mlx.streams import Stream
from magistral_mlx.tokenizer.home import find_tokenizer
from magistral_mlx.tokenizer.segments import Segment


@dataclass(frozen=True, slots=True)
class ModelStats:
    """Figures of a model, as of its last reply; the bytes are MLX's, of the whole process."""

    replies: int = 0
    cached_tokens: int = 0
    active_bytes: int = 0
    peak_bytes: int = 0
    freed_bytes: int = 0  # kept by MLX for the next arrays


class ModelJobs:
    """The jobs of one model. Every method runs on the worker, except ``cancel``."""

    def __init__(self, lock: AbstractContextManager[bool]) -> None:
        self._lock = lock
        self._magistral: Magistral | None = None
        self._failure: events.Failed | None = None
        # The conversation of the last reply that had any text.
        self._chat: Chat | None = None
        self._running: tuple[EventQueue, Stream[Segment, Reply]] | None = None
        self.plan: MemoryPlan | None = None
        self.is_ready = False
        self.stats = ModelStats()

    def cancel(self, queue: EventQueue) -> None:
        """End a load or a reply early, from any thread; one that waits never starts."""
        with self._lock:
            queue.is_cancelled = True
            if self._running is not None and self._running[0] is queue:
                self._running[1].cancel()

    def load(
        self, queue: EventQueue, model: str, options: LoadOptions, others: Sequence["ModelJobs"]
    ) -> Steps:
        """Load the model beside other models; after a failure every later job ends in its error."""
        try:
            yield from self._load(queue, model, options, others)
        except BaseException as error:
            self._failure = events.failed(error)
        if self._failure is not None:
            self._free()
            queue.end(self._failure_event())

    def reply(self, queue: EventQueue, request: Request) -> Steps:
        """Give a reply, to a done event or an error event."""
        if queue.is_cancelled:
            queue.end(events.never_started())
            return
        if self._magistral is None:
            queue.end(self._failure_event())
            return
        stream = self._magistral.stream(
            request.messages,
            request.sampling,
            tools=request.tools,
            system_prompt_only=request.system_prompt_only,
        )
        with self._lock:
            self._running = queue, stream
            if queue.is_cancelled:
                stream.cancel()
        try:
            for segment in stream:
                queue.put(events.event_of(segment))
                yield
        finally:
            with self._lock:
                self._running = None
            stream.close()
            # A pass is queued ahead. A host that exits after the last event must find MLX idle.
            mx.synchronize()
            self._measure(replies=self.stats.replies + 1)
        reply = stream.result()
        self._remember(request, reply)
        queue.end(events.done(reply))

    def save(self, queue: EventQueue, path: str, *, overwrite: bool) -> Steps:
        """Write the conversation of the last reply, its trace included, and the cache."""
        yield from ()
        if self._magistral is None:
            queue.end(self._failure_event())
            return
        if self._chat is None:
            raise OptionError("there is no conversation to save yet; ask something first")
        self._chat.save(path, overwrite=overwrite)
        queue.end({"kind": "result", "cached_tokens": self.stats.cached_tokens})

    def resume(self, queue: EventQueue, path: str) -> Steps:
        """Read a saved conversation; the next reply continues from its cache."""
        yield from ()
        if self._magistral is None:
            queue.end(self._failure_event())
            return
        chat = self._magistral.resume(path)
        self._chat = Chat(self._magistral, "all", chat.messages, chat.tools)
        self._chat.continue_files_of(chat)
        self._measure()
        value = {
            "messages": chat.messages,
            "tools": chat.tools,
            "cached_tokens": self.stats.cached_tokens,
        }
        queue.end({"kind": "result", **copy_plain(value, path)})

    def release(self, queue: EventQueue) -> Steps:
        """Free the memory."""
        yield from ()
        self._free()
        queue.end({"kind": "result", "active_bytes": mx.get_active_memory()})

    def _load(
        self, queue: EventQueue, model: str, options: LoadOptions, others: Sequence["ModelJobs"]
    ) -> Steps:
        loaded = [other.plan for other in others if other.plan is not None]
        held = sum(plan.total_bytes for plan in loaded)
        folder, draft = resolve_local(model), options.draft_model
        if draft is not None:
            options = replace(options, draft_model=resolve_local(str(draft)))
        if options.memory_gb is None and held:
            options = replace(options, memory_gb=_remaining_bytes(held) / 1e9)
        self.plan = plan_local(folder, options)
        # A host can cancel no download.
        home = find_tokenizer(folder, options.tokenizer, fetches=False)
        options = replace(options, tokenizer=home)
        _check_cancelled(queue)
        with loading(folder, options) as stream:
            for progress in stream:
                if held:
                    # Loading has limited MLX to this model's part, as if it were alone.
                    freed = sum(plan.workspace_bytes for plan in [*loaded, self.plan])
                    limit_memory(held + self.plan.budget_bytes, freed=freed, wired=None)
                queue.put(events.loaded(progress))
                yield
                _check_cancelled(queue)
        self._magistral, self.is_ready = stream.result(), True
        self._measure()
        queue.end(events.ready(model, self.plan))

    def _failure_event(self) -> dict[str, Any]:
        """Return the error event of the load, which failed before this job."""
        assert self._failure is not None
        return {**self._failure}

    def _remember(self, request: Request, reply: Reply) -> None:
        asked = request.messages
        messages = [{"role": "user", "content": asked}] if isinstance(asked, str) else asked
        turn = turn_messages(messages, reply, has_tools=bool(request.tools))
        if turn and self._magistral is not None:
            chat = Chat(self._magistral, "all", turn, request.tools)
            if self._chat is not None:
                chat.continue_files_of(self._chat)
            self._chat = chat

    def _free(self) -> None:
        self._magistral = self.plan = self._chat = None
        self.is_ready = False
        # A cache and its layers refer to each other.
        gc.collect()
        mx.clear_cache()
        self._measure()

    def _measure(self, replies: int | None = None) -> None:
        self.stats = ModelStats(
            replies=self.stats.replies if replies is None else replies,
            cached_tokens=0 if self._magistral is None else self._magistral.cached_tokens,
            active_bytes=mx.get_active_memory(),
            peak_bytes=mx.get_peak_memory(),
            freed_bytes=mx.get_cache_memory(),
        )


def plan_local(folder: Path, options: LoadOptions) -> MemoryPlan:
    """Plan for a folder and its draft model; read headers, no weights, and fetch nothing."""
    checkpoint, draft = open_checkpoint(folder), options.draft_model
    find_tokenizer(folder, options.tokenizer, fetches=False)
    return plan_for(
        checkpoint, options, draft=None if draft is None else open_checkpoint(Path(draft))
    )


def _check_cancelled(queue: EventQueue) -> None:
    if queue.is_cancelled:
        raise CancelledError("the load was cancelled")


def _remaining_bytes(held: int) -> int:
    """Return the bytes that other models leave of this device's budget."""
    budget = budget_bytes()
    if held >= budget:
        raise MemoryLimitError(
            f"other loaded models take {in_units(held)} of the {in_units(budget)} that may be "
            "used; close one first, or give memory_gb"
        )
    return budget - held
