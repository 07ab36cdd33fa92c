"""Replies of the embedded model in 4 bit: text, usage, limits and log-probabilities."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

import magistral_mlx as mm
from magistral_mlx.generation import reply as reply_module
from magistral_mlx.generation.decoding import Token

GREEDY = mm.SamplingParams(temperature=0)
QUESTION = "What is 48 + 76?"


def collect(stream: mm.Stream[mm.Segment, mm.Reply]) -> tuple[list[mm.Segment], mm.Reply]:
    return list(stream), stream.result()


def texts(segments: list[mm.Segment]) -> list[mm.Text]:
    return [segment for segment in segments if isinstance(segment, mm.Text)]


def joined(segments: list[mm.Segment], kind: str) -> str:
    return "".join(text.text for text in texts(segments) if text.kind == kind)


def test_it_reasons_and_answers(magistral: mm.Magistral) -> None:
    reply = magistral.ask(QUESTION, GREEDY)
    assert "124" in reply.answer
    assert "8+6=14" in reply.reasoning
    assert "think>" not in reply.reasoning + reply.answer
    assert (reply.finish_reason, reply.reasoning_closed_by, reply.tool_calls) == (
        "stop",
        "model",
        (),
    )


def test_a_stream_is_the_reply_in_pieces(magistral: mm.Magistral) -> None:
    sampling = mm.SamplingParams(seed=3)
    segments, reply = collect(magistral.stream(QUESTION, sampling))
    for kind in ("reasoning", "answer"):
        assert joined(segments, kind) == getattr(reply, kind)
    again = magistral.ask(QUESTION, sampling)
    assert (again.reasoning, again.answer) == (reply.reasoning, reply.answer)


def test_usage_counts(magistral: mm.Magistral) -> None:
    prompt = magistral.tokenizer.encode_chat(QUESTION)
    usage = magistral.ask(QUESTION, GREEDY).usage
    assert (usage.prompt_tokens, usage.cached_tokens) == (len(prompt), 0)
    assert (
        usage.forward_passes == 1 + usage.completion_tokens + 1
    )  # the prompt, each id, the stop id looked past
    assert 0 < usage.reasoning_tokens < usage.completion_tokens
    assert usage.max_tokens == magistral.plan.context - len(prompt)
    assert usage.peak_memory_bytes > 0


@pytest.mark.slow
def test_a_second_request_prefills_only_what_differs(magistral: mm.Magistral) -> None:
    fresh = magistral.ask(QUESTION, GREEDY)
    again = magistral.ask(QUESTION, GREEDY)
    assert again.usage.cached_tokens == again.usage.prompt_tokens - 1
    other = magistral.ask("What is 48 + 77?", GREEDY)
    assert 0 < other.usage.cached_tokens < other.usage.prompt_tokens - 1
    assert (again.reasoning, again.answer) == (fresh.reasoning, fresh.answer)
    magistral.prefix_cache.clear()
    assert magistral.ask("What is 48 + 77?", GREEDY).reasoning == other.reasoning


@pytest.mark.parametrize("read", [0, 1, 2, 9, pytest.param(30, marks=pytest.mark.slow)])
def test_a_stream_closed_anywhere_leaves_the_model_usable(
    magistral: mm.Magistral, read: int
) -> None:
    expected = magistral.ask(QUESTION, GREEDY)
    magistral.prefix_cache.clear()
    stream = magistral.stream("How many r's are in strawberry?", GREEDY)
    for _ in range(read):
        next(stream)
    stream.close()
    reply = magistral.ask(QUESTION, GREEDY)
    assert (reply.reasoning, reply.answer) == (expected.reasoning, expected.answer)


def test_an_older_stream_cannot_go_on_with_a_newer_ones_cache(magistral: mm.Magistral) -> None:
    expected = magistral.ask(QUESTION, GREEDY)
    old = magistral.stream("How many r's are in strawberry?", GREEDY)
    next(old)
    newer = magistral.stream(QUESTION, GREEDY)
    next(newer)
    with pytest.raises(mm.OptionError, match="newer reply"):
        list(old)
    _, reply = collect(newer)
    assert expected.reasoning.endswith(reply.reasoning)


@pytest.mark.parametrize(
    ("message", "error"),
    [("[metal::malloc] Out of memory", mm.MemoryLimitError), ("the device hung", RuntimeError)],
)
def test_a_device_error_drops_the_cache_and_leaves_the_model_usable(
    magistral: mm.Magistral, monkeypatch: pytest.MonkeyPatch, message: str, error: type[Exception]
) -> None:
    expected = magistral.ask(QUESTION, GREEDY)

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError(message)

    with monkeypatch.context() as patch:
        patch.setattr(magistral.model, "logits", fail)
        with pytest.raises(error):
            magistral.ask("What is 1 + 1?", GREEDY)
    again = magistral.ask(QUESTION, GREEDY)
    assert (again.answer, again.usage.cached_tokens) == (expected.answer, 0)


def test_what_does_not_fit_is_refused_before_any_pass(
    magistral: mm.Magistral, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_pass(*_: object) -> None:
        raise AssertionError("the model ran")

    monkeypatch.setattr(magistral.model, "hidden", no_pass)
    with pytest.raises(mm.ContextError, match=r"max_tokens is .*, but the prompt"):
        magistral.stream(QUESTION, mm.SamplingParams(max_tokens=magistral.plan.context))
    with pytest.raises(mm.ContextError, match="shorten it"):
        magistral.ask("1 + 1 " * 2000)
    with pytest.raises(mm.OptionError, match="at least 1"):
        magistral.sample(QUESTION, n=0)


def test_a_reply_never_grows_past_the_context() -> None:
    small = mm.load("demo", max_kv_size=64)
    with pytest.raises(mm.ContextError, match="leaves 15 of the context of 64 for the reply"):
        small.ask(QUESTION, GREEDY)
    reply = small.ask(QUESTION, replace(GREEDY, max_tokens=15))
    assert reply.finish_reason == "length"
    assert reply.usage.prompt_tokens + reply.usage.completion_tokens == 64
    assert reply.answer == ""
    assert reply.reasoning_closed_by is None


@pytest.mark.parametrize("budget", [3, 10, 20])
def test_a_thinking_budget_always_yields_a_closed_trace_and_an_answer(
    magistral: mm.Magistral, budget: int
) -> None:
    free = magistral.ask(QUESTION, GREEDY)
    reply = magistral.ask(QUESTION, replace(GREEDY, think_budget=budget))
    assert reply.reasoning_closed_by == "budget"
    assert free.reasoning.startswith(reply.reasoning)
    assert reply.answer.strip()
    assert "think>" not in reply.answer


def test_no_thinking_is_a_budget_of_zero(magistral: mm.Magistral) -> None:
    reply = magistral.ask(QUESTION, replace(GREEDY, think_budget=0))
    assert reply.reasoning == ""
    assert reply.answer.strip()
    assert (reply.reasoning_closed_by, reply.usage.reasoning_tokens) == ("budget", 0)


def test_stop_strings_end_the_answer_not_the_trace(magistral: mm.Magistral) -> None:
    whole = magistral.ask(QUESTION, GREEDY)
    stop = whole.answer[5:9]
    reply = magistral.ask(QUESTION, replace(GREEDY, stop=(stop, "\n")))
    assert reply.reasoning == whole.reasoning
    assert reply.answer == whole.answer[: whole.answer.index(stop)]
    assert reply.finish_reason == "stop"


@pytest.mark.parametrize("think_budget", [None, 12])
def test_logprobs_are_the_best_of_every_distribution(
    magistral: mm.Magistral, think_budget: int | None
) -> None:
    """Compare with the log-probabilities of one pass without a cache, in float64."""
    sampling = mm.SamplingParams(seed=5, logprobs=4, max_tokens=40, think_budget=think_budget)
    segments, reply = collect(magistral.stream(QUESTION, sampling))
    found = [best for text in texts(segments) for best in text.logprobs]
    assert len(found) == reply.usage.completion_tokens
    prompt, ids = reply.usage.prompt_tokens, magistral.prefix_cache.ids
    logits = np.array(magistral.model(mx.array([ids]))[0, prompt - 1 :], dtype=np.float64)
    expected = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    drawn = [i for i, best in enumerate(found[: len(expected)]) if best]
    closing = len(found[: len(expected)]) - len(drawn)
    assert closing == (
        0 if think_budget is None else len(magistral.tokenizer.closing(reply.reasoning))
    )
    for i in drawn:
        ordered = np.argsort(-expected[i], kind="stable")[:4]
        assert list(found[i]) == ordered.tolist()
        np.testing.assert_allclose(list(found[i].values()), expected[i][ordered], atol=2e-5)


def test_no_logprobs_are_taken_unless_asked(
    magistral: mm.Magistral, monkeypatch: pytest.MonkeyPatch
) -> None:
    def not_asked(*_: object) -> None:
        raise AssertionError("log-probabilities were taken")

    monkeypatch.setattr(reply_module, "top_logprobs", not_asked)
    segments, _ = collect(magistral.stream(QUESTION, GREEDY))
    assert not any(text.logprobs for text in texts(segments))


def test_progress_while_a_long_prompt_is_read() -> None:
    slow = mm.load("demo", prefill_step_size=16)
    segments, reply = collect(slow.stream(QUESTION, GREEDY))
    tokens = reply.usage.prompt_tokens
    assert [s for s in segments if isinstance(s, mm.Progress)] == [
        mm.Progress(n, tokens) for n in range(16, tokens, 16)
    ]
    assert reply.usage.forward_passes == -(-tokens // 16) + reply.usage.completion_tokens + 1


def test_tool_calls_come_from_control_ids_only(magistral: mm.Magistral) -> None:
    """Build the reply from given ids: the demo calls no tools."""
    from magistral_mlx.generation.reply import ReplyBuilder, Usage

    t = magistral.tokenizer
    spelled = t.encode('<think>\n[TOOL_CALLS]f[ARGS]{}\n</think>\n[TOOL_CALLS]g[ARGS]{"x": 1}')
    control = [t.tool_calls_id, *t.encode("add"), 32, *t.encode('{"a": 1}')]
    usage = Usage(0, 0, 0, 0, 0, 0.0, 0.0, 0, 0, 0)

    def reply(ids: list[int]) -> mm.Reply:
        builder = ReplyBuilder(t, GREEDY, 100)
        for identity in ids:
            builder.push(Token(identity, mx.zeros((1, 1))))
        builder.flush()
        return builder.reply("stop", usage)

    assert reply(spelled).tool_calls == ()
    assert "[TOOL_CALLS]g" in reply(spelled).answer
    called = reply([*spelled, *control])
    assert [(c.name, c.arguments) for c in called.tool_calls] == [("add", {"a": 1})]
    assert called.finish_reason == "tool_calls"
    assert "add" not in called.answer
    inside = reply([*t.encode("<think>\nhm"), *control])
    assert inside.tool_calls == ()
