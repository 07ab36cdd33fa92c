"""The command line ``plan``."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from magistral_mlx import plan
from magistral_mlx.model.mac import MAC_GB, Mac
from tests.support.tekken import write_tekken
from tests.support.tiny import make_config

Folder = Callable[..., Path]
VOCABULARY = 1500


@pytest.fixture
def model_folder(checkpoint_folder: Folder) -> Folder:
    """Return a function that writes a folder that can be loaded: weights and a tokenizer."""

    def write(name: str = "model", **changes: object) -> Path:
        config = make_config(vocab_size=VOCABULARY, **changes)
        return write_tekken(checkpoint_folder(config, name=name), VOCABULARY)

    return write


def test_it_adds_up_and_reads_no_weights(
    model_folder: Folder, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = model_folder()
    assert plan.main(["--model", str(folder), "--json", "--memory-gb", "1"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["context"] == 4096
    assert printed["budget_bytes"] == 10**9
    assert (
        printed["total_bytes"]
        == printed["weights_bytes"] + printed["kv_bytes"] + printed["workspace_bytes"]
    )
    assert plan.main(["--model", str(folder), "--max-kv-size", "1000", "--kv-bits", "4"]) == 0
    text = capsys.readouterr().out
    assert "4-bit KV cache, context 1,000" in text
    assert "weights" in text
    assert "draft" not in text


def test_a_draft_model_is_planned_for(
    model_folder: Folder, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(model_folder())
    small = str(model_folder("draft", num_layers=1))
    command = ["--model", folder, "--max-kv-size", "500", "--memory-gb", "1"]
    assert plan.main([*command, "--draft-model", small]) == 0
    assert "draft model and its cache" in capsys.readouterr().out
    assert (
        plan.main([*command, "--draft-model", small, "--json"])
        == plan.main([*command, "--json"])
        == 0
    )
    both, alone = map(json.loads, capsys.readouterr().out.splitlines())
    assert (
        both["total_bytes"] - alone["total_bytes"]
        == both["draft_bytes"]
        > 0
        == alone["draft_bytes"]
    )


def test_a_plan_that_does_not_fit_is_exit_2(
    model_folder: Folder, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = model_folder()
    assert plan.main(["--model", str(folder), "--max-kv-size", "4096", "--memory-gb", "0.005"]) == 2
    error = capsys.readouterr().err
    assert "--max-kv-size" in error
    assert "5.0 MB may be used" in error
    assert plan.main(["--model", str(folder), "--memory-gb", "0.0001"]) == 2
    assert "no context fits" in capsys.readouterr().err
    assert plan.main(["--model", str(folder / "nowhere")]) == 2
    assert "no such folder" in capsys.readouterr().err


def show(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> str:
    assert plan.main(words) == code
    out, err = capsys.readouterr()
    return out if code == 0 else err


def test_without_a_model_the_macs_are_rows(capsys: pytest.CaptureFixture[str]) -> None:
    lines = show(capsys).splitlines()
    assert max(map(len, lines)) <= 80
    assert "|" not in "".join(lines)
    rows = {line.split(" GB")[0]: line.split()[2:] for line in lines if re.match(r"\d+ GB", line)}
    assert list(rows) == [str(size) for size in MAC_GB]
    assert rows["8"] == ["5.7", *["-"] * 8]
    assert rows["16"][1:4] == ["6,656", "11,776", "-"]
    assert rows["24"][3:] == ["23,296", "40,960", "-", "-", "-", "-"]
    assert set(rows["512"][1:]) == {"40,960"}
    assert "Each cell is the longest context" in " ".join(lines)


def test_the_row_of_this_mac_is_marked_and_by_its_own_figure(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "this_mac", lambda: Mac(20))
    monkeypatch.setattr(plan, "budget_bytes", lambda: 16 * 10**9)
    marked = [line for line in show(capsys).splitlines() if line.startswith("* ")]
    assert marked[0].split()[:4] == ["*", "20", "GB", "16.0"]
    assert "this Mac" in marked[1]


def test_a_named_mac_is_planned_for_before_any_download(capsys: pytest.CaptureFixture[str]) -> None:
    text = show(capsys, "--mac", "M4 Pro 24GB")
    assert "an M4 Pro with 24 GB: 17.18 GB may be used" in text
    assert re.search(r"4 bit +13\.3 +23,296 +40,960 +40,960 +16\.1 to 17\.3", text)
    assert "tok/s" not in show(capsys, "--memory", "24GB")
    text = show(capsys, "--memory", "24GB", "--bits", "4", "--context", "30000", "--kv-bits", "8")
    assert "Magistral Small in 4 bit on a Mac with 24 GB: a context of 30,000 tokens fits" in text
    text = show(capsys, "--memory-gb", "17.18", "--bits", "4")
    assert "context 23,296" in text


def test_what_does_not_fit_a_named_mac_is_exit_2_with_what_would(
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = ("--memory", "24GB", "--bits", "4", "--context", "30000")
    error = show(capsys, *command, code=2)
    assert "--max-kv-size 23296" in error
    assert "--kv-bits 8" in error
    error = show(capsys, "--memory", "16GB", "--context", "40000", code=2)
    assert "does not fit, not even with --bits 3 --kv-bits 4" in error
    assert "what fits: a context of" in error
    assert "no context fits" in show(capsys, "--memory", "8GB", code=2)
    assert "use 1 to 40,960" in show(capsys, "--context", "50000", code=2)


def test_json_has_every_cell(capsys: pytest.CaptureFixture[str]) -> None:
    plans = json.loads(show(capsys, "--mac", "M4 24GB", "--json"))["plans"]
    assert len(plans) == 7 * 3
    fitting = [one for one in plans if one["fits"]]
    assert {one["bits"] for one in fitting} == {"3", "4", "5", "mxfp4"}
    assert all(one["total_bytes"] <= one["budget_bytes"] for one in fitting)
    assert fitting[0]["tokens_per_second"][0] < fitting[0]["tokens_per_second"][1]
    plans = json.loads(show(capsys, "--bits", "5", "--context", "20000", "--json"))["plans"]
    assert next(one["memory_gb"] for one in plans if one["fits"]) == 32
    one = json.loads(show(capsys, "--memory", "48", "--bits", "8", "--json"))
    assert (one["bits"], one["kv_bits"], one["fits"], one["context"]) == ("8", 16, True, 40_960)


def test_a_models_files_are_planned_for_on_a_named_mac(
    model_folder: Folder, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(model_folder())
    found = json.loads(show(capsys, "--model", folder, "--mac", "M4 Pro 24GB", "--json"))
    assert found["budget_bytes"] == pytest.approx(Mac(24).budget_bytes, abs=2)
    assert (found["chip"], found["memory_gb"]) == ("M4 Pro", 24)
    # A Mac's chunks, also where the plan is made on a CPU.
    assert found["prefill_chunk"] == 2048
    text = show(capsys, "--model", folder, "--mac", "M4 Pro 24GB")
    assert "an M4 Pro with 24 GB: a context of 4,096 tokens fits" in text
    assert "no speed is predicted" in text


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--mac", "M4 24GB", "--memory", "24GB"), "leave --memory out"),
        (("--memory", "24GB", "--memory-gb", "17"), "keep one"),
        (("--model", "demo", "--bits", "4"), "leave --bits or --model out"),
        (("--revision", "main"), "need a --model"),
        (("--draft-model", "demo"), "need a --model"),
        (("--bits", "7"), "--bits"),
    ],
)
def test_options_that_contradict_are_refused(
    words: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said in show(capsys, *words, code=2)


def test_a_default_of_the_user_gives_way_to_a_mac(capsys: pytest.CaptureFixture[str]) -> None:
    defaults = {"memory_gb": 3, "draft_model": "demo"}
    plan.command.main(["--memory", "24GB"], standalone_mode=False, default_map=defaults)
    assert "17.18 GB may be used" in capsys.readouterr().out


def test_a_folder_that_cannot_be_loaded_does_not_fit(
    model_folder: Folder, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = model_folder()
    (folder / "tekken.json").unlink()
    assert "tekken.json is missing" in show(capsys, "--model", str(folder), code=2)
    write_tekken(folder, VOCABULARY - 1)
    assert "1499 ids, the model has 1500" in show(capsys, "--model", str(folder), code=2)
    small = model_folder("draft", num_layers=1)
    write_tekken(folder, VOCABULARY)
    write_tekken(small, VOCABULARY - 1)
    error = show(capsys, "--model", str(folder), "--draft-model", str(small), code=2)
    assert "another vocabulary" in error
