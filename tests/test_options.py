"""Options that are declared once, as the keywords of a function."""

from dataclasses import dataclass

import pytest

from magistral_mlx.errors import OptionError
from magistral_mlx.options import from_values, option, takes_keywords_of, takes_two_and_keywords_of


@dataclass(frozen=True)
class Shape:
    width: int = option(1, "Columns.")
    height: int = option(1, "Rows.")


@takes_keywords_of(Shape)
def draw(name: str, shape: Shape) -> str:
    """Draw a shape."""
    return f"{name} {shape.width}x{shape.height}"


@takes_two_and_keywords_of(Shape)
def copy(source: str, target: str, shape: Shape) -> str:
    """Copy a shape."""
    return f"{source} {target} {shape.width}x{shape.height}"


def test_the_fields_are_keywords_and_the_leading_arguments_keep_their_names() -> None:
    assert draw("a", height=2) == "a 1x2"
    assert draw(name="a", height=2) == "a 1x2"  # type: ignore[call-arg]
    assert copy("a", "b", width=3) == "a b 3x1"
    assert copy("a", target="b") == "a b 1x1"  # type: ignore[call-arg]
    assert copy(target="b", source="a") == "a b 1x1"  # type: ignore[call-arg]


def test_a_missing_argument_is_named() -> None:
    with pytest.raises(TypeError, match="'name'"):
        draw(height=2)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="'target'"):
        copy("a")  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="depth"):
        draw("a", depth=2)  # type: ignore[call-arg]


def test_help_shows_every_option() -> None:
    assert "height: Rows." in (draw.__doc__ or "")


def test_an_unknown_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(OptionError, match="did you mean height"):
        from_values(Shape, {"heigth": 2})
    assert from_values(Shape, {"height": None}) == Shape()
