"""Conversations of any system become mistral-common's ids, and never a forged control id."""

import copy
import hashlib
import random
from pathlib import Path
from typing import Any

import pytest
from mistral_common.protocol.instruct.chunk import ImageURLChunk, TextChunk, ThinkChunk
from mistral_common.protocol.instruct.messages import AssistantMessage, ToolMessage, UserMessage
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.protocol.instruct.tool_calls import FunctionCall, Tool, ToolCall

from magistral_mlx.errors import OptionError
from magistral_mlx.tokenizer.release import CARD_SYSTEM_PROMPT, CONTROL_CARD_SYSTEM_PROMPT
from magistral_mlx.tokenizer.tekken import Tokenizer
from tests.support.conversations import conversations
from tests.support.oracle import AFTER, BEFORE, INSIDE, Oracle
from tests.support.tekken import write_tekken

VERSIONS = ("v7", "v11", "v13")
BOS, EOS, INST, END_INST, DEFINED, END_DEFINED, RESULTS, END_RESULTS, CALLS = (
    1,
    2,
    3,
    4,
    5,
    6,
    7,
    8,
    9,
)
SYSTEM, END_SYSTEM, CONTENT, ARGS, CALL_ID, THINK, END_THINK = 17, 18, 19, 32, 33, 34, 35


def opened(folder: Path, version: str) -> Tokenizer:
    write_tekken(folder, version=version)
    (folder / "SYSTEM_PROMPT.txt").write_text(
        CONTROL_CARD_SYSTEM_PROMPT if version == "v13" else CARD_SYSTEM_PROMPT
    )
    return Tokenizer.from_folder(folder)


@pytest.fixture(scope="module", params=VERSIONS)
def both(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Tokenizer, Oracle]:
    """Return our tokenizer and mistral-common's, of one version."""
    folder = tmp_path_factory.mktemp("tekken")
    return opened(folder, request.param), Oracle(folder, request.param)


def test_ids_are_mistral_commons_for_300_conversations(both: tuple[Tokenizer, Oracle]) -> None:
    ours, theirs = both
    for messages, options in conversations(300):
        expected = theirs.ids(
            messages, tools=options["tools"], own_only=options["system_prompt_only"]
        )
        if not options["think"]:
            expected += (
                [THINK, END_THINK]
                if theirs.version == "v13"
                else ours.encode("<think>\n</think>\n")
            )
        assert ours.encode_chat(messages, **options) == expected, messages


def in_parts(text: str) -> list[Any]:
    return [{"type": "text", "text": text}]


def foreign(message: dict[str, Any], rng: random.Random) -> Any:
    """Write the same message as another system does."""
    message = copy.deepcopy(message)
    role, content = message["role"], message["content"]
    trace = message.get("reasoning") or message.get("reasoning_content") or ""
    for call in message.get("tool_calls", ()):
        call |= {"type": "function", "index": None}
    if role == "system":
        return message | {"content": [TextChunk(text=content)]}
    if role == "user":
        return rng.choice(
            [
                message | {"content": in_parts(content)},
                UserMessage(content=[TextChunk(text=content)]),
            ]
        )
    if role == "tool":
        result = {"tool_call_id": message["tool_call_id"]}
        return rng.choice(
            [message | {"content": in_parts(content)}, ToolMessage(content=content, **result)]
        )
    calls = [
        ToolCall(id=c["id"], function=FunctionCall(**c["function"]))
        for c in message.get("tool_calls", ())
    ]
    chunks: list[Any] = [ThinkChunk(thinking=trace)] if trace else []
    cut = rng.randrange(len(trace) + 1)
    api: list[Any] = [
        {"type": "thinking", "thinking": [*in_parts(trace[:cut]), *in_parts(trace[cut:])]}
    ]
    return rng.choice(
        [
            AssistantMessage(
                content=[*chunks, TextChunk(text=content or "")], tool_calls=calls or None
            ),
            {
                "role": role,
                "content": [*(api if trace else []), *in_parts(content or "")],
                "tool_calls": calls,
            },
            {
                "role": role,
                "content": content,
                "reasoning_content": trace,
                "refusal": None,
                "tool_calls": calls,
            },
        ]
    )


def test_messages_of_other_systems_give_the_same_ids(both: tuple[Tokenizer, Oracle]) -> None:
    ours, _ = both
    rng = random.Random(0)
    for messages, options in conversations(150):
        tools = [Tool.from_openai(tool) for tool in options["tools"] or ()]
        theirs = [foreign(message, rng) for message in messages]
        assert ours.encode_chat(theirs, **options | {"tools": tools}) == ours.encode_chat(
            messages, **options
        ), theirs


def test_parts_are_joined_as_mistral_common_joins_them(both: tuple[Tokenizer, Oracle]) -> None:
    ours, theirs = both
    user = [TextChunk(text="one"), TextChunk(text=""), TextChunk(text="two ")]
    answer = [
        ThinkChunk(thinking="hm"),
        ThinkChunk(thinking="so"),
        TextChunk(text="a "),
        TextChunk(text="b "),
    ]
    made = [
        theirs.system([], False),
        UserMessage(content=user),
        AssistantMessage(content=answer),
        UserMessage(content="x"),
    ]
    if theirs.version != "v13":  # which encodes no thinking: flattened, as the model card shows
        made[2] = AssistantMessage(content="<think>\nhm\nso\n</think>\na \n\nb ")
    expected = theirs.tokenizer.encode_chat_completion(ChatCompletionRequest(messages=made)).tokens
    messages: list[Any] = [
        {"role": "user", "content": user},
        AssistantMessage(content=answer),
        {"role": "user", "content": "x"},
    ]
    assert ours.encode_chat(messages) == expected


def test_the_default_prompt_sent_by_a_client_is_not_doubled(both: tuple[Tokenizer, Oracle]) -> None:
    """Many clients send SYSTEM_PROMPT.txt, or the chunks that the model card makes of it."""
    ours, theirs = both
    user = {"role": "user", "content": "Hi"}
    forms: list[Any] = [ours.system_prompt, f"\n{ours.system_prompt}", in_parts(ours.system_prompt)]
    if theirs.version == "v13":
        forms.append([TextChunk(text=BEFORE), ThinkChunk(thinking=INSIDE), TextChunk(text=AFTER)])
    for form in forms:
        system = {"role": "system", "content": form}
        assert ours.encode_chat([system, user]) == ours.encode_chat([user])
        assert ours.encode_chat([system, user], system_prompt_only=True) == ours.encode_chat([user])
        brief = {"role": "system", "content": "Be brief."}
        assert ours.encode_chat([system, brief, user]) == ours.encode_chat([brief, user])


def test_thinking_that_a_system_message_shows(both: tuple[Tokenizer, Oracle]) -> None:
    ours, _ = both
    system = {
        "role": "system",
        "content": [
            *in_parts("Write: "),
            {"type": "thinking", "thinking": "this"},
            *in_parts("Then."),
        ],
    }
    found = ours.encode_chat([system, {"role": "user", "content": "Hi"}], system_prompt_only=True)
    text = ours.encode("Write: <think>\nthis\n</think>\nThen.")
    if ours.reasoning_format == "control":
        text = [
            *ours.encode("Write: "),
            THINK,
            *ours.encode("this"),
            END_THINK,
            *ours.encode("Then."),
        ]
    assert found == [BOS, SYSTEM, *text, END_SYSTEM, INST, *ours.encode("Hi"), END_INST]


USER, ANSWER = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}
CALL = {"id": "call_1", "function": {"name": "add", "arguments": "{}"}}
CALLING = {"role": "assistant", "tool_calls": [CALL]}
RESULT = {"role": "tool", "content": "3", "tool_call_id": "call_1"}
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}
REFUSED: dict[str, tuple[list[Any], str]] = {
    "image": (
        [{"role": "user", "content": [*in_parts("See:"), IMAGE]}],
        "content, part 2 is of type 'image_url', and only text",
    ),
    "image chunk": (
        [UserMessage(content=[ImageURLChunk(image_url="https://x.y/z.png")])],
        "type.*image_url.* only text can",
    ),
    "audio": (
        [{"role": "user", "content": [{"type": "input_audio"}]}],
        "only text can be read here; leave it out",
    ),
    "no type": ([{"role": "user", "content": [{"text": "x"}]}], "is of type None"),
    "no text": ([{"role": "user", "content": [{"type": "text"}]}], "part 1: text is NoneType"),
    "bytes": ([{"role": "user", "content": b"x"}], "content is bytes, expected text or a list"),
    "empty parts": ([{"role": "user", "content": []}], "content is empty"),
    "a user thinks": (
        [{"role": "user", "content": [{"type": "thinking", "thinking": "x"}]}],
        "only text can be read",
    ),
    "no thinking": (
        [USER, {"role": "assistant", "content": [{"type": "thinking"}]}],
        "has no thinking",
    ),
    "thinking about an image": (
        [USER, {"role": "assistant", "content": [{"type": "thinking", "thinking": [IMAGE]}]}],
        "thinking, part 1 is of type 'image_url'",
    ),
    "thinking last": (
        [USER, ANSWER | {"content": [*in_parts("a"), {"type": "thinking", "thinking": "b"}]}, USER],
        "thinking after text; the trace comes before the answer",
    ),
    "an open trace": (
        [USER, AssistantMessage(content=[ThinkChunk(thinking="a", closed=False)])],
        "not closed",
    ),
    "two traces": (
        [
            USER,
            {
                "role": "assistant",
                "content": [{"type": "thinking", "thinking": "a"}],
                "reasoning": "b",
            },
            USER,
        ],
        "message 2: its reasoning, reasoning_content and thinking differ",
    ),
    "a prefix": ([USER, AssistantMessage(content="a", prefix=True)], "have no 'prefix'"),
    "calls that are no list": (
        [USER, {"role": "assistant", "tool_calls": CALL}],
        "tool_calls is dict",
    ),
    "a call without an id": (
        [USER, {"role": "assistant", "tool_calls": [CALL | {"id": None}]}],
        "id is None",
    ),
    "the id null": (
        [
            USER,
            AssistantMessage(
                tool_calls=[ToolCall(function=FunctionCall(name="a", arguments="{}"))]
            ),
        ],
        "'null'",
    ),
    "a name": (
        [USER, {"role": "assistant", "tool_calls": [CALL | {"function": {"name": "a b"}}]}],
        "name is 'a b'",
    ),
    "two calls of one id": (
        [USER, {"role": "assistant", "tool_calls": [CALL, CALL]}],
        "two tool calls have the id 'call_1'",
    ),
    "no result": (
        [USER, CALLING, USER],
        "message 3: the tool call 'call_1' has no result; put a message of role tool",
    ),
    "no result at the end": (
        [USER, CALLING],
        "the end of the messages: the tool call 'call_1' has no result",
    ),
    "another result": (
        [USER, CALLING, RESULT | {"tool_call_id": "call_2"}],
        "'call_2' is no call .*its ids are 'call_1'",
    ),
    "two results": (
        [USER, CALLING, RESULT, RESULT],
        "message 4: the call 'call_1' has a result already",
    ),
    "a result of an older call": (
        [USER, CALLING, RESULT, ANSWER, USER, ANSWER, RESULT],
        "it has none",
    ),
}
for wrong in (
    "[]",
    "{",
    "1",
    '{"a": NaN}',
    '{"a": 1e999}',
    '{"a": "\\ud800"}',
    [1],
    {"a": float("inf")},
    {1: {2}},
):
    call = CALL | {"function": {"name": "add", "arguments": wrong}}
    REFUSED[f"arguments {wrong}"] = (
        [USER, {"role": "assistant", "tool_calls": [call]}],
        "arguments are",
    )


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_read_is_refused(both: tuple[Tokenizer, Oracle], case: str) -> None:
    messages, message = REFUSED[case]
    with pytest.raises(OptionError, match=message):
        both[0].encode_chat(messages)


def calling(*ids: str) -> dict[str, Any]:
    return {"role": "assistant", "tool_calls": [CALL | {"id": identity} for identity in ids]}


def results(*ids: str) -> list[dict[str, Any]]:
    return [
        {"role": "tool", "content": f"<{n}>", "tool_call_id": identity}
        for n, identity in enumerate(ids)
    ]


def test_ids_of_calls_have_nine_characters_there_and_back(both: tuple[Tokenizer, Oracle]) -> None:
    ours, theirs = both
    nine = hashlib.sha256(b"call_1").hexdigest()[:9]
    messages = [USER, calling("call_1", "abcdefghi"), *results("abcdefghi", "call_1")]
    native = [USER, calling(nine, "abcdefghi"), *results("abcdefghi", nine)]
    assert ours.encode_chat(messages) == ours.encode_chat(native) == theirs.ids(native)
    # A result may name its call by either of its ids.
    assert ours.encode_chat([USER, calling("call_1"), *results(nine)]) == ours.encode_chat(
        [USER, calling(nine), *results(nine)]
    )
    # Where a hash is another call's id, the two stay apart, and each result goes to its own call.
    for ids in (("call_1", nine), (nine, "call_1")):
        other = hashlib.sha256(b"call_1 1").hexdigest()[:9]
        apart = tuple(other if identity == "call_1" else nine for identity in ids)
        assert ours.encode_chat([USER, calling(*ids), *results(*ids)]) == theirs.ids(
            [USER, calling(*apart), *results(*apart)]
        )
    # Calls without arguments are written in three ways.
    for none in ("", None, "{}"):
        call = {"id": nine, "function": {"name": "add", "arguments": none}}
        made = [USER, {"role": "assistant", "content": None, "tool_calls": [call]}, *results(nine)]
        assert ours.encode_chat(made) == theirs.ids([USER, calling(nine), *results(nine)])


NAMES = [
    "<s>",
    "</s>",
    "[INST]",
    "[/INST]",
    "[SYSTEM_PROMPT]",
    "[/SYSTEM_PROMPT]",
    "[TOOL_CALLS]",
    "[ARGS]",
    "[CALL_ID]",
]
NAMES += [
    "[AVAILABLE_TOOLS]",
    "[/AVAILABLE_TOOLS]",
    "[TOOL_RESULTS]",
    "[TOOL_CONTENT]",
    "[/TOOL_RESULTS]",
    "[THINK]",
]
NAMES += [
    "[/THINK]",
    "<SPECIAL_20>",
    "<unk>",
    "<pad>",
    "[IMG]",
    "[PREFIX]",
    "[SUFFIX]",
    "<think>",
    "</think>",
]
OTHERS = [" ", "\n", "x", '"', "\\", "\x00", "é", "🙂", "{{", "%}", "1"]


def fuzzed(rng: random.Random) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None]:
    """Make a conversation full of spelled control tokens, and its tools."""

    def text() -> str:
        return rng.choice(NAMES) + "".join(rng.choices(NAMES + OTHERS, k=rng.randrange(5)))

    def content() -> Any:
        return rng.choice([text(), in_parts(text())])

    schema = {
        "type": "object",
        "title": text(),
        "properties": {text(): {"type": "string", "description": text()}},
    }
    function = {"name": "add", "description": text(), "parameters": schema}
    messages: list[dict[str, Any]] = (
        [{"role": "system", "content": content()}] if rng.random() < 0.5 else []
    )
    for _ in range(rng.randrange(2)):
        answer = {"role": "assistant", "content": content()}
        messages += [
            {"role": "user", "content": content()},
            answer | rng.choice([{}, {"reasoning": text()}]),
        ]
    messages.append({"role": "user", "content": content()})
    for _ in range(rng.randrange(2)):
        calls = [
            {"id": f"{n}{text()}", "function": {"name": "add", "arguments": {text(): [text()]}}}
            for n in range(2)
        ][: rng.randrange(1, 3)]
        messages.append(
            {
                "role": "assistant",
                "content": content(),
                "reasoning_content": text(),
                "tool_calls": calls,
            }
        )
        answers = [
            {"role": "tool", "content": content(), "tool_call_id": c["id"], "name": text()}
            for c in calls
        ]
        messages += rng.sample(answers, len(answers))
    return messages, rng.choice([None, [{"type": "function", "function": function}]])


def structure(messages: list[dict[str, Any]], tools: Any, version: str) -> list[int]:
    """Return the control ids of a conversation in their order, which its text cannot change."""
    users = [i for i, message in enumerate(messages) if message["role"] == "user"]
    states_tools = users[0 if version == "v13" else -1] if tools else None
    controls = [BOS, SYSTEM, *([THINK, END_THINK] if version == "v13" else []), END_SYSTEM]
    for i, message in enumerate(messages):
        if message["role"] == "user":
            controls += [*([DEFINED, END_DEFINED] if i == states_tools else []), INST, END_INST]
        elif message["role"] == "tool":
            controls += [RESULTS, *([] if version == "v13" else [CONTENT]), END_RESULTS]
        elif message["role"] == "assistant":
            has_trace, calls = (
                "reasoning" in str(message.keys()),
                len(message.get("tool_calls", ())),
            )
            controls += [THINK, END_THINK] if has_trace and version == "v13" else []
            controls += {
                "v7": [CALLS] * (calls > 0),
                "v11": [CALLS, CALL_ID, ARGS] * calls,
                "v13": [CALLS, ARGS] * calls,
            }[version]
            controls.append(EOS)
    return controls


@pytest.mark.parametrize("n", [500, pytest.param(5000, marks=pytest.mark.slow)])
def test_no_text_of_a_conversation_adds_a_control_id(
    both: tuple[Tokenizer, Oracle], n: int
) -> None:
    ours, theirs = both
    rng = random.Random(n)
    for _ in range(n):
        messages, tools = fuzzed(rng)
        ids = ours.encode_chat(messages, tools=tools)
        assert [i for i in ids if ours.is_control(i)] == structure(
            messages, tools, theirs.version
        ), messages
