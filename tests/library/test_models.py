"""The models of this machine: pull, list, show and remove, on a hub on the loopback interface."""

import io
import json
import shutil
from pathlib import Path
from typing import Any

import click
import pytest

from magistral_mlx import manage
from magistral_mlx.convert import convert_checkpoint
from magistral_mlx.library.known_folders import remember
from magistral_mlx.library.preview import Preview, preview
from magistral_mlx.terminal import command_line
from tests.support.hub_server import OLDER, REPO, Hub, go_offline, use
from tests.support.tiny import DEMO

Capture = pytest.CaptureFixture[str]


def run(command: click.Command, *arguments: str) -> int:
    return command_line.run(command, arguments)


def listed(capsys: Capture) -> dict[str, dict[str, Any]]:
    capsys.readouterr()
    assert run(manage.list_models, "--json") == 0
    return {model["name"]: model for model in json.loads(capsys.readouterr().out)}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("made") / "demo-8bit"
    convert_checkpoint(DEMO, target, q_bits=8, q_method="round", tokenizer_json=False)
    return target


@pytest.fixture
def converted(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a converted folder that is known; the hub's cache is empty."""
    use(monkeypatch, "http://127.0.0.1:9", tmp_path)
    folder = tmp_path / "mine"
    shutil.copytree(made, folder)
    remember(folder)
    return folder


# pull


def test_pull_tells_fetches_and_makes_the_default(hub: Hub, capsys: Capture, config: Path) -> None:
    assert run(manage.pull, REPO) == 0
    out, err = capsys.readouterr()
    assert Path(out.strip()).is_dir()
    assert f"{REPO}: 16 bit" in err
    assert "fits this machine, with a context of 4,096" in err
    assert config.read_text() == f'model = "{REPO}"\n'
    model = listed(capsys)[REPO]
    assert (model["is_default"], model["bits"], model["context"]) == (True, 16, 4096)
    assert model["disk_bytes"] == sum(map(len, hub.files.values()))


def test_pull_keeps_a_default_that_is_there(hub: Hub, config: Path) -> None:
    assert run(manage.config, "model", "demo") == 0
    assert run(manage.pull, REPO) == 0
    assert config.read_text() == 'model = "demo"\n'


def test_a_model_that_does_not_fit_is_fetched_with_force_alone(hub: Hub, capsys: Capture) -> None:
    assert run(manage.config, "memory-gb", "0.0001") == 0
    assert run(manage.pull, REPO) == 2
    assert "does not fit this machine, so it is not fetched (--force" in capsys.readouterr().err
    assert not any(request.name.endswith("tekken.json") for request in hub.requests)
    assert run(manage.pull, REPO, "--force") == 0
    assert "does not fit" in listed(capsys)[REPO]["problem"]


def test_pull_goes_on_where_it_was_interrupted(
    hub: Hub, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = "model-00002-of-00002.safetensors"

    def preview_and_damage(repo_id: str, revision: str | None) -> Preview:
        found = preview(repo_id, revision)
        hub.damaged = frozenset({shard})
        return found

    monkeypatch.setattr(manage, "preview", preview_and_damage)
    assert run(manage.pull, REPO) == 2
    assert "run the same command again" in capsys.readouterr().err
    monkeypatch.setattr(manage, "preview", preview)
    assert run(manage.pull, REPO) == 2
    assert f"{REPO}/{shard} is damaged" in capsys.readouterr().err
    hub.damaged = frozenset()
    hub.forget()
    assert run(manage.pull, REPO) == 0
    assert hub.sent["tekken.json"] == 0


@pytest.mark.parametrize("has_copy", [True, False])
def test_pull_without_a_network(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: Capture, has_copy: bool
) -> None:
    if has_copy:
        assert run(manage.pull, REPO) == 0
    go_offline(monkeypatch, "flag")
    assert run(manage.pull, REPO) == (0 if has_copy else 2)
    err = capsys.readouterr().err
    assert has_copy or "no complete copy is cached" in err


@pytest.mark.parametrize("name", ["demo", "."])
def test_what_is_here_is_not_pulled(name: str, capsys: Capture) -> None:
    assert run(manage.pull, name) == 2
    assert "is on this machine already" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["nothing", "https://hub/org/name", "org/a/b", "./a b"])
def test_what_is_no_hub_id_is_not_asked_for(hub: Hub, name: str, capsys: Capture) -> None:
    assert run(manage.pull, name) == 2
    assert "is no hub id; use the form org/name" in capsys.readouterr().err
    assert hub.requests == []


def test_a_model_without_a_tokenizer_is_refused_before_its_weights(
    hub: Hub, capsys: Capture
) -> None:
    del hub.files["tekken.json"]
    assert run(manage.pull, REPO) == 2
    assert "tekken.json is missing" in capsys.readouterr().err
    shards = {name: data for name, data in hub.files.items() if name.endswith(".safetensors")}
    assert all(hub.sent[name] < len(content) for name, content in shards.items())


# list


def test_the_list_names_every_kind(converted: Path, capsys: Capture) -> None:
    assert run(manage.config, "model", "mine") == 0
    found = listed(capsys)
    assert list(found) == ["demo", "mine"]
    assert found["mine"]["bits"] == 8
    assert found["mine"]["is_default"]
    assert found["mine"]["disk_bytes"] == sum(p.stat().st_size for p in converted.iterdir())
    assert run(manage.list_models) == 0
    out, err = capsys.readouterr()
    assert "* mine" in out
    assert "* is the default" in err
    shutil.rmtree(converted)
    assert list(listed(capsys)) == ["demo"]


def test_other_models_of_the_cache_are_left_out(hub: Hub, capsys: Capture) -> None:
    assert run(manage.pull, REPO) == 0
    (snapshot,) = Path(listed(capsys)[REPO]["folder"]).parent.iterdir()
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").write_text('{"model_type": "bert"}')
    assert list(listed(capsys)) == ["demo"]


def test_a_folder_that_cannot_be_opened_is_listed_with_the_reason(
    converted: Path, capsys: Capture
) -> None:
    (converted / "tekken.json").write_text("{}")
    found = listed(capsys)["mine"]
    assert "tekken.json" in found["problem"]
    assert found["context"] is None
    assert run(manage.list_models) == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[-1].endswith("  -")
    assert '"-" means that it cannot be loaded; magistral show mine tells why' in err
    assert run(manage.show, "mine") == 2
    assert "tekken.json" in capsys.readouterr().err


def test_an_incomplete_download_is_listed_and_can_be_removed(hub: Hub, capsys: Capture) -> None:
    assert run(manage.pull, REPO) == 0
    blobs = Path(listed(capsys)[REPO]["folder"]).parents[1] / "blobs"
    (blobs / "new.incomplete").write_bytes(b"half")
    model = listed(capsys)[REPO]
    assert model["problem"] == f"incomplete; magistral pull {REPO} goes on"
    assert model["disk_bytes"] == 4 + sum(map(len, hub.files.values()))
    assert run(manage.remove, REPO, "--yes") == 0
    assert not blobs.exists()


def test_names_cannot_write_to_a_terminal(converted: Path, capsys: Capture) -> None:
    folder = converted.with_name("a\x1b[2Jb")
    converted.rename(folder)
    remember(folder)
    assert run(manage.list_models) == 0
    assert run(manage.show, str(folder)) == 0
    assert run(manage.remove, str(folder), "--yes") == 0
    out, err = capsys.readouterr()
    assert "\x1b" not in out + err


def test_a_default_that_was_never_loaded_is_listed(
    converted: Path, capsys: Capture, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    converted.rename(other)
    assert run(manage.config, "model", str(other)) == 0
    assert listed(capsys)["other"]["is_default"] is True
    assert run(manage.list_models) == 0
    assert "is the default" in capsys.readouterr().err


def test_a_default_that_has_gone_is_said(converted: Path, capsys: Capture) -> None:
    assert run(manage.config, "model", "mine") == 0
    shutil.rmtree(converted)
    assert run(manage.list_models) == 0
    assert "the default, " in capsys.readouterr().err


# show


def test_show_tells_the_bits_the_release_and_the_origin(converted: Path, capsys: Capture) -> None:
    assert run(manage.show, "mine", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["release"], found["tokenizer"], found["bits"]) == ("2506", "v11", 8)
    assert found["options"]["q_bits"] == 8
    assert found["config"]["num_layers"] == 4
    assert run(manage.show, str(converted)) == 0
    out = capsys.readouterr().out
    assert "q_proj        8 bit" in out
    assert "q_method: round\n" in out
    assert "recipe: none\n" in out
    assert "tokenizer_json: no\n" in out
    assert run(manage.show, "demo") == 0


@pytest.mark.parametrize("name", ["nothing", "org/nothing"])
def test_a_model_that_is_not_here_is_named(converted: Path, capsys: Capture, name: str) -> None:
    for command in (manage.show, manage.remove):
        assert run(command, name) == 2
        err = capsys.readouterr().err
        assert f"{name} is not on this machine" in err
        assert ("magistral pull" in err) == ("/" in name)


# remove


def test_remove_frees_a_converted_folder_and_the_default(
    converted: Path, capsys: Capture, config: Path
) -> None:
    assert run(manage.config, "model", "mine") == 0
    assert run(manage.remove, "mine") == 2
    assert "say --yes" in capsys.readouterr().err
    assert run(manage.remove, "mine", "--yes") == 0
    assert "freed" in capsys.readouterr().out
    assert not converted.exists()
    assert config.read_text() == ""
    assert list(listed(capsys)) == ["demo"]


def test_remove_takes_a_model_out_of_the_cache_with_all_its_commits(
    hub: Hub, capsys: Capture, config: Path
) -> None:
    assert run(manage.pull, REPO) == 0
    hub.commit, hub.files = OLDER, hub.files | {"SYSTEM_PROMPT.txt": b"think"}
    assert run(manage.pull, REPO) == 0
    size = listed(capsys)[REPO]["disk_bytes"]
    assert run(manage.remove, REPO, "--yes") == 0
    assert size == sum(map(len, hub.files.values()))
    assert list(listed(capsys)) == ["demo"]
    assert config.read_text() == ""


def test_remove_touches_nothing_that_is_not_a_conversion(
    converted: Path, capsys: Capture, tmp_path: Path
) -> None:
    (converted / "notes.txt").write_text("precious")
    assert run(manage.remove, "mine", "--yes") == 2
    assert "also holds notes.txt" in capsys.readouterr().err
    (converted / "notes.txt").unlink()
    link = tmp_path / "link"
    link.symlink_to(converted)
    assert run(manage.remove, str(link), "--yes") == 2
    assert "is a link" in capsys.readouterr().err
    (converted / "magistral_mlx.json").rename(tmp_path / "manifest")
    assert run(manage.remove, str(converted), "--yes") == 2
    assert "was not converted here" in capsys.readouterr().err
    assert run(manage.remove, "demo", "--yes") == 2
    assert "part of this package" in capsys.readouterr().err
    assert (converted / "tekken.json").exists()


@pytest.mark.parametrize("answer", ["y", "n", ""])
def test_remove_asks_at_a_terminal(
    converted: Path, monkeypatch: pytest.MonkeyPatch, answer: str
) -> None:
    typed = io.StringIO(f"{answer}\n")
    monkeypatch.setattr(typed, "isatty", lambda: True)
    monkeypatch.setattr("sys.stdin", typed)
    assert run(manage.remove, "mine") == 0
    assert converted.exists() == (answer != "y")


def test_quiet_shows_the_folder_alone(hub: Hub, capfd: pytest.CaptureFixture[str]) -> None:
    from huggingface_hub.utils import enable_progress_bars

    assert run(manage.pull, REPO, "--quiet") == 0
    enable_progress_bars()
    out, err = capfd.readouterr()
    assert Path(out.strip()).is_dir()
    assert err == ""


def test_an_interrupted_removal_can_be_repeated(converted: Path) -> None:
    next(converted.glob("*.safetensors")).unlink()
    assert run(manage.remove, str(converted), "--yes") == 0
    assert not converted.exists()
