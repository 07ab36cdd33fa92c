"""Plain values of exact types are copied; others are refused, and no foreign code runs."""

import math
from collections import OrderedDict
from typing import Any

import numpy as np
import pytest

from magistral_mlx.errors import OptionError
from magistral_mlx.serving.plain_values import MAX_DEPTH, copy_plain, returns_errors


def nested(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


class Evil(str):
    def encode(self, *_: Any) -> bytes:  # type: ignore[override]
        raise AssertionError("foreign code was run")


CYCLE: list[Any] = []
CYCLE.append(CYCLE)


@pytest.mark.parametrize(
    "value",
    [None, True, 5, -(2**63), 0.5, "ü\0", [1, ["a", {"b": None}]], {}, nested(MAX_DEPTH - 1)],
    ids=repr,
)
def test_plain_values_are_copied(value: Any) -> None:
    copy = copy_plain(value, "x")
    assert copy == value
    assert type(copy) is type(value)
    assert copy is not value or not isinstance(value, list | dict)


@pytest.mark.parametrize(
    "value",
    [
        b"bytes",
        {1, 2},
        2**63,
        10**5000,
        math.nan,
        math.inf,
        "\ud800",
        {5: 1},
        {"\udfff": 1},
        np.float32(1),
        np.int64(1),
        OrderedDict(a=1),
        Evil("text"),
        {Evil("key"): 1},
        object(),
        print,
        1j,
        nested(MAX_DEPTH),
        nested(900),
        CYCLE,
        {"a": [{"b": (x for x in ())}]},
    ],
    ids=lambda value: type(value).__name__,
)
def test_other_values_are_refused(value: Any) -> None:
    with pytest.raises(OptionError, match="x "):
        copy_plain(value, "x")


@returns_errors
def scaled(
    number: float, *, times: int = 2, name: str | None = None, values: str | list[Any] = ""
) -> dict[str, Any]:
    return {"number": number * times, "type": type(number).__name__, "name": name, "values": values}


def test_a_number_may_be_whole() -> None:
    assert scaled(3, times=4) == {
        "ok": True,
        "number": 12.0,
        "type": "float",
        "name": None,
        "values": "",
    }
    assert scaled(number=1.5, values=(1, 2))["ok"] is False  # a tuple is plain inside a list only
    assert scaled(1.5, values=[(1, 2)])["values"] == [[1, 2]]


@pytest.mark.parametrize(
    ("args", "kwargs", "said"),
    [
        ((), {}, "missing"),
        ((1, 2), {}, "too many"),
        ((1,), {"tmes": 2}, "tmes"),
        ((True,), {}, "number is of type bool, expected a number"),
        (("1",), {}, "expected a number"),
        ((1,), {"times": 2.0}, "times is of type float, expected a whole number"),
        ((1,), {"name": 5}, "expected text"),
        ((1,), {"values": {}}, "expected text or a list"),
        ((10**400,), {}, "64 bits"),
    ],
)
def test_arguments_are_held_to_their_annotations(
    args: tuple[Any, ...], kwargs: dict[str, Any], said: str
) -> None:
    result = scaled(*args, **kwargs)
    assert result["ok"] is False
    assert result["error"]["code"] == "option"
    assert said in result["error"]["message"]
