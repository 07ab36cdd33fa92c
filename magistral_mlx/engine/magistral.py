"""A loaded model: ask it, stream it, sample it, chat with it."""

import secrets
from collections.abc import Generator
from functools import partial
from pathlib import Path
from typing import TypeVar

from magistral_mlx.checkpoint.config import ModelConfig
from magistral_mlx.checkpoint.folder import Checkpoint
from magistral_mlx.engine.async_stream import AsyncStream
from magistral_mlx.engine.chat import Chat
from magistral_mlx.engine.line import Line
from magistral_mlx.engine.prefix_cache import PrefixCache
from magistral_mlx.engine.reply_stream import ReplyRun, Runtime
from magistral_mlx.engine.request import Job, Messages, Request, SampleRequest, Tools
from magistral_mlx.engine.samples import SampleRun, only_sample, plan_samples
from magistral_mlx.engine.turns import KeepReasoning
from magistral_mlx.engine.worker_stream import on_worker, run_on_worker
from magistral_mlx.errors import OptionError, in_units, named
from magistral_mlx.files import as_path
from magistral_mlx.generation.params import SamplingParams
from magistral_mlx.generation.reply import Reply, ReplyBuilder, Samples
from magistral_mlx.generation.speculation import Speculation
from magistral_mlx.model.cache_file import check_cache_file
from magistral_mlx.model.kv_format import KVFormat
from magistral_mlx.model.memory import MemoryPlan
from magistral_mlx.model.transformer import Transformer
from magistral_mlx.options import takes_keywords_of
from magistral_mlx.streams import Cancellation, Stream
from magistral_mlx.tokenizer.segments import Segment
from magistral_mlx.tokenizer.tekken import Tokenizer

Item = TypeVar("Item")
Result = TypeVar("Result")


class Magistral:
    """A loaded model. Any thread may call it.

    Callers are served one at a time, in the order in which they came: a reply waits until those
    before it have ended, a stream that another thread has begun included. A stream that the same
    thread left open is ended instead. All work is done on one thread of the process, the worker.
    """

    def __init__(
        self,
        model: Transformer,
        checkpoint: Checkpoint,
        tokenizer: Tokenizer,
        plan: MemoryPlan,
        speculation: Speculation,
    ) -> None:
        self.model = model
        self.checkpoint = checkpoint
        self.config: ModelConfig = checkpoint.config
        self.tokenizer = tokenizer
        self.plan = plan
        self.speculation = speculation
        self.prefix_cache = PrefixCache(
            checkpoint.config,
            limit=plan.context,
            kv_format=KVFormat.of(plan.kv_bits, checkpoint.config.head_dim),
            fingerprint=checkpoint.fingerprint(),
            dtype=model.norm.weight.dtype,
        )
        self._newest = Cancellation()
        self._builders: list[ReplyBuilder] = []
        self._line = Line()

    def __repr__(self) -> str:
        return (
            f"Magistral({self.checkpoint.folder.name!r}, {in_units(self.plan.weights_bytes)} of "
            f"weights, context {self.plan.context:,}, {self.cached_tokens:,} tokens cached)"
        )

    @takes_keywords_of(Request)
    def ask(self, request: Request) -> Reply:
        """Return the whole reply to a question, or to a conversation that ends in one.

        Raises:
            OptionError: a message or option is malformed.
            ContextError: the prompt, or an explicit max_tokens beside it, does not fit the planned
                context.
            NumericsError: the weights are damaged.
        """
        return self._stream(request).result()

    @takes_keywords_of(Request)
    def stream(self, request: Request) -> Stream[Segment, Reply]:
        """Start a reply as ``ask`` gives it: a stream of segments whose result is the Reply.

        Arguments are checked at once, and work begins with the first segment. Close the stream at
        any point; the model stays usable. A cancelled stream ends with what there is of the reply,
        its ``finish_reason`` "cancelled", and the prefix cache keeps what was read.
        """
        return self._stream(request)

    @takes_keywords_of(Request)
    async def aask(self, request: Request) -> Reply:
        """Return the reply that ``ask`` gives, in ``async`` code; a cancelled task cancels it."""
        return await AsyncStream(self._stream(request)).result()

    @takes_keywords_of(Request)
    def astream(self, request: Request) -> AsyncStream[Segment, Reply]:
        """Start the reply that ``stream`` gives, for ``async for``."""
        return AsyncStream(self._stream(request))

    @takes_keywords_of(SampleRequest)
    def sample(self, request: SampleRequest) -> Samples:
        """Return ``n`` replies with the seeds seed, seed + 1, ... and their majority.

        They are decoded side by side after one prefill. Each is what ``ask`` gives with its seed.
        ``max_tokens`` holds for each; by default it is what fits n times. Arguments and errors are
        those of ``ask``, and:

        Raises:
            OptionError: ``n`` is no number of replies.
            MemoryLimitError: so many do not fit side by side. The message, before any work, names
                what would fit.
        """
        return self._stream_samples(request).result()

    @takes_keywords_of(SampleRequest)
    def stream_samples(self, request: SampleRequest) -> Stream[Reply, Samples]:
        """Start the replies of ``sample``, each yielded as soon as it has ended.

        Once they are cancelled, or Ctrl-C is pressed, what there is of the others comes at once.
        """
        return self._stream_samples(request)

    def chat(
        self,
        *,
        keep_reasoning: KeepReasoning | bool = "none",
        system_prompt: str | None = None,
        tools: Tools | None = None,
    ) -> Chat:
        """Begin a conversation; see ``Chat``.

        Raises:
            OptionError: the system prompt or a tool is malformed.
        """
        messages = [] if system_prompt is None else [{"role": "system", "content": system_prompt}]
        # Check them now, not with the first question.
        if messages or tools is not None:
            self.free_context([*messages, {"role": "user", "content": "?"}], tools=tools)
        return Chat(self, keep_reasoning, messages, tools)

    def resume(self, path: str | Path) -> Chat:
        """Return the conversation that ``Chat.save`` wrote, its cache included.

        Raises:
            OptionError: the file is missing, or of another checkpoint or kind of cache.
            CheckpointError: it is damaged.
        """
        path = as_path(path, "path")
        state, stamp = run_on_worker(partial(self.prefix_cache.open, path), self._line)
        if not state:
            raise OptionError(f"{path} holds a prompt cache but no conversation; name another file")
        return Chat.restored(self, state, path, stamp)

    def save_cache(
        self,
        path: str | Path,
        conversation: str = "",
        *,
        overwrite: bool = False,
        replaces: bytes = b"",
    ) -> bytes:
        """Write the prefix cache, and a conversation's state, to a file, atomically.

        Args:
            path: the file.
            conversation: the state, as ``Chat.save`` makes it.
            overwrite: replace another conversation's file, too.
            replaces: the stamp of the file that may be replaced in any case.

        Returns:
            The stamp of the new file.

        Raises:
            OverwriteError: the file is another conversation's, or no prompt cache.
            OptionError: it cannot be written; an older file is unchanged.
        """
        file = as_path(path, "path")

        def save() -> bytes:
            return self.prefix_cache.save(
                file, conversation, lambda stamp: overwrite or stamp == replaces
            )

        return run_on_worker(save, self._line, replaces=False)

    def free_context(
        self,
        messages: Messages,
        sampling: SamplingParams | None = None,
        *,
        tools: Tools | None = None,
    ) -> int:
        """Return the positions left for a reply to messages; below 0 where they do not fit."""
        return self.plan.context - len(self._encode(Request(messages, sampling, tools=tools)))

    @property
    def cached_tokens(self) -> int:
        """Ids in the prefix cache."""
        return len(self.prefix_cache.ids)

    @property
    def cache_bytes(self) -> int:
        """Bytes that the prefix cache has allocated."""
        return self.prefix_cache.nbytes

    @property
    def tokens_so_far(self) -> int:
        """Tokens that the newest stream has written so far, in all of its replies."""
        return sum(builder.tokens for builder in self._builders)

    def cancel(self) -> None:
        """Cancel the newest stream. May be called from another thread.

        It ends with the token or the chunk of the prompt under way. A later stream is not affected.
        """
        self._newest.request()

    def _stream(self, request: Request) -> Stream[Segment, Reply]:
        prompt = self._encode(request)
        max_tokens = self.plan.reply_tokens(len(prompt), request.params.max_tokens)
        run = ReplyRun(self._runtime(), _job(request, prompt, max_tokens))
        return self._begin(run, self._keeping_file(request, run, run.segments()))

    def _stream_samples(self, request: SampleRequest) -> Stream[Reply, Samples]:
        prompt, n = self._encode(request), request.n
        budget = plan_samples(self.plan, self.config, len(prompt), n, request.params.max_tokens)
        job = _job(request, prompt, budget.max_tokens)
        if n == 1:
            run = ReplyRun(self._runtime(), job)
            work = self._keeping_file(request, run, run.segments())
            return self._begin(run, only_sample(Stream(work, job.cancellation)))
        several = SampleRun(self._runtime(), job, n, budget.prompt_bytes)
        replies = self._keeping_file(request, several, several.replies())
        return self._begin(several, replies, gives_rest=True)

    def _encode(self, request: Request) -> list[int]:
        """Return the prompt's ids."""
        return self.tokenizer.encode_chat(
            request.conversation,
            system_prompt_only=request.system_prompt_only,
            tools=request.tools,
            think=request.params.thinks,
        )

    def _runtime(self) -> Runtime:
        return Runtime(
            model=self.model,
            tokenizer=self.tokenizer,
            prefix_cache=self.prefix_cache,
            speculation=self.speculation,
            chunk=self.plan.prefill_chunk,
        )

    def _begin(
        self,
        run: ReplyRun | SampleRun,
        work: Generator[Item, None, Result],
        *,
        gives_rest: bool = False,
    ) -> Stream[Item, Result]:
        """Return a stream of the work, which is now the newest."""
        self._newest, self._builders = run.job.cancellation, run.builders
        return on_worker(work, self._line, run.job.cancellation, gives_rest=gives_rest)

    def _keeping_file(
        self, request: Request, run: ReplyRun | SampleRun, work: Generator[Item, None, Result]
    ) -> Generator[Item, None, Result]:
        """Return work that begins with the request's cache file, and saves it at the end."""
        if request.prompt_cache_file is None:
            return work
        file = as_path(request.prompt_cache_file, named("prompt_cache_file"))
        check_cache_file(file)
        return self.prefix_cache.with_file(file, work, run, run.job.cancellation)


def _job(request: Request, prompt: list[int], max_tokens: int) -> Job:
    sampling = request.params
    seed = secrets.randbits(31) if sampling.seed is None else sampling.seed
    return Job(prompt=prompt, sampling=sampling, seed=seed, max_tokens=max_tokens)
