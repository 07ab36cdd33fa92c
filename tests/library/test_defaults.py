"""Defaults of the commands: a typed flag wins over MAGISTRAL_MODEL, and that over the settings."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from magistral_mlx import chat, generate, plan
from magistral_mlx.errors import HubError, OptionError
from magistral_mlx.library.known_folders import find_model, known_folders, remember
from magistral_mlx.model.load_options import LoadOptions
from magistral_mlx.terminal import command_line, shared_flags

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, LoadOptions]]:
    """Record what would be loaded, and load nothing."""
    found: list[tuple[str, LoadOptions]] = []

    def loading(model: str, options: LoadOptions) -> Any:
        found.append((model, options))
        raise HubError("nothing is loaded here")

    monkeypatch.setattr(shared_flags, "loading", loading)
    return found


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


ASK = ["-p", "hi"]


@pytest.mark.parametrize(
    "case",
    [
        ([], None, "org/of-file"),
        ([], "org/of-variable", "org/of-variable"),
        (["org/word"], "org/of-variable", "org/word"),
        (["--model", "org/flag"], "org/of-variable", "org/flag"),
        ([], "", "org/of-file"),
    ],
)
def test_the_model_is_the_nearest(
    config: Path,
    monkeypatch: pytest.MonkeyPatch,
    loaded: list[tuple[str, LoadOptions]],
    case: tuple[list[str], str | None, str],
) -> None:
    arguments, variable, expected = case
    write(config, 'model = "org/of-file"')
    if variable is not None:
        monkeypatch.setenv("MAGISTRAL_MODEL", variable)
    assert generate.main([*arguments, *ASK]) == 2
    assert chat.main(arguments) == 2
    assert [model for model, _ in loaded] == [expected, expected]


def test_flags_win_over_settings(config: Path, loaded: list[tuple[str, LoadOptions]]) -> None:
    write(config, 'model = "org/name"\nkv-bits = 8\nmemory-gb = 3\n')
    assert generate.main([*ASK, "--kv-bits", "4"]) == 2
    assert loaded == [("org/name", LoadOptions(kv_bits=4, memory_gb=3.0))]


@pytest.mark.parametrize(
    ("words", "model", "code"),
    [
        (["hi"], "org/name", 2),
        (["org/other", "hi"], "org/other", 2),
        (["demo"], None, 2),
        (["what", "is", "this"], None, 2),
        (["--model", "org/third", "hi"], "org/third", 2),
    ],
)
def test_run_takes_a_question_or_a_model_and_a_question(
    config: Path,
    loaded: list[tuple[str, LoadOptions]],
    words: Sequence[str],
    model: str | None,
    code: int,
) -> None:
    write(config, 'model = "org/name"')
    assert command_line.run(generate.run, words) == code
    assert [name for name, _ in loaded] == ([] if model is None else [model])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["demo", "--model", "demo"], "two models are named"),
        (["what is this?", "-p", "hi"], "magistral run"),
        (["-p", "hi"], "magistral pull"),
    ],
)
def test_a_model_that_is_unclear_or_missing_is_refused(
    capsys: Capture, arguments: list[str], said: str
) -> None:
    assert generate.main(arguments) == 2
    assert said in capsys.readouterr().err


def test_an_error_names_the_setting_that_caused_it(config: Path, capsys: Capture) -> None:
    write(config, 'model = "demo"\nmax-kv-size = 1000000\n')
    assert generate.main(ASK) == 2
    err = capsys.readouterr().err
    assert f"{config} sets" in err
    assert "max-kv-size" in err


def test_an_error_that_no_setting_caused_names_none(config: Path, capsys: Capture) -> None:
    write(config, 'model = "org/name"\ntemp = 0.1\n')
    assert generate.main(["-p", ""]) == 2
    assert str(config) not in capsys.readouterr().err


def test_a_model_of_the_variable_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture, tmp_path: Path
) -> None:
    monkeypatch.setenv("MAGISTRAL_MODEL", str(tmp_path))
    assert generate.main(ASK) == 2
    assert "MAGISTRAL_MODEL sets model" in capsys.readouterr().err


def test_help_is_shown_beside_wrong_settings(config: Path, capsys: Capture) -> None:
    write(config, "temp = 'hot'")
    assert generate.main(["--help"]) == 0
    assert generate.main(ASK) == 2
    assert "temperature is 'hot'" in capsys.readouterr().err


def test_no_think_wins_over_a_budget_of_the_settings(config: Path, capsys: Capture) -> None:
    write(config, 'model = "demo"\nthink-budget = 5\nthink-budget-message = "So:"\ntemp = 0\n')
    assert generate.main(["-p", "What is 1 + 2?", "--no-think", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["reasoning_tokens"] == 0


def test_the_default_model_is_not_planned_for_unasked(config: Path, capsys: Capture) -> None:
    write(config, 'model = "org/name"')
    assert plan.main([]) == 0
    assert "24" in capsys.readouterr().out
    assert plan.main(["demo", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["model"] == "demo"


def test_an_error_spells_flags_and_names_the_settings(config: Path, capsys: Capture) -> None:
    write(config, "memory-gb = 17\nkv-bits = 8")
    assert plan.main(["--bits", "4", "--context", "40000"]) == 2
    error = capsys.readouterr().err
    assert "(--max-kv-size 39168)" in error
    assert "sets kv-bits, memory-gb" in error
    assert plan.main(["--memory", "16GB", "--context", "40000"]) == 2
    assert "(--max-kv-size 11776) with an 8-bit cache (--kv-bits 8)" in capsys.readouterr().err


def test_a_folder_is_found_by_its_name_until_it_goes(tmp_path: Path) -> None:
    for parent in ("a", "b"):
        (tmp_path / parent / "mine").mkdir(parents=True)
        (tmp_path / parent / "mine" / "config.json").write_text("{}")
    remember(tmp_path / "a" / "mine")
    remember(tmp_path / "a" / "mine")
    assert find_model("mine") == str(tmp_path / "a" / "mine")
    remember(tmp_path / "b" / "mine")
    with pytest.raises(Exception, match="several models"):
        find_model("mine")
    (tmp_path / "a" / "mine" / "config.json").unlink()
    assert find_model("mine") == str(tmp_path / "b" / "mine")
    assert known_folders() == [tmp_path / "b" / "mine"]
    assert find_model("other") == "other"


def test_a_damaged_list_is_made_again(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "models.json").write_text("{")
    assert known_folders() == []
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text("{}")
    remember(tmp_path / "mine")
    assert known_folders() == [tmp_path / "mine"]


@pytest.mark.parametrize("name", ["/" + "a" * 5000, "/\\u0000", "/\\ud800", "relative", 5, None])
def test_a_name_that_is_no_path_is_left_out(tmp_path: Path, name: object) -> None:
    (tmp_path / "state").mkdir()
    text = json.dumps({"folders": [name, str(tmp_path)]}).replace("\\\\", "\\")
    (tmp_path / "state" / "models.json").write_text(text)
    (tmp_path / "config.json").write_text("{}")
    assert known_folders() == [tmp_path]


def test_a_home_that_is_read_only_costs_the_list_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MAGISTRAL_MLX_STATE", str(tmp_path / "file" / "state"))
    remember(tmp_path)
    assert known_folders() == []


def test_option_errors_stay_option_errors(config: Path) -> None:
    write(config, "temp = 1\nmax-tokens = 'x'")
    with pytest.raises(OptionError):
        generate.command.main(["demo", *ASK], standalone_mode=False)


def test_a_folder_that_is_away_for_a_while_stays_in_the_list(tmp_path: Path) -> None:
    drive, other = tmp_path / "drive", tmp_path / "other"
    for folder in (drive, other):
        folder.mkdir()
        (folder / "config.json").write_text("{}")
    remember(drive)
    drive.rename(tmp_path / "away")
    remember(other)
    assert drive not in known_folders()
    (tmp_path / "away").rename(drive)
    assert {drive, other} <= set(known_folders())
