"""Calibration on the model's own replies: the same however a conversion is interrupted."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from magistral_mlx.checkpoint.folder import open_checkpoint
from magistral_mlx.convert import ConvertOptions, check_conversion, stream_conversion
from magistral_mlx.convert.calibration import choose as calibration
from magistral_mlx.convert.calibration import traces
from magistral_mlx.convert.calibration.corpus import WINDOW, questions
from magistral_mlx.convert.calibration.traces import FILE, SelfCalibration
from magistral_mlx.convert.output.staging import TRACES
from magistral_mlx.convert.verify import main as verify
from magistral_mlx.errors import CheckpointError, ConversionError, MemoryLimitError
from magistral_mlx.generation.params import SamplingParams
from magistral_mlx.model import memory
from magistral_mlx.tokenizer.tekken import Tokenizer
from tests.support.sources import content, convert_quickly, write_hf
from tests.support.tekken import write_tekken

SELF: dict[str, Any] = {"q_method": "importance", "calibration": "self", "tokenizer_json": False}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hf(tmp_path_factory.mktemp("source") / "hf")


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traces, "SAMPLING", SamplingParams(think_budget=12, max_tokens=20))
    monkeypatch.setattr(calibration, "WINDOWS", {"importance": 2, "gptq": 2})


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / FILE).read_text("utf-8").splitlines()]


@pytest.mark.slow
def test_replies_to_our_questions_are_kept_with_the_checkpoint_and_change_it(
    source: Path, tmp_path: Path
) -> None:
    stream_conversion(source, tmp_path / "one", **SELF).result()
    convert_quickly(source, tmp_path / "built-in", q_method="importance")
    written = lines(tmp_path / "one")
    assert [line["question"] for line in written] == questions()[: len(written)]
    assert [line["seed"] for line in written] == list(range(len(written)))
    assert all(0 < len(line["ids"]) <= 20 for line in written)
    assert not (tmp_path / "one.partial").exists()
    ours, others = content(tmp_path / "one"), content(tmp_path / "built-in")
    assert ours.keys() - others.keys() == {FILE}
    assert any(ours[name] != others[name] for name in ours if name.endswith(".safetensors"))
    options = json.loads(ours["magistral_mlx.json"])["options"]
    assert options["calibration"]["origin"] == "self"
    assert verify([str(tmp_path / "one"), "--hf-path", str(source)]) == 0
    again = SelfCalibration(Tokenizer.from_folder(source), 2, None)
    assert again.ids(again.read(tmp_path / "one" / FILE)) is not None
    assert again.ids(again.read(tmp_path / "one" / FILE)[:-1]) is None


def test_windows_hold_the_system_prompt_once_and_every_question_with_its_reply(
    source: Path,
) -> None:
    tokenizer = Tokenizer.from_folder(source)
    own = SelfCalibration(tokenizer, 2, None)
    replies = [[5 + number, 2] for number in range(60)]
    ids = own.ids(replies)
    assert ids is not None
    assert ids.shape == (2, WINDOW)
    assert (np.array(ids)[:, 0] == tokenizer.bos_id).all()
    expected = tokenizer.encode_chat(questions()[0])[1:] + replies[0]
    flat = np.array(ids)[:, 1:].reshape(-1).tolist()
    assert flat[: len(expected)] == expected
    asked = flat[len(expected) :]
    start, end = [token_id for token_id in expected if tokenizer.is_control(token_id)][2:4]
    assert asked[0] == start
    assert tokenizer.decode(asked[1 : asked.index(end)]) == questions()[1]
    assert asked[asked.index(end) + 1 :][:2] == replies[1]


@pytest.mark.parametrize(
    "cut", [pytest.param(0, marks=pytest.mark.slow), 1, pytest.param(3, marks=pytest.mark.slow)]
)
@pytest.mark.slow
def test_a_conversion_goes_on_after_the_last_whole_reply(
    cut: int, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream_conversion(source, tmp_path / "whole", **SELF).result()
    write, drawn = SelfCalibration._write, []

    def failing(self: SelfCalibration, *arguments: object) -> dict[str, object]:
        if len(drawn) == cut:
            raise KeyboardInterrupt
        drawn.append(arguments[-1])
        return write(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(SelfCalibration, "_write", failing)
    with pytest.raises(KeyboardInterrupt):
        stream_conversion(source, tmp_path / "out", **SELF).result()
    file = tmp_path / "out.partial" / TRACES / FILE
    assert len(file.read_bytes().splitlines()) == cut
    with file.open("ab") as end:
        # A power failure leaves half a line.
        end.write(b'{"seed": %d, "ids": [1, 2' % cut)
    with pytest.raises(ConversionError, match=r"another calibration"):
        stream_conversion(
            source, tmp_path / "out", q_method="importance", tokenizer_json=False
        ).result()
    drawn.clear()
    monkeypatch.setattr(
        SelfCalibration, "_write", lambda self, *rest: drawn.append(rest[-1]) or write(self, *rest)
    )
    stream_conversion(source, tmp_path / "out", **SELF).result()
    assert drawn == list(range(cut, len(lines(tmp_path / "out"))))
    assert content(tmp_path / "out") == content(tmp_path / "whole")


@pytest.mark.slow
def test_any_checkpoint_of_the_same_vocabulary_may_write(source: Path, tmp_path: Path) -> None:
    convert_quickly(source, tmp_path / "8bit", q_bits=8, q_method="round")
    options: dict[str, Any] = {
        "q_method": "gptq",
        "calibration": str(tmp_path / "8bit"),
        "tokenizer_json": False,
    }
    stream_conversion(source, tmp_path / "out", **options).result()
    recorded = json.loads((tmp_path / "out" / "magistral_mlx.json").read_text())["options"][
        "calibration"
    ]
    assert recorded["writer"] == open_checkpoint(tmp_path / "8bit").fingerprint()
    write_tekken(tmp_path / "8bit", 512)
    with pytest.raises(CheckpointError):
        check_conversion(source, tmp_path / "other", ConvertOptions(**options))


def test_a_writer_that_does_not_fit_is_refused_before_any_work(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "budget_bytes", lambda memory_gb=None: 1000)
    with pytest.raises(MemoryLimitError, match="may be used"):
        check_conversion(source, tmp_path / "out", ConvertOptions(**SELF))
    assert not list(tmp_path.iterdir())
