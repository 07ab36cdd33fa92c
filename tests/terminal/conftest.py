"""A model with a reply that is written beforehand, for the tests of command lines."""

import pytest

from magistral_mlx.terminal import shared_flags
from tests.support.terminal.scripted import Scripted


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Scripted:
    scripted = Scripted()
    monkeypatch.setattr(shared_flags, "loading", scripted.loading)
    return scripted
