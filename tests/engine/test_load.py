"""The library on the embedded model in 4 bit, as a user calls it."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

import magistral_mlx as mm
from magistral_mlx.engine.chat import KeepReasoning
from magistral_mlx.engine.load import loading
from magistral_mlx.generation import reply as reply_module
from magistral_mlx.generation.decoding import Token
from magistral_mlx.generation.reply import vote
from tests.support.tiny import DEMO

GREEDY = mm.SamplingParams(temperature=0)
QUESTION = "What is 48 + 76?"


@pytest.fixture(scope="module")
def loaded() -> mm.Magistral:
    return mm.load("demo")


@pytest.fixture
def magistral(loaded: mm.Magistral) -> Iterator[mm.Magistral]:
    """Return the demo with an empty prefix cache, so that no test sees another's."""
    loaded.prefix_cache.clear()
    yield loaded
    loaded.prefix_cache.clear()


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
    with pytest.raises(mm.ContextError, match="has room for"):
        magistral.stream(QUESTION, mm.SamplingParams(max_tokens=magistral.plan.context))
    with pytest.raises(mm.ContextError, match="shorten it"):
        magistral.ask("1 + 1 " * 2000)
    with pytest.raises(mm.OptionError, match="at least one"):
        magistral.sample(QUESTION, n=0)


def test_a_reply_never_grows_past_the_context() -> None:
    small = mm.load("demo", max_kv_size=64)
    with pytest.raises(mm.ContextError, match="leaves 15 for the reply"):
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


def test_samples_are_the_single_replies_with_those_seeds(magistral: mm.Magistral) -> None:
    samples = magistral.sample(QUESTION, mm.SamplingParams(temperature=1.5, seed=7), n=3)
    assert [r.usage.seed for r in samples.replies] == [7, 8, 9]
    for reply in samples.replies:
        single = magistral.ask(QUESTION, mm.SamplingParams(temperature=1.5, seed=reply.usage.seed))
        assert (single.reasoning, single.answer) == (reply.reasoning, reply.answer)
    keys = [vote(r.answer) for r in samples.replies]
    assert samples.votes == {k: keys.count(k) for k in keys if k}
    assert vote(samples.majority) == max(samples.votes, key=lambda k: samples.votes[k])


@pytest.mark.parametrize(
    ("answer", "key"),
    [
        ("It is **1,234**.", "1,234"),
        ("From 3 to -7", "-7"),
        ("3.50", "3.50"),
        ("Yes,  it IS.", "yes it is"),
        ("", ""),
    ],
)
def test_votes(answer: str, key: str) -> None:
    assert vote(answer) == key


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


@pytest.mark.parametrize("keep", ["all", "last", "none"])
@pytest.mark.slow
def test_a_chat_keeps_or_drops_traces(magistral: mm.Magistral, keep: KeepReasoning) -> None:
    chat = magistral.chat(keep_reasoning=keep, system_prompt="Be brief.")
    first, second = chat.ask(QUESTION, GREEDY), chat.ask("What is 7 * 8?", GREEDY)
    third = chat.ask("What is 90 - 13?", GREEDY)
    kept = {"all": (True, True), "last": (False, True), "none": (False, False)}[keep]
    messages: list[dict[str, str]] = [{"role": "system", "content": "Be brief."}]
    for reply, question, is_kept in zip(
        (first, second), (QUESTION, "What is 7 * 8?"), kept, strict=True
    ):
        answer = {"role": "assistant", "content": reply.answer}
        messages += [
            {"role": "user", "content": question},
            answer | ({"reasoning": reply.reasoning} if is_kept else {}),
        ]
    messages.append({"role": "user", "content": "What is 90 - 13?"})
    magistral.prefix_cache.clear()
    fresh = magistral.ask(messages, GREEDY)
    assert (fresh.answer, fresh.usage.prompt_tokens) == (third.answer, third.usage.prompt_tokens)
    assert third.usage.cached_tokens > 0


def test_a_turn_cut_off_before_its_answer_keeps_its_trace(magistral: mm.Magistral) -> None:
    chat = magistral.chat(keep_reasoning="none")
    cut = chat.ask(QUESTION, replace(GREEDY, max_tokens=12))
    assert (cut.answer, cut.finish_reason) == ("", "length")
    assert chat.ask("What is 7 * 8?", GREEDY).answer
    assert [m["role"] for m in chat.messages] == ["user", "assistant"] * 2


def test_a_turn_closed_early_leaves_no_trace(magistral: mm.Magistral) -> None:
    chat = magistral.chat()
    stream = chat.stream(QUESTION)
    next(stream)
    stream.close()
    assert chat.messages == []


def test_a_chat_is_saved_and_resumed_with_its_cache(
    magistral: mm.Magistral, tmp_path: Path
) -> None:
    chat = magistral.chat(keep_reasoning="all")
    chat.ask(QUESTION, GREEDY)
    chat.save(tmp_path / "chat.cache")
    expected = chat.ask("What is 7 * 8?", GREEDY)
    magistral.prefix_cache.clear()
    resumed = magistral.resume(tmp_path / "chat.cache").ask("What is 7 * 8?", GREEDY)
    assert (resumed.reasoning, resumed.answer) == (expected.reasoning, expected.answer)
    assert resumed.usage.cached_tokens == expected.usage.cached_tokens > 0


def test_a_prompt_cache_file_is_reused_and_belongs_to_its_checkpoint(
    magistral: mm.Magistral, tmp_path: Path
) -> None:
    file = tmp_path / "prompt.cache"
    first = magistral.ask(QUESTION, GREEDY, prompt_cache_file=file)
    magistral.prefix_cache.clear()
    again = magistral.ask(QUESTION, GREEDY, prompt_cache_file=file)
    assert again.usage.cached_tokens == first.usage.prompt_tokens - 1
    assert again.reasoning == first.reasoning
    with pytest.raises(mm.OptionError, match="no conversation"):
        magistral.resume(file)
    with pytest.raises(mm.OptionError, match="no such prompt cache"):
        magistral.resume(tmp_path / "none")
    with pytest.raises(mm.OptionError, match="kv_bits"):
        mm.load("demo", kv_bits=8).ask(QUESTION, prompt_cache_file=file)
    with pytest.raises(mm.OptionError, match="fingerprint"):
        mm.load(DEMO).ask(QUESTION, prompt_cache_file=file)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(mm.CheckpointError, match="cut short"):
        magistral.ask(QUESTION, prompt_cache_file=file)


def test_a_single_reply_never_overwrites_a_conversation(
    magistral: mm.Magistral, tmp_path: Path
) -> None:
    chat = magistral.chat()
    chat.ask(QUESTION, GREEDY)
    chat.save(tmp_path / "talk")
    before = (tmp_path / "talk").read_bytes()
    for ask in (magistral.ask, magistral.stream, partial(magistral.sample, n=2)):
        with pytest.raises(
            mm.OptionError, match="talk holds a conversation, which a single reply would overwrite"
        ):
            ask(QUESTION, GREEDY, prompt_cache_file=tmp_path / "talk")
    assert (tmp_path / "talk").read_bytes() == before
    assert magistral.resume(tmp_path / "talk").messages == chat.messages


def test_a_cache_that_could_not_be_written_is_refused_before_the_reply(
    magistral: mm.Magistral, tmp_path: Path
) -> None:
    with pytest.raises(mm.OptionError, match="no prompt cache can be written there"):
        magistral.stream(QUESTION, prompt_cache_file=tmp_path / "none" / "c")


WRONG_TYPES: dict[str, Callable[[mm.Magistral], object]] = {
    "a model that is a list": lambda _: mm.load(["demo"]),  # type: ignore[arg-type]
    "no model": lambda _: mm.load(""),
    "a revision of the demo": lambda _: mm.load("demo", revision="main"),
    "a revision that is a number": lambda _: mm.load("demo", revision=3),  # type: ignore[arg-type]
    "a draft that is a list": lambda _: mm.load("demo", draft_model=["demo"]),  # type: ignore[arg-type]
    "a context that is text": lambda _: mm.load("demo", max_kv_size="x"),  # type: ignore[arg-type]
    "half a position": lambda _: mm.load("demo", max_kv_size=1.5),  # type: ignore[arg-type]
    "half an id a pass": lambda _: mm.load("demo", prefill_step_size=1.5),  # type: ignore[arg-type]
    "memory that is text": lambda _: mm.load("demo", memory_gb="x"),  # type: ignore[arg-type]
    "memory that is a truth": lambda _: mm.load("demo", memory_gb=True),
    "no question": lambda m: m.ask(None),  # type: ignore[arg-type]
    "sampling that is text": lambda m: m.ask(QUESTION, "x"),  # type: ignore[arg-type]
    "sampling that is a table": lambda m: m.ask(QUESTION, {}),  # type: ignore[arg-type]
    "a chat asked with a number": lambda m: m.chat().ask(5),  # type: ignore[arg-type]
    "a chat asked with messages": lambda m: m.chat().ask([{"role": "user", "content": "x"}]),  # type: ignore[arg-type]
    "a system prompt that is a number": lambda m: m.chat(system_prompt=5),  # type: ignore[arg-type]
    "tools that are text": lambda m: m.chat(tools="x"),  # type: ignore[arg-type]
    "a tool that is nothing": lambda m: m.chat(tools=[{}]),
    "a path that is a number": lambda m: m.chat().save(5),  # type: ignore[arg-type]
    "a path with a zero byte": lambda m: m.resume("a\0b"),
    "a cache that is a list": lambda m: m.ask(QUESTION, prompt_cache_file=["c"]),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("case", WRONG_TYPES)
def test_what_is_of_no_use_is_an_option_error(magistral: mm.Magistral, case: str) -> None:
    with pytest.raises(mm.OptionError):
        WRONG_TYPES[case](magistral)


@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantized_cache_is_smaller_and_survives_a_file(bits: int, tmp_path: Path) -> None:
    plain, packed = mm.load("demo", max_kv_size=512), mm.load("demo", max_kv_size=512, kv_bits=bits)
    plain.ask(QUESTION, GREEDY)
    first = packed.ask(QUESTION, GREEDY, prompt_cache_file=tmp_path / "c")
    # float32 here: 64 values take 256 bytes, or 8 * bits and two float32
    assert packed.prefix_cache.cache.nbytes / plain.prefix_cache.cache.nbytes == pytest.approx(
        (8 * bits + 8) / 256
    )
    packed.prefix_cache.clear()
    assert packed.ask(QUESTION, GREEDY, prompt_cache_file=tmp_path / "c").answer == first.answer


def test_loading_reports_bytes_and_checks_the_vocabulary(tmp_path: Path) -> None:
    steps = list(loading("demo"))
    assert steps[-1].done == steps[-1].total > 0
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in (f for f in DEMO.iterdir() if f.suffix in (".json", ".safetensors")):
        (broken / file.name).write_bytes(file.read_bytes())
    tekken = json.loads((broken / "tekken.json").read_text())
    tekken["config"]["default_vocab_size"] -= 1
    tekken["vocab"].pop()
    (broken / "tekken.json").write_text(json.dumps(tekken))
    with pytest.raises(mm.MagistralError, match="2047"):
        mm.load(broken)


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
