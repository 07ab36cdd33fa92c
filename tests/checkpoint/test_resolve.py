"""A path or hub id resolves to a folder, and a folder's fingerprint to its content."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from magistral_mlx.checkpoint import folder as folder_module
from magistral_mlx.checkpoint.config import ModelConfig
from magistral_mlx.checkpoint.folder import Checkpoint, open_checkpoint, resolve
from magistral_mlx.convert import ConvertOptions, check_conversion
from magistral_mlx.errors import CheckpointError, HubError, OptionError, visible
from tests.support.faults.edits import FIRST, INDEX, edit_json
from tests.support.tiny import DEMO


def edit_bytes(path: Path, edit: Callable[[bytes], bytes]) -> None:
    path.write_bytes(edit(path.read_bytes()))


def flip_middle_of(checkpoint: Checkpoint, name: str) -> None:
    shard = next(s for s in checkpoint.shards if name in s.header)
    entry = shard.header[name]
    place = shard.data_start + (entry.begin + entry.end) // 2
    edit_bytes(shard.path, lambda b: b[:place] + bytes([b[place] ^ 1]) + b[place + 1 :])


CHANGES: dict[str, Callable[[Path], object]] = {
    "a byte of the config": lambda f: edit_bytes(f / "config.json", lambda b: b + b" "),
    "a value of the config": lambda f: edit_json(f / "config.json", rope_theta=1e6),
    "a byte of the index": lambda f: edit_bytes(f / INDEX, lambda b: b + b" "),
    "no index": lambda f: (f / INDEX).unlink(),
    "a header": lambda f: edit_bytes(
        f / FIRST, lambda b: b.replace(b'"format":"pt"', b'"format":"tf"')
    ),
    "a size": lambda f: edit_bytes(
        f / FIRST,
        lambda b: (
            (int.from_bytes(b[:8], "little") + 8).to_bytes(8, "little")
            + (
                b[8 : 8 + int.from_bytes(b[:8], "little")]
                + b" " * 8
                + b[8 + int.from_bytes(b[:8], "little") :]
            )
        ),
    ),
    "weights of a fine-tune": lambda f: flip_middle_of(
        open_checkpoint(f), "model.layers.2.self_attn.k_proj.weight"
    ),
    "a norm of a fine-tune": lambda f: flip_middle_of(open_checkpoint(f), "model.norm.weight"),
}


@pytest.mark.parametrize("case", CHANGES)
def test_the_fingerprint_changes_with(folder: Path, case: str) -> None:
    before = open_checkpoint(folder).fingerprint()
    CHANGES[case](folder)
    assert open_checkpoint(folder).fingerprint() != before


def test_the_fingerprint_is_that_of_the_content_not_of_the_place(
    folder: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(folder, tmp_path / "elsewhere")
    found = open_checkpoint(copy).fingerprint()
    assert found == open_checkpoint(folder).fingerprint()
    assert len(found) == 64


def test_a_folder_resolves_to_itself(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    monkeypatch.setenv("HOME", str(folder.parent))
    assert resolve(folder) == folder
    assert resolve(str(folder)) == folder
    assert resolve("model") == Path("model")
    assert resolve("~/model") == folder


def test_a_folder_wins_over_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_module, "fetch", None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert resolve("org/name") == Path("org/name")


def test_a_hub_id_is_fetched_with_what_was_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def fetch(repo_id: str, *, revision: str | None, layout: str | None, check: object) -> Path:
        calls.append((repo_id, revision, layout, check))
        return tmp_path

    monkeypatch.setattr(folder_module, "fetch", fetch)
    assert (
        resolve(
            "mistralai/Magistral-Small-2506", revision="main", layout="consolidated", check=print
        )
        == tmp_path
    )
    assert calls == [("mistralai/Magistral-Small-2506", "main", "consolidated", print)]


@pytest.mark.parametrize(
    "model",
    [
        "none",
        "./none",
        "../org/none",
        "/none/here",
        "~/none",
        "~nobody-here/x",
        "a/b/c",
        "a/",
        "/a",
        "a b/c",
        "-a/b",
        "x" * 5000,
        "org/nàme",
        "\0/x",
        "https://host/a",
        "org/name\n",
        Path("org/name"),
    ],
)
def test_what_is_neither_folder_nor_hub_id_names_the_ways(
    model: str | Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder_module, "fetch", None)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        resolve(model)
    for words in (
        visible(str(model)),
        "no such folder",
        "lmstudio-community/Magistral-Small-2506-MLX-4bit",
        "'demo'",
    ):
        assert words in str(caught.value)


def test_the_demo_is_a_source_and_no_4_bit_model_is_advised_as_one(tmp_path: Path) -> None:
    assert resolve("demo") == DEMO
    with pytest.raises(OptionError, match="has no revision 'main'"):
        resolve("demo", revision="main")
    with pytest.raises(CheckpointError) as caught:
        check_conversion("none", tmp_path / "out", ConvertOptions(tokenizer_json=False))
    assert "such as mistralai/Magistral-Small-2506; or 'demo'" in str(caught.value)
    assert "4bit" not in str(caught.value)


def test_a_file_is_not_a_checkpoint(folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json is a file; name the folder"):
        resolve(folder / "config.json")


def test_a_folder_has_no_revision(folder: Path) -> None:
    with pytest.raises(OptionError, match="which has no revision 'main'; leave the revision out"):
        resolve(folder, revision="main")


def test_errors_of_the_hub_pass_through(monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(*_: object, **__: object) -> Path:
        raise HubError("no network")

    monkeypatch.setattr(folder_module, "fetch", fetch)
    with pytest.raises(HubError, match="no network"):
        resolve("org/name")


def test_the_config_type_is_exported_as_read(folder: Path) -> None:
    assert isinstance(open_checkpoint(folder).config, ModelConfig)
