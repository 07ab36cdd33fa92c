"""A checkpoint from a hub of our own: what is requested, kept and refused."""

import errno
import logging
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest

from magistral_mlx.checkpoint import hub_api as remote
from magistral_mlx.checkpoint.hub_api import Cancelled
from magistral_mlx.checkpoint.safetensors import Shard
from magistral_mlx.convert.source import hub_stream as streaming
from magistral_mlx.convert.source.hub_stream import INCOMPLETE, HubStream
from magistral_mlx.errors import CheckpointError, ConversionError, HubError
from tests.support.hub_server import COMMIT, OLDER, REPO, Hub, go_offline, serving, use
from tests.support.tiny import make_config, make_weights, write_checkpoint

pytest.importorskip("huggingface_hub")

FIRST, SECOND = (f"model-{i:05}-of-00002.safetensors" for i in (1, 2))
# So short that every header takes a second request.
HEAD_BYTES = 100
BESIDE = {
    "tekken.json": b"{ }",
    "SYSTEM_PROMPT.txt": b"think",
    "tokenizer.json": b"large",
    "README.md": b"read me",
}


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the folder that the repository was uploaded from."""
    config = make_config(num_layers=1, vocab_size=64)
    folder = write_checkpoint(
        tmp_path_factory.mktemp("published"), config, make_weights(config, mx.bfloat16)
    )
    for name, content in BESIDE.items():
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture
def hub(published: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    state = Hub({path.name: path.read_bytes() for path in published.iterdir()})
    monkeypatch.setattr(streaming, "HEAD_BYTES", HEAD_BYTES)
    monkeypatch.setattr(remote, "FIRST_PAUSE_SECONDS", 0.0)
    with serving(state) as endpoint:
        use(monkeypatch, endpoint, tmp_path)
        yield state
    # The user's own cache is never touched.
    assert not (tmp_path / "cache").exists()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "source"


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


# before any weight moves


def test_documents_and_headers_are_there_first(hub: Hub, folder: Path, published: Path) -> None:
    stream = open_stream(folder)
    documents = {"config.json", "tekken.json", "SYSTEM_PROMPT.txt", "model.safetensors.index.json"}
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        name: hub.files[name] for name in documents
    }
    assert stream.commit == COMMIT
    assert stream.layout == "hf"
    assert [(f.name, f.size) for f in stream.files.values()] == [
        (n, len(hub.files[n])) for n in (FIRST, SECOND)
    ]
    for shard in stream.shards:
        assert shard == replace(
            Shard.open(published / shard.path.name), path=folder / shard.path.name
        )
        # Not a byte of a tensor.
        assert hub.sent[shard.path.name] == shard.data_start
    assert sum("/api/models/" in request.path for request in hub.requests) == 1


@pytest.mark.parametrize("revision", ["main", "v1", COMMIT])
def test_everything_is_of_one_commit(hub: Hub, folder: Path, revision: str) -> None:
    stream = open_stream(folder, revision=revision)
    hub.other_commits[COMMIT] = hub.files
    hub.commit, hub.files = OLDER, {name: content[::-1] for name, content in hub.files.items()}
    assert fetch(stream, FIRST).read_bytes() == hub.other_commits[COMMIT][FIRST]
    assert all(f"/resolve/{COMMIT}/" in r.path for r in hub.requests if "/resolve/" in r.path)


def test_a_second_process_asks_for_no_document_that_is_right(hub: Hub, folder: Path) -> None:
    open_stream(folder)
    # Damaged, with the same length.
    (folder / "tekken.json").write_bytes(b"[ ]")
    (folder / "SYSTEM_PROMPT.txt").unlink()
    (folder / "magistral_mlx.json").write_bytes(b"of another commit")
    hub.forget()
    open_stream(folder)
    assert hub.fetched() == {"tekken.json", "SYSTEM_PROMPT.txt", FIRST, SECOND}
    assert (folder / "tekken.json").read_bytes() == BESIDE["tekken.json"]
    assert not (folder / "magistral_mlx.json").exists()


def test_a_document_that_arrives_damaged_is_refused(hub: Hub, folder: Path) -> None:
    hub.damaged = frozenset({"SYSTEM_PROMPT.txt"})
    with pytest.raises(
        HubError, match=r"SYSTEM_PROMPT\.txt arrived damaged; run the same command again"
    ):
        open_stream(folder)
    assert not (folder / "SYSTEM_PROMPT.txt").exists()


def test_a_file_that_the_index_names_and_nobody_has_is_noticed_first(
    hub: Hub, folder: Path
) -> None:
    del hub.files[SECOND]
    with pytest.raises(HubError, match=f"names '{SECOND}', which commit {COMMIT} does not hold"):
        open_stream(folder)
    assert FIRST not in hub.fetched()


@pytest.mark.parametrize(
    "head", [b"", b"\xff" * 8 + b"{", b"\x02" + bytes(7) + b"{}" + bytes(8), bytes(500)]
)
def test_a_header_that_contradicts_itself_is_refused_first(
    hub: Hub, folder: Path, head: bytes
) -> None:
    hub.files[FIRST] = head
    with pytest.raises(CheckpointError, match=f"{FIRST} is damaged"):
        open_stream(folder)
    assert hub.sent[FIRST] <= HEAD_BYTES


@pytest.mark.parametrize("how", ["flag", "no network"])
def test_without_a_network_the_message_says_so(
    hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    go_offline(monkeypatch, how)
    with pytest.raises(
        HubError,
        match=r"cannot be reached .*Connect and run the same command again, or name a folder",
    ):
        open_stream(folder)
    assert hub.requests == []


def test_offline_mode_that_begins_later_is_named(
    hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = open_stream(folder)
    go_offline(monkeypatch, "flag")
    assert "unset the `HF_HUB_OFFLINE` environment variable" in refusal(stream, FIRST)


def test_the_consolidated_file_is_streamed_when_asked_for(hub: Hub, folder: Path) -> None:
    hub.files["consolidated.safetensors"] = hub.files[FIRST]
    stream = open_stream(folder, layout="consolidated")
    assert list(stream.files) == ["consolidated.safetensors"]
    assert fetch(stream, "consolidated.safetensors").read_bytes() == hub.files[FIRST]


# one file


def test_a_file_is_fetched_once_and_let_go(hub: Hub, folder: Path) -> None:
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
    assert len(hub.requests) == 1 + remote.FAILURES_IN_A_ROW


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


def test_a_commit_that_is_gone_is_named(hub: Hub, folder: Path) -> None:
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


def test_a_header_that_came_otherwise_before_is_noticed(hub: Hub, folder: Path) -> None:
    stream = open_stream(folder)
    other = replace(
        stream, shards=tuple(replace(shard, header_sha256="0" * 64) for shard in stream.shards)
    )
    assert f"the header of {FIRST} has changed since it was first fetched" in refusal(other, FIRST)


# what an earlier process left


def flipped(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


@pytest.mark.parametrize("suffix", ["", INCOMPLETE])
@pytest.mark.parametrize("what", ["flipped in the data", "of another model", "too long"])
def test_what_was_left_damaged_is_fetched_anew(
    hub: Hub, folder: Path, what: str, suffix: str
) -> None:
    stream, right = open_stream(folder), hub.files[FIRST]
    left = {
        "flipped in the data": flipped(right, len(right) - 1),
        "of another model": flipped(right, 20),
        "too long": right + b"x",
    }
    (folder / (FIRST + suffix)).write_bytes(left[what])
    assert fetch(stream, FIRST).read_bytes() == right
    assert {path.name for path in folder.glob("*.safetensors*")} == {
        FIRST,
        "model.safetensors.index.json",
    }


def test_the_rest_of_another_model_is_not_added_to(hub: Hub, folder: Path) -> None:
    stream = open_stream(folder)
    hub.forget()
    (folder / (FIRST + INCOMPLETE)).write_bytes(flipped(hub.files[FIRST], 20)[:5000])
    fetch(stream, FIRST)
    assert ranges(hub, FIRST) == [f"bytes=0-{len(hub.files[FIRST]) - 1}"]


@pytest.mark.parametrize("name", [FIRST, FIRST + INCOMPLETE, "tekken.json", "tekken.json.partial"])
@pytest.mark.parametrize("how", ["symbolic", "dangling", "hard", "folder"])
def test_no_link_leads_out_of_the_folder(
    hub: Hub, folder: Path, tmp_path: Path, name: str, how: str
) -> None:
    open_stream(folder)
    outside, path = tmp_path / "outside", folder / name
    outside.mkdir()
    (outside / "precious").write_bytes(b"precious")
    path.unlink(missing_ok=True)
    if how == "symbolic":
        path.symlink_to(outside / "precious")
    elif how == "dangling":
        path.symlink_to(outside / "new")
    elif how == "hard":
        os.link(outside / "precious", path)
    else:
        path.symlink_to(outside, target_is_directory=True)
    stream = open_stream(folder)
    assert fetch(stream, FIRST).read_bytes() == hub.files[FIRST]
    assert (folder / "tekken.json").read_bytes() == BESIDE["tekken.json"]
    assert [(p.name, p.read_bytes()) for p in outside.iterdir()] == [("precious", b"precious")]
    assert all(not p.is_symlink() and p.stat().st_nlink == 1 for p in folder.iterdir())


def test_a_folder_that_is_a_link_is_refused(hub: Hub, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    folder.symlink_to(tmp_path / "outside", target_is_directory=True)
    with pytest.raises(
        ConversionError, match="is a link, and fetched files would go to its target"
    ):
        open_stream(folder)
    assert not any((tmp_path / "outside").iterdir())


def test_a_full_disk_leaves_what_arrived(
    hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = open_stream(folder)
    write_at, size = streaming.write_at, len(hub.files[FIRST])

    def write_half(descriptor: int, data: memoryview, offset: int) -> None:
        if offset + len(data) > size // 2:
            write_at(descriptor, data[: size // 2 - offset], offset)
            raise OSError(errno.ENOSPC, "No space left on device")
        write_at(descriptor, data, offset)

    with monkeypatch.context() as patch:
        patch.setattr(streaming, "write_at", write_half)
        with pytest.raises(OSError, match="No space left"):
            fetch(stream, FIRST)
    hub.forget()
    assert fetch(stream, FIRST).read_bytes() == hub.files[FIRST]
    assert ranges(hub, FIRST) == [f"bytes={size // 2}-{size - 1}"]


def test_a_folder_that_cannot_be_written_is_named(hub: Hub, folder: Path) -> None:
    folder.write_bytes(b"in the way")
    with pytest.raises(
        ConversionError, match=r"source could not be written .* check the folder and the disk"
    ):
        open_stream(folder)


# stopping


def test_ctrl_c_leaves_what_arrived(hub: Hub, folder: Path) -> None:
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
def test_a_cancelled_fetch_keeps_what_is_there(hub: Hub, folder: Path, left: int | None) -> None:
    """Check that a cancelled fetch keeps all bytes, few or a whole file (None)."""
    stream, content = open_stream(folder), hub.files[FIRST][:left]
    partial = folder / (FIRST + INCOMPLETE)
    partial.write_bytes(content)
    with pytest.raises(Cancelled):
        stream.fetch(FIRST, report=lambda _: None, cancelled=lambda: True)
    assert partial.read_bytes() == content


def test_a_pause_is_cancelled(hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = open_stream(folder)
    monkeypatch.setattr(remote, "FIRST_PAUSE_SECONDS", 3600.0)
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


# peak_bytes


@pytest.mark.parametrize(
    ("order", "together"),
    [
        # The next file is fetched meanwhile.
        ("a b c", "ab"),
        ("c b a", "ab"),
        # While the second step needs two files, the third arrives.
        ("a ab b c", "abc"),
        ("a b a c", "abc"),
        ("aa", "a"),
        ("c", "c"),
        ("", ""),
    ],
)
def test_the_most_bytes_at_once(hub: Hub, folder: Path, order: str, together: str) -> None:
    sizes = {"a": 100, "b": 1000, "c": 10}
    stream = open_stream(folder)
    file, shard = stream.files[FIRST], stream.shards[0]
    entry = next(iter(shard.header.values()))
    stream = replace(
        stream,
        files={name: file._replace(size=size) for name, size in sizes.items()},
        shards=tuple(
            replace(shard, path=folder / n, header={f"{n}.{i}": entry for i in "xy"}) for n in sizes
        ),
    )
    steps = [[f"{name}.{i}" for name in step for i in "xy"] for step in order.split()]
    assert stream.peak_bytes(steps) == sum(sizes[name] for name in together)
