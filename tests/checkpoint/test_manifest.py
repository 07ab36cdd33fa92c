"""A converted checkpoint opens only with the files that its manifest lists."""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from magistral_mlx.checkpoint import manifest
from magistral_mlx.checkpoint.folder import open_checkpoint
from magistral_mlx.checkpoint.manifest import MANIFEST
from magistral_mlx.checkpoint.quant_format import QuantFormat
from magistral_mlx.convert.source.source import open_source
from magistral_mlx.errors import CheckpointError
from tests.support.sources import CONFIG, change_json, convert_quickly, write_hf
from tests.support.tiny import make_weights, quantize_weights, write_checkpoint

INDEX, WEIGHTS = "model.safetensors.index.json", "model.safetensors"
WAY_OUT = f"Where that was on purpose, delete {MANIFEST}: without it nothing is compared"
Change = Callable[[Path], object]


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("converted")
    convert_quickly(write_hf(folder / "hf"), folder / "out")
    return folder / "out"


@pytest.fixture
def out(converted: Path, tmp_path: Path) -> Path:
    return shutil.copytree(converted, tmp_path / "out")


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder)
    return str(caught.value)


def edit(name: str, change: Callable[[bytes], bytes]) -> Change:
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


def edit_record(change: Callable[[dict[str, Any]], object]) -> Change:
    """Change its table of files."""

    def write(folder: Path) -> None:
        raw = json.loads((folder / MANIFEST).read_text())
        change(raw["files"])
        (folder / MANIFEST).write_text(json.dumps(raw))

    return write


def swap_names(content: bytes) -> bytes:
    """Exchange two tensors of one shape in the header."""
    one, two, three = (
        b'"model.layers.0.mlp.up_proj.w',
        b'"model.layers.0.mlp.gate_proj.w',
        b'"no tensor has this name',
    )
    assert content.count(one) == content.count(two) == 1
    return content.replace(one, three).replace(two, one).replace(three, two)


def test_the_record_is_of_the_bytes_on_the_disk(converted: Path) -> None:
    files = json.loads((converted / MANIFEST).read_text())["files"]
    assert set(files) == {path.name for path in converted.iterdir()} - {MANIFEST}
    for name, entry in files.items():
        content = (converted / name).read_bytes()
        expected = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        if name.endswith(".safetensors"):
            head = content[: 8 + int.from_bytes(content[:8], "little")]
            expected["header_sha256"] = hashlib.sha256(head).hexdigest()
        assert entry == expected
    open_checkpoint(converted)


CHANGED: dict[str, tuple[str, Change, str]] = {
    "a value of the config": (
        "config.json",
        edit(
            "config.json", lambda b: b.replace(b'"rms_norm_eps": 1e-05', b'"rms_norm_eps": 1e-06')
        ),
        "has another sha256",
    ),
    "a space in the config": (
        "config.json",
        edit("config.json", lambda b: b + b" "),
        "bytes, magistral_mlx.json rec",
    ),
    "a space in the index": (
        INDEX,
        edit(INDEX, lambda b: b.replace(b" ", b"\t", 1)),
        "has another sha256",
    ),
    "no index": (
        INDEX,
        lambda f: (f / INDEX).unlink(),
        "is missing, magistral_mlx.json records it",
    ),
    "a merge of the tokenizer": (
        "tekken.json",
        edit("tekken.json", lambda b: b.replace(b'"rank": 300', b'"rank": 301', 1)),
        "has another sha256",
    ),
    "no tokenizer": ("tekken.json", lambda f: (f / "tekken.json").unlink(), "is missing"),
    "the system prompt": (
        "SYSTEM_PROMPT.txt",
        edit("SYSTEM_PROMPT.txt", lambda b: b.replace(b"A user", b"A User")),
        "has another sha256",
    ),
    "the template": (
        "chat_template.jinja",
        edit("chat_template.jinja", lambda b: b[::-1]),
        "has another sha256",
    ),
    "the template is a folder": (
        "chat_template.jinja",
        lambda f: ((f / "chat_template.jinja").unlink(), (f / "chat_template.jinja").mkdir()),
        "is missing",
    ),
    "a pipe for the template": (
        "chat_template.jinja",
        lambda f: ((f / "chat_template.jinja").unlink(), os.mkfifo(f / "chat_template.jinja")),
        "is missing",
    ),
    "a header": (
        WEIGHTS,
        edit(WEIGHTS, swap_names),
        "has another header than magistral_mlx.json records",
    ),
    "the config's line gone": (
        "config.json",
        edit_record(lambda f: f.pop("config.json")),
        "is not recorded in",
    ),
    "the tokenizer's line gone": (
        "tekken.json",
        edit_record(lambda f: f.pop("tekken.json")),
        "is not recorded in",
    ),
    "the weights' line gone": (
        WEIGHTS,
        edit_record(lambda f: f.pop(WEIGHTS)),
        "is not recorded in",
    ),
    "a recorded hash": (
        "config.json",
        edit_record(lambda f: f["config.json"].update(sha256="0" * 64)),
        "has another sha256",
    ),
    "a recorded size": (
        WEIGHTS,
        edit_record(lambda f: f[WEIGHTS].update(size=0)),
        f"bytes, {MANIFEST} records 0",
    ),
    "a file that was never there": (
        "more.json",
        edit_record(lambda f: f.update({"more.json": f["config.json"]})),
        "is missing",
    ),
}


@pytest.mark.parametrize("case", CHANGED)
def test_what_changed_is_named(out: Path, case: str) -> None:
    name, change, words = CHANGED[case]
    change(out)
    message = refusal(out)
    assert message.startswith(f"{out / name} ")
    assert words in message
    assert message.endswith(WAY_OUT)
    with pytest.raises(CheckpointError, match=WAY_OUT):
        open_source(out)  # to convert again


def test_without_its_record_it_is_a_checkpoint_as_any_other(out: Path) -> None:
    edit("config.json", lambda b: b + b" ")(out)
    (out / MANIFEST).unlink()
    open_checkpoint(out)


DAMAGED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "it is not JSON"),
    "a list": (b"[]", "it holds a JSON list"),
    "no files": (b"{}", "it has no table of files. Convert again"),
    "files of a list": (b'{"files": []}', "it has no table of files"),
    "an entry of a number": (
        b'{"files": {"config.json": 1}}',
        "no name, size and sha256 is 'config.json'. Convert",
    ),
    "no size": (b'{"files": {"config.json": {"sha256": "%s"}}}' % (b"0" * 64), "is 'config.json'"),
    "a size that is true": (
        b'{"files": {"a.json": {"size": true, "sha256": "%s"}}}' % (b"0" * 64),
        "is 'a.json'",
    ),
    "a short hash": (
        b'{"files": {"config.json": {"size": 1, "sha256": "00"}}}',
        "is 'config.json'",
    ),
    "another header hash": (
        b'{"files": {"a.json": {"size": 1, "sha256": "%s", "header_sha256": 1}}}' % (b"0" * 64),
        "is 'a.json'",
    ),
    "a way out": (b'{"files": {"../a": {"size": 1, "sha256": "%s"}}}' % (b"0" * 64), "is '../a'"),
    "a name of zeros": (
        b'{"files": {"a\\u0000": {"size": 1, "sha256": "%s"}}}' % (b"0" * 64),
        r"is 'a\x00'",
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_record_is_named(out: Path, case: str) -> None:
    content, words = DAMAGED[case]
    (out / MANIFEST).write_bytes(content)
    message = refusal(out)
    assert message.startswith(f"{out / MANIFEST} is damaged: ")
    assert words in message


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo, lambda path: path.symlink_to("gone")])
def test_a_record_that_is_no_file_is_named(out: Path, make: Callable[[Path], object]) -> None:
    (out / MANIFEST).unlink()
    make(out / MANIFEST)
    assert refusal(out).startswith(f"{out / MANIFEST} cannot be read (")


def test_the_card_may_be_edited_or_left_behind(out: Path) -> None:
    """README.md is for readers, and the hub's client does not fetch it."""
    edit("README.md", lambda b: b + b"Mine.")(out)
    open_checkpoint(out)
    (out / "README.md").unlink()
    open_checkpoint(out)


def test_weights_are_not_read_to_be_compared(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = (out / WEIGHTS).read_bytes()
    (out / WEIGHTS).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    read: list[str] = []
    read_document = manifest.read_document
    monkeypatch.setattr(
        manifest,
        "read_document",
        lambda path, most: (read.append(path.name), read_document(path, most))[1],
    )
    open_checkpoint(out)
    assert WEIGHTS not in read
    assert "tekken.json" in read


def test_a_large_document_is_compared_by_its_size_and_that_is_said(
    out: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    size = (out / "tekken.json").stat().st_size
    monkeypatch.setattr(manifest, "MAX_HASHED_BYTES", size - 1)
    caplog.set_level(logging.INFO)
    open_checkpoint(out)
    assert [r.getMessage() for r in caplog.records] == [
        f"{out / 'tekken.json'}: only its size, {size} bytes, is compared with {MANIFEST}"
    ]
    edit("tekken.json", lambda b: b + b" ")(out)
    assert f"has {size + 1} bytes, {MANIFEST} records {size}" in refusal(out)


def test_a_record_of_before_headers_were_hashed_still_serves(
    out: Path, caplog: pytest.LogCaptureFixture
) -> None:
    edit_record(lambda files: files[WEIGHTS].pop("header_sha256"))(out)
    caplog.set_level(logging.INFO)
    open_checkpoint(out)
    assert f"{WEIGHTS}: only its size" in caplog.text


def test_what_other_software_made_needs_no_record(tmp_path: Path) -> None:
    tensors, block = quantize_weights(make_weights(CONFIG, mx.bfloat16), QuantFormat(4, 64))
    folder = write_checkpoint(tmp_path, CONFIG, tensors, block)
    change_json(folder / "config.json", made_by="another")
    open_checkpoint(folder)
