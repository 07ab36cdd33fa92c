"""A checkpoint from a hub of our own: its documents, its headers, and files left behind."""

import errno
import os
from dataclasses import replace
from pathlib import Path

import pytest

from magistral_mlx.checkpoint.safetensors import Shard
from magistral_mlx.convert.source import hub_stream as streaming
from magistral_mlx.convert.source.hub_stream import INCOMPLETE
from magistral_mlx.errors import CheckpointError, ConversionError, HubError
from tests.support.hub_files import (
    BESIDE,
    FIRST,
    HEAD_BYTES,
    SECOND,
    fetch,
    open_stream,
    ranges,
    refusal,
)
from tests.support.hub_server import COMMIT, OLDER, Hub, go_offline

pytest.importorskip("huggingface_hub")


# before any weight moves


def test_documents_and_headers_are_fetched_first(hub: Hub, folder: Path, published: Path) -> None:
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


def test_a_file_that_only_the_index_names_is_refused_first(hub: Hub, folder: Path) -> None:
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


# what an earlier process left


def flipped(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


@pytest.mark.parametrize("suffix", ["", INCOMPLETE])
@pytest.mark.parametrize("what", ["flipped in the data", "of another model", "too long"])
def test_damaged_leftovers_are_fetched_again(
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


def test_a_full_disk_keeps_the_bytes_that_arrived(
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
