"""The command line ``plan``."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from magistral_mlx import plan
from magistral_mlx.model.mac_table import mac_table
from tests.support.tiny import make_config

Folder = Callable[..., Path]


def test_it_adds_up_and_reads_no_weights(
    checkpoint_folder: Folder, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = checkpoint_folder(make_config())
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
    checkpoint_folder: Folder, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(checkpoint_folder(make_config()))
    small = str(checkpoint_folder(make_config(num_layers=1), name="draft"))
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
    checkpoint_folder: Folder, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = checkpoint_folder(make_config())
    assert plan.main(["--model", str(folder), "--max-kv-size", "4096", "--memory-gb", "0.005"]) == 2
    error = capsys.readouterr().err
    assert "--max-kv-size" in error
    assert "5.0 MB may be used" in error
    assert plan.main(["--model", str(folder), "--memory-gb", "0.0001"]) == 2
    assert "no context fits" in capsys.readouterr().err
    assert plan.main(["--model", str(folder / "nowhere")]) == 2
    assert "no such folder" in capsys.readouterr().err


def test_without_a_model_it_prints_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan.main([]) == 0
    assert capsys.readouterr().out == mac_table() + "\n"
    assert plan.main(["--kv-bits", "8"]) == 2
    assert "--model" in capsys.readouterr().err
