"""The embedded model for the tests of the engine."""

from collections.abc import Iterator

import pytest

import magistral_mlx as mm


@pytest.fixture(scope="module")
def loaded() -> mm.Magistral:
    return mm.load("demo")


@pytest.fixture
def magistral(loaded: mm.Magistral) -> Iterator[mm.Magistral]:
    """Return the model with an empty prefix cache, so that no test sees another's."""
    loaded.prefix_cache.clear()
    yield loaded
    loaded.prefix_cache.clear()
