"""Graders against answers made by hand, with the value that a reader takes from each."""

import pytest

from benchmarks.reasoning.grading import final_integer, final_letter
from magistral_mlx.tokenizer.reasoning import TagSplitter
from tests.support.graded_integers import INTEGERS, TRACED_INTEGERS
from tests.support.graded_letters import LETTERS, TRACED_LETTERS


def answer_of(text: str) -> str:
    splitter = TagSplitter()
    segments = [*splitter.push(text), *splitter.flush()]
    return "".join(segment.text for segment in segments if segment.kind == "answer")


def test_there_are_enough_of_them() -> None:
    every = [*INTEGERS, *LETTERS, *TRACED_INTEGERS, *TRACED_LETTERS]
    assert len({text for text, _ in every}) >= 200


@pytest.mark.parametrize(("answer", "stated"), INTEGERS)
def test_the_integer_that_is_stated(answer: str, stated: int | None) -> None:
    assert final_integer(answer) == stated


@pytest.mark.parametrize(("answer", "stated"), LETTERS)
def test_the_letter_that_is_stated(answer: str, stated: str | None) -> None:
    assert final_letter(answer) == stated


@pytest.mark.parametrize(("reply", "stated"), TRACED_INTEGERS)
def test_an_integer_in_the_trace_alone_is_not_stated(reply: str, stated: int | None) -> None:
    assert final_integer(answer_of(reply)) == stated


@pytest.mark.parametrize(("reply", "stated"), TRACED_LETTERS)
def test_a_letter_in_the_trace_alone_is_not_stated(reply: str, stated: str | None) -> None:
    assert final_letter(answer_of(reply)) == stated
