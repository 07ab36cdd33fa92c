"""A session with the embedded model, for the tests of the chat's commands."""

from collections.abc import Iterator

import pytest

import magistral_mlx as mm
from magistral_mlx.terminal.repl.session import Models, Session


@pytest.fixture(scope="module")
def loaded() -> mm.Magistral:
    return mm.load("demo")


@pytest.fixture
def session(loaded: mm.Magistral) -> Iterator[Session]:
    """Return a session that answers at once, with an empty conversation."""
    loaded.prefix_cache.clear()
    sampling = mm.SamplingParams(temperature=0, think_budget=0, max_tokens=2)
    models = Models("demo", check=lambda name: None, open=lambda name: loaded)
    yield Session(models, loaded, loaded.chat(), sampling)
    loaded.prefix_cache.clear()
