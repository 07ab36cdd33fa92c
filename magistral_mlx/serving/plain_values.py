"""Plain values, which may cross from a host: text, numbers, None, lists and dictionaries."""

import functools
import inspect
import math
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, TypeVar

from magistral_mlx.errors import OptionError
from magistral_mlx.options import from_values, options_of
from magistral_mlx.serving.failures import refusal

# Levels of lists and dictionaries; the limit also ends one that contains itself.
MAX_DEPTH = 64
# The integers of a host.
INT64 = range(-(2**63), 2**63)
NAMES = {
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    list: "a list",
    tuple: "a list",
    dict: "a dict",
}

Options = TypeVar("Options")
Parameters = ParamSpec("Parameters")
Call = Callable[Parameters, dict[str, Any]]


def returns_errors(function: Call[Parameters]) -> Call[Parameters]:
    """Let a function return every exception as a dictionary, and check its arguments.

    The arguments are checked against the annotations. The dictionary gets ``ok``: True, or False
    beside an ``error``.
    """
    signature = inspect.signature(function)

    @functools.wraps(function)
    def call(*args: Parameters.args, **kwargs: Parameters.kwargs) -> dict[str, Any]:
        try:
            bound = _bound(signature, function.__name__, args, kwargs)
            return {"ok": True, **function(*bound.args, **bound.kwargs)}
        # Any exception would crash a host, even Ctrl-C and exit.
        except BaseException as error:
            return refusal(error)

    return call


def _bound(
    signature: inspect.Signature, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> inspect.BoundArguments:
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as error:
        raise OptionError(f"{name}: {error}; it takes {', '.join(signature.parameters)}") from None
    for parameter, value in bound.arguments.items():
        declared = signature.parameters[parameter]
        if declared.kind is inspect.Parameter.VAR_KEYWORD:
            # The function itself checks names that the signature does not declare.
            bound.arguments[parameter] = {key: copy_plain(each, key) for key, each in value.items()}
        else:
            bound.arguments[parameter] = argument(value, parameter, declared.annotation)
    return bound


def read_options(cls: type[Options], values: Mapping[str, Any]) -> Options:
    """Make options from a host's keywords, checked against the types of the declared fields.

    Raises:
        OptionError: a name is not an option, or a value is of another type or out of range.
    """
    declared = {option.name: option.type for option in options_of(cls)}
    checked = {
        name: argument(value, name, declared[name] | None) if name in declared else value
        for name, value in values.items()
    }
    return from_values(cls, checked)


def argument(value: Any, name: str, annotation: Any) -> Any:
    """Return a copy of a plain value, if its type is one that an annotation allows.

    A list stands for a tuple, a number for one of the numbers that a Literal names.

    Raises:
        OptionError: it is something else.
    """
    allowed = _allowed_types(annotation)
    if type(value) is int and int not in allowed and float in allowed:
        value = _checked_int(value, name) * 1.0
    # Exact types: a subclass could run code of its own, and True is not a number.
    if type(value) is list and tuple in allowed:
        return tuple(copy_plain(value, name))
    if type(value) not in allowed:
        expected = " or ".join(NAMES[kind] for kind in NAMES if kind in allowed)
        raise OptionError(f"{name} is of type {type(value).__name__}, expected {expected}")
    return copy_plain(value, name)


def _allowed_types(annotation: Any) -> set[type]:
    origin = typing.get_origin(annotation)
    if origin in (types.UnionType, typing.Union):
        inner = typing.get_args(annotation)
        return {kind for alternative in inner for kind in _allowed_types(alternative)}
    if origin is typing.Literal:
        return {type(choice) for choice in typing.get_args(annotation)}
    return {origin or annotation}


def copy_plain(value: Any, name: str, depth: int = MAX_DEPTH) -> Any:
    """Return a copy of a value that holds plain values only.

    Raises:
        OptionError: it holds other values.
    """
    if depth == 0:
        raise OptionError(
            f"{name} has more than {MAX_DEPTH} levels, or contains itself; make it flatter"
        )
    kind = type(value)
    if value is None or kind is bool:
        return value
    if kind is str:
        return _checked_text(value, name)
    if kind is int:
        return _checked_int(value, name)
    if kind is float:
        if not math.isfinite(value):
            raise OptionError(f"{name} holds {value}; use a finite number")
        return value
    if kind is list or kind is tuple:
        return [copy_plain(item, name, depth - 1) for item in value]
    if kind is dict:
        return {_key(key, name): copy_plain(item, name, depth - 1) for key, item in value.items()}
    raise OptionError(
        f"{name} holds a value of type {kind.__name__}; "
        "use text, numbers, lists and dictionaries only"
    )


def _key(key: Any, name: str) -> str:
    if type(key) is not str:
        raise OptionError(
            f"{name} holds a dictionary with a key of type {type(key).__name__}; use text"
        )
    return _checked_text(key, name)


def _checked_int(value: int, name: str) -> int:
    if value not in INT64:
        raise OptionError(f"{name} is a number of more than 64 bits; use a smaller one")
    return value


def _checked_text(text: str, name: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise OptionError(
            f"{name} is not valid Unicode; was it read as something other than UTF-8?"
        ) from None
    return text
