"""What generate, chat and plan share: options, loading with progress."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar, get_args

import click

from magistral_mlx.checkpoint.manifest import ReasoningFormat
from magistral_mlx.engine.load import loading
from magistral_mlx.engine.magistral import Magistral
from magistral_mlx.errors import in_units
from magistral_mlx.generation.params import OnLoop, SamplingParams
from magistral_mlx.model import cache_file
from magistral_mlx.terminal import command_line
from magistral_mlx.terminal.display import show_status

Function = TypeVar("Function", bound=Callable[..., Any])

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
    "--extra-eos-token": "use --stop TEXT",
    "--ignore-chat-template": "Magistral is asked through its chat format only",
    "--image": "Magistral Small 2506 reads text only",
    "--kv-group-size": "groups are 64; choose the bits with --kv-bits",
    "--min-p": "use --top-p, as the model card does",
    "--min-tokens-to-keep": "use --top-p",
    "--pipeline": "the model runs on one machine",
    "--prefill-response": "use --no-think for an answer without a trace",
    "--quantize": "a checkpoint is quantized once, with magistral convert; see --kv-bits for the cache",
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


class Command(command_line.Command):
    """A command whose users know mlx-lm's generate."""

    foreign_flags = MLX_LM_FLAGS


@dataclass(frozen=True, slots=True, kw_only=True)
class Loading:
    """What was asked for of a model that is yet to be loaded."""

    model: str
    revision: str | None
    max_kv_size: int | None
    kv_bits: int | None
    prefill_step_size: int | None
    memory_gb: float | None
    wired: bool
    draft_model: str | None
    num_draft_tokens: int | None
    reasoning_format: ReasoningFormat | None

    def visibly(self) -> Magistral:
        """Load it, with progress on stderr."""
        steps = loading(
            self.model,
            context=self.max_kv_size,
            kv_bits=self.kv_bits,
            prefill_step_size=self.prefill_step_size,
            memory_gb=self.memory_gb,
            wired=self.wired,
            draft=self.draft_model,
            num_draft_tokens=self.num_draft_tokens,
            reasoning_format=self.reasoning_format,
            revision=self.revision,
        )
        while True:
            try:
                done, total = next(steps)
            except StopIteration as end:
                show_status("")
                magistral: Magistral = end.value
                return magistral
            show_status(f"loading {self.model}: {in_units(done)} of {in_units(total)}")


def make_sampling(
    *,
    max_tokens: int | None,
    temp: float,
    top_p: float,
    seed: int | None,
    stop: tuple[str, ...],
    think_budget: int | None,
    think_budget_message: str,
    no_think: bool,
    on_loop: OnLoop,
) -> SamplingParams:
    if no_think and think_budget is not None:
        raise click.UsageError("--no-think is --think-budget 0; keep one of the two")
    if think_budget_message and not think_budget:
        raise click.UsageError(
            "--think-budget-message is written where --think-budget cuts a trace off; give both"
        )
    budget = 0 if no_think else think_budget
    return SamplingParams(
        temp,
        top_p,
        max_tokens,
        seed,
        stop,
        budget,
        on_loop=on_loop,
        think_budget_message=think_budget_message,
    )


def options(
    name: str, make: Callable[..., object], *decorators: Callable[[Any], Any]
) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Several click options as one decorator, in the order of the help text, and as one argument ``name`` that
    ``make`` makes of them."""
    own = inspect.signature(make).parameters

    def decorate(function: Callable[..., int]) -> Callable[..., int]:
        @wraps(function)
        def gathered(**values: object) -> int:
            made = make(**{option: values.pop(option) for option in own})
            return function(**values, **{name: made})

        for decorator in reversed(decorators):
            gathered = decorator(gathered)
        return gathered

    return decorate


def check_model(ctx: click.Context, _: click.Parameter, model: str | None) -> str | None:
    if model is None and not ctx.resilient_parsing:  # resilient: while a shell completes
        raise click.UsageError(NO_MODEL, ctx)
    return model


def check_cache_file(ctx: click.Context, param: click.Parameter, path: Path | None) -> Path | None:
    """Before any work: a reply may take hours, and only then is the file written."""
    if path is not None:
        cache_file.check_cache_file(path)
    return path


loading_options = options(
    "loading",
    Loading,
    click.option(
        "--model",
        metavar="M",
        is_eager=True,
        callback=check_model,
        help="A folder, a hub id such as org/name, or demo.",
    ),
    click.option("--revision", metavar="R", help="Branch, tag or commit of a hub id."),
    click.option(
        "--max-kv-size",
        type=int,
        metavar="N",
        help="Context to plan for, prompt and reply together; by default what fits, at most 40,960. "
        "A prompt that does not fit is refused, never cut.",
    ),
    click.option(
        "--kv-bits", type=int, metavar="16|8|4", help="Quantize the KV cache; 16 does not."
    ),
    click.option(
        "--prefill-step-size",
        type=int,
        metavar="N",
        help="Prompt tokens a pass; by default what fits.",
    ),
    click.option(
        "--memory-gb",
        type=float,
        metavar="G",
        help="Memory to plan for, in 10^9 bytes; by default the device's.",
    ),
    click.option(
        "--wired",
        is_flag=True,
        help="Keep weights and cache in a Mac's memory when others want it. Implicated in kernel panics of macOS.",
    ),
    click.option(
        "--draft-model",
        metavar="M",
        help="A small model of the same vocabulary that guesses ahead; by default the text so far does.",
    ),
    click.option(
        "--num-draft-tokens",
        type=int,
        metavar="N",
        help="Guesses checked in one pass at most; by default as many as pay on this device, 0 for none.",
    ),
    click.option(
        "--reasoning-format",
        type=click.Choice(get_args(ReasoningFormat)),
        help="How the model writes its traces, where its files show that wrongly.",
    ),
)
sampling_options = options(
    "sampling",
    make_sampling,
    click.option(
        "--max-tokens",
        "-m",
        type=int,
        metavar="N",
        help="Default: 40,960, or what the context leaves.",
    ),
    click.option(
        "--temp", type=float, default=0.7, show_default=True, help="Temperature; 0 is greedy."
    ),
    click.option(
        "--top-p", type=float, default=0.95, show_default=True, help="Probability mass kept."
    ),
    click.option(
        "--seed", type=int, help="The same seed gives the same reply on the same machine."
    ),
    click.option(
        "--stop", multiple=True, metavar="S", help="Text that ends the answer; may be repeated."
    ),
    click.option(
        "--think-budget",
        type=int,
        metavar="N",
        help="Reasoning tokens at most; then the trace is closed.",
    ),
    click.option(
        "--think-budget-message",
        default="",
        metavar="TEXT",
        help="The last line of a trace that is cut off at its budget, such as 'Time is up, so I answer now.'",
    ),
    click.option(
        "--on-loop",
        type=click.Choice(get_args(OnLoop)),
        default="close",
        show_default=True,
        help="When the model repeats itself: close its trace so that it answers, stop the reply, or ignore it. "
        "In an answer close stops as well.",
    ),
    click.option("--no-think", is_flag=True, help="Answer without a trace, as --think-budget 0."),
)
hide_reasoning_option = click.option(
    "--hide-reasoning", is_flag=True, help="Do not show the trace."
)


def cache_file_option(what: str) -> Callable[[Function], Function]:
    """``--prompt-cache-file``; ``what`` is its help text."""
    path = click.Path(dir_okay=False, path_type=Path)
    return click.option(
        "--prompt-cache-file", type=path, metavar="F", callback=check_cache_file, help=what
    )
