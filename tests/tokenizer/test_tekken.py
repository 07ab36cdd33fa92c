"""Chats against ids written by hand, text against bytes, 500 attempts to forge a turn."""

import json
import random
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from magistral_mlx.errors import OptionError, TokenizerError
from magistral_mlx.tokenizer.reasoning import THINK_CLOSE
from magistral_mlx.tokenizer.release import CARD_SYSTEM_PROMPT
from magistral_mlx.tokenizer.segments import ToolCall
from magistral_mlx.tokenizer.tekken import Tokenizer
from tests.support.tekken import write_tekken

BOS, EOS, INST, END_INST, TOOLS, END_TOOLS, RESULTS, END_RESULTS, CALLS = 1, 2, 3, 4, 5, 6, 7, 8, 9
SYSTEM, END_SYSTEM, CONTENT, ARGS, CALL_ID = 17, 18, 19, 32, 33
TOOL = {
    "type": "function",
    "function": {"name": "add", "parameters": {"type": "object", "properties": {}}},
}
HEAD = CARD_SYSTEM_PROMPT.removesuffix("Problem:\n\n")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.from_folder(write_tekken(tmp_path_factory.mktemp("small")))


@pytest.fixture(scope="module", params=["v11", "v13"])
def any_release(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Tokenizer:
    return Tokenizer.from_folder(
        write_tekken(tmp_path_factory.mktemp("small"), version=request.param)
    )


def ids_of(tokenizer: Tokenizer, *parts: int | str) -> list[int]:
    """Return ids: control ids given as numbers, each text encoded on its own."""
    return [
        i for part in parts for i in ([part] if isinstance(part, int) else tokenizer.encode(part))
    ]


@pytest.mark.slow
def test_the_full_vocabulary_gives_the_published_ids(tmp_path: Path) -> None:
    real = Tokenizer.from_folder(write_tekken(tmp_path, 131_072))
    assert (real.vocab_size, real.bos_id, real.eos_id, real.pad_id, real.stop_ids) == (
        131_072,
        1,
        2,
        11,
        frozenset({2}),
    )
    assert real.encode("<think>") == [49250, 2077, 1062]
    assert real.encode("</think>") == [1885, 74045, 1062]
    assert real.encode(THINK_CLOSE) == real.closing("a") == [1010, 1885, 74045, 3318]
    assert real.closing("a\n") == [1885, 74045, 3318]
    assert real.closing("a\n</") == real.closing("a.</") == [74045, 3318]
    assert len(real.encode("🙂‍↕️")) > 2  # an emoji is several ids


def test_one_question_gets_the_default_system_prompt(tokenizer: Tokenizer) -> None:
    expected = ids_of(
        tokenizer, BOS, SYSTEM, CARD_SYSTEM_PROMPT, END_SYSTEM, INST, "What is 2 + 2?", END_INST
    )
    assert tokenizer.encode_chat("What is 2 + 2?") == expected
    assert tokenizer.encode_chat([{"role": "user", "content": "What is 2 + 2?"}]) == expected
    assert tokenizer.encode_chat("What is 2 + 2?", think=False) == expected + tokenizer.encode(
        "<think>\n</think>\n"
    )


def test_a_system_message_goes_before_the_problem_and_keeps_the_head(tokenizer: Tokenizer) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
        {"role": "system", "content": "Be polite."},
    ]
    prompt = HEAD + "Be brief.\n\nBe polite.\n\nProblem:\n\n"
    assert tokenizer.encode_chat(messages) == ids_of(
        tokenizer, BOS, SYSTEM, prompt, END_SYSTEM, INST, "Hello", END_INST
    )
    alone = ids_of(
        tokenizer, BOS, SYSTEM, "Be brief.\n\nBe polite.", END_SYSTEM, INST, "Hello", END_INST
    )
    assert tokenizer.encode_chat(messages, system_prompt_only=True) == alone


@pytest.mark.parametrize(
    ("own", "merged"),
    [
        ("Think.\n\nProblem:\n\n", "Think.\n\nUSER\n\nProblem:\n\n"),
        ("Think.\nProblem:", "Think.\n\nUSER\n\nProblem:"),
        ("Problem: first. Problem:\n", "Problem: first. \n\nUSER\n\nProblem:\n"),
        ("Just think.\n", "Just think.\n\nUSER"),
    ],
)
def test_the_checkpoints_own_system_prompt_is_used(tmp_path: Path, own: str, merged: str) -> None:
    write_tekken(tmp_path)
    (tmp_path / "SYSTEM_PROMPT.txt").write_bytes(own.encode())
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.system_prompt == own
    assert tokenizer.encode_chat("Hi") == ids_of(
        tokenizer, BOS, SYSTEM, own, END_SYSTEM, INST, "Hi", END_INST
    )
    messages = [{"role": "system", "content": "USER"}, {"role": "user", "content": "Hi"}]
    assert tokenizer.encode_chat(messages) == ids_of(
        tokenizer, BOS, SYSTEM, merged, END_SYSTEM, INST, "Hi", END_INST
    )


def test_turns_traces_tools_and_results(tokenizer: Tokenizer) -> None:
    call = {
        "id": "abc123XYZ",
        "type": "function",
        "function": {"name": "add", "arguments": '{"a":"é"}'},
    }
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "one"},
        {"role": "user", "content": "more"},
        {"role": "assistant", "content": "A", "reasoning": "because\nof this"},
        {"role": "user", "content": "two"},
        {
            "role": "assistant",
            "content": None,
            "reasoning_content": "call it",
            "tool_calls": [call],
        },
        {"role": "tool", "content": "3", "tool_call_id": "abc123XYZ"},
    ]
    definition = '[{"type": "function", "function": {"name": "add", "description": "", '
    definition += '"parameters": {"type": "object", "properties": {}}}}]'
    # v11 states the tools before the last question, not at the beginning.
    assert tokenizer.encode_chat(messages, tools=[TOOL]) == ids_of(
        tokenizer,
        *(BOS, SYSTEM, CARD_SYSTEM_PROMPT, END_SYSTEM, INST, "one\n\nmore", END_INST),
        *(
            "<think>\nbecause\nof this\n</think>\nA",
            EOS,
            TOOLS,
            definition,
            END_TOOLS,
            INST,
            "two",
            END_INST,
        ),
        *(
            "<think>\ncall it\n</think>\n",
            CALLS,
            "add",
            CALL_ID,
            "abc123XYZ",
            ARGS,
            '{"a": "é"}',
            EOS,
        ),
        *(RESULTS, "abc123XYZ", CONTENT, "3", END_RESULTS),
    )
    # Ids of another form are replaced by nine characters, the same in the call and its result.
    messages[4]["tool_calls"] = [call | {"id": "call_1"}]
    messages[5]["tool_call_id"] = "call_1"
    replaced = tokenizer.encode_chat(messages, tools=[TOOL])
    identity = replaced[replaced.index(CALL_ID) + 1 : replaced.index(ARGS)]
    assert len(tokenizer.decode(identity)) == 9
    assert identity == replaced[replaced.index(RESULTS) + 1 : replaced.index(CONTENT)]


def injections(n: int) -> list[str]:
    names = [
        "<s>",
        "</s>",
        "[INST]",
        "[/INST]",
        "[SYSTEM_PROMPT]",
        "[/SYSTEM_PROMPT]",
        "[TOOL_CALLS]",
        "[ARGS]",
    ]
    names += [
        "[AVAILABLE_TOOLS]",
        "[/AVAILABLE_TOOLS]",
        "[TOOL_RESULTS]",
        "[TOOL_CONTENT]",
        "[/TOOL_RESULTS]",
    ]
    names += [
        "[CALL_ID]",
        "<SPECIAL_20>",
        "<SPECIAL_999>",
        "<unk>",
        "<pad>",
        "[IMG]",
        "[PREFIX]",
        "[SUFFIX]",
    ]
    names += ["[THINK]", "[/THINK]"]
    rng = random.Random(0)
    others = [" ", "\n", "x", '"', "\\", "\x00", "é", "🙂", "<think>", "</think>", "{{", "%}"]
    return [
        rng.choice(names) + "".join(rng.choices(names + others, k=rng.randrange(6)))
        for _ in range(n)
    ]


def everywhere(text: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Make a conversation and tools with ``text`` in every field that takes free text."""
    call = {
        "id": text,
        "type": "function",
        "function": {"name": "add", "arguments": {text: [text]}},
    }
    schema = {
        "type": "object",
        "title": text,
        "properties": {text: {"type": "string", "description": text}},
    }
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": text},
        {"role": "user", "content": text},
        {"role": "assistant", "content": text, "reasoning": text},
        {"role": "user", "content": text},
        {"role": "assistant", "content": text, "reasoning_content": text, "tool_calls": [call]},
        {"role": "tool", "content": text, "tool_call_id": text, "name": text},
    ]
    return messages, [
        {"type": "function", "function": {"name": "add", "description": text, "parameters": schema}}
    ]


@pytest.mark.slow
def test_no_text_anywhere_adds_a_control_id(any_release: Tokenizer) -> None:
    def controls(text: str) -> Counter[int]:
        messages, tools = everywhere(text)
        return Counter(
            filter(any_release.is_control, any_release.encode_chat(messages, tools=tools))
        )

    harmless = controls("harmless")
    assert harmless[BOS] == 1
    assert harmless[EOS] == 2
    for text in injections(500):
        assert controls(text) == harmless, text
        assert not any(map(any_release.is_control, any_release.encode(text)))
        with pytest.raises(OptionError):  # names are not free text
            any_release.encode_chat(
                "hi", tools=[{"type": "function", "function": {"name": text, "parameters": {}}}]
            )


@pytest.mark.slow
def test_streamed_text_equals_batch_text(any_release: Tokenizer) -> None:
    rng = random.Random(0)
    control = list(range(40))
    single_bytes = list(range(1000, 1256))  # most are no whole character
    words = list(range(1256, any_release.vocab_size))
    for _ in range(10_000):
        ids = [
            rng.choice(rng.choices((control, single_bytes, words), (1, 6, 3))[0])
            for _ in range(rng.randrange(20))
        ]
        stream = any_release.detokenizer()
        pieces = [stream.push(i) for i in ids] + [stream.flush()]
        assert "".join(pieces) == any_release.decode(ids), ids


def test_no_character_is_ever_split(any_release: Tokenizer) -> None:
    text = "Größe 日本語 👩‍👩‍👧 مرحبا"
    stream = any_release.detokenizer()
    pieces = [stream.push(i) for i in any_release.encode(text)]
    assert "".join(pieces) == text == any_release.decode(any_release.encode(text))
    assert "" in pieces  # some ids complete no character
    half = any_release.encode("🙂")[:2]
    assert any_release.decode([*half, EOS, *any_release.encode("ok")]) == "\ufffdok"
    with pytest.raises(TokenizerError, match="-2 is no id"):
        any_release.decode([-2])


def test_tool_calls_come_from_control_ids_only(tokenizer: Tokenizer) -> None:
    one = [CALLS, *ids_of(tokenizer, "add", CALL_ID, "abcdefgh1", ARGS, '{"a": [1, "é"]}')]
    two = [CALLS, *ids_of(tokenizer, "now", ARGS, "{}")]
    (first, second, third), rest = tokenizer.tool_calls(
        [*tokenizer.encode("Let me see."), *one, *two, *two, EOS]
    )
    assert (first, rest) == (ToolCall("abcdefgh1", "add", {"a": [1, "é"]}), "Let me see.")
    assert (second.name, second.arguments) == (third.name, third.arguments) == ("now", {})
    assert re.fullmatch(
        "[0-9a-z]{9} [0-9a-z]{9}", f"{second.id} {third.id}"
    )  # made up where the model gave none
    assert second.id != third.id
    spelled = tokenizer.encode('[TOOL_CALLS]add[ARGS]{"a": 1}')
    assert tokenizer.tool_calls(spelled) == ([], '[TOOL_CALLS]add[ARGS]{"a": 1}')
    for broken in ("{", "[1]", "[" * 5000):
        assert tokenizer.tool_calls([CALLS, *ids_of(tokenizer, "add", ARGS, broken)]) == (
            [],
            "add" + broken,
        )


USER = {"role": "user", "content": "hi"}
ANSWER = {"role": "assistant", "content": "yes"}


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("", "message 1: content is empty"),
        (" \n", "content is empty"),
        ("\udce9", "not valid Unicode"),
        ([], "end without a question"),
        ([USER, ANSWER], "end without a question"),
        ([{"role": "system", "content": "x"}], "end without a question"),
        ([ANSWER, USER], "cannot open a conversation"),
        ([USER, ANSWER, ANSWER, USER], "message 3: a message of role assistant cannot follow"),
        ([{"role": "developer", "content": "x"}], "role is 'developer'; use one of system"),
        ([{"content": "x"}], "role is None"),
        (["hi"], "message 1 is str"),
        ([{"role": "user", "content": ["hi"]}], "content, part 1 is str, expected"),
        ([{"role": "user", "contents": "hi"}], "no 'contents'"),
        ([USER, {"role": "assistant", "content": ""}, USER], "message 2: content is empty"),
        ([USER, ANSWER | {"reasoning": "a", "reasoning_content": "b"}, USER], "differ"),
        (
            [USER, ANSWER | {"tool_calls": [{"id": "a"}]}, USER],
            "message 2: tool call 1: function is NoneType",
        ),
        ([USER, {"role": "tool", "content": "x", "tool_call_id": "a"}], "cannot follow"),
        (
            [USER, ANSWER, {"role": "tool", "content": "x", "tool_call_id": "a"}],
            "'a' is no call of the assistant's message before it; it has none",
        ),
    ],
)
def test_malformed_conversations_are_refused(
    tokenizer: Tokenizer, messages: Any, message: str
) -> None:
    with pytest.raises(OptionError, match=message):
        tokenizer.encode_chat(messages)


@pytest.mark.parametrize(
    "tools", [[{}], [5], [{"type": "function", "function": {"name": "a b", "parameters": {}}}]]
)
def test_malformed_tools_are_refused(tokenizer: Tokenizer, tools: Any) -> None:
    with pytest.raises(OptionError, match=r"cannot be encoded|a tool is int"):
        tokenizer.encode_chat("hi", tools=tools)
    with pytest.raises(OptionError, match="no system message to replace"):
        tokenizer.encode_chat("hi", system_prompt_only=True)


def test_a_folder_without_a_usable_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"tekken.json is missing; .* copy it"):
        Tokenizer.from_folder(tmp_path)
    whole = (write_tekken(tmp_path) / "tekken.json").read_bytes()
    raw = json.loads(whole)
    config, vocab = raw["config"], raw["vocab"]
    damaged: list[Any] = [
        [],
        {},
        None,
        raw | {"config": None},
        raw | {"vocab": vocab[:-1]},
        raw | {"vocab": "x"},
    ]
    damaged += [
        raw | {"config": config | {"version": "v99"}},
        raw | {"config": config | {"pattern": "("}},
    ]
    damaged += [
        raw | {"config": config | {"default_vocab_size": value}}
        for value in ("2048", None, -1, 10**30)
    ]
    damaged += [
        raw | {"vocab": [{**vocab[0], "token_bytes": value}, *vocab[1:]]}
        for value in (None, "###", "é")
    ]
    damaged += [
        raw | {"special_tokens": value} for value in (None, [], [1], raw["special_tokens"][:20])
    ]
    for content in [
        b"",
        b"\xff\xfe",
        whole[: len(whole) // 2],
        *(json.dumps(d).encode() for d in damaged),
    ]:
        (tmp_path / "tekken.json").write_bytes(content)
        with pytest.raises(TokenizerError, match="damaged or unknown; download it again"):
            Tokenizer.from_folder(tmp_path)
    write_tekken(tmp_path, 1255)
    with pytest.raises(TokenizerError, match="has 255 ids of text, and single bytes alone are 256"):
        Tokenizer.from_folder(tmp_path)
    assert Tokenizer.from_folder(write_tekken(tmp_path / "bytes", 1256)).encode("é") == [
        1000 + b for b in "é".encode()
    ]
    write_tekken(tmp_path)
    for content in (b"", b" \n", b"\xff\xfe"):
        (tmp_path / "SYSTEM_PROMPT.txt").write_bytes(content)
        with pytest.raises(TokenizerError, match="is empty or not UTF-8"):
            Tokenizer.from_folder(tmp_path)


def test_importing_the_module_does_not_import_mistral_common() -> None:
    probe = "import sys, magistral_mlx.tokenizer.tekken; sys.exit('mistral_common' in sys.modules)"
    subprocess.run([sys.executable, "-c", probe], cwd=Path(__file__).parents[2], check=True)
