"""Flags of generate, chat and plan, and loading with progress."""

import os
from dataclasses import replace
from functools import wraps
from itertools import chain, islice
from pathlib import Path
from typing import Any

import click

from magistral_mlx.checkpoint.hub_api import is_hub_id
from magistral_mlx.engine.load import loading
from magistral_mlx.engine.magistral import Magistral
from magistral_mlx.errors import (
    CheckpointError,
    ContextError,
    HubError,
    MagistralError,
    MemoryLimitError,
    TokenizerError,
    in_units,
)
from magistral_mlx.generation.params import SamplingParams
from magistral_mlx.library.hub_models import hide_progress
from magistral_mlx.library.known_folders import find_model, remember
from magistral_mlx.library.settings import LOADING, MODEL, read_settings
from magistral_mlx.model import cache_file
from magistral_mlx.model.load_options import LoadOptions
from magistral_mlx.terminal import command_line
from magistral_mlx.terminal.asking.model_name import is_setting, source_of
from magistral_mlx.terminal.flags_from_options import Decorator, Function, click_options
from magistral_mlx.terminal.verbosity import Status, is_quiet, waiting

# Flags of mlx-lm, Ollama and llama.cpp that a user may type here, and what to do instead.
MLX_LM_FLAGS = {
    "--adapter-path": "adapters are not read; fuse the adapter into the checkpoint first "
    "(mlx_lm.fuse)",
    "--chat-template-config": "the chat is encoded by mistral-common, not by a template; "
    "see --no-think",
    "--extra-eos-token": "use --stop TEXT",
    "--ignore-chat-template": "Magistral is asked through its chat format only",
    "--ctx-size": "use --max-kv-size",
    "--format": "use --json",
    "--frequency-penalty": "the model card asks for none; for repetitions see --on-loop",
    "--grammar": "replies are not bound to a grammar; ask for the form in the prompt",
    "--hidethinking": "use --hide-reasoning",
    "--image": "Magistral Small 2506 reads text only",
    "--json-schema": "replies are not bound to a schema; ask for the form in the prompt",
    "--kv-group-size": "groups are 64; choose the bits with --kv-bits",
    "--logit-bias": "no token is preferred; ask for what you want in the prompt",
    "--min-p": "use --top-p, as the model card does",
    "--min-tokens-to-keep": "use --top-p",
    "--n-predict": "use --max-tokens",
    "--pipeline": "the model runs on one machine",
    "--prefill-response": "use --no-think for an answer without a trace",
    "--presence-penalty": "the model card asks for none; for repetitions see --on-loop",
    "--quantize": "a checkpoint is quantized once, with magistral convert; "
    "see --kv-bits for the cache",
    "--quantize-activations": "activations keep the checkpoint's type",
    "--quantized-kv-start": "the cache is quantized from the first token on; see --kv-bits",
    "--repeat-penalty": "the model card asks for none; for repetitions see --on-loop",
    "--repetition-penalty": "the model card asks for none; for repetitions see --on-loop",
    "--think": "the model thinks unless --no-think is given; see also --think-budget",
    "--top-k": "use --top-p, as the model card does",
    "--trust-remote-code": "no code from a checkpoint is ever run",
    "--use-default-chat-template": "the chat is encoded by mistral-common, not by a template",
    "--xtc-probability": "use --temp and --top-p, as the model card does",
    "--xtc-threshold": "use --temp and --top-p, as the model card does",
}


class Command(command_line.Command):
    """A command whose users know mlx-lm's generate."""

    foreign_flags = MLX_LM_FLAGS

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the words; what they leave out comes from the user's settings."""
        # Parsing is resilient while a shell completes the line.
        if not ctx.resilient_parsing:
            try:
                ctx.default_map = read_settings()
            except MagistralError:
                # Help is shown beside settings that are wrong.
                if not {"--help", *ctx.help_option_names} & set(args):
                    raise
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; an error also names the settings that may have caused it."""
        try:
            return super().invoke(ctx)
        except MagistralError as error:
            used = [name for name in ctx.params if may_cause(name, error) and is_setting(ctx, name)]
            if not used:
                raise
            names = ", ".join(name.replace("_", "-") for name in used)
            where = f"{source_of(used)} sets {names}"
            raise type(error)(f"{error.template}\n({where})") from None


def may_cause(name: str, error: MagistralError) -> bool:
    """Return whether a parameter may be the cause of an error that its command ended with."""
    if isinstance(error, CheckpointError | HubError | TokenizerError):
        return name in (MODEL, "tokenizer")
    if isinstance(error, ContextError | MemoryLimitError):
        return name in (*LOADING, "max_tokens")
    text = error.template.replace("-", "_")
    return name in text or (name == "max_kv_size" and "context" in text)


def load_with_progress(model: str, options: LoadOptions) -> Magistral:
    """Load a model, with progress on stderr."""
    folder = find_model(model)
    if is_quiet() and is_hub_id(folder):
        hide_progress()
    stream, status = loading(folder, options), Status()
    try:
        # The first step fetches a model of the hub, whose bars are for a terminal only.
        with waiting(f"opening {model}"):
            first = [*islice(stream, 1)]
        for progress in chain(first, stream):
            status.show(f"loading {model}: {in_units(progress.done)} of {in_units(progress.total)}")
    finally:
        status.clear()
    magistral = stream.result()
    if os.path.isdir(os.path.expanduser(folder)):
        remember(folder)
    return magistral


def sampling_options(function: Function) -> Function:
    """Add the flags of SamplingParams and ``--no-think``, as the argument ``sampling``."""

    @click_options(SamplingParams, "sampling")
    @click.option("--no-think", is_flag=True, help="Answer without a trace, as --think-budget 0.")
    @wraps(function)
    def call(*, sampling: SamplingParams, no_think: bool, **others: Any) -> int:
        ctx = click.get_current_context()
        if no_think and is_setting(ctx, "think_budget"):
            sampling = replace(sampling, think_budget=None)
        if not sampling.think_budget and is_setting(ctx, "think_budget_message"):
            sampling = replace(sampling, think_budget_message="")
        if no_think and sampling.think_budget is not None:
            raise click.UsageError("--no-think is --think-budget 0; keep one of the two")
        if sampling.think_budget_message and not sampling.think_budget:
            raise click.UsageError(
                "--think-budget-message is written where --think-budget cuts a trace off; give both"
            )
        if no_think:
            sampling = replace(sampling, think_budget=0)
        return function(sampling=sampling, **others)

    return call


def check_cache_file(ctx: click.Context, param: click.Parameter, path: Path | None) -> Path | None:
    """Check the file before any work: a reply may take hours before the file is written."""
    if path is not None:
        cache_file.check_cache_file(path)
    return path


hide_reasoning_option = click.option(
    "--hide-reasoning", is_flag=True, help="Do not show the trace."
)


def cache_file_option(help: str) -> Decorator:
    """Make the option ``--prompt-cache-file`` with a help text."""
    path = click.Path(dir_okay=False, path_type=Path)
    return click.option(
        "--prompt-cache-file", type=path, metavar="F", callback=check_cache_file, help=help
    )
