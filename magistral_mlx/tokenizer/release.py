"""Which release of Magistral a tokenizer is of, by evidence and never by name, and the system prompt that fits it."""

import os
from pathlib import Path

from magistral_mlx.checkpoint.manifest import Manifest, ReasoningFormat
from magistral_mlx.errors import TokenizerError
from magistral_mlx.tokenizer.messages import (
    CARD_SYSTEM_PROMPT,
    CONTROL_CARD_SYSTEM_PROMPT,
    CONTROL_TAGS,
    CONTROL_TRACE,
)
from magistral_mlx.tokenizer.reasoning import OPEN

SYSTEM_PROMPT_FILE = "SYSTEM_PROMPT.txt"
MAX_PROMPT_BYTES = 1_000_000
OVERRIDE = ". If it does reason, and writes <think> as text, say so: --reasoning-format text"

FORMATS: dict[str, ReasoningFormat] = {
    "v7": "text",
    "v11": "text",
    "v13": "control",
}  # by tekken.json's version


def reasoning_format(
    folder: Path, version: str, *, has_control_tags: bool, stated: ReasoningFormat | None = None
) -> ReasoningFormat:
    """How a release writes its trace: as stated, else by the evidence of its files.

    The evidence is the version of tekken.json, whether that has control tags, and what SYSTEM_PROMPT.txt spells. A v7
    tokenizer, and a v13 one without control tags, are of models that need not reason: only the prompt tells.

    Args:
        version: of tekken.json.
        stated: by whoever loads or converts the checkpoint; else what its conversion recorded.
    Raises:
        TokenizerError: it is no release of Magistral's, or not of the format stated.
        CheckpointError: the record is damaged.
    """
    path = folder / "tekken.json"
    if version not in FORMATS:
        raise TokenizerError(
            f"{path} has version {version}; Magistral Small has v11 (2506) or v13 (2507, 2509): "
            "this is the tokenizer of another model"
        )
    if stated is None and (manifest := Manifest.find(folder)) is not None:
        stated = manifest.reasoning_format
    can_be_control = FORMATS[version] == "control" and has_control_tags
    if stated == "control" and not can_be_control:
        raise TokenizerError(
            f"{path} has version {version} without control tokens for a trace; use the format text"
        )
    if stated is not None:
        return stated
    spells_text = OPEN in _text_of(folder / SYSTEM_PROMPT_FILE)
    if FORMATS[version] == "control" and not has_control_tags and not spells_text:
        raise TokenizerError(
            f"{path} has version {version}, but not the control tokens {' and '.join(CONTROL_TAGS)} that Magistral "
            f"Small 2507 and 2509 reason with: this is the tokenizer of another model{OVERRIDE}"
        )
    if version == "v7" and not spells_text:
        raise TokenizerError(
            f"{path} has version v7, and no {SYSTEM_PROMPT_FILE} beside it asks for {OPEN}; Magistral Small has v11 "
            f"(2506) or v13 (2507, 2509): this is the tokenizer of another model{OVERRIDE}"
        )
    return "control" if can_be_control else "text"


def read_system_prompt(folder: Path, form: ReasoningFormat) -> str:
    """A checkpoint's own default system prompt, or the model card's of its release.

    Raises:
        TokenizerError: SYSTEM_PROMPT.txt is empty, not UTF-8 or of a release with another tokenizer.
    """
    path = folder / SYSTEM_PROMPT_FILE
    if not os.path.lexists(path):  # a link whose target is gone stands for a prompt, too
        return {"text": CARD_SYSTEM_PROMPT, "control": CONTROL_CARD_SYSTEM_PROMPT}[form]
    if not path.is_file() or path.stat().st_size > MAX_PROMPT_BYTES:
        raise TokenizerError(
            f"{path} is no plain file of at most {MAX_PROMPT_BYTES} bytes; download it again, or delete it to use the "
            "model card's"
        )
    prompt = _text_of(path)
    if not prompt.strip():
        raise TokenizerError(
            f"{path} is empty or not UTF-8; download it again, or delete it to use the model card's"
        )
    spells_control = any(tag in prompt for tag in CONTROL_TAGS)
    if spells_control if form == "text" else OPEN in prompt and not spells_control:
        raise TokenizerError(
            f"{path} writes its tags as {CONTROL_TAGS[0] if spells_control else OPEN}, unlike tekken.json beside it; "
            "they are of different releases: download both again"
            + (OVERRIDE if form == "control" else "")
        )
    if any(tag in CONTROL_TRACE.sub(r"\1", prompt) for tag in CONTROL_TAGS):
        raise TokenizerError(
            f"{path} has a {' or a '.join(CONTROL_TAGS)} without the other; download it again"
        )
    return prompt


def _text_of(path: Path) -> str:
    """A file's text; none where it is missing, large, no text, or a pipe, whose opening would wait for ever."""
    try:
        return (
            path.read_bytes().decode()
            if path.is_file() and path.stat().st_size <= MAX_PROMPT_BYTES
            else ""
        )
    except (OSError, UnicodeDecodeError):
        return ""
