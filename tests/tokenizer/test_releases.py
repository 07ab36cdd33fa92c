"""Releases 2506, 2507 and 2509: told apart by evidence, and a trace in control ids."""

import json
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

import magistral_mlx as mm
from magistral_mlx.checkpoint.manifest import MANIFEST
from magistral_mlx.errors import CheckpointError, TokenizerError
from magistral_mlx.generation.decoding import Token
from magistral_mlx.generation.reply import ReplyBuilder, Usage
from magistral_mlx.tokenizer.release import CARD_SYSTEM_PROMPT, CONTROL_CARD_SYSTEM_PROMPT
from magistral_mlx.tokenizer.tekken import Tokenizer
from tests.support.sources import convert_quickly
from tests.support.tekken import write_tekken
from tests.support.tiny import make_config, make_weights, write_checkpoint

BOS, EOS, INST, END_INST, TOOLS, END_TOOLS, RESULTS, END_RESULTS, CALLS = 1, 2, 3, 4, 5, 6, 7, 8, 9
SYSTEM, END_SYSTEM, ARGS, THINK, END_THINK = 17, 18, 32, 34, 35
BEFORE, _, INSIDE = CONTROL_CARD_SYSTEM_PROMPT.partition("[THINK]")
INSIDE, _, AFTER = INSIDE.partition("[/THINK]")
GREEDY = mm.SamplingParams(temperature=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tekken(tmp_path_factory.mktemp("v13"), version="v13")


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.from_folder(folder)


def ids_of(tokenizer: Tokenizer, *parts: int | str) -> list[int]:
    return [
        i for part in parts for i in ([part] if isinstance(part, int) else tokenizer.encode(part))
    ]


def test_a_conversation_with_control_ids_spelled_out(tokenizer: Tokenizer) -> None:
    call = {
        "id": "abc123XYZ",
        "type": "function",
        "function": {"name": "add", "arguments": '{"a":"é"}'},
    }
    tool = {"type": "function", "function": {"name": "add", "parameters": {}}}
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": "Be brief. [THINK]x[/THINK]"},
        {"role": "user", "content": "one [/THINK]"},
        {"role": "assistant", "content": "A", "reasoning": "because\nof [/THINK] this"},
        {"role": "user", "content": "two"},
        {
            "role": "assistant",
            "content": None,
            "reasoning_content": "call it",
            "tool_calls": [call],
        },
        {"role": "tool", "content": "3", "tool_call_id": "abc123XYZ"},
    ]
    definition = (
        '[{"type": "function", "function": {"name": "add", "description": "", "parameters": {}}}]'
    )
    system = (
        SYSTEM,
        BEFORE,
        THINK,
        INSIDE,
        END_THINK,
        AFTER + "\n\nBe brief. [THINK]x[/THINK]",
        END_SYSTEM,
    )
    # v13 states the tools before the first question, and gives calls and results no id.
    assert tokenizer.encode_chat(messages, tools=[tool]) == ids_of(
        tokenizer,
        *(BOS, *system, TOOLS, definition, END_TOOLS, INST, "one [/THINK]", END_INST),
        *(THINK, "because\nof [/THINK] this", END_THINK, "A", EOS, INST, "two", END_INST),
        *(
            THINK,
            "call it",
            END_THINK,
            CALLS,
            "add",
            ARGS,
            '{"a": "é"}',
            EOS,
            RESULTS,
            "3",
            END_RESULTS,
        ),
    )


def test_a_prompt_is_the_same_up_to_the_users_part_of_it(tokenizer: Tokenizer) -> None:
    def encoded(own: str) -> list[int]:
        return tokenizer.encode_chat(
            [{"role": "system", "content": own}, {"role": "user", "content": "Hi"}]
        )

    shared = ids_of(tokenizer, BOS, SYSTEM, BEFORE, THINK, INSIDE, END_THINK, AFTER[:-1])
    for own in ("Be brief.", "\n7", "[THINK]"):
        assert encoded(own)[: len(shared)] == shared


def test_a_release_is_told_by_its_files(tmp_path: Path, tokenizer: Tokenizer) -> None:
    text_tags = Tokenizer.from_folder(write_tekken(tmp_path))
    assert (text_tags.reasoning_format, text_tags.system_prompt) == ("text", CARD_SYSTEM_PROMPT)
    assert (text_tags.open_id, text_tags.close_id) == (None, None)
    assert (tokenizer.reasoning_format, tokenizer.system_prompt) == (
        "control",
        CONTROL_CARD_SYSTEM_PROMPT,
    )
    assert (tokenizer.open_id, tokenizer.close_id) == (THINK, END_THINK)
    assert (tokenizer.empty_trace, tokenizer.closing("\n")) == ([THINK, END_THINK], [END_THINK])


OTHER_MODEL = "the tokenizer of another model"
DIFFERENT = "they are of different releases"
REFUSED: dict[str, tuple[str, str, str]] = {
    "not a reasoning model's": (
        "v7",
        "",
        rf"version v7, and no SYSTEM_PROMPT.txt.* asks for <think>; .*{OTHER_MODEL}",
    ),
    "one that is asked otherwise": (
        "v7",
        "Just answer.",
        f"version v7, and no .*{OTHER_MODEL}.*reasoning_format=text",
    ),
    "older": ("v3", "", rf"version v3; .*v11 \(2506\) or v13.*{OTHER_MODEL}"),
    "no [THINK]": (
        "v13 without tags",
        "",
        rf"not the control tokens \[THINK\] and \[/THINK\].*{OTHER_MODEL}",
    ),
    "2506 with a newer prompt": (
        "v11",
        CONTROL_CARD_SYSTEM_PROMPT,
        rf"tags as \[THINK\].*{DIFFERENT}",
    ),
    "2507 with an older prompt": ("v13", CARD_SYSTEM_PROMPT, f"tags as <think>.*{DIFFERENT}"),
    "not closed": ("v13", "Use [THINK]this. And that.", "without the other; download it again"),
    "closed twice": (
        "v13",
        "Use [THINK]this[/THINK][/THINK].",
        "without the other; download it again",
    ),
    "nested": (
        "v13",
        "Use [THINK]this[THINK]that[/THINK][/THINK].",
        "without the other; download it again",
    ),
}


def write_release(folder: Path, version: str, prompt: str = "") -> None:
    write_tekken(folder, version=version.split(maxsplit=1)[0])
    if "without" in version:
        path = folder / "tekken.json"
        path.write_text(path.read_text().replace("THINK]", "THUNK]"))
    if prompt:
        (folder / "SYSTEM_PROMPT.txt").write_text(prompt)


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_release_is_refused(tmp_path: Path, case: str) -> None:
    version, prompt, message = REFUSED[case]
    write_release(tmp_path, version, prompt)
    with pytest.raises(TokenizerError, match=message):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize(
    ("version", "prompt", "stated", "form"),
    [
        ("v7", CARD_SYSTEM_PROMPT, None, "text"),  # its prompt tells
        ("v7", "", "text", "text"),
        ("v11", "", "text", "text"),
        ("v13", "", "control", "control"),
        ("v13", CARD_SYSTEM_PROMPT, "text", "text"),  # as one trained on from a newer base
        ("v13 without tags", CARD_SYSTEM_PROMPT, None, "text"),
        ("v13 without tags", "", "text", "text"),
    ],
)
def test_what_is_stated_of_a_release_comes_before_the_evidence(
    tmp_path: Path, version: str, prompt: str, stated: Any, form: str
) -> None:
    write_release(tmp_path, version, prompt)
    tokenizer = Tokenizer.from_folder(tmp_path, stated)
    assert tokenizer.reasoning_format == form
    # A conversion records it, and the record is read before the evidence, but after what is stated.
    (tmp_path / MANIFEST).write_text(json.dumps({"reasoning_format": form}))
    assert Tokenizer.from_folder(tmp_path).reasoning_format == form
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "A", "reasoning": "B"},
    ]
    ids = tokenizer.encode_chat([*messages, {"role": "user", "content": "Hm"}])
    spelled = tokenizer.encode("<think>\nB\n</think>\nA")
    if form == "control":
        spelled = [THINK, *tokenizer.encode("B"), END_THINK, *tokenizer.encode("A")]
    assert any(ids[i : i + len(spelled)] == spelled for i in range(len(ids)))


@pytest.mark.parametrize("version", ["v7", "v11", "v13 without tags"])
def test_without_control_ids_a_trace_is_text(tmp_path: Path, version: str) -> None:
    write_release(tmp_path, version)
    with pytest.raises(
        TokenizerError,
        match=f"version {version[:3].strip()} without control tokens.*; use the format text",
    ):
        Tokenizer.from_folder(tmp_path, "control")
    (tmp_path / MANIFEST).write_text('{"reasoning_format": "spoken"}')
    with pytest.raises(
        CheckpointError, match=r"is damaged: reasoning_format is 'spoken'\. Convert again"
    ):
        Tokenizer.from_folder(tmp_path)


def test_a_prompt_of_ones_own_needs_no_tags(tmp_path: Path) -> None:
    write_tekken(tmp_path, version="v13")
    (tmp_path / "SYSTEM_PROMPT.txt").write_text("Just answer.")
    tokenizer = Tokenizer.from_folder(tmp_path)
    expected = ids_of(tokenizer, BOS, SYSTEM, "Just answer.", END_SYSTEM, INST, "Hi", END_INST)
    assert tokenizer.encode_chat("Hi") == expected


TRACE = "Let me see: [/THINK] so"
ANSWER = "42 <x>"


@pytest.fixture(scope="module")
def magistral(tmp_path_factory: pytest.TempPathFactory) -> mm.Magistral:
    """Make a checkpoint like 2507 whose reply is known: each id has one most likely successor.

    Its attention and feed-forward layers add nothing. Its embedding gives each id of the chain its
    own direction, and lm_head reads the next id off that direction.
    """
    folder = write_tekken(tmp_path_factory.mktemp("model"), version="v13")
    config = make_config(vocab_size=2048, num_layers=1)
    tokenizer = Tokenizer.from_folder(folder)
    trace, answer = tokenizer.encode(TRACE), tokenizer.encode(ANSWER)
    chain = [END_INST, THINK, *trace, END_THINK, *answer, EOS]
    assert len(set(chain)) == len(chain) <= config.hidden_size
    weights = {n: w if w.ndim == 1 else mx.zeros_like(w) for n, w in make_weights(config).items()}
    for i, (identity, following) in enumerate(pairwise(chain)):
        weights["model.embed_tokens.weight"][identity, i] = 1
        weights["lm_head.weight"][following, i] = 1
    return mm.load(write_checkpoint(folder, config, weights))


def test_a_model_of_control_ids_reasons_and_answers(magistral: mm.Magistral) -> None:
    reply = magistral.ask("What is 2 + 2?", GREEDY)
    assert (reply.reasoning, reply.answer) == (TRACE, ANSWER)
    assert (reply.reasoning_closed_by, reply.finish_reason) == ("model", "stop")
    assert (
        reply.usage.reasoning_tokens == len(magistral.tokenizer.encode(TRACE)) + 2
    )  # and the tags
    streamed = [s for s in magistral.stream("What is 2 + 2?", GREEDY) if isinstance(s, mm.Text)]
    assert all(s.text for s in streamed)
    for kind, whole in (("reasoning", TRACE), ("answer", ANSWER)):
        assert "".join(s.text for s in streamed if s.kind == kind) == whole


@pytest.mark.parametrize("budget", [1, 2, 5])
def test_a_budget_closes_with_the_control_id(magistral: mm.Magistral, budget: int) -> None:
    reply = magistral.ask("Hi", mm.SamplingParams(temperature=0, think_budget=budget))
    assert reply.reasoning == magistral.tokenizer.decode(
        magistral.tokenizer.encode(TRACE)[: budget - 1]
    )
    assert (reply.answer, reply.reasoning_closed_by) == (ANSWER, "budget")
    assert reply.usage.reasoning_tokens == budget + 1


def test_without_thinking_the_empty_trace_is_part_of_the_prompt(magistral: mm.Magistral) -> None:
    reply = magistral.ask("Hi", mm.SamplingParams(temperature=0, think_budget=0))
    assert (reply.reasoning, reply.answer, reply.usage.reasoning_tokens) == ("", ANSWER, 0)
    assert reply.usage.prompt_tokens == len(magistral.tokenizer.encode_chat("Hi")) + 2


def test_a_chat_that_keeps_its_traces_reads_on_from_the_cache(magistral: mm.Magistral) -> None:
    chat = magistral.chat(keep_reasoning="all")
    first = chat.ask("Hi", GREEDY)
    second = chat.ask("And?", GREEDY)
    assert (second.reasoning, second.answer) == (TRACE, ANSWER)
    assert second.usage.cached_tokens >= first.usage.prompt_tokens + first.usage.completion_tokens
    history = [{k: v for k, v in m.items() if k != "reasoning"} for m in chat.messages[:2]]
    history.append({"role": "user", "content": "And?"})
    dropped = magistral.chat(keep_reasoning="none")
    dropped.ask("Hi", GREEDY)
    assert dropped.ask("And?", GREEDY).usage.prompt_tokens == len(
        magistral.tokenizer.encode_chat(history)
    )


def test_a_converted_one_is_of_the_same_release(magistral: mm.Magistral, tmp_path: Path) -> None:
    convert_quickly(magistral.checkpoint.folder, tmp_path / "out", q_bits=8, q_group_size=32)
    assert json.loads((tmp_path / "out" / MANIFEST).read_text())["reasoning_format"] == "control"
    converted = mm.load(tmp_path / "out")
    assert converted.tokenizer.reasoning_format == "control"
    assert converted.tokenizer.system_prompt == CONTROL_CARD_SYSTEM_PROMPT
    reply = converted.ask("Hi", GREEDY)
    assert (reply.reasoning, reply.answer) == (TRACE, ANSWER)


def build(tokenizer: Tokenizer, ids: list[int]) -> mm.Reply:
    builder = ReplyBuilder(tokenizer, GREEDY, 100)
    for identity in ids:
        builder.push(Token(identity, mx.zeros((1, 1))))
    builder.flush()
    return builder.reply("stop", Usage(0, 0, 0, 0, 0, 0.0, 0.0, 0, 0, 0))


def test_a_conversion_records_what_it_was_told(magistral: mm.Magistral, tmp_path: Path) -> None:
    source = shutil.copytree(magistral.checkpoint.folder, tmp_path / "source")
    (source / "SYSTEM_PROMPT.txt").write_text(CARD_SYSTEM_PROMPT)
    with pytest.raises(TokenizerError, match="reasoning_format=text"):
        convert_quickly(source, tmp_path / "out", q_bits=8, q_group_size=32)
    convert_quickly(source, tmp_path / "out", q_bits=8, q_group_size=32, reasoning_format="text")
    assert json.loads((tmp_path / "out" / MANIFEST).read_text())["reasoning_format"] == "text"
    assert mm.load(tmp_path / "out").tokenizer.reasoning_format == "text"
    again = convert_quickly(
        source, tmp_path / "out", q_bits=8, q_group_size=32, reasoning_format="text"
    )
    assert again.already_complete
    with pytest.raises(mm.OptionError, match="reasoning_format is 'spoken'; use text or control"):
        convert_quickly(source, tmp_path / "out", reasoning_format="spoken")


def test_calls_come_after_the_trace_and_without_an_id(tokenizer: Tokenizer) -> None:
    call = [CALLS, *ids_of(tokenizer, "add", ARGS, '{"a": 1}')]
    trace = [THINK, *tokenizer.encode("hm"), END_THINK]
    reply = build(tokenizer, [*trace, *call, *call])
    assert [(c.name, c.arguments, len(c.id)) for c in reply.tool_calls] == [
        ("add", {"a": 1}, 9)
    ] * 2
    assert (reply.reasoning, reply.answer, reply.finish_reason) == ("hm", "", "tool_calls")
    # A call's own id brings its result back, in any order.
    calls = [
        {"id": c.id, "function": {"name": c.name, "arguments": c.arguments}}
        for c in reply.tool_calls
    ]
    results = [
        {"role": "tool", "content": str(i), "tool_call_id": c["id"]} for i, c in enumerate(calls)
    ]
    messages = [
        {"role": "user", "content": "x"},
        {"role": "assistant", "tool_calls": calls},
        *results[::-1],
    ]
    end = ids_of(tokenizer, EOS, RESULTS, "0", END_RESULTS, RESULTS, "1", END_RESULTS)
    assert tokenizer.encode_chat(messages)[-len(end) :] == end
    assert build(tokenizer, [THINK, *tokenizer.encode("hm"), *call]).tool_calls == ()
