"""Fetch the files of a small repository from a hub of our own."""

from pathlib import Path

import pytest

from magistral_mlx.convert.source.hub_stream import HubStream
from magistral_mlx.errors import HubError
from tests.support.hub_server import REPO, Hub

FIRST, SECOND = (f"model-{i:05}-of-00002.safetensors" for i in (1, 2))
# So short that every header takes a second request.
HEAD_BYTES = 100
BESIDE = {
    "tekken.json": b"{ }",
    "SYSTEM_PROMPT.txt": b"think",
    "tokenizer.json": b"large",
    "README.md": b"read me",
}


def open_stream(folder: Path, **options: str) -> HubStream:
    return HubStream.open(REPO, folder, **({"revision": None, "layout": None} | options))  # type: ignore[arg-type]


def fetch(stream: HubStream, name: str) -> Path:
    """Fetch a file and check that the reported bytes add up."""
    counts: list[int] = []
    path = stream.fetch(name, report=counts.append, cancelled=lambda: False)
    assert sum(counts) == stream.files[name].size
    return path


def refusal(stream: HubStream, name: str) -> str:
    with pytest.raises(HubError) as caught:
        fetch(stream, name)
    return str(caught.value)


def ranges(hub: Hub, name: str) -> list[str | None]:
    return [request.range for request in hub.requests if request.name == name]
