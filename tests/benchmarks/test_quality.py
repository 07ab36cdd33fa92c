"""KL against float64 over the whole vocabulary, its bounds, and the parts of a text."""

import json
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from benchmarks.__main__ import main
from benchmarks.quality import scores as quality
from benchmarks.quality.scores import Ratio, Scores, make_reference, reference_of, score
from benchmarks.quality.texts import (
    OURS,
    Texts,
    conversations,
    demo_texts,
    our_texts,
    texts_of_file,
)
from magistral_mlx.convert.calibration.corpus import BETWEEN_PARTS, BETWEEN_TEXTS, TEXTS
from magistral_mlx.errors import OptionError
from magistral_mlx.tokenizer.tekken import Tokenizer
from tests.support import reference
from tests.support.tekken import write_tekken
from tests.support.tiny import DEMO, make_config, make_weights

Write = Callable[..., Path]
CONFIG = make_config(num_layers=2)
IDS = np.random.default_rng(0).integers(3, 320, size=(3, 11))
SOME = np.random.default_rng(1).integers(-1, 2, size=(3, 10)).astype(np.int8)
TINY = Texts(mx.array(IDS, mx.int32), SOME, ("trace", "answer"))


def logprobs(weights: dict[str, mx.array]) -> reference.Array:
    """Return log-probabilities of the positions that count, in float64."""
    floats = {name: np.array(weight.astype(mx.float32)) for name, weight in weights.items()}
    logits = np.stack([reference.forward(floats, CONFIG, list(ids)) for ids in IDS])[:, :-1][
        SOME >= 0
    ]
    return (
        logits
        - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
        - logits.max(-1, keepdims=True)
    )


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_folder(DEMO)


@pytest.fixture
def pair(checkpoint_folder: Write) -> tuple[Path, Path, reference.Array, reference.Array]:
    one, other = make_weights(CONFIG, mx.bfloat16), make_weights(CONFIG, mx.bfloat16, seed=1)
    other = {name: (0.7 * one[name] + 0.3 * other[name]).astype(mx.bfloat16) for name in one}
    folders = checkpoint_folder(CONFIG, one, "one"), checkpoint_folder(CONFIG, other, "other")
    return (*folders, logprobs(one), logprobs(other))


@pytest.mark.parametrize("rows", [4, 256])
def test_scores_are_those_in_float64(
    rows: int,
    pair: tuple[Path, Path, reference.Array, reference.Array],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("benchmarks.quality.logits.ROWS", rows)
    one, other, p, q = pair
    found = score(other, TINY, make_reference(one, TINY))
    targets = IDS[:, 1:][SOME >= 0][:, None]
    assert np.allclose(found.kl, (np.exp(p) * (p - q)).sum(-1), rtol=1e-3)
    assert np.array_equal(found.kl, found.kl_upper)
    assert np.allclose(found.nll, -np.take_along_axis(q, targets, -1)[:, 0], rtol=1e-4)
    assert np.allclose(found.reference_nll, -np.take_along_axis(p, targets, -1)[:, 0], rtol=1e-4)
    assert np.array_equal(found.agrees, p.argmax(-1) == q.argmax(-1))
    assert np.array_equal(found.part, SOME[SOME >= 0])
    assert np.array_equal(found.sequence, np.nonzero(SOME >= 0)[0])
    answer = found.of_part(1).summary()
    assert answer["tokens"] == (SOME == 1).sum()
    assert answer["kl"] == pytest.approx(found.kl[found.part == 1].mean())


@pytest.mark.parametrize("kept", [1, 7, 319])
def test_what_was_not_kept_leaves_bounds_that_hold(
    kept: int,
    pair: tuple[Path, Path, reference.Array, reference.Array],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(quality, "KEPT", kept)
    one, other, p, q = pair
    made = make_reference(one, TINY)
    assert made.ids.shape[-1] == kept
    assert np.array_equal(np.array(made.ids[:, 0]), p.argmax(-1))
    found = score(other, TINY, made)
    exact = (np.exp(p) * (p - q)).sum(-1)
    assert (found.kl <= exact + 1e-5).all()
    assert (found.kl_upper >= exact - 1e-5).all()
    if kept == 319:  # one id is left, and nothing of it unknown
        assert np.allclose(found.kl, exact, rtol=1e-3)
        assert np.allclose(found.kl_upper, exact, rtol=1e-3)


@pytest.mark.parametrize("kept", [5, 2048])
def test_a_model_is_as_near_to_itself_as_can_be(
    kept: int,
    pair: tuple[Path, Path, reference.Array, reference.Array],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(quality, "KEPT", kept)
    found = score(pair[0], TINY, make_reference(pair[0], TINY))
    assert np.abs(found.kl).max() < 1e-6
    assert found.agrees.all()
    assert found.summary()["perplexity"] == pytest.approx(found.summary()["reference_perplexity"])


def test_a_reference_runs_once_and_again_where_its_file_is_damaged(
    pair: tuple[Path, Path, reference.Array, reference.Array],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = reference_of(pair[0], TINY, tmp_path / "cache")
    (file,) = (tmp_path / "cache").iterdir()
    runs = []
    monkeypatch.setattr(
        quality, "make_reference", lambda folder, texts: runs.append(folder) or made
    )
    again = reference_of(pair[0], TINY, tmp_path / "cache")
    assert not runs
    assert mx.array_equal(again.logprobs, made.logprobs)
    file.write_bytes(file.read_bytes()[:-5])
    reference_of(pair[0], TINY, tmp_path / "cache")
    reference_of(pair[1], TINY, tmp_path / "cache")
    reference_of(pair[0], Texts(TINY.ids, SOME.clip(-1, 0), TINY.names), tmp_path / "cache")
    assert runs == [pair[0], pair[1], pair[0]]
    assert len(list((tmp_path / "cache").iterdir())) == 3


def test_ratios_are_geometric_means_over_sequences() -> None:
    def scores(kl: list[float]) -> Scores:
        values, zeros = np.array(kl), np.zeros(len(kl))
        sequence = np.array([0, 0, 2, 2])  # none of sequence 1 counts
        return Scores(values, values, zeros, zeros, zeros > 0, sequence, sequence.astype(np.int8))

    ratio = Ratio.of(scores([1, 3, 2, 6]), scores([4, 4, 2, 6]))
    assert ratio.mean == pytest.approx(0.5**0.5)
    assert np.log(ratio.factor) == pytest.approx(np.std([np.log(0.5), 0], ddof=1) / 2**0.5)
    assert Ratio.of(scores([0, 0, 0, 0]), scores([1, 1, 1, 1])).mean == pytest.approx(1e-9)


def test_trace_and_answer_count_with_their_tags_and_the_question_does_not(
    tokenizer: Tokenizer,
) -> None:
    written = [("What is 2 + 2?", "2+2=4", "It is **4**."), ("Wie viel ist 1 + 1?", "2", "2")]
    texts = conversations(tokenizer, written)
    for (_, trace, answer), ids, parts in zip(
        written, np.array(texts.ids)[:, 1:], texts.parts, strict=True
    ):
        assert tokenizer.decode(ids[parts == 0].tolist()) == f"<think>\n{trace}\n</think>\n"
        assert tokenizer.decode(ids[parts == 1].tolist()) == answer
        assert ids[parts == 1][-1] in tokenizer.stop_ids


def test_control_ids_of_a_trace_are_its_own(tmp_path: Path) -> None:
    control = Tokenizer.from_folder(write_tekken(tmp_path, version="v13"), "control")
    texts = conversations(control, [("What is 2 + 2?", "2+2=4", "It is **4**.")])
    ids, parts = np.array(texts.ids)[0, 1:], texts.parts[0]
    assert (ids[parts == 0][0], ids[parts == 0][-1]) == (control.open_id, control.close_id)
    assert control.decode(ids[parts == 0].tolist()) == "2+2=4"
    assert control.decode(ids[parts == 1].tolist()) == "It is **4**."


def test_our_texts_are_no_calibration(tokenizer: Tokenizer) -> None:
    mine, theirs = (
        {
            part.strip()
            for text in path.read_text("utf-8").split(BETWEEN_TEXTS)
            for part in text.split(BETWEEN_PARTS)
        }
        for path in (OURS, TEXTS)
    )
    assert not mine & theirs
    texts = our_texts(tokenizer)
    assert len(texts.ids) == 16
    assert all((texts.parts == part).any(axis=1).all() for part in (0, 1))
    assert len(our_texts(tokenizer, most=3).ids) == 3
    assert len(demo_texts(tokenizer, 8).ids) == 8


def test_a_text_of_the_users_counts_whole_or_is_refused(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    (tmp_path / "text").write_text("A number is even if two divides it. " * 400)
    texts = texts_of_file(tmp_path / "text", tokenizer, windows=3)
    assert texts.ids.shape == (3, 512)
    assert (texts.parts == 0).all()
    (tmp_path / "text").write_text("short")
    with pytest.raises(OptionError, match=r"^the text .* is too short"):
        texts_of_file(tmp_path / "text", tokenizer, windows=3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", str(DEMO), "--q-method", "round"], "name their --q-bits"),
        (["--text", "/nowhere/text"], "cannot be read"),
        (["--q-bits", "7", "--q-method", "round"], "7"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    arguments: list[str],
    said: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("MAGISTRAL_MLX_CACHE", str(tmp_path))
    assert main(["quality", "--quick", *arguments]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.slow
def test_the_embedded_model_is_measured_from_end_to_end(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MAGISTRAL_MLX_CACHE", str(tmp_path))
    assert (
        main(
            [
                "quality",
                "--quick",
                "--model",
                str(DEMO),
                "--q-bits",
                "3",
                "--q-method",
                "round",
                "--q-method",
                "importance",
                "--json",
                str(tmp_path / "json"),
            ]
        )
        == 0
    )
    found = json.loads((tmp_path / "json").read_text())["quality"]
    itself, rounded, searched = found["candidates"]
    assert itself["parts"]["trace"]["kl"] < 1e-6 < rounded["parts"]["trace"]["kl"]
    assert [one["kl_ratio_to"] for one in found["candidates"]] == [None, None, "3 bit, round"]
    both = [searched["parts"][part]["tokens"] for part in ("trace", "answer", "all")]
    assert both[0] + both[1] == both[2]
    assert searched["parts"]["all"]["kl_ratio"]["mean"] < 0.65
    assert itself["answers"]["problems"] == 3
    assert "3 bit, round" in capsys.readouterr().out
