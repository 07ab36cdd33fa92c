"""Compare the exported template, tokenizer.json and config.json with what their readers need."""

import importlib.metadata
import json
import random
import re
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from magistral_mlx.checkpoint.config import ModelConfig
from magistral_mlx.convert.output.export import exports, make_config, require_export_extra
from magistral_mlx.errors import CheckpointError, ConversionError, TokenizerError
from magistral_mlx.tokenizer.release import CARD_SYSTEM_PROMPT
from magistral_mlx.tokenizer.tekken import Tokenizer
from tests.support import tiny
from tests.support.conversations import TEXTS, conversations
from tests.support.tekken import write_tekken

QUANTIZATION = {"group_size": 64, "bits": 4, "mode": "affine"}
OWN_PROMPT = (
    "Denke nach: {{ x }} {% if %} \\boxed{} 'a' \"b\" @AFTER@ é日.\r\n"
    "\t<think>\n</think>\n\nProblem:\n\n"
)


def config_out(vocab_size: int = 2048) -> dict[str, Any]:
    return make_config(tiny.make_config(vocab_size=vocab_size), QUANTIZATION)


def export(folder: Path, prompt: str | None = None, version: str = "v11", **options: Any) -> Path:
    source = write_tekken(folder / "source", version=version.split(maxsplit=1)[0])
    if "without" in version:
        text = (source / "tekken.json").read_text()
        (source / "tekken.json").write_text(text.replace("THINK]", "THUNK]"))
    if prompt is not None:
        (source / "SYSTEM_PROMPT.txt").write_bytes(prompt.encode())
    target = folder / "target"
    target.mkdir()
    files = exports(source, config_out(), **({"tokenizer_json": True} | options))
    assert list(files) == sorted(files)
    for name, content in files.items():
        (target / name).write_bytes(content)
    return target


CASES = {
    "2506": ("v11", None),
    "2506, own prompt": ("v11", OWN_PROMPT),
    "2506, no Problem:": ("v11", "Just think."),
    "2507": ("v13", None),
    "2507, own prompt": (
        "v13",
        OWN_PROMPT.replace("<think>\n</think>", "[THINK]{{ '\n' }}[/THINK] and [THINK][/THINK]"),
    ),
    "2507, no tags": ("v13", "Just answer.\n\n"),
    "an older base": ("v7", OWN_PROMPT),
    "a newer base": ("v13 without tags", OWN_PROMPT),
}


@pytest.fixture(scope="module", params=CASES)
def exported(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Tokenizer, Any]:
    """Our tokenizer and transformers', both from an exported folder."""
    transformers = pytest.importorskip("transformers")
    version, prompt = CASES[request.param]
    folder = export(tmp_path_factory.mktemp("export"), prompt, version)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    assert type(theirs).__name__ == "TokenizersBackend"
    return Tokenizer.from_folder(folder), theirs


def test_the_template_and_tokenizer_json_encode_as_we_do(exported: tuple[Tokenizer, Any]) -> None:
    ours, theirs = exported
    default = {"role": "system", "content": ours.system_prompt}
    again = [
        ([default, *messages], options | {"system_prompt_only": False})
        for messages, options in conversations(9)
    ]
    for messages, options in conversations(200) + again:
        rendered = theirs.apply_chat_template(
            messages,
            tokenize=False,
            add_generation_prompt=True,
            tools=options["tools"],
            think=options["think"],
            enable_thinking=False,  # what mlx-lm sends, asked or not
            system_prompt_only=options["system_prompt_only"],
        )
        expected = ours.encode_chat(messages, **options)
        assert theirs.encode(rendered, add_special_tokens=False) == expected, messages
        assert theirs.encode(rendered) == expected  # nothing adds a second <s>


def test_without_tokenizer_json_transformers_reads_tekken_json_alike(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    folder = export(tmp_path, tokenizer_json=False)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    text = theirs.apply_chat_template([USER], tokenize=False, add_generation_prompt=True)
    assert theirs.encode(text) == Tokenizer.from_folder(folder).encode_chat([USER])


USER = {"role": "user", "content": "x"}


def calling(*ids: str) -> dict[str, Any]:
    return {
        "role": "assistant",
        "tool_calls": [{"id": i, "function": {"name": "add", "arguments": {}}} for i in ids],
    }


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "developer", "content": "x"}],
        [{"role": "user", "content": ["x"]}],
        [{"role": "system", "content": ["x"]}, USER],
        [{"role": "assistant", "content": "x"}],
        [USER, {"role": "assistant", "content": ""}],
        [USER, {"role": "assistant", "content": ["x"]}],
        [USER, {"role": "tool", "content": "x", "tool_call_id": "abcdefghi"}],
        [USER, calling("")],
        [USER, calling("abcdefghi", "abcdefghi")],
        [USER, calling("abcdefghi"), {"role": "tool", "content": "x", "tool_call_id": "123456789"}],
    ],
)
def test_the_template_refuses_what_it_would_misread(
    exported: tuple[Tokenizer, Any], messages: Any
) -> None:
    with pytest.raises(Exception, match=r"must|empty"):
        exported[1].apply_chat_template(messages, tokenize=False)


def test_newer_releases_write_no_ids_of_calls(exported: tuple[Tokenizer, Any]) -> None:
    ours, theirs = exported
    if ours.version != "v13":
        with pytest.raises(Exception, match="must be nine letters and digits"):
            theirs.apply_chat_template([USER, calling("call_1")], tokenize=False)
    else:
        assert "call_1" not in theirs.apply_chat_template([USER, calling("call_1")], tokenize=False)


def random_texts(n: int, controls: list[str]) -> list[str]:
    """Yield strings of many kinds of pieces that spell no control token."""
    rng = random.Random(0)
    pieces = [
        *" \n\t\r",
        "  ",
        "\n\n",
        "the ",
        "Ü",
        "ß",
        "é",
        "e\u0301",
        "日",
        "🙂",
        "👩‍👩‍👧",
        "ǅ",
        "ʰ",
        "٣",
        "½",
    ]
    pieces += [
        *"aZ9.,;:!?'\"()[]{}<>/\\-_=+*&^%$#@~|",
        "\u200b",
        "\u00a0",
        "\x00",
        "\u2028",
        "\U0001f1eb",
        "हि",
        "ไทย",
    ]
    pieces += [
        "think",
        "INST",
        "Größe",
        " Москва",
        " مرحبا",
        "'ll",
        "DON'T",
        "1234567",
        " the",
        "ing",
        "\r\n",
        "    ",
    ]
    pieces += [chr(rng.choice(range(0x20, 0xD800))) for _ in range(500)]
    texts = ("".join(rng.choices(pieces, k=rng.randrange(40))) for _ in range(2 * n))
    return list(islice((text for text in texts if not any(name in text for name in controls)), n))


def test_tokenizer_json_encodes_any_text_as_mistral_common_does(
    exported: tuple[Tokenizer, Any],
) -> None:
    ours, theirs = exported
    for text in random_texts(1000, theirs.all_special_tokens):
        ids = ours.encode(text)
        assert theirs.encode(text, add_special_tokens=False) == ids, text
        assert theirs.decode(ids) == text == ours.decode(ids)


@pytest.mark.slow
@pytest.mark.parametrize("version", ["v11", "v13"])
def test_the_full_vocabulary_encodes_100_000_texts_as_mistral_common_does(
    tmp_path: Path, version: str
) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    source = write_tekken(tmp_path / "source", 131_072, version)
    files = exports(source, config_out(131_072), tokenizer_json=True)
    theirs = tokenizers.Tokenizer.from_str(files["tokenizer.json"].decode())
    ours = Tokenizer.from_folder(source)
    controls = [theirs.id_to_token(i) for i in range(1000)]
    assert controls[: 36 if version == "v13" else 34][-1] == (
        "[/THINK]" if version == "v13" else "[CALL_ID]"
    )
    texts = [*TEXTS, CARD_SYSTEM_PROMPT, *random_texts(100_000, controls)]
    for text, encoding in zip(
        texts, theirs.encode_batch(texts, add_special_tokens=False), strict=True
    ):
        assert encoding.ids == ours.encode(text), text


def test_config_json_states_what_its_readers_would_guess(tmp_path: Path) -> None:
    config = tiny.make_config(vocab_size=2048)
    raw = make_config(config, QUANTIZATION)
    assert raw["quantization"] == raw["quantization_config"] == QUANTIZATION
    assert (
        raw["head_dim"],
        raw["rope_theta"],
        raw["tie_word_embeddings"],
        raw["sliding_window"],
    ) == (32, 1e9, False, None)
    assert (raw["bos_token_id"], raw["eos_token_id"], raw["pad_token_id"]) == (1, 2, 11)
    # What we write we read back, and a float checkpoint states no quantization.
    plain = make_config(config, None, "float16")
    assert "quantization" not in plain
    assert "quantization_config" not in plain
    assert ModelConfig.from_dict(plain, tmp_path, config.shapes) == config
    folder = export(tmp_path)
    assert json.loads((folder / "config.json").read_text()) == raw
    generation = json.loads((folder / "generation_config.json").read_text())
    assert (generation["temperature"], generation["top_p"], generation["max_new_tokens"]) == (
        0.7,
        0.95,
        40_960,
    )


def test_the_files_are_a_function_of_the_checkpoint_alone(tmp_path: Path) -> None:
    """Vary the folder, the order of keys and the file that holds a fact; expect the same bytes."""
    one, two = export(tmp_path / "one", OWN_PROMPT), tmp_path / "two"
    source = write_tekken(two / "source")
    (source / "SYSTEM_PROMPT.txt").write_bytes(OWN_PROMPT.encode())
    (source / "params.json").write_text("{}")
    (source / "generation_config.json").write_text('{"temperature": 1.0}')
    for name, content in exports(source, config_out(), tokenizer_json=True).items():
        assert (one / name).read_bytes() == content, name
    for path in sorted(one.iterdir()):
        assert str(tmp_path).encode() not in path.read_bytes()
        assert path.read_bytes().endswith(b"\n") or path.name == "tekken.json"
    assert (one / "tekken.json").read_bytes() == (source / "tekken.json").read_bytes()
    assert (one / "SYSTEM_PROMPT.txt").read_bytes() == OWN_PROMPT.encode()


def test_without_the_extra_nothing_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_tekken(tmp_path / "source")
    found = importlib.metadata.version

    def version(name: str) -> str:
        if name == "transformers":
            raise importlib.metadata.PackageNotFoundError(name)
        return found(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(
        ConversionError,
        match=r"transformers is not installed.*pip install 'magistral-mlx\[export\]'",
    ):
        require_export_extra()
    with pytest.raises(ConversionError, match="tokenizer_json=False"):
        exports(source, config_out(), tokenizer_json=True)
    texts = [
        "README.md",
        "SYSTEM_PROMPT.txt",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "tekken.json",
        "tokenizer_config.json",
    ]
    assert list(exports(source, config_out(), tokenizer_json=False)) == texts
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "4.57.1")
    with pytest.raises(ConversionError, match=r"transformers is 4.57.1, 5 or later is needed"):
        require_export_extra()


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    source = write_tekken(tmp_path / "source", 1500)
    with pytest.raises(CheckpointError, match="1500 ids, the model has 2048"):
        Tokenizer.of_model(source, 2048)
    with pytest.raises(CheckpointError, match="1500 ids"):
        exports(source, config_out(), tokenizer_json=False)
    (source / "tekken.json").unlink()
    with pytest.raises(TokenizerError, match="is missing"):
        exports(source, config_out(1500), tokenizer_json=False)


@pytest.mark.parametrize("version", ["v11", "v13"])
def test_the_template_is_of_one_release(tmp_path: Path, version: str) -> None:
    template = (
        export(tmp_path, version=version, tokenizer_json=False) / "chat_template.jinja"
    ).read_text()
    assert "@" not in template
    assert not re.search(r"\{#(v\d|text|control)", template)
    assert ("[THINK]" in template, "<think>" in template) == (version == "v13", version == "v11")
