"""The exported template and tokenizer.json against our own encoding; config.json against its readers."""

import importlib.metadata
import json
import random
from pathlib import Path
from typing import Any

import pytest

from convert.export import chat_template, make_config, read_tokenizer, require_export_extra, write_exports
from magistral_mlx.config import ModelConfig
from magistral_mlx.errors import ConversionError, TokenizerError
from magistral_mlx.messages import CARD_SYSTEM_PROMPT
from magistral_mlx.tokenizer import Tokenizer
from tests import tiny
from tests.tekken import write_tekken

QUANTIZATION = {"group_size": 64, "bits": 4, "mode": "affine"}
OWN_PROMPT = "Denke nach: {{ x }} {% if %} \\boxed{} 'a' \"b\" @AFTER@ é日.\r\n\t<think>\n</think>\n\nProblem:\n\n"
TEXTS = [
    "Hi",
    " leading",
    "trailing  ",
    "two\n\nlines\n",
    "\n",
    "3.14 × 10²",
    "日本語 🙂",
    "'quotes' \"and\" \\n",
    "{{ 7 * 7 }}",
]
TEXTS += ["<think>\nfake\n</think>\n", "Problem:\n\n", "def f(x):\n\treturn x", "</", "> ", "ends in spaces \n  "]
TOOLS = [
    {"type": "function", "function": {"parameters": {"type": "object", "properties": {"é": {}}}, "name": "add"}},
    {
        "type": "function",
        "function": {"name": "now", "description": 'the "time" <&>', "parameters": {}, "strict": True},
    },
]


def config_out(vocab_size: int = 2048) -> dict[str, Any]:
    return make_config(tiny.make_config(vocab_size=vocab_size), QUANTIZATION)


def export(folder: Path, prompt: str | None = None, **options: Any) -> Path:
    source = write_tekken(folder / "source")
    if prompt is not None:
        (source / "SYSTEM_PROMPT.txt").write_bytes(prompt.encode())
    staging = folder / "staging"
    staging.mkdir()
    names = write_exports(source, staging, config_out(), **({"tokenizer_json": True} | options))
    assert names == sorted(p.name for p in staging.iterdir())
    return staging


@pytest.fixture(scope="module", params=[None, OWN_PROMPT, "Just think."], ids=["card", "own", "no problem"])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Any]:
    """Our tokenizer and transformers', both from an exported folder."""
    transformers = pytest.importorskip("transformers")
    folder = export(tmp_path_factory.mktemp("export"), request.param)
    theirs = transformers.AutoTokenizer.from_pretrained(folder, mistral_format=False)
    assert type(theirs).__name__ == "TokenizersBackend"
    return Tokenizer.from_folder(folder), theirs


def conversations(n: int) -> list[tuple[list[dict[str, Any]], dict[str, Any]]]:
    """Conversations of every shape, and the options they are encoded with."""
    rng = random.Random(0)

    def text() -> str:
        return rng.choice([t for t in TEXTS if t.strip()])

    made = []
    for i in range(n):
        messages: list[dict[str, Any]] = [{"role": "system", "content": text()}] if i % 3 else []
        for turn in range(rng.randrange(4)):
            messages.append({"role": "user", "content": text()})
            if rng.random() < 0.2:
                messages.append({"role": rng.choice(["user", "system"]), "content": text()})
            reply: dict[str, Any] = {"role": "assistant", "content": text()}
            if rng.random() < 0.6:
                reply[rng.choice(["reasoning", "reasoning_content"])] = rng.choice(TEXTS)
            if rng.random() < 0.3:
                calls = [
                    {"id": f"call{turn}abc{k}", "function": {"name": "add", "arguments": {"é": text(), "n": [1, None]}}}
                    for k in range(rng.randrange(1, 3))
                ]
                reply |= {"tool_calls": calls} | ({"content": None} if rng.random() < 0.5 else {})
                results = [{"role": "tool", "content": rng.choice(TEXTS), "tool_call_id": c["id"]} for c in calls]
                messages += [reply, *results, {"role": "assistant", "content": text()}]
            else:
                messages.append(reply)
        messages += [{"role": "user", "content": text()} for _ in range(rng.choice((1, 1, 2)))]
        has_system = any(m["role"] == "system" for m in messages)
        options = {"tools": TOOLS if i % 4 == 1 else None, "think": i % 5 > 0}
        made.append((messages, options | {"system_prompt_only": has_system and i % 7 == 0}))
    return made


def test_the_template_and_tokenizer_json_encode_as_we_do(exported: tuple[Tokenizer, Any]) -> None:
    ours, theirs = exported
    for messages, options in conversations(80):
        rendered = theirs.apply_chat_template(
            messages,
            tokenize=False,
            add_generation_prompt=True,
            tools=options["tools"],
            enable_thinking=options["think"],
            system_prompt_only=options["system_prompt_only"],
        )
        expected = ours.encode_chat(messages, **options)
        assert theirs.encode(rendered, add_special_tokens=False) == expected, messages
        assert theirs.encode(rendered) == expected  # nothing adds a second <s>


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "developer", "content": "x"}],
        [{"role": "user", "content": ["x"]}],
        [{"role": "system", "content": ["x"]}, {"role": "user", "content": "x"}],
        [{"role": "assistant", "content": "x"}],
        [{"role": "user", "content": "x"}, {"role": "assistant", "content": ""}],
        [{"role": "user", "content": "x"}, {"role": "assistant", "content": ["x"]}],
        [{"role": "user", "content": "x"}, {"role": "tool", "content": "x", "tool_call_id": "abcdefghi"}],
        [
            {"role": "user", "content": "x"},
            {"role": "assistant", "tool_calls": [{"id": "call_1", "function": {"name": "add", "arguments": {}}}]},
        ],
    ],
)
def test_the_template_refuses_what_it_would_misread(exported: tuple[Tokenizer, Any], messages: Any) -> None:
    with pytest.raises(Exception, match=r"must|empty"):
        exported[1].apply_chat_template(messages, tokenize=False)


def test_tokenizer_json_encodes_any_text_as_mistral_common_does(exported: tuple[Tokenizer, Any]) -> None:
    ours, theirs = exported
    rng = random.Random(0)
    alphabet = [*" \n\t\r", "  ", "\n\n", "the ", "Ü", "ß", "é", "e\u0301", "日", "🙂", "👩‍👩‍👧", "ǅ", "ʰ", "٣", "½"]
    alphabet += [
        *"aZ9.,;:!?'\"()[]{}<>/\\-_=+*&^%$#@~|",
        "\u200b",
        "\u00a0",
        "\x00",
        "\u2028",
        "\U0001f1eb",
        "हि",
        "ไทย",
    ]
    for _ in range(2000):
        text = "".join(rng.choices(alphabet, k=rng.randrange(30)))
        ids = ours.encode(text)
        assert theirs.encode(text, add_special_tokens=False) == ids, text
        assert theirs.decode(ids) == text == ours.decode(ids)


@pytest.mark.slow
def test_the_full_vocabulary_exports(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    source = write_tekken(tmp_path / "source", 131_072)
    (tmp_path / "staging").mkdir()
    write_exports(source, tmp_path / "staging", config_out(131_072), tokenizer_json=True)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "staging", mistral_format=False)
    ours = Tokenizer.from_folder(source)
    for text in [*TEXTS, CARD_SYSTEM_PROMPT]:
        assert theirs.encode(text, add_special_tokens=False) == ours.encode(text)


def test_config_json_states_what_its_readers_would_guess(tmp_path: Path) -> None:
    config = tiny.make_config(vocab_size=2048)
    raw = make_config(config, QUANTIZATION)
    assert raw["quantization"] == raw["quantization_config"] == QUANTIZATION
    assert (raw["head_dim"], raw["rope_theta"], raw["tie_word_embeddings"], raw["sliding_window"]) == (
        32,
        1e9,
        False,
        None,
    )
    assert (raw["bos_token_id"], raw["eos_token_id"], raw["pad_token_id"]) == (1, 2, 11)
    # What we write we read back, and a float checkpoint states no quantization.
    plain = make_config(config, None, "float16")
    assert "quantization" not in plain
    assert "quantization_config" not in plain
    assert ModelConfig.from_dict(plain, tmp_path, config.parameter_shapes()) == config
    folder = export(tmp_path)
    assert json.loads((folder / "config.json").read_text()) == raw
    generation = json.loads((folder / "generation_config.json").read_text())
    assert (generation["temperature"], generation["top_p"], generation["max_new_tokens"]) == (0.7, 0.95, 40_960)


def test_the_files_are_a_function_of_the_checkpoint_alone(tmp_path: Path) -> None:
    """Another folder, another file of the source's that says the same, another order: the same bytes."""
    one, two = export(tmp_path / "one", OWN_PROMPT), tmp_path / "two"
    source = write_tekken(two / "source")
    (source / "SYSTEM_PROMPT.txt").write_bytes(OWN_PROMPT.encode())
    (source / "params.json").write_text("{}")
    (source / "generation_config.json").write_text('{"temperature": 1.0}')
    (two / "staging").mkdir()
    write_exports(source, two / "staging", config_out(), tokenizer_json=True)
    for path in sorted(one.iterdir()):
        assert path.read_bytes() == (two / "staging" / path.name).read_bytes(), path.name
        assert str(tmp_path).encode() not in path.read_bytes()
        assert path.read_bytes().endswith(b"\n") or path.name == "tekken.json"
    assert (one / "tekken.json").read_bytes() == (source / "tekken.json").read_bytes()
    assert (one / "SYSTEM_PROMPT.txt").read_bytes() == OWN_PROMPT.encode()


def test_without_the_extra_nothing_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_tekken(tmp_path / "source")
    (tmp_path / "staging").mkdir()
    found = importlib.metadata.version

    def version(name: str) -> str:
        if name == "transformers":
            raise importlib.metadata.PackageNotFoundError(name)
        return found(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(ConversionError, match=r"transformers is not installed.*pip install 'magistral-mlx\[export\]'"):
        require_export_extra()
    with pytest.raises(ConversionError, match="--no-tokenizer-json"):
        write_exports(source, tmp_path / "staging", config_out(), tokenizer_json=True)
    assert not list((tmp_path / "staging").iterdir())
    names = write_exports(source, tmp_path / "staging", config_out(), tokenizer_json=False)
    assert names == sorted(
        [
            "README.md",
            "SYSTEM_PROMPT.txt",
            "chat_template.jinja",
            "config.json",
            "generation_config.json",
            "tekken.json",
        ]
    )
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "4.57.1")
    with pytest.raises(ConversionError, match=r"transformers is 4.57.1, 5 or later is needed"):
        require_export_extra()


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    source = write_tekken(tmp_path / "source", 1500)
    with pytest.raises(ConversionError, match="1500 ids, the model has 2048"):
        read_tokenizer(source, 2048)
    with pytest.raises(ConversionError, match="1500 ids"):
        write_exports(source, tmp_path, config_out(), tokenizer_json=False)
    (source / "tekken.json").unlink()
    with pytest.raises(TokenizerError, match="is missing"):
        write_exports(source, tmp_path, config_out(1500), tokenizer_json=False)


def test_the_card_names_what_it_is(tmp_path: Path) -> None:
    card = (export(tmp_path, base_model="org/name", tokenizer_json=False) / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: mlx\n")
    for part in ("base_model: org/name\n", "- 4-bit\n", "4 bit (affine, groups of 64)", "needs tokenizer.json"):
        assert part in card
    assert "org/name" not in (export(tmp_path / "other") / "README.md").read_text()
    assert "@" not in chat_template(CARD_SYSTEM_PROMPT)
