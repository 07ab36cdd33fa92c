"""A real tokenizer, cut to any size from the one in mistral-common."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import mistral_common
from mistral_common.tokens.tokenizers.tekken import Tekkenizer

BUNDLED = Path(mistral_common.__file__).parent / "data" / "tekken_240911.json"
SMALL = 5000  # ids


def write_tekken(folder: Path, vocab_size: int = 2048, version: str = "v11") -> Path:
    """Write ``tekken.json`` with the first ids of the real vocabulary; all are 131,072.

    The control ids are those of 2506. ``version="v13"`` has those of 2507 and 2509, with [THINK]
    at 34 and [/THINK] at 35; "v7" has the 20 of Mistral Small 3.1, without [ARGS] and [CALL_ID].
    """
    raw = dict(_parsed()) if vocab_size <= SMALL else json.loads(BUNDLED.read_text())
    texts = vocab_size - raw["config"]["default_num_special_tokens"]
    names = [str(t["token_str"]) for t in Tekkenizer.DEPRECATED_SPECIAL_TOKENS]
    names += (
        [f"<SPECIAL_{i}>" for i in range(20, 32)] + ["[ARGS]", "[CALL_ID]"]
        if version != "v7"
        else []
    )
    names += ["[THINK]", "[/THINK]"] if version == "v13" else []
    raw["vocab"] = raw["vocab"][:texts]
    raw["special_tokens"] = [
        {"rank": i, "token_str": name, "is_control": True} for i, name in enumerate(names)
    ]
    counts = {"default_vocab_size": vocab_size, "num_vocab_tokens": texts, "version": version}
    raw["config"] = raw["config"] | counts
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tekken.json").write_text(json.dumps(raw))
    return folder


@cache
def _parsed() -> dict[str, Any]:
    """Parse the file once, which takes a third of a second, and keep what small ones need."""
    raw: dict[str, Any] = json.loads(BUNDLED.read_text())
    return raw | {"vocab": raw["vocab"][:SMALL]}
