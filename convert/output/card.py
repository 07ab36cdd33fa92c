"""Write the model card: README.md in the shape of mlx-community's, ready to be uploaded."""

from pathlib import Path
from typing import Any

from magistral_mlx.checkpoint.manifest import ReasoningFormat

# Languages that the published cards of 2506, 2507 and 2509 list.
LANGUAGES = (
    *("en", "fr", "de", "es", "pt", "it", "ja", "ko", "ru", "zh", "ar", "fa"),
    *("id", "ms", "ne", "pl", "ro", "sr", "sv", "tr", "uk", "vi", "hi", "bn"),
)
TRACES = {
    "text": "as the text `<think>...</think>` (Magistral Small 2506)",
    "control": "between the control tokens `[THINK]` and `[/THINK]` "
    "(Magistral Small 2507 and 2509)",
}
WITHOUT_TOKENIZER_JSON = """
It needs tokenizer.json, which this conversion left out: convert again without \
`--no-tokenizer-json`.
"""
CARD, SWIFT = (Path(__file__).with_name(name) for name in ("card.md", "card_swift.md"))


def model_card(
    config_out: dict[str, Any],
    base_model: str | None,
    *,
    form: ReasoningFormat,
    max_new_tokens: int,
    tokenizer_json: bool,
) -> str:
    """Build the text of README.md.

    Args:
        config_out: content of config.json.
        base_model: hub id of the source, if known.
        form: format of the release's reasoning traces.
        max_new_tokens: recommended length of a reply.
        tokenizer_json: True if the checkpoint has a tokenizer.json.
    """
    quantization = config_out.get("quantization")
    bits = "" if quantization is None else f"{quantization['bits']}-bit"
    weights = config_out["torch_dtype"] if quantization is None else _weights(quantization)
    origin, title = "a Magistral Small checkpoint", "Magistral Small"
    if base_model is not None:
        origin = f"[{base_model}](https://huggingface.co/{base_model})"
        title = base_model.split("/")[-1]
    swift = SWIFT.read_text(encoding="utf-8") if tokenizer_json else WITHOUT_TOKENIZER_JSON
    return CARD.read_text(encoding="utf-8").format(
        front_matter=_front_matter(base_model, bits),
        title=title,
        format=bits or weights,
        origin=origin,
        weights=weights,
        max_new_tokens=max_new_tokens,
        traces=TRACES[form],
        swift=swift,
    )


def _weights(quantization: dict[str, Any]) -> str:
    more = ", some modules otherwise" if len(quantization) > 3 else ""
    return (
        f"{quantization['bits']} bit ({quantization['mode']}, "
        f"groups of {quantization['group_size']}{more})"
    )


def _front_matter(base_model: str | None, bits: str) -> str:
    lines = [] if base_model is None else [f"base_model: {base_model}"]
    lines += ["base_model_relation: quantized"] if base_model and bits else []
    lines += ["language:", *(f"- {language}" for language in LANGUAGES)]
    lines += ["library_name: mlx", "license: apache-2.0", "pipeline_tag: text-generation"]
    return "\n".join(
        [*lines, "tags:", "- mlx", "- magistral", "- reasoning", *([f"- {bits}"] if bits else [])]
    )
