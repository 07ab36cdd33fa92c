"""Settings: a small TOML file that a user and ``magistral config`` both edit."""

import os
import sys
from pathlib import Path

import pytest

from magistral_mlx import manage
from magistral_mlx.errors import OptionError
from magistral_mlx.files import settings_path, state_dir
from magistral_mlx.library import settings
from magistral_mlx.terminal import command_line

Capture = pytest.CaptureFixture[str]


def config_command(*arguments: str) -> int:
    return command_line.run(manage.config, arguments)


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("temp", "0.2", 0.2),
        ("temperature", "0", 0),
        ("top_p", "1", 1),
        ("max_tokens", "100", 100),
        ("think-budget", "0", 0),
        ("think-budget-message", 'I answer now: it\'s "all".', 'I answer now: it\'s "all".'),
        ("on-loop", "stop", "stop"),
        ("stop", "END", ("END",)),
        ("stop", '["a", "b"]', ("a", "b")),
        ("kv-bits", "8", 8),
        ("memory-gb", "17.2", 17.2),
        ("max-kv-size", "4096", 4096),
        ("model", "org/name", "org/name"),
        ("tokenizer", "org/name", "org/name"),
    ],
)
def test_a_value_is_read_as_it_was_set(key: str, text: str, value: object) -> None:
    assert config_command(key, text) == 0
    assert settings.read_settings() == {settings.key_of(key).option.name: value}
    assert config_command("--unset", key) == 0
    assert settings.read_settings() == {}


@pytest.mark.parametrize(
    ("key", "text", "said"),
    [
        ("temp", "hot", "temperature is 'hot'; use a number"),
        ("top-p", "2", "top-p is 2"),
        ("temp", "nan", "temperature is nan"),
        ("temp", "true", "use a number"),
        ("kv-bits", "7", "use one of 16, 8, 4"),
        ("kv-bits", "8.0", "use one of 16, 8, 4"),
        ("max-tokens", "1.5", "use a whole number"),
        ("max-kv-size", "0", "from 1 on"),
        ("on-loop", "never", "use one of close, stop, ignore"),
        ("stop", "[1]", "a list of texts"),
        ("model", "nothing here", "is no model here"),
        ("model", "a\nb/c", r"'a\nb/c' is no model here"),
        ("tempe", "1", "did you mean"),
        ("wired", "true", "is not a setting; use one of model"),
        ("revision", "main", "is not a setting"),
    ],
)
def test_a_wrong_key_or_value_is_refused_and_the_file_stays(
    config: Path, capsys: Capture, key: str, text: str, said: str
) -> None:
    write(config, "# mine\ntop-p = 0.9\n")
    assert config_command(key, text) == 2
    assert said in capsys.readouterr().err
    assert config.read_text() == "# mine\ntop-p = 0.9\n"


def test_comments_and_other_lines_stay(config: Path, capsys: Capture) -> None:
    write(config, '# mine\ntemp = 0.2  # cool\n\nmodel = "demo"\n')
    assert config_command("temperature", "0.5") == 0
    assert config.read_text() == '# mine\n\nmodel = "demo"\ntemperature = 0.5\n'
    assert config_command() == 0
    assert capsys.readouterr().out == 'model = "demo"\ntemperature = 0.5\n'
    assert config_command("model") == 0
    assert capsys.readouterr().out == "demo\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("temprature = 1", "did you mean temperature?"),
        ("temp = 1\ntemperature = 1", "is set twice"),
        ("temp = 'hot'", "use a number"),
        ("[chat]\ntemp = 1", "is not a setting"),
        ("temp =", "is not TOML"),
        ("temp = '\udcff'", "is not UTF-8"),
        ("#" * 100_001, "is far too large"),
    ],
)
def test_a_file_that_is_wrong_is_named(config: Path, text: str, said: str) -> None:
    config.parent.mkdir()
    config.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(OptionError, match=said) as caught:
        settings.read_settings()
    assert str(config) in str(caught.value)


def test_an_unknown_key_of_the_file_can_be_removed(config: Path) -> None:
    write(config, "temprature = 1\ntemp = 1\n")
    assert config_command("--unset", "temprature") == 0
    assert config.read_text() == "temp = 1\n"


def test_what_is_not_edited_here_is_left_alone(config: Path, capsys: Capture) -> None:
    text = "stop = [\n'a',\n]\n"
    write(config, text)
    assert config_command("stop", "b") == 2
    assert "edit the file by hand" in capsys.readouterr().err
    assert config.read_text() == text


def test_the_null_device_sets_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAGISTRAL_CONFIG", os.devnull)
    assert settings.read_settings() == {}
    assert config_command("temp", "1") == 2


def test_a_pipe_is_no_settings_file(config: Path) -> None:
    config.parent.mkdir()
    os.mkfifo(config)
    with pytest.raises(OptionError, match="no plain file"):
        settings.read_settings()


@pytest.mark.parametrize("arguments", [["temp"], ["--unset", "temp"], ["--unset", "temp", "top-p"]])
def test_what_is_not_set_is_said(capsys: Capture, arguments: list[str]) -> None:
    assert config_command(*arguments) == 2
    assert capsys.readouterr().out == ""


def test_a_folder_is_kept_with_its_whole_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path)
    assert config_command("model", "mine") == 0
    assert settings.read_settings() == {"model": str(tmp_path / "mine")}


@pytest.mark.parametrize(
    ("platform", "variables", "state"),
    [
        ("darwin", {}, "Library/Application Support/magistral-mlx"),
        ("linux", {}, ".local/state/magistral-mlx"),
        ("linux", {"XDG_STATE_HOME": "/xdg"}, "/xdg/magistral-mlx"),
        ("linux", {"XDG_STATE_HOME": "here"}, ".local/state/magistral-mlx"),
        ("darwin", {"MAGISTRAL_MLX_STATE": "~/own"}, "own"),
    ],
)
def test_each_platform_has_its_folders(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    platform: str,
    variables: dict[str, str],
    state: str,
) -> None:
    for name in ("MAGISTRAL_MLX_STATE", "MAGISTRAL_CONFIG", "XDG_STATE_HOME", "XDG_CONFIG_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "platform", platform)
    for name, value in ({"HOME": str(tmp_path)} | variables).items():
        monkeypatch.setenv(name, value)
    assert state_dir() == tmp_path / state
    assert settings_path() == tmp_path / ".config/magistral-mlx/config.toml"
