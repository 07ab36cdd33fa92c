"""Which release of Magistral a tokenizer is of, by evidence and never by name, and the system prompt that fits it."""

import os
from pathlib import Path

from magistral_mlx.errors import TokenizerError
from magistral_mlx.messages import CARD_SYSTEM_PROMPT, CONTROL_CARD_SYSTEM_PROMPT, CONTROL_TAGS, CONTROL_TRACE
from magistral_mlx.reasoning import OPEN, ReasoningFormat

SYSTEM_PROMPT_FILE = "SYSTEM_PROMPT.txt"
MAX_PROMPT_BYTES = 1_000_000

FORMATS: dict[str, ReasoningFormat] = {"v11": "text", "v13": "control"}  # by the version of tekken.json


def reasoning_format(path: Path, version: str, *, has_control_tags: bool) -> ReasoningFormat:
    """How a release writes its trace, from the version of its tekken.json and whether that has control tags.

    Raises:
        TokenizerError: it is no release of Magistral's.
    """
    if version not in FORMATS:
        raise TokenizerError(
            f"{path} has version {version}; Magistral Small has v11 (2506) or v13 (2507, 2509): "
            "this is the tokenizer of another model"
        )
    found = FORMATS[version]
    if found == "control" and not has_control_tags:
        raise TokenizerError(
            f"{path} has version {version}, but not the control tokens {' and '.join(CONTROL_TAGS)} that Magistral "
            "Small 2507 and 2509 reason with: this is the tokenizer of another model"
        )
    return found


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
    try:
        prompt = path.read_bytes().decode()
    except UnicodeDecodeError:
        prompt = ""
    if not prompt.strip():
        raise TokenizerError(f"{path} is empty or not UTF-8; download it again, or delete it to use the model card's")
    spells_control = any(tag in prompt for tag in CONTROL_TAGS)
    if spells_control if form == "text" else OPEN in prompt and not spells_control:
        raise TokenizerError(
            f"{path} writes its tags as {CONTROL_TAGS[0] if spells_control else OPEN}, unlike tekken.json beside it; "
            "they are of different releases: download both again"
        )
    if any(tag in CONTROL_TRACE.sub(r"\1", prompt) for tag in CONTROL_TAGS):
        raise TokenizerError(f"{path} has a {' or a '.join(CONTROL_TAGS)} without the other; download it again")
    return prompt
