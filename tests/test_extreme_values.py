"""Every declared option with values that no user means: refused in words, or kept."""

import math
from contextlib import suppress
from typing import Any

import pytest

from magistral_mlx.convert.recipe.options import ConvertOptions
from magistral_mlx.engine.request import SampleRequest
from magistral_mlx.errors import OptionError
from magistral_mlx.generation.params import SamplingParams
from magistral_mlx.model.load_options import LoadOptions
from magistral_mlx.options import options_of

HUGE = 10**5000
EXTREME: list[Any] = [
    *(HUGE, -HUGE, 10**400, 2**63, -1, 0.5, math.nan, math.inf, -math.inf, True),
    *("", "\x00", "\ud800", b"", [], {}, {1: [HUGE]}, (HUGE,), object(), len),
]
DECLARED = [
    (kind, option.name)
    for kind in (SamplingParams, LoadOptions, ConvertOptions)
    for option in options_of(kind)
]


@pytest.mark.parametrize(("kind", "name"), DECLARED)
def test_an_option_takes_an_extreme_value_or_refuses_it(kind: Any, name: str) -> None:
    for value in EXTREME:
        with suppress(OptionError):
            kind(**{name: value})


@pytest.mark.parametrize("n", [0, -1, 1.0, True, None, -(2**70)])
def test_a_number_of_samples_is_a_number(n: Any) -> None:
    with pytest.raises(OptionError, match="n is "):
        SampleRequest("hello", n=n)
    with pytest.raises(OptionError, match="n is "):
        SampleRequest("hello", n=HUGE)


def test_a_number_over_what_can_be_counted_is_told_the_limit() -> None:
    with pytest.raises(OptionError, match=f"max_tokens is .*; use .* from 1 to {2**63 - 1}"):
        SamplingParams(max_tokens=2**63)


@pytest.mark.parametrize("form", [5, [], "spoken", True, {"a": 1}])
def test_a_reasoning_format_is_refused_by_its_own_name(form: Any) -> None:
    with pytest.raises(OptionError, match=r"^reasoning_format is .*; use text or control$"):
        LoadOptions(reasoning_format=form)
