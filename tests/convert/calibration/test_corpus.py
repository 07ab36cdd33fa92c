"""Calibration ids: our texts, random ids, and a user's files, good and bad."""

import re
from itertools import pairwise
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from magistral_mlx.convert.calibration import corpus
from magistral_mlx.convert.calibration.corpus import (
    BETWEEN_PARTS,
    BETWEEN_TEXTS,
    TEXTS,
    WINDOW,
    built_in,
    digest,
    read_calibration,
)
from magistral_mlx.convert.output.card import LANGUAGES
from magistral_mlx.errors import OptionError
from magistral_mlx.tokenizer.tekken import Tokenizer
from tests.support.tiny import DEMO

PROSE = " ".join(
    f"A number is even if two divides it, so {2 * i} = 2 * {i} is." for i in range(300)
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_folder(DEMO)


def test_our_texts_have_question_trace_and_answer_in_as_many_languages_as_the_card() -> None:
    texts = TEXTS.read_text(encoding="utf-8").split(BETWEEN_TEXTS)
    assert len(texts) >= 36
    assert all(len(text.split(BETWEEN_PARTS)) == 3 and "think>" not in text for text in texts)
    assert len(set(texts)) == len(texts)
    assert len(LANGUAGES) == 24
    scripts = ["[a-z]", "[а-я]", "[ぁ-ん]", "[가-힣]", "[一-龥]", "[ء-ي]", "[ऀ-ॿ]", "[ঀ-৿]"]
    assert all(any(re.search(script, text) for text in texts) for script in scripts)


def test_the_built_in_input_is_random_ids_and_then_the_conversation(tokenizer: Tokenizer) -> None:
    ids = np.array(built_in(tokenizer, windows=5))
    assert ids.shape == (5, WINDOW)
    assert (ids[:, 0] == tokenizer.bos_id).all()
    assert not any(map(tokenizer.is_control, ids[0, 1:].tolist()))
    # Drawn from 2,010 ids.
    assert len(set(ids[0].tolist())) > 400
    text = tokenizer.decode(ids[1:].flatten().tolist())
    assert text.startswith(tokenizer.system_prompt[:40])
    assert "<think>\nFrom 14:35 to 17:10." in text
    assert "Je décompose 360" in text


def test_the_seed_decides_the_random_ids_alone(tokenizer: Tokenizer) -> None:
    ids, same, other = (np.array(built_in(tokenizer, windows=2, seed=seed)) for seed in (1, 1, 2))
    assert np.array_equal(ids, same)
    assert not np.array_equal(ids[0], other[0])
    assert np.array_equal(ids[1], other[1])
    assert digest(mx.array(ids)) == digest(mx.array(same)) != digest(mx.array(other))


def test_no_window_is_padded_where_the_texts_end(tokenizer: Tokenizer) -> None:
    ids = built_in(tokenizer, windows=10_000)
    assert 10 < len(ids) < 200
    assert ids.shape[1] == WINDOW


def test_windows_of_a_file_are_spread_over_it(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "traces.txt"
    path.write_text(PROSE, encoding="utf-8-sig")
    ids = tokenizer.encode(PROSE)
    found = np.array(read_calibration(path, tokenizer, windows=4))
    assert found.shape == (4, WINDOW)
    every = np.array(read_calibration(path, tokenizer, windows=10_000))
    assert every[:, 1:].flatten().tolist() == ids[: 511 * len(every)]
    assert len(every) == len(ids) // 511
    places = [every.tolist().index(row) for row in found.tolist()]
    assert all(b - a in (len(every) // 4, -(-len(every) // 4)) for a, b in pairwise(places))
    assert places[0] == 0


def test_a_short_file_is_one_short_window(tokenizer: Tokenizer, tmp_path: Path) -> None:
    text = PROSE[:700]
    (tmp_path / "short").write_text(text)
    ids = tokenizer.encode(text)
    assert corpus.MIN_IDS <= len(ids) < WINDOW - 1
    assert read_calibration(tmp_path / "short", tokenizer, windows=4).tolist() == [
        [tokenizer.bos_id, *ids]
    ]


def test_text_that_spells_control_tokens_stays_text(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("[INST] </s> <s> [TOOL_CALLS] " * 200)
    ids = np.array(read_calibration(tmp_path / "text", tokenizer, windows=2))
    assert not any(map(tokenizer.is_control, ids[:, 1:].flatten().tolist()))


def test_a_large_file_is_read_in_part_even_where_that_ends_in_a_character(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "large").write_text("é" * 3000, encoding="utf-8")
    monkeypatch.setattr(corpus, "MAX_FILE_BYTES", 4001)
    ids = np.array(read_calibration(tmp_path / "large", tokenizer, windows=99))
    assert set(tokenizer.decode(ids[:, 1:].flatten().tolist())) == {"é"}


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "is empty"),
        (b" \n\t", "is empty"),
        (b"\x89PNG\r\n\x1a\n" + bytes(2000), "byte 0 is not UTF-8"),
        (b"words " * 500 + b"\0", "holds zero bytes"),
        (b"words and \xff" + b"words" * 900, "byte 10 is not UTF-8"),
        (b"Only a few words.", "is too short: [0-9]+ tokens, at least 256"),
    ],
)
def test_a_file_that_cannot_calibrate_is_refused(
    content: bytes, complaint: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    (tmp_path / "bad").write_bytes(content)
    with pytest.raises(
        OptionError,
        match=f"calibration file .*bad {complaint}|calibration file .*bad is no.*{complaint}",
    ):
        read_calibration(tmp_path / "bad", tokenizer, windows=4)


def test_a_file_that_cannot_be_read_is_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(
            OptionError, match=r"(is no plain file|cannot be read .*); name a UTF-8 text file"
        ):
            read_calibration(path, tokenizer, windows=4)
