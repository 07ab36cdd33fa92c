"""Release of a tokenizer, found by evidence and never by name, and its system prompt."""

import os
from pathlib import Path

from magistral_mlx.checkpoint.documents import read_document
from magistral_mlx.checkpoint.manifest import Manifest, ReasoningFormat
from magistral_mlx.errors import CheckpointError, TokenizerError, named
from magistral_mlx.tokenizer.messages import CONTROL_TAGS, CONTROL_TRACE
from magistral_mlx.tokenizer.reasoning import OPEN

SYSTEM_PROMPT_FILE = "SYSTEM_PROMPT.txt"
MAX_PROMPT_BYTES = 1_000_000
# System prompts of the model cards, of 2506 and of 2507 and 2509, for checkpoints that come
# without SYSTEM_PROMPT.txt.
CARD_SYSTEM_PROMPT = (
    "A user will ask you to solve a task. You should first draft your thinking process (inner "
    "monologue) until you have derived the final answer. Afterwards, write a self-contained "
    "summary of your thoughts (i.e. your summary should be succinct but contain all the critical "
    "steps you needed to reach the conclusion). You should use Markdown to format your response. "
    "Write both your thoughts and summary in the same language as the task posed by the user. "
    "NEVER use \\boxed{} in your response.\n\n"
    "Your thinking process must follow the template below:\n"
    "<think>\n"
    "Your thoughts or/and draft, like working through an exercise on scratch paper. Be as casual "
    "and as long as you want until you are confident to generate a correct answer.\n"
    "</think>\n\n"
    "Here, provide a concise summary that reflects your reasoning and presents a clear final "
    "answer to the user. Don't mention that this is a summary.\n\n"
    "Problem:\n\n"
)
CONTROL_CARD_SYSTEM_PROMPT = (
    "First draft your thinking process (inner monologue) until you arrive at a response. Format "
    "your response using Markdown, and use LaTeX for any mathematical equations. Write both your "
    "thoughts and the response in the same language as the input.\n\n"
    "Your thinking process must follow the template below:[THINK]Your thoughts or/and draft, like "
    "working through an exercise on scratch paper. Be as casual and as long as you want until you "
    "are confident to generate the response. Use the same language as the input.[/THINK]Here, "
    "provide a self-contained response."
)

OVERRIDE = ". If it does reason, and writes <think> as text, say so: " + named(
    "reasoning_format", "text"
)

# By the version of tekken.json.
FORMATS: dict[str, ReasoningFormat] = {"v7": "text", "v11": "text", "v13": "control"}


def find_reasoning_format(
    folder: Path, version: str, *, has_control_tags: bool, given: ReasoningFormat | None = None
) -> ReasoningFormat:
    """Find the form in which a release writes its trace.

    It is the ``given`` one, else the one in the manifest, else by evidence: the version of
    tekken.json, its control tags, and the tags that SYSTEM_PROMPT.txt spells. A v7 tokenizer, or a
    v13 one without control tags, may be of a model that does not reason: only the prompt tells.

    Args:
        folder: of the checkpoint.
        version: of tekken.json.
        has_control_tags: tekken.json has control ids for the tags of a trace.
        given: by the user who loads or converts the checkpoint.

    Raises:
        TokenizerError: it is no release of Magistral, or not of the given format.
        CheckpointError: the manifest is damaged.
    """
    path = folder / "tekken.json"
    if version not in FORMATS:
        raise TokenizerError(
            f"{path} has version {version}; Magistral Small has v11 (2506) or v13 (2507, 2509): "
            "this is the tokenizer of another model"
        )
    if given is None and (manifest := Manifest.find(folder)) is not None:
        given = manifest.reasoning_format
    can_be_control = FORMATS[version] == "control" and has_control_tags
    if given == "control" and not can_be_control:
        raise TokenizerError(
            f"{path} has version {version} without control tokens for a trace; use the format text"
        )
    if given is not None:
        return given
    spells_text = OPEN in _text_of(folder / SYSTEM_PROMPT_FILE)
    if FORMATS[version] == "control" and not has_control_tags and not spells_text:
        raise TokenizerError(
            f"{path} has version {version}, but not the control tokens "
            f"{' and '.join(CONTROL_TAGS)} that Magistral Small 2507 and 2509 reason with: "
            f"this is the tokenizer of another model{OVERRIDE}"
        )
    if version == "v7" and not spells_text:
        raise TokenizerError(
            f"{path} has version v7, and no {SYSTEM_PROMPT_FILE} beside it asks for {OPEN}; "
            "Magistral Small has v11 (2506) or v13 (2507, 2509): "
            f"this is the tokenizer of another model{OVERRIDE}"
        )
    return "control" if can_be_control else "text"


def read_system_prompt(folder: Path, form: ReasoningFormat) -> str:
    """Return the default system prompt of a checkpoint, or of the model card of its release.

    Raises:
        TokenizerError: SYSTEM_PROMPT.txt is empty, not UTF-8 or of another release.
    """
    path = folder / SYSTEM_PROMPT_FILE
    # A link whose target is gone counts as a prompt.
    if not os.path.lexists(path):
        return {"text": CARD_SYSTEM_PROMPT, "control": CONTROL_CARD_SYSTEM_PROMPT}[form]
    if not path.is_file() or path.stat().st_size > MAX_PROMPT_BYTES:
        raise TokenizerError(
            f"{path} is no plain file of at most {MAX_PROMPT_BYTES} bytes; download it again, "
            "or delete it to use the model card's"
        )
    prompt = _text_of(path)
    if not prompt.strip():
        raise TokenizerError(
            f"{path} is empty or not UTF-8; download it again, or delete it to use the model card's"
        )
    spells_control = any(tag in prompt for tag in CONTROL_TAGS)
    if spells_control if form == "text" else OPEN in prompt and not spells_control:
        raise TokenizerError(
            f"{path} writes its tags as {CONTROL_TAGS[0] if spells_control else OPEN}, "
            "unlike tekken.json beside it; they are of different releases: download both again"
            + (OVERRIDE if form == "control" else "")
        )
    if any(tag in CONTROL_TRACE.sub(r"\1", prompt) for tag in CONTROL_TAGS):
        raise TokenizerError(
            f"{path} has a {' or a '.join(CONTROL_TAGS)} without the other; download it again"
        )
    return prompt


def _text_of(path: Path) -> str:
    """Return a file's text, or "" if it is missing, too large, or no plain text file."""
    try:
        return read_document(path, MAX_PROMPT_BYTES).decode()
    except (CheckpointError, UnicodeDecodeError):
        return ""
