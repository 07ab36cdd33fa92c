"""The library as a person calls it: keywords, what is printed, and help."""

import pydoc
from dataclasses import fields

import pytest

import magistral_mlx as mm
from magistral_mlx.model.load_options import LoadOptions

QUESTION = "What is 48 + 76?"
SHORT = mm.SamplingParams(temperature=0.2, seed=3, max_tokens=6)


def said(reply: mm.Reply) -> tuple[str, str, int]:
    return reply.reasoning, reply.answer, reply.usage.seed


def test_the_fields_of_the_sampling_are_keywords(magistral: mm.Magistral) -> None:
    expected = said(magistral.ask(QUESTION, SHORT))
    given = {"temperature": 0.2, "seed": 3, "max_tokens": 6}
    assert said(magistral.ask(QUESTION, temperature=0.2, seed=3, max_tokens=6)) == expected
    assert said(magistral.ask(QUESTION, None, **given)) == expected  # type: ignore[arg-type]
    assert said(magistral.stream(QUESTION, **given).result()) == expected  # type: ignore[arg-type]
    assert said(magistral.chat().ask(QUESTION, **given)) == expected  # type: ignore[arg-type]
    samples = magistral.sample(QUESTION, n=2, **given)  # type: ignore[arg-type]
    assert said(samples.replies[0]) == expected
    with pytest.raises(mm.OptionError, match="temperature is -1"):
        magistral.ask(QUESTION, temperature=-1)


def test_a_system_prompt_is_a_system_message(magistral: mm.Magistral) -> None:
    asked = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": QUESTION}]
    expected = magistral.ask(asked, SHORT)
    for messages in (QUESTION, asked[1:]):
        found = magistral.ask(messages, SHORT, system_prompt="Be brief.")
        assert said(found) == said(expected)
        assert found.usage.prompt_tokens == expected.usage.prompt_tokens
    with pytest.raises(mm.OptionError):
        magistral.ask(QUESTION, system_prompt=5)  # type: ignore[arg-type]


@pytest.mark.parametrize("how", ["ask", "stream", "sample", "stream_samples"])
def test_keywords_and_a_sampling_are_not_mixed(magistral: mm.Magistral, how: str) -> None:
    count = {"n": 2} if "sample" in how else {}
    with pytest.raises(mm.OptionError, match="both sampling and top_p"):
        getattr(magistral, how)(QUESTION, SHORT, top_p=0.95, **count)
    with pytest.raises(mm.OptionError, match="both sampling and top_p"):
        getattr(magistral, how)(QUESTION, sampling=SHORT, top_p=0.95, **count)


def test_a_wrong_keyword_is_named_with_the_right_one(magistral: mm.Magistral) -> None:
    with pytest.raises(TypeError, match=r"ask\(\) has no keyword 'temp'; did you mean temperature"):
        magistral.ask(QUESTION, temp=0.2)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match=r"load\(\) .*'kv_bit'; did you mean kv_bits"):
        mm.load("demo", kv_bit=8)  # type: ignore[call-arg]


def test_a_wrong_number_of_arguments_names_the_call(magistral: mm.Magistral) -> None:
    with pytest.raises(TypeError, match=r"^load\(\): too many positional arguments"):
        mm.load("demo", "8")  # type: ignore[call-arg]
    with pytest.raises(TypeError, match=r"^ask\(\): missing a required argument: 'messages'"):
        magistral.ask()  # type: ignore[call-arg]


def test_what_is_printed(magistral: mm.Magistral) -> None:
    chat = magistral.chat()
    reply = chat.ask(QUESTION, temperature=0, think_budget=8)
    assert str(reply) == reply.answer != ""
    assert repr(reply).startswith(f"Reply(answer={reply.answer!r}, reasoning=<")
    assert len(repr(reply)) < 200
    samples = magistral.sample(QUESTION, n=2, max_tokens=2)
    assert str(samples) == samples.majority
    assert "<2 replies>" in repr(samples)
    assert "demo" in repr(magistral)
    assert "tokens cached" in repr(magistral)
    assert repr(chat) == "Chat(<turns: 1>, keep_reasoning='none')"
    stream = magistral.stream(QUESTION, SHORT)
    assert "open" in repr(stream)
    stream.close()
    assert "ended without a result" in repr(stream)


def test_a_reply_has_the_logprobs_of_its_tokens(magistral: mm.Magistral) -> None:
    reply = magistral.ask(QUESTION, logprobs=2, temperature=0, max_tokens=5)
    assert [len(found) for found in reply.logprobs] == [2] * 5
    assert magistral.ask(QUESTION, max_tokens=2).logprobs == ()


@pytest.mark.parametrize(
    "cls", [mm.SamplingParams, LoadOptions, mm.Reply, mm.Usage, mm.Samples, mm.Text, mm.ToolCall]
)
def test_help_explains_every_field(cls: type) -> None:
    shown = cls.__doc__ or ""
    missing = [found.name for found in fields(cls) if f"{found.name}: " not in shown]
    assert not missing
    assert shown.count("Attributes:") == 1


def test_help_of_a_call_explains_every_keyword() -> None:
    shown = pydoc.plain(pydoc.render_doc(mm.Magistral.ask))
    for name in ("messages", "sampling", "tools", "prompt_cache_file", "temperature", "logprobs"):
        assert f"{name}: " in shown
    assert shown.index("Args:") < shown.index("Raises:")
    assert "messages: " in pydoc.plain(pydoc.render_doc(mm.Chat))
