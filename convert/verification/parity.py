"""Compare tokenizer.json with tekken.json, and the chat template with Mistral's encoding."""

import importlib.util
import random
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from magistral_mlx.checkpoint.documents import parse_json, read_document
from magistral_mlx.errors import CheckpointError, ConversionError, quoted
from magistral_mlx.tokenizer.tekken import Tokenizer

TOKENIZER_JSON, TEMPLATE = "tokenizer.json", "chat_template.jinja"
NUM_TEXTS = 4000
PIECES = (
    *" \n\t\r",
    *"aZ09.,;:!?'\"()[]{}<>/\\-_=+*&^%$#@~|`",
    *("  ", "    ", "\n\n", "\r\n", "\u00a0", "\u200b", "\u2028", "\x00", "\ufeff"),
    *(
        "the ",
        " the",
        "ing",
        "'ll",
        "DON'T",
        "Größe",
        " Москва",
        " مرحبا",
        "हिन्दी",
        "ไทย",
        "日本語",
    ),
    *(
        "한국어",
        "Ü",
        "ß",
        "e\u0301",
        "ǅ",
        "ʰ",
        "٣",
        "½",
        "²",
        "🙂",
        "👩‍👩‍👧",
        "\U0001f1eb\U0001f1f7",
    ),
    *("𝔘", "\U0010ffff", "3.14", "1234567", "1,000", "0x1F", "1e-9", "think", "INST", "</", "<s"),
    *("[/", "SYSTEM_PROMPT]", "def f(x):\n", "\treturn ", "foo_bar()", "a->b;", "// "),
    *('{"k": [1, null]}', "\\boxed{", "$x^2$", "https://"),
)
CHATS: tuple[tuple[tuple[str, str], ...], ...] = (
    (("user", "What is 48 + 76?"),),
    (("user", " leading, trailing  "),),
    (("user", "two\n\nlines\n"),),
    (("user", "日本語で答えて 🙂 e\u0301 \u200b"),),
    (("user", "{{ 7 * 7 }} {% raw %} '\"\\n"),),
    (("user", "def f(x):\n\treturn x\r\n"),),
    (("system", "Answer in French."), ("user", "Hi")),
    (("system", "Réponds\n\nen  français.\n"), ("user", "Grüße 👩‍👩‍👧")),
    (("system", "One."), ("system", "Two."), ("user", "Hi")),
    (("user", "Hi"), ("user", "there")),
    (("user", "Hi"), ("assistant", "Hello!"), ("user", "1 + 1?")),
    (
        ("user", "Hi"),
        ("assistant", " spaces "),
        ("user", "日本"),
        ("assistant", "\n3.14 × 10²"),
        ("user", "Why?"),
    ),
    (
        ("system", "Be brief."),
        *(
            turn
            for i in range(6)
            for turn in (("user", f"{i} * {i}?"), ("assistant", f"It is {i * i}."))
        ),
        ("user", "And the sum?"),
    ),
)


def require_parsers() -> None:
    """Raise ConversionError unless the libraries that read the two files are installed."""
    if missing := [
        name for name in ("tokenizers", "jinja2") if importlib.util.find_spec(name) is None
    ]:
        raise ConversionError(
            f"{TOKENIZER_JSON} cannot be checked: {' and '.join(missing)} is not installed. "
            "Run: pip install 'magistral-mlx[export]'"
        )


def read_tokenizer_json(folder: Path) -> Any:
    """Read a ``tokenizers.Tokenizer``; raise CheckpointError if the file is missing or damaged."""
    from tokenizers import Tokenizer as Backend

    path = folder / TOKENIZER_JSON
    if not path.is_file():
        raise CheckpointError(f"{path} is missing; Swift and LM Studio need it: convert again")
    try:
        return Backend.from_file(str(path))
    except Exception as error:  # the library raises no other type
        raise CheckpointError(f"{path} is damaged ({quoted(str(error))}); convert again") from None


def tokenizer_fault(tokenizer: Tokenizer, backend: Any) -> str | None:
    """Return the first text on which the two tokenizers disagree, or None.

    The texts are the vocabulary's entries and ``NUM_TEXTS`` random ones from a fixed seed.
    ``tokenizer`` reads tekken.json, ``backend`` tokenizer.json.
    """
    if backend.get_vocab_size() != tokenizer.vocab_size:
        found = backend.get_vocab_size()
        return f"{TOKENIZER_JSON} has {found} ids, tekken.json {tokenizer.vocab_size}"
    controls = [token.content for token in backend.get_added_tokens_decoder().values()]
    entries = (tokenizer.decode([identity]) for identity in range(tokenizer.vocab_size))
    texts = [
        text
        for text in [*entries, *islice(fuzzed(), NUM_TEXTS)]
        if not any(name in text for name in controls)
    ]
    theirs = [encoding.ids for encoding in backend.encode_batch(texts, add_special_tokens=False)]
    for text, ids, decoded in zip(texts, theirs, backend.decode_batch(theirs), strict=True):
        expected = tokenizer.encode(text)
        if ids != expected:
            return (
                f"{quoted(text)} is {quoted(ids)} by {TOKENIZER_JSON}, "
                f"{quoted(expected)} by tekken.json"
            )
        if decoded != text:
            return f"{TOKENIZER_JSON} decodes the ids of {quoted(text)} to {quoted(decoded)}"
    return None


def template_fault(folder: Path, tokenizer: Tokenizer, backend: Any) -> str | None:
    """Return the first chat whose ids differ from mistral-common's, or None.

    Raises:
        CheckpointError: the template or tokenizer_config.json cannot be read.
    """
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    path, config_path = folder / TEMPLATE, folder / "tokenizer_config.json"
    config = parse_json(read_document(config_path), config_path)
    names = {name: config.get(name) for name in ("bos_token", "eos_token")}
    # The settings of transformers.
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = _raise
    try:
        template = environment.from_string(read_document(path).decode())
        for chat in CHATS:
            messages = [{"role": role, "content": content} for role, content in chat]
            rendered = template.render(messages=messages, add_generation_prompt=True, **names)
            ids = backend.encode(rendered, add_special_tokens=False).ids
            if ids != tokenizer.encode_chat(messages):
                return f"{TEMPLATE} makes other ids of {quoted(messages)} than mistral-common"
    except (
        TemplateError,
        ArithmeticError,
        LookupError,
        TypeError,
        ValueError,
        AttributeError,
        RecursionError,
    ) as error:
        # A template can raise any error.
        return f"the template fails ({type(error).__name__}: {quoted(str(error))})"
    return None


def fuzzed() -> Iterator[str]:
    """Yield random strings of pieces that the tokenizer's pattern treats differently, seed 0."""
    rng = random.Random(0)
    while True:
        letters = (chr(rng.choice(range(0x20, 0xD800))) for _ in range(8))
        yield "".join(rng.choices([*PIECES, *letters], k=rng.randrange(1, 40)))


def _raise(message: str) -> None:
    from jinja2 import TemplateError

    raise TemplateError(message)
