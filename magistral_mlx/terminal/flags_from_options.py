"""Make a command line's flags from options that a dataclass declares."""

from collections.abc import Callable, Collection
from functools import wraps
from typing import Any, Literal, get_args, get_origin

import click
from click.shell_completion import CompletionItem

from magistral_mlx.options import FILE, FOLDER, Option, alternatives, options_of

Function = Callable[..., int]
Decorator = Callable[[Function], Function]


def click_options(cls: type, argument: str, *, only: Collection[str] = ()) -> Decorator:
    """Make a decorator that adds a flag for each option that a dataclass declares.

    The decorated function gets them as one argument, an instance of the dataclass.
    ``only`` names the options that get a flag; by default all.
    """
    declared = [option for option in options_of(cls) if not only or option.name in only]

    def decorate(function: Function) -> Function:
        def call(**values: Any) -> int:
            options = cls(**{option.name: values.pop(option.name) for option in declared})
            return function(**values, **{argument: options})

        decorated: Function = wraps(function)(call)
        for option in reversed(declared):
            decorated = _flag(option)(decorated)
        return decorated

    return decorate


def suggest(*completes: str) -> Callable[..., list[CompletionItem]]:
    """Make the function that gives a shell the values of an argument: words, FOLDER, FILE.

    bash looks for files only where no word fits. So words after FOLDER or FILE are offered only
    once they are begun.
    """
    kinds = {FOLDER: "dir", FILE: "file"}

    def suggestions(_: click.Context, __: click.Parameter, begun: str) -> list[CompletionItem]:
        found = []
        for word in completes:
            if word in kinds:
                found.append(CompletionItem(begun, type=kinds[word]))
            elif word.startswith(begun) and (begun or not found or found[-1].type == "plain"):
                found.append(CompletionItem(word))
        return found

    return suggestions


def _flag(option: Option) -> Decorator:
    """Make the click option of one declared option, by its type."""
    flag = option.name.replace("_", "-")
    names = [f"--{flag}", *option.aliases, option.name]
    kind = alternatives(option.type)[0]
    completer = suggest(*option.completes) if option.completes else None
    if kind is bool and option.default:
        # The flag of an option that is on by default turns it off.
        no = click.option(f"--no-{flag}", f"no_{option.name}", is_flag=True, help=option.help)
        return lambda function: no(_negated(function, option.name))
    if kind is bool:
        return click.option(*names, is_flag=True, help=option.help)
    if get_origin(kind) is tuple:
        return click.option(
            *names,
            multiple=True,
            metavar=option.metavar,
            help=option.help,
            shell_complete=completer,
        )
    if get_origin(kind) is Literal:
        choices = get_args(kind)
        is_text = all(isinstance(choice, str) for choice in choices)
        # Numbers stay numbers; the dataclass refuses those that are not among the choices.
        kind = click.Choice(choices) if is_text else type(choices[0])
    return click.option(
        *names,
        type=kind,
        default=option.default,
        show_default=option.default not in (None, ""),
        metavar=option.metavar,
        help=option.help,
        shell_complete=completer,
    )


def _negated(function: Function, name: str) -> Function:
    def call(**values: Any) -> int:
        values[name] = not values.pop(f"no_{name}")
        return function(**values)

    return wraps(function)(call)
