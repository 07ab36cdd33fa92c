"""What the command lines share: exit codes, options, loading with progress, showing a reply."""

import logging
import os
import sys
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, TextIO, TypeVar

import click

from magistral_mlx.api import Magistral, loading
from magistral_mlx.errors import MagistralError
from magistral_mlx.reasoning import Segment, visible
from magistral_mlx.reply import Reply, Usage
from magistral_mlx.sampling import SamplingParams

Function = TypeVar("Function", bound=Callable[..., Any])

DONE, BUG, WRONG, INTERRUPTED = 0, 1, 2, 130  # exit codes; BUG is Python's own for an exception that escapes

NO_MODEL = """--model is missing. Three ways to get a model:
  --model lmstudio-community/Magistral-Small-2506-MLX-4bit
      ready-made in 4 bit; fetches 13 GB on first use
  magistral convert --hf-path mistralai/Magistral-Small-2506 --mlx-path magistral-4bit
      your own, from the published weights (fetches 47 GB); then --model magistral-4bit
  --model demo
      the small model that comes with this software: arithmetic and letters, to try everything out"""

# Flags of mlx-lm that fingers may type here, and what to do instead.
MLX_LM_FLAGS = {
    "--adapter-path": "adapters are not read; fuse the adapter into the checkpoint first (mlx_lm.fuse)",
    "--chat-template-config": "the chat is encoded by mistral-common, not by a template; see --no-think",
    "--draft-model": "there is no draft model for Magistral Small",
    "--extra-eos-token": "use --stop TEXT",
    "--ignore-chat-template": "Magistral is asked through its chat format only",
    "--image": "Magistral Small 2506 reads text only",
    "--kv-group-size": "groups are 64; choose the bits with --kv-bits",
    "--min-p": "use --top-p, as the model card does",
    "--min-tokens-to-keep": "use --top-p",
    "--num-draft-tokens": "there is no draft model for Magistral Small",
    "--prefill-response": "use --no-think for an answer without a trace",
    "--quantize-activations": "activations keep the checkpoint's type",
    "--quantized-kv-start": "the cache is quantized from the first token on; see --kv-bits",
    "--temperature": "use --temp",
    "--top-k": "use --top-p, as the model card does",
    "--trust-remote-code": "no code from a checkpoint is ever run",
    "--use-default-chat-template": "the chat is encoded by mistral-common, not by a template",
    "--verbose": "progress and figures are on stderr already; silence them with 2>/dev/null",
    "--xtc-probability": "use --temp and --top-p, as the model card does",
    "--xtc-threshold": "use --temp and --top-p, as the model card does",
}


class Command(click.Command):
    """A click command that knows mlx-lm's flags and lets a reader of its output go away."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            if error.option_name not in MLX_LM_FLAGS:
                raise
            raise click.UsageError(f"{error.option_name} is mlx-lm's: {MLX_LM_FLAGS[error.option_name]}", ctx) from None

    def invoke(self, ctx: click.Context) -> Any:
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
            return result
        except BrokenPipeError:  # as in `... | head -1`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python flushes into it once more
            return DONE


def run(command: click.Command, argv: Sequence[str] | None, name: str | None = None) -> int:
    """Run a command line to its exit code; errors a user can change are one message on stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    log = logging.getLogger("magistral_mlx")
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        result = command.main(None if argv is None else list(argv), name, standalone_mode=False)
        return result if isinstance(result, int) else DONE
    except click.Abort:
        return INTERRUPTED
    except click.ClickException as error:
        error.show()
        return WRONG
    except MagistralError as error:
        print(f"error: {error}", file=sys.stderr)
        return WRONG
    finally:
        log.removeHandler(handler)
        log.setLevel(level)


def options(*decorators: Callable[[Any], Any]) -> Callable[[Function], Function]:
    """Several click options as one decorator, in the order of the help text."""

    def decorate(function: Function) -> Function:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return decorate


loading_options = options(
    click.option("--model", metavar="M", help="A folder, a hub id such as org/name, or demo."),
    click.option("--revision", metavar="R", help="Branch, tag or commit of a hub id."),
    click.option(
        "--max-kv-size",
        type=int,
        metavar="N",
        help="Context to plan for, prompt and reply together; by default what fits, at most 40,960. "
        "A prompt that does not fit is refused, never cut.",
    ),
    click.option("--kv-bits", type=int, metavar="8|4", help="Quantize the KV cache."),
    click.option("--prefill-step-size", type=int, metavar="N", help="Prompt tokens a pass; by default what fits."),
)
sampling_options = options(
    click.option("--max-tokens", "-m", type=int, metavar="N", help="Default: 40,960, or what the context leaves."),
    click.option("--temp", type=float, default=0.7, show_default=True, help="Temperature; 0 is greedy."),
    click.option("--top-p", type=float, default=0.95, show_default=True, help="Probability mass kept."),
    click.option("--seed", type=int, help="The same seed gives the same reply on the same machine."),
    click.option("--stop", multiple=True, metavar="S", help="Text that ends the answer; may be repeated."),
    click.option("--think-budget", type=int, metavar="N", help="Reasoning tokens at most; then the trace is closed."),
    click.option("--no-think", is_flag=True, help="Answer without a trace, as --think-budget 0."),
    click.option("--hide-reasoning", is_flag=True, help="Show the answer only."),
)


def make_sampling(
    *,
    max_tokens: int | None,
    temp: float,
    top_p: float,
    seed: int | None,
    stop: tuple[str, ...],
    think_budget: int | None,
    no_think: bool,
) -> SamplingParams:
    if no_think and think_budget:
        raise click.UsageError(f"--no-think and --think-budget {think_budget} contradict each other; keep one")
    budget = 0 if no_think else think_budget
    return SamplingParams(temp, top_p, max_tokens, seed, stop, budget)


def load_visibly(
    model: str | None,
    *,
    revision: str | None,
    max_kv_size: int | None,
    kv_bits: int | None,
    prefill_step_size: int | None,
) -> Magistral:
    """Load a model with progress on stderr."""
    if model is None:
        raise click.UsageError(NO_MODEL)
    steps = loading(model, context=max_kv_size, kv_bits=kv_bits, prefill_step_size=prefill_step_size, revision=revision)
    while True:
        try:
            done, total = next(steps)
        except StopIteration as end:
            show_status("")
            magistral: Magistral = end.value
            return magistral
        show_status(f"loading {model}: {done / 1e9:.2f} of {total / 1e9:.2f} GB")


def show_status(text: str) -> None:
    """One line on a terminal's stderr that the next one replaces; "" removes it."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\x1b[K{text}")
        sys.stderr.flush()


@dataclass
class Display:
    """Shows a reply while it arrives: the answer on stdout, so that a pipe gets nothing else; the trace on stderr.

    What a terminal would obey is made visible; a pipe or a file gets the model's text as it is.
    """

    hides_reasoning: bool = False
    hides_answer: bool = False
    reasoning: str = ""
    answer: str = ""

    def show(self, segment: Segment) -> None:
        if segment.kind == "progress":
            show_status(f"reading the prompt: {segment.text} tokens")
            return
        if not self.reasoning and not self.answer:
            show_status("")
        if segment.kind == "reasoning":
            self.reasoning += segment.text
            if not self.hides_reasoning:
                write(sys.stderr, segment.text, is_dim=True)
        elif segment.kind == "answer":
            if not self.answer and self.reasoning and not self.hides_reasoning:
                write(sys.stderr, "\n\n")
            self.answer += segment.text
            if not self.hides_answer:
                write(sys.stdout, segment.text)

    def end(self) -> None:
        """Finish the last line."""
        show_status("")
        if self.answer and not self.hides_answer:
            write(sys.stdout, "\n")
        elif self.reasoning and not self.hides_reasoning:
            write(sys.stderr, "\n")

    def show_all(self, stream: Generator[Segment, None, Reply]) -> Reply | None:
        """Show a whole stream; None if Ctrl-C ended it, which leaves the model usable."""
        try:
            while True:
                try:
                    self.show(next(stream))
                except StopIteration as end:
                    reply: Reply = end.value
                    return reply
        except KeyboardInterrupt:
            stream.close()
            return None
        finally:
            self.end()


def write(stream: TextIO, text: str, *, is_dim: bool = False) -> None:
    if stream.isatty():
        text = visible(text)
        if is_dim and "NO_COLOR" not in os.environ:
            text = f"\x1b[2m{text}\x1b[22m"
    stream.write(text)
    stream.flush()


def figures(usage: Usage) -> str:
    """What a reply cost, as one line."""

    def rate(tokens: int, seconds: float) -> str:
        return f"{tokens / seconds:,.1f} tok/s" if tokens > 0 and seconds > 0 else "-"

    cached = f" ({usage.cached_tokens:,} cached)" if usage.cached_tokens else ""
    return (
        f"prompt {usage.prompt_tokens:,} tokens{cached}, "
        f"{rate(usage.prompt_tokens - usage.cached_tokens, usage.prefill_seconds)}; "
        f"reply {usage.completion_tokens:,} tokens ({usage.reasoning_tokens:,} reasoning), "
        # the first token came with the prompt's pass
        f"{rate(usage.completion_tokens - 1, usage.decode_seconds)}; "
        f"first token after {usage.prefill_seconds:.2f} s; peak memory {usage.peak_memory_bytes / 1e9:.2f} GB"
    )
