"""Fetching one file from a hub of our own: retries, refusals, stopping, and the token."""

import logging
from dataclasses import replace
from pathlib import Path

import pytest

from magistral_mlx.checkpoint import hub_transfer
from magistral_mlx.checkpoint.hub_transfer import Cancelled
from magistral_mlx.convert.source.hub_stream import INCOMPLETE
from tests.support.hub_files import FIRST, SECOND, fetch, open_stream, ranges, refusal
from tests.support.hub_server import COMMIT, OLDER, Hub, serving

pytest.importorskip("huggingface_hub")


# one file


def test_a_file_is_fetched_once_and_released(hub: Hub, folder: Path) -> None:
    stream = open_stream(folder)
    hub.forget()
    path = fetch(stream, FIRST)
    assert path == folder / FIRST
    assert path.read_bytes() == hub.files[FIRST]
    assert fetch(stream, FIRST) == path
    assert ranges(hub, FIRST) == [f"bytes=0-{len(hub.files[FIRST]) - 1}"]
    stream.release(FIRST)
    assert not path.exists()
    assert hub.fetched() == {FIRST}


@pytest.mark.slow
def test_interrupted_anywhere_only_the_missing_bytes_are_fetched_again(
    hub: Hub, tmp_path: Path
) -> None:
    sizes = {name: len(hub.files[name]) for name in (FIRST, SECOND)}
    for point in range(20):
        folder = tmp_path / f"source-{point}"
        stream = open_stream(folder)
        hub.forget()
        hub.bytes_until_down = left = 1 + sum(sizes.values()) * point // 20
        broken = FIRST if left < sizes[FIRST] else SECOND
        if broken == SECOND:
            fetch(stream, FIRST)
        assert f"{broken} could not be fetched" in refusal(stream, broken)
        hub.come_back()
        # The next process opens the stream again.
        stream = open_stream(folder)
        hub.forget()
        for name in (FIRST, SECOND):
            assert fetch(stream, name).read_bytes() == hub.files[name]
        assert sum(hub.sent.values()) == sum(sizes.values()) - left
        assert (FIRST in hub.fetched()) == (broken == FIRST)


@pytest.mark.parametrize("has_ranges", [True, False])
def test_a_transfer_that_breaks_off_goes_on_by_itself(
    hub: Hub, folder: Path, has_ranges: bool
) -> None:
    stream = open_stream(folder)
    hub.forget()
    size, hub.has_ranges = len(hub.files[FIRST]), has_ranges
    hub.bytes_an_answer = size // 3 if has_ranges else None
    assert fetch(stream, FIRST).read_bytes() == hub.files[FIRST]
    # No byte is sent twice.
    assert hub.sent[FIRST] == size


def test_a_server_without_ranges_sends_all_again_and_nothing_is_spoilt(
    hub: Hub, folder: Path
) -> None:
    hub.has_ranges = False
    stream = open_stream(folder)
    (folder / (FIRST + INCOMPLETE)).write_bytes(hub.files[FIRST][:5000])
    assert fetch(stream, FIRST).read_bytes() == hub.files[FIRST]


@pytest.mark.parametrize("statuses", [[500], [503, 429, 408, 502, 504]])
def test_a_failure_that_passes_is_waited_out(hub: Hub, folder: Path, statuses: list[int]) -> None:
    stream = open_stream(folder)
    hub.passing = list(statuses)
    assert fetch(stream, FIRST).read_bytes() == hub.files[FIRST]
    assert hub.passing == []


def test_a_failure_that_stays_is_named(hub: Hub, folder: Path) -> None:
    stream = open_stream(folder)
    hub.forget()
    hub.passing = [503] * 99
    assert (
        f"{FIRST} could not be fetched (503 Service Unavailable); run the same command again"
        in refusal(stream, FIRST)
    )
    assert len(hub.requests) == 1 + hub_transfer.FAILURES_IN_A_ROW


@pytest.mark.parametrize(
    ("refused", "words"),
    [
        ((403, "GatedRepo"), "is gated: accept its terms at http://127.0.0.1"),
        ((401, ""), "log in with `hf auth login`"),
        ((404, "EntryNotFound"), f"no longer has {FIRST} at commit {COMMIT}: see "),
        ((404, "RevisionNotFound"), f"no longer has {FIRST} at commit {COMMIT}: see "),
        ((410, ""), "could not be fetched (410 Gone)"),
    ],
)
def test_a_refusal_is_not_tried_again(
    hub: Hub, folder: Path, refused: tuple[int, str], words: str
) -> None:
    stream = open_stream(folder)
    hub.forget()
    hub.file_refusal = refused
    assert words in refusal(stream, FIRST)
    assert len(hub.requests) == 1


def test_a_missing_commit_is_named(hub: Hub, folder: Path) -> None:
    stream = open_stream(folder)
    hub.commit = OLDER
    assert f"no longer has {FIRST} at commit {COMMIT}" in refusal(stream, FIRST)


def test_a_file_that_arrives_damaged_is_deleted_and_only_it_is_fetched_again(
    hub: Hub, folder: Path
) -> None:
    stream = open_stream(folder)
    fetch(stream, FIRST)
    hub.damaged = frozenset({SECOND})
    assert f"{SECOND} arrived damaged" in refusal(stream, SECOND)
    assert {path.name for path in folder.glob("*.safetensors*")} == {
        FIRST,
        "model.safetensors.index.json",
    }
    hub.damaged = frozenset()
    hub.forget()
    assert fetch(stream, SECOND).read_bytes() == hub.files[SECOND]
    fetch(stream, FIRST)
    assert hub.fetched() == {SECOND}


def test_a_header_that_has_changed_is_refused(hub: Hub, folder: Path) -> None:
    stream = open_stream(folder)
    other = replace(
        stream, shards=tuple(replace(shard, header_sha256="0" * 64) for shard in stream.shards)
    )
    assert f"the header of {FIRST} has changed since it was first fetched" in refusal(other, FIRST)


# stopping


def test_ctrl_c_keeps_the_bytes_that_arrived(hub: Hub, folder: Path) -> None:
    stream, size = open_stream(folder), len(hub.files[FIRST])
    counts: list[int] = []

    def interrupt(count: int) -> None:
        counts.append(count)
        if sum(counts):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stream.fetch(FIRST, report=interrupt, cancelled=lambda: False)
    hub.forget()
    assert fetch(stream, FIRST).read_bytes() == hub.files[FIRST]
    assert ranges(hub, FIRST) in ([f"bytes={sum(counts)}-{size - 1}"], [])


@pytest.mark.parametrize("left", [0, 5000, None])
def test_a_cancelled_fetch_keeps_its_bytes(hub: Hub, folder: Path, left: int | None) -> None:
    """Check that a cancelled fetch keeps all bytes, few or a whole file (None)."""
    stream, content = open_stream(folder), hub.files[FIRST][:left]
    partial = folder / (FIRST + INCOMPLETE)
    partial.write_bytes(content)
    with pytest.raises(Cancelled):
        stream.fetch(FIRST, report=lambda _: None, cancelled=lambda: True)
    assert partial.read_bytes() == content


def test_a_pause_is_cancelled(hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = open_stream(folder)
    monkeypatch.setattr(hub_transfer, "FIRST_PAUSE_SECONDS", 3600.0)
    hub.passing = [503]
    with pytest.raises(Cancelled):
        stream.fetch(FIRST, report=lambda _: None, cancelled=lambda: True)
    assert hub.passing == []


# secrets


def test_the_token_stays_with_the_hub(
    hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Check redirects: files come from other hosts, by signed addresses."""
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    storage = Hub(hub.files)
    with serving(storage) as hub.elsewhere, caplog.at_level(logging.DEBUG, "magistral_mlx"):
        stream = open_stream(folder)
        assert fetch(stream, FIRST).read_bytes() == hub.files[FIRST]
        assert {request.authorization for request in hub.requests} == {"Bearer hf_secret"}
        assert {request.authorization for request in storage.requests} == {None}
        assert storage.sent[FIRST] == len(hub.files[FIRST]) + stream.shards[0].data_start
        storage.file_refusal = 403, ""
        message = refusal(stream, SECOND)
        storage.file_refusal, storage.passing = None, [503] * 99
        message += refusal(stream, SECOND)
    assert "ecret" not in message + caplog.text
