"""A loaded model: ask it, stream it, sample it, talk to it."""

import secrets
from collections.abc import Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from magistral_mlx.checkpoint.config import ModelConfig
from magistral_mlx.checkpoint.folder import Checkpoint
from magistral_mlx.engine.chat import Chat, KeepReasoning, result_of
from magistral_mlx.engine.prefix_cache import PrefixCache
from magistral_mlx.engine.reply_stream import ReplyRun
from magistral_mlx.engine.samples import SampleRun, plan_samples
from magistral_mlx.errors import OptionError, quoted
from magistral_mlx.files import as_path
from magistral_mlx.generation.params import SamplingParams
from magistral_mlx.generation.reply import Reply, Samples
from magistral_mlx.generation.speculation import Speculation
from magistral_mlx.model.cache_file import check_cache_file
from magistral_mlx.model.kv_format import KVFormat
from magistral_mlx.model.memory import MemoryPlan
from magistral_mlx.model.transformer import Transformer
from magistral_mlx.tokenizer.segments import Segment
from magistral_mlx.tokenizer.tekken import Tokenizer

Messages = str | Sequence[Mapping[str, Any]]
Item = TypeVar("Item")
Result = TypeVar("Result")


class Magistral:
    """A loaded model. Call it from one thread: MLX arrays belong to the thread that made them."""

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

    def ask(
        self,
        messages: Messages,
        sampling: SamplingParams | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        system_prompt_only: bool = False,
        prompt_cache_file: str | Path | None = None,
    ) -> Reply:
        """The whole reply to a question, or to a conversation ending in one.

        Args:
            messages: the user's text, or [{"role": ..., "content": ...}, ...].
            sampling: how ids are chosen; the model card's values by default.
            tools: functions the model may call, as OpenAI's tool definitions.
            system_prompt_only: a system message replaces the checkpoint's instead of joining it;
                the model may then stop reasoning.
            prompt_cache_file: reuse what this file holds of the prompt, and write the cache there at the end.
        Raises:
            OptionError: a message or option is malformed.
            ContextError: the prompt, or an explicit max_tokens beside it, does not fit the planned context.
            NumericsError: the weights are damaged.
        """
        return result_of(
            self.stream(
                messages,
                sampling,
                tools=tools,
                system_prompt_only=system_prompt_only,
                prompt_cache_file=prompt_cache_file,
            )
        )

    def stream(
        self,
        messages: Messages,
        sampling: SamplingParams | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        system_prompt_only: bool = False,
        prompt_cache_file: str | Path | None = None,
    ) -> Generator[Segment, None, Reply]:
        """As ``ask``, in pieces: a generator of Segments that returns the Reply.

        Arguments are checked at once, work begins with the first segment. Close it at any point; the
        model stays usable. A progress segment's text is "prompt ids read/prompt ids in all".
        """
        sampling = _checked(sampling)
        prompt = self._prompt(
            messages, sampling, tools=tools, system_prompt_only=system_prompt_only
        )
        max_tokens = self.plan.reply_tokens(len(prompt), sampling.max_tokens)
        file = self._opened(prompt_cache_file)
        return self._saved(self._single(prompt, sampling, max_tokens).stream(), file)

    def sample(
        self,
        messages: Messages,
        sampling: SamplingParams | None = None,
        *,
        n: int,
        tools: Sequence[Mapping[str, Any]] | None = None,
        system_prompt_only: bool = False,
        prompt_cache_file: str | Path | None = None,
    ) -> Samples:
        """``n`` replies with seeds seed, seed + 1, ..., side by side over one prefill, and their majority.

        Each is what ``ask`` gives with its seed. ``max_tokens`` holds for each; left out, it is what fits n times.
        Arguments and errors are those of ``ask``, and:

        Raises:
            OptionError: ``n`` is no number of replies.
            MemoryLimitError: so many do not fit side by side; said before any work, with what would.
        """
        replies = self.replies(
            messages,
            sampling,
            n=n,
            tools=tools,
            system_prompt_only=system_prompt_only,
            prompt_cache_file=prompt_cache_file,
        )
        return Samples.from_replies(replies)

    def replies(
        self,
        messages: Messages,
        sampling: SamplingParams | None = None,
        *,
        n: int,
        tools: Sequence[Mapping[str, Any]] | None = None,
        system_prompt_only: bool = False,
        prompt_cache_file: str | Path | None = None,
    ) -> Iterator[Reply]:
        """The replies of ``sample``, each as soon as it has ended.

        When they are cancelled, or Ctrl-C is pressed, what there is of the others comes at once.
        """
        if type(n) is not int or n < 1:
            raise OptionError(f"n is {n!r}; ask for at least one sample")
        sampling = _checked(sampling)
        prompt = self._prompt(
            messages, sampling, tools=tools, system_prompt_only=system_prompt_only
        )
        share = plan_samples(self.plan, self.config, len(prompt), n, sampling.max_tokens)
        file = self._opened(prompt_cache_file)
        if n == 1:
            alone = self._saved(self._single(prompt, sampling, share.max_tokens).stream(), file)
            return (result_of(stream) for stream in [alone])
        seed = _seed(sampling)
        several = SampleRun(
            model=self.model,
            tokenizer=self.tokenizer,
            prefix_cache=self.prefix_cache,
            chunk=self.plan.prefill_chunk,
            prompt=prompt,
            sampling=sampling,
            seeds=range(seed, seed + n),
            share=share,
        )
        return self._saved(several.replies(), file)

    def chat(
        self,
        *,
        keep_reasoning: KeepReasoning | bool = "none",
        system_prompt: str | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> Chat:
        """A conversation; see Chat. Raises OptionError where the system prompt or a tool is malformed."""
        messages = [] if system_prompt is None else [{"role": "system", "content": system_prompt}]
        if messages or tools is not None:  # said now, and not at the first question
            self.free_context([*messages, {"role": "user", "content": "?"}], tools=tools)
        return Chat(self, keep_reasoning, messages, tools)

    def resume(self, path: str | Path) -> Chat:
        """The conversation that ``Chat.save`` wrote, its cache included.

        Raises:
            OptionError: the file is missing, or of another checkpoint or kind of cache.
            CheckpointError: it is damaged.
        """
        path = as_path(path, "path")
        state = self.prefix_cache.open(path)
        if not state:
            raise OptionError(
                f"{path} holds a prompt cache but no conversation; it was not written by Chat.save"
            )
        return Chat.restored(self, state, path)

    def free_context(
        self,
        messages: Messages,
        sampling: SamplingParams | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> int:
        """Positions the context has left for a reply to these messages; below 0 where they do not fit."""
        prompt = self._prompt(messages, _checked(sampling), tools=tools, system_prompt_only=False)
        return self.plan.context - len(prompt)

    def cancel(self) -> None:
        """End the reply that is under way; the one method that may be called from another thread.

        It ends with the token or the chunk of the prompt under way: the stream returns what there is of the reply,
        its ``finish_reason`` "cancelled", and the cache keeps what was read. A later reply is not concerned.
        """
        self.prefix_cache.cancel_requested = True

    def _prompt(
        self,
        messages: Messages,
        sampling: SamplingParams,
        *,
        tools: Sequence[Mapping[str, Any]] | None,
        system_prompt_only: bool,
    ) -> list[int]:
        think = sampling.think_budget != 0
        return self.tokenizer.encode_chat(
            messages, system_prompt_only=system_prompt_only, tools=tools, think=think
        )

    def _opened(self, prompt_cache_file: str | Path | None) -> Path | None:
        """Make the live cache ready for a reply: what the file holds, if there is one, and not recalled."""
        file = (
            None if prompt_cache_file is None else as_path(prompt_cache_file, "prompt_cache_file")
        )
        if file is not None:
            check_cache_file(file)
            if file.exists() and self.prefix_cache.open(file):
                raise OptionError(
                    f"{file} holds a conversation, which a single reply would overwrite; go on with it (magistral "
                    "chat, Magistral.resume), or name another file"
                )
        self.prefix_cache.cancel_requested = False
        return file

    def _single(self, prompt: list[int], sampling: SamplingParams, max_tokens: int) -> ReplyRun:
        return ReplyRun(
            model=self.model,
            tokenizer=self.tokenizer,
            prefix_cache=self.prefix_cache,
            speculation=self.speculation,
            chunk=self.plan.prefill_chunk,
            prompt=prompt,
            sampling=sampling,
            seed=_seed(sampling),
            max_tokens=max_tokens,
        )

    def _saved(
        self, work: Generator[Item, None, Result], file: Path | None
    ) -> Generator[Item, None, Result]:
        """Do the work; then write the live cache to the file, if there is one."""
        result = yield from work
        if file is not None:
            self.prefix_cache.save(file)
        return result


def _checked(sampling: SamplingParams | None) -> SamplingParams:
    if not isinstance(sampling, SamplingParams | None):
        raise OptionError(
            f"sampling is {quoted(sampling)}; use SamplingParams(...), or leave it out"
        )
    return SamplingParams() if sampling is None else sampling


def _seed(sampling: SamplingParams) -> int:
    return secrets.randbits(31) if sampling.seed is None else sampling.seed
