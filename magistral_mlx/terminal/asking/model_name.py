"""The model of a command line: an option, a word, or the default."""

import os
from collections.abc import Callable
from copy import copy
from typing import Any

import click
from click.core import ParameterSource
from click.shell_completion import CompletionItem

from magistral_mlx.errors import quoted
from magistral_mlx.files import settings_path
from magistral_mlx.library.known_folders import find_model, is_model, model_names
from magistral_mlx.library.settings import MODEL, MODEL_VARIABLE, default_model
from magistral_mlx.options import FOLDER
from magistral_mlx.terminal.asking.question import is_piped
from magistral_mlx.terminal.flags_from_options import Decorator, suggest

READY_MADE = "lmstudio-community/Magistral-Small-2506-MLX-4bit"
NO_MODEL = f"""no model is named, and none is the default. Ways to get one:
  magistral pull
      fetches {READY_MADE},
      ready-made in 4 bit (13 GB), and makes it the default
  magistral config model NAME
      makes one that you have the default; magistral list shows them
  magistral convert --hf-path mistralai/Magistral-Small-2506 --mlx-path my-4bit
      makes your own, my-4bit, from the published weights (fetches 47 GB)
  demo, as a name (or --model demo)
      is the toy model of this package: it does sums and counts letters"""
# Where the options keep the model that was named, until all of them are read.
NAMED = "magistral_mlx.named"
# Its keys beside MODEL: the word in place of --model; True if none is typed.
WORD, DEFAULT = "model_name", "is_default"


def is_setting(ctx: click.Context, name: str) -> bool:
    """Return whether a parameter's value comes from the settings, or from MAGISTRAL_MODEL."""
    if name == MODEL:
        return bool(ctx.meta[NAMED].get(DEFAULT))
    return ctx.get_parameter_source(name) is ParameterSource.DEFAULT_MAP


def source_of(names: list[str]) -> str:
    """Return the place that sets these parameters."""
    is_variable = names == [MODEL] and bool(os.environ.get(MODEL_VARIABLE))
    return MODEL_VARIABLE if is_variable else str(settings_path())


def keep_name(ctx: click.Context, param: click.Parameter, name: str | None) -> None:
    """Keep a model's name that is typed, as an option or as a word."""
    is_typed = ctx.get_parameter_source(str(param.name)) is ParameterSource.COMMANDLINE
    _choose(ctx, str(param.name), name if is_typed else None)


def check_model(ctx: click.Context, param: click.Parameter, name: str | None) -> None:
    """Keep a model's name, else the default's; tell the ways to get a model where none is given."""
    keep_name(ctx, param, name)
    _require(ctx)


def _choose(ctx: click.Context, key: str, name: str | None) -> None:
    """Keep one of the two names; the last that arrives sets the argument ``model``."""
    named = ctx.meta.setdefault(NAMED, {})
    named[key] = name
    # Parsing is resilient while a shell completes the line.
    if not {MODEL, WORD} <= set(named) or ctx.resilient_parsing:
        return
    flag, word = named[MODEL], named[WORD]
    if word is not None and flag is not None:
        raise click.UsageError(f"two models are named, {word} and {flag}; keep one", ctx)
    if word is not None and not os.path.isdir(word) and any(map(str.isspace, word)):
        raise click.UsageError(
            f"{quoted(word)} is where a model's name stands; a question is given with -p, or "
            'as magistral run "..."',
            ctx,
        )
    chosen = flag if word is None else word
    ctx.params[MODEL] = None if chosen is None else find_model(chosen)


def _require(ctx: click.Context) -> None:
    if MODEL in ctx.params and ctx.params[MODEL] is None:
        default = default_model()
        if default is None:
            raise click.UsageError(NO_MODEL, ctx)
        ctx.params[MODEL] = find_model(default)
        ctx.meta[NAMED][DEFAULT] = True


def _keep_words(ctx: click.Context, _: click.Parameter, words: tuple[str, ...]) -> None:
    """Split the words of ``run`` into a model and a question; without words, stdin asks it."""
    if ctx.resilient_parsing:
        return
    if len(words) > 2:
        raise click.UsageError('put the question in quotes: magistral run "..."', ctx)
    is_alone = len(words) == 1 and is_model(words[0])
    if is_alone and not is_piped():
        raise click.UsageError(
            f'{words[0]} is a model: magistral run {words[0]} "..." asks it a question, and '
            f"magistral chat {words[0]} talks to it",
            ctx,
        )
    if is_alone:  # as in: cat question.txt | magistral run demo
        words = (words[0], "-")
    ctx.params["prompt"] = words[-1] if words else None
    _choose(ctx, WORD, words[0] if len(words) == 2 else None)
    _require(ctx)


def complete_models(ctx: click.Context, param: click.Parameter, typed: str) -> list[CompletionItem]:
    """Offer the names of models to a shell, and folders."""
    return suggest(FOLDER, *model_names())(ctx, param, typed)


# Both places of a model are eager, so that a missing one is told before anything else.
EAGER: dict[str, Any] = {"is_eager": True, "expose_value": False, "shell_complete": complete_models}


def _model_options(callback: Callable[..., None], help: str) -> Decorator:
    """Make a decorator that adds the argument ``model``: ``--model`` or a word."""
    word = click.argument(WORD, required=False, metavar="[M]", callback=callback, **EAGER)
    flag = click.option("--model", metavar="M", help=help, callback=callback, **EAGER)
    return lambda function: word(flag(function))


def word_command(command: click.Command, *, help: str, epilog: str) -> click.Command:
    """Make ``run``, the form of ``generate`` whose words are a question, or a model and one."""
    metavar = '[M] "QUESTION"'
    words = click.Argument(["words"], nargs=-1, metavar=metavar, callback=_keep_words, **EAGER)
    made = copy(command)
    made.params = [words, *(p for p in command.params if p.name not in (WORD, "prompt"))]
    made.name, made.help, made.epilog = "run", help, epilog
    return made


MODEL_HELP = "A folder, a name of magistral list, a hub id such as org/name, or demo."
model_option = _model_options(check_model, f"{MODEL_HELP} By default magistral config model.")
optional_model_option = _model_options(keep_name, MODEL_HELP)
