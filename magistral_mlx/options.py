"""Options, each declared once as a field of a frozen dataclass: type, default, help text.

Command lines, the bridge and keyword arguments are made from the field. A new option is two edits:
the field, and the place that uses it.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field, dataclass, field, fields
from difflib import get_close_matches
from functools import wraps
from textwrap import TextWrapper
from types import UnionType
from typing import (
    Any,
    Concatenate,
    ParamSpec,
    TypeVar,
    Union,
    cast,
    get_args,
    get_origin,
    get_type_hints,
)

from magistral_mlx.errors import OptionError, named, quoted

P = ParamSpec("P")
First = TypeVar("First")
Second = TypeVar("Second")
Options = TypeVar("Options")
Result = TypeVar("Result")

_TEXT = TextWrapper(96, " " * 4, " " * 8, break_on_hyphens=False, break_long_words=False)

# In ``completes`` of an option: a shell offers the names of folders, or of files.
FOLDER, FILE = "<folder>", "<file>"
LARGEST_COUNT = 2**63 - 1  # what MLX, and every library below it, can count


@dataclass(frozen=True, slots=True)
class Option:
    """A field, as a command line needs it.

    Attributes:
        type: the annotation.
        aliases: other flags, such as "-m".
        completes: the values that a shell offers: words, FOLDER for folders, FILE for files.
    """

    name: str
    type: Any
    default: Any
    help: str
    metavar: str | None
    aliases: tuple[str, ...]
    completes: tuple[str, ...]


def option(
    default: Any,
    help: str,
    *,
    metavar: str | None = None,
    aliases: tuple[str, ...] = (),
    completes: tuple[str, ...] = (),
) -> Any:
    """Declare a field of a frozen dataclass as an option.

    Args:
        default: the value without the option.
        help: one or two sentences, for ``--help`` and for the documentation.
        metavar: the value's name on a command line; by default its type.
        aliases: flags beside the field's name with dashes.
        completes: the values that a shell offers: words, FOLDER for folders, FILE for files.
    """
    metadata = {"help": help, "metavar": metavar, "aliases": aliases, "completes": completes}
    return field(default=default, metadata=metadata)


def refused(name: str, value: object, instead: str) -> OptionError:
    """Make the error for an option's value; ``instead`` tells which values it takes."""
    return OptionError(f"{named(name)} is {quoted(value)}; use {instead}")


def check_count(name: str, value: object, least: int, most: int = LARGEST_COUNT) -> None:
    """Check the value of an option that is a whole number or None.

    Raises:
        OptionError: it is something else, or not in ``least`` to ``most``.
    """
    if value is not None and not (type(value) is int and least <= value <= most):
        is_open = most == LARGEST_COUNT and not (isinstance(value, int) and value > most)
        limits = f"of at least {least}" if is_open else f"from {least} to {most}"
        raise refused(name, value, f"a whole number {limits}, or leave it out")


def is_number(value: object) -> bool:
    """Return whether a value is a number, which ``True`` is not."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def explained(text: str) -> Mapping[str, str]:
    """Return the metadata of a field that is documented, but is no option of a command line."""
    return {"text": text}


def documented(cls: type[Options]) -> type[Options]:
    """Add the texts of a dataclass's fields to its docstring."""
    cls.__doc__ = _with_section(cls.__doc__ or "", "Attributes", describe(cls))
    return cls


def alternatives(annotation: Any) -> tuple[Any, ...]:
    """Return the types that an annotation allows."""
    is_union = get_origin(annotation) in (UnionType, Union)
    return get_args(annotation) if is_union else (annotation,)


def options_of(cls: type) -> list[Option]:
    """Return the options that a dataclass declares, in order."""
    types = get_type_hints(cls)
    return [
        Option(found.name, types[found.name], found.default, **found.metadata)
        for found in _declared(cls)
    ]


def from_values(cls: Callable[..., Options], values: Mapping[str, object]) -> Options:
    """Make options from a mapping, such as a host's; None stands for the default.

    Raises:
        OptionError: a name is not an option, or a value is out of range.
    """
    names = [found.name for found in _declared(cls)]
    for name in values:
        if name not in names:
            near = get_close_matches(name, names, n=1)
            hint = f"did you mean {near[0]}?" if near else f"use {', '.join(names)}"
            raise OptionError(f"{name!r} is not an option; {hint}")
    return cls(**{name: value for name, value in values.items() if value is not None})


def takes_keywords_of(
    options: Callable[P, Options],
) -> Callable[[Callable[[First, Options], Result]], Callable[Concatenate[First, P], Result]]:
    """Let a function of (value, options) be called with the options' fields as keywords.

    Type checkers and editors see the keywords with the types of the dataclass.
    """

    def decorate(
        function: Callable[[First, Options], Result],
    ) -> Callable[Concatenate[First, P], Result]:
        @wraps(function)
        def call(*args: Any, **keywords: Any) -> Result:
            first, *rest = _positional(function, args, keywords, leading=1)
            _check_call(function, options, rest, keywords)
            return function(first, options(*rest, **keywords))

        _show_keywords(call, function, options, leading=1)
        return cast(Callable[Concatenate[First, P], Result], call)

    return decorate


def describe(cls: Any) -> list[str]:
    """Return the part of a docstring for each field with a text, in the order of keywords."""
    declared = {found.name: found.metadata for found in fields(cls)}
    texts = {
        name: declared[name].get("help", declared[name].get("text", ""))
        for name in inspect.signature(cls).parameters
    }
    return [_TEXT.fill(f"{name}: {text}") for name, text in texts.items() if text]


def _with_section(doc: str, title: str, lines: list[str]) -> str:
    """Add lines to a section of a docstring, which stands before its errors."""
    before, errors, after = inspect.cleandoc(doc).partition("\n\nRaises:")
    if f"\n{title}:\n" not in before:
        before += f"\n\n{title}:"
    return f"{chr(10).join([before, *lines])}{errors}{after}" if lines else doc


def takes_two_and_keywords_of(
    options: Callable[P, Options],
) -> Callable[
    [Callable[[First, Second, Options], Result]], Callable[Concatenate[First, Second, P], Result]
]:
    """Let a function of (value, value, options) be called with the options' fields as keywords."""

    def decorate(
        function: Callable[[First, Second, Options], Result],
    ) -> Callable[Concatenate[First, Second, P], Result]:
        @wraps(function)
        def call(*args: Any, **keywords: Any) -> Result:
            first, second, *rest = _positional(function, args, keywords, leading=2)
            _check_call(function, options, rest, keywords)
            return function(first, second, options(*rest, **keywords))

        _show_keywords(call, function, options, leading=2)
        return cast(Callable[Concatenate[First, Second, P], Result], call)

    return decorate


def _positional(
    function: Callable[..., Any], args: tuple[Any, ...], keywords: dict[str, Any], *, leading: int
) -> list[Any]:
    """Return the positional arguments of a call, whose leading ones may be given by name."""
    given = list(args)
    for name in list(inspect.signature(function).parameters)[len(args) : leading]:
        if name not in keywords:
            raise TypeError(f"{function.__name__}() needs the argument {name!r}")
        given.append(keywords.pop(name))
    return given


def _check_call(
    function: Callable[..., Any],
    options: Any,
    args: Sequence[object],
    keywords: Mapping[str, object],
) -> None:
    """Raise TypeError, in the function's name, for arguments that the options do not have."""
    declared = {found.name: found.metadata.get("aliases", ()) for found in fields(options)}
    for name in keywords.keys() - declared:
        near = [own for own, flags in declared.items() if f"--{name.replace('_', '-')}" in flags]
        near += get_close_matches(name, declared, n=1)
        hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(declared)}"
        raise TypeError(f"{function.__name__}() has no keyword {name!r}; {hint}")
    try:
        inspect.signature(options).bind(*args, **keywords)
    except TypeError as error:
        raise TypeError(f"{function.__name__}(): {error}") from None


def _show_keywords(
    call: Any, function: Callable[..., Any], options: Callable[..., Any], *, leading: int
) -> None:
    """Let ``help(call)`` show the options after the leading parameters."""
    own = inspect.signature(function)
    parameters = list(own.parameters.values())[:leading]
    parameters += inspect.signature(options).parameters.values()
    call.__signature__ = own.replace(parameters=parameters)
    call.__doc__ = _with_section(function.__doc__ or "", "Args", describe(options))


def _declared(cls: Any) -> list[Field[Any]]:
    return [found for found in fields(cls) if "help" in found.metadata]
