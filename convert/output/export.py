"""Build the files beside the weights as MLX, Swift and transformers read them.

They depend on the checkpoint alone, not on its layout, the time, host, path or versions.
"""

import importlib.metadata
import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from magistral_mlx.checkpoint.config import ModelConfig
from magistral_mlx.checkpoint.hub_api import TEKKEN_FILE
from magistral_mlx.convert.output.card import model_card
from magistral_mlx.errors import ConversionError, named
from magistral_mlx.tokenizer.home import BASE_MODEL
from magistral_mlx.tokenizer.messages import prompt_around
from magistral_mlx.tokenizer.release import SYSTEM_PROMPT_FILE
from magistral_mlx.tokenizer.tekken import Tokenizer

TEMPLATE = Path(__file__).with_name("chat_template.jinja")
# From the model card, like the sampling below.
MAX_NEW_TOKENS = 40_960
# Oldest major version that makes tokenizer.json from tekken.json.
TRANSFORMERS = 5

# A text with every kind of piece in the tokenizer's pattern, to compare two tokenizers.
PROBE = (
    "Don't panic: 3.14 × 10²  = x;\n\n\tfoo_bar(); <think>\n日本語 Größe 👩‍👩‍👧 ЯНДЕКС\r\n   end  "
)


def require_export_extra() -> None:
    """Raise ConversionError unless the libraries that make tokenizer.json are installed."""
    try:
        found = importlib.metadata.version("transformers")
        if int(found.partition(".")[0]) >= TRANSFORMERS and importlib.metadata.version(
            "tokenizers"
        ):
            return
        what = f"transformers is {found}, {TRANSFORMERS} or later is needed"
    except importlib.metadata.PackageNotFoundError as error:
        what = f"{error.name} is not installed"
    raise ConversionError(
        f"tokenizer.json, which Swift and LM Studio need, cannot be made: {what}. "
        "Run: pip install 'magistral-mlx[export]', or leave tokenizer.json out with "
        f"{named('tokenizer_json', False)}"
    )


def make_config(
    config: ModelConfig, quantization: Mapping[str, Any] | None, torch_dtype: str = "bfloat16"
) -> dict[str, Any]:
    """Build config.json in a fixed order, with every value that runtimes would otherwise guess.

    The model type is that of the architecture, Llama, which mlx-lm and mlx-swift run for both
    names. Under the name mistral, transformers takes mistral-common's tokenizer where that is
    installed, which ignores the chat template and encodes mlx-lm's prompts as plain text.

    Args:
        config: of the model.
        quantization: from ``quantization_block``; None for float weights.
        torch_dtype: type of the tensors that are not packed.
    """
    raw: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 11,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_positions,
        "num_attention_heads": config.num_heads,
        "num_hidden_layers": config.num_layers,
        "num_key_value_heads": config.num_kv_heads,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "sliding_window": None,  # transformers' default is a window of 4,096
        "tie_word_embeddings": config.tie_word_embeddings,
        "torch_dtype": torch_dtype,
        "use_cache": True,
        "vocab_size": config.vocab_size,
    }
    if quantization is not None:
        raw |= {"quantization": dict(quantization), "quantization_config": dict(quantization)}
    return raw


def exports(
    source: Path,
    config_out: dict[str, Any],
    tokenizer: Tokenizer | None = None,
    *,
    tokenizer_json: bool,
    base_model: str | None = None,
) -> dict[str, bytes]:
    """Build every file but the weights and their index; return content by sorted name.

    Args:
        source: the checkpoint to convert.
        config_out: from ``make_config``.
        tokenizer: the source's, if it was read already; its tekken.json is copied.
        tokenizer_json: make tokenizer.json, with the export extra.
        base_model: hub id of the source, for the card.

    Raises:
        CheckpointError, ConversionError, TokenizerError: as ``require_export_extra`` and
            ``Tokenizer.of_model``.
    """
    if tokenizer_json:
        require_export_extra()
    tokenizer = tokenizer or Tokenizer.of_model(source, config_out["vocab_size"])
    ids = _special_ids(tokenizer, config_out)
    sampling = {
        "do_sample": True,
        "max_new_tokens": MAX_NEW_TOKENS,
        "temperature": 0.7,
        "top_p": 0.95,
    }
    texts = {
        "config.json": json_text(config_out),
        "generation_config.json": json_text(ids | sampling),
        "chat_template.jinja": chat_template(tokenizer),
        SYSTEM_PROMPT_FILE: tokenizer.system_prompt,
        "README.md": model_card(
            config_out,
            base_model,
            form=tokenizer.reasoning_format,
            max_new_tokens=MAX_NEW_TOKENS,
            tokenizer_json=tokenizer_json,
        ),
        # Without tokenizer.json, transformers makes its tokenizer from tekken.json and this.
        "tokenizer_config.json": json_text(
            _tokenizer_config(config_out["max_position_embeddings"], base_model)
        ),
    }
    if tokenizer_json:
        vocab_size, probe_ids = tokenizer.vocab_size, tokenizer.encode(PROBE)
        texts["tokenizer.json"] = _tokenizer_json(
            tokenizer.path, vocab_size=vocab_size, probe_ids=probe_ids
        )
    files = {name: text.encode() for name, text in texts.items()}
    return dict(sorted((files | {TEKKEN_FILE: tokenizer.path.read_bytes()}).items()))


def _special_ids(tokenizer: Tokenizer, config_out: dict[str, Any]) -> dict[str, int]:
    """Return a tokenizer's special ids; raise ConversionError if config.json has others."""
    ids = {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": tokenizer.pad_id,
    }
    if wrong := {key for key, value in ids.items() if config_out[key] != value}:
        raise ConversionError(
            f"{tokenizer.path}: {', '.join(sorted(wrong))} is not Magistral's; download it again"
        )
    return ids


def chat_template(tokenizer: Tokenizer) -> str:
    """Make the Jinja template that encodes chats as ``tokenizer.encode_chat`` does.

    A line of the file that begins with ``{#v7 v11#}``, ``{#text#}`` or the like is only for these
    versions of tekken.json, or for this format of traces.
    """
    before, after = prompt_around(tokenizer.system_prompt)
    texts = {"DEFAULT_PROMPT": tokenizer.system_prompt, "BEFORE": before, "AFTER": after}
    ours = {tokenizer.version, tokenizer.reasoning_format}
    template = re.sub(
        r"^\{#([a-z][a-z\d ]*)#\}(.*\n)",
        lambda line: line[2] if ours & set(line[1].split()) else "",
        TEMPLATE.read_text(encoding="utf-8"),
        flags=re.MULTILINE,
    )
    return re.sub(
        "@(" + "|".join(texts) + ")@", lambda found: _jinja_string(texts[found[1]]), template
    )


def json_text(value: dict[str, Any]) -> str:
    """Format JSON with keys in the given order, two spaces and a final newline."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def _tokenizer_config(max_positions: int, base_model: str | None) -> dict[str, Any]:
    # mlx-lm copies this file and no tekken.json. The base model tells a later reader where it is.
    base = {} if base_model is None else {BASE_MODEL: base_model}
    return base | {
        "add_bos_token": False,  # the chat template writes it
        "add_eos_token": False,
        "bos_token": "<s>",
        "clean_up_tokenization_spaces": False,
        "eos_token": "</s>",
        "model_max_length": max_positions,
        "pad_token": "<pad>",
        # transformers 4 and 5, and every version of mlx-swift's tokenizers, know this class.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "<unk>",
    }


def _tokenizer_json(tekken: Path, *, vocab_size: int, probe_ids: list[int]) -> str:
    """Make tokenizer.json from tekken.json; check that it encodes PROBE as ``probe_ids``."""
    log = logging.getLogger("transformers")
    log.addFilter(_is_useful)
    try:
        from transformers.integrations.mistral import MistralConverter  # type: ignore[attr-defined]
    finally:
        log.removeFilter(_is_useful)

    # The converter holds every merge as a Python tuple. Drop it before the text is made.
    backend = MistralConverter(str(tekken)).converted()
    if backend.get_vocab_size() != vocab_size or backend.encode(PROBE).ids != probe_ids:
        raise ConversionError(
            "the tokenizer.json that transformers makes does not encode as tekken.json does; "
            "install another version of transformers, or pass "
            f"{named('tokenizer_json', False)}"
        )
    text: str = backend.to_str(pretty=True)
    return text + "\n"


def _is_useful(record: logging.LogRecord) -> bool:
    """Filter out transformers' warning that PyTorch is missing: a tokenizer needs none."""
    return "PyTorch was not found" not in record.getMessage()


def _jinja_string(text: str) -> str:
    for character, escape in (
        ("\\", "\\\\"),
        ("'", "\\'"),
        ("\n", "\\n"),
        ("\r", "\\r"),
        ("\t", "\\t"),
    ):
        text = text.replace(character, escape)
    return f"'{text}'"
