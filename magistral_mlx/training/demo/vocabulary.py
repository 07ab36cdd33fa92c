"""The embedded model's vocabulary: the head of the real one."""

import json
from pathlib import Path

SPECIAL_TOKENS = (
    "<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]",
    "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]",
    "[IMG_END]", "[PREFIX]", "[MIDDLE]", "[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]",
    "[TOOL_CONTENT]", *(f"<SPECIAL_{i}>" for i in range(20, 32)), "[ARGS]", "[CALL_ID]",
)  # fmt: skip
VOCABULARY = 2048
CONTROL = {name: i for i, name in enumerate(SPECIAL_TOKENS)}


def write_tokenizer(path: Path) -> None:
    """Write a genuine Tekken v11, cut to its most frequent pieces."""
    import mistral_common

    full = json.loads(
        (Path(mistral_common.__file__).parent / "data" / "tekken_240911.json").read_text("utf-8")
    )
    kept = VOCABULARY - len(SPECIAL_TOKENS)
    cut = {
        "config": full["config"]
        | {
            "num_vocab_tokens": kept,
            "default_vocab_size": VOCABULARY,
            "default_num_special_tokens": len(SPECIAL_TOKENS),
            "version": "v11",
        },
        "vocab": full["vocab"][:kept],
        "special_tokens": [
            {"rank": i, "token_str": s, "is_control": True} for i, s in enumerate(SPECIAL_TOKENS)
        ],
    }
    path.write_text(json.dumps(cut, separators=(",", ":")) + "\n")
