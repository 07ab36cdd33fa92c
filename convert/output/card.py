"""The model card: README.md in the shape of mlx-community's, ready to be uploaded with the checkpoint."""

from typing import Any

from magistral_mlx.checkpoint.manifest import ReasoningFormat

# Of the published cards of 2506, 2507 and 2509.
LANGUAGES = (
    *("en", "fr", "de", "es", "pt", "it", "ja", "ko", "ru", "zh", "ar", "fa"),
    *("id", "ms", "ne", "pl", "ro", "sr", "sv", "tr", "uk", "vi", "hi", "bn"),
)
TRACES = {
    "text": "as the text `<think>...</think>` (Magistral Small 2506)",
    "control": "between the control tokens `[THINK]` and `[/THINK]` (Magistral Small 2507 and 2509)",
}
SWIFT = """
```swift
import Foundation
import HuggingFace
import MLXHuggingFace
import MLXLLM
import MLXLMCommon
import Tokenizers

let folder = URL(fileURLWithPath: "THIS_FOLDER")
let model = try await #huggingFaceLoadModelContainer(configuration: ModelConfiguration(directory: folder))
let session = ChatSession(model, generateParameters: GenerateParameters(temperature: 0.7, topP: 0.95))
print(try await session.respond(to: "How many r's are in strawberry?"))
```
"""
WITHOUT_TOKENIZER_JSON = """
It needs tokenizer.json, which this conversion left out: convert again without `--no-tokenizer-json`.
"""


def model_card(
    config_out: dict[str, Any],
    base_model: str | None,
    *,
    form: ReasoningFormat,
    max_new_tokens: int,
    tokenizer_json: bool,
) -> str:
    """README.md.

    Args:
        config_out: config.json.
        base_model: hub id of what was converted, if known.
        form: how the release writes its traces.
        max_new_tokens: the model card's.
        tokenizer_json: whether tokenizer.json lies beside it.
    """
    quantization = config_out.get("quantization")
    bits, weights = "", config_out["torch_dtype"]
    if quantization is not None:
        bits = f"{quantization['bits']}-bit"
        weights = f"{quantization['bits']} bit ({quantization['mode']}, groups of {quantization['group_size']}"
        weights += ", some modules otherwise)" if len(quantization) > 3 else ")"
    origin, title = "a Magistral Small checkpoint", "Magistral Small"
    if base_model is not None:
        origin, title = (
            f"[{base_model}](https://huggingface.co/{base_model})",
            base_model.split("/")[-1],
        )
    title += f", {bits or weights}, for MLX"
    return f"""---
{_front_matter(base_model, bits)}
---

# {title}

This is {origin},
converted for Apple's [MLX](https://github.com/ml-explore/mlx) by magistral-mlx.

- Weights: {weights}.
- Sample at temperature 0.7 and top-p 0.95, with room for the reasoning: up to {max_new_tokens:,} tokens.
- It writes its reasoning {TRACES[form]}.
- What makes it reason is the system prompt in SYSTEM_PROMPT.txt. The chat template puts that first; a system message of
  yours joins it.

`THIS_FOLDER` is where these files lie; all but Swift take their id on the hub as well.

## Use with magistral-mlx

It tells reasoning from answer.

```bash
magistral generate --model THIS_FOLDER --prompt "How many r's are in strawberry?"
```

## Use with mlx-lm

```bash
pip install mlx-lm
```

```python
from mlx_lm import generate, load
from mlx_lm.sample_utils import make_sampler

# Where mistral-common is installed, transformers would otherwise leave the chat template, and its system prompt, aside.
model, tokenizer = load("THIS_FOLDER", tokenizer_config={{"mistral_format": False}})
messages = [{{"role": "user", "content": "How many r's are in strawberry?"}}]
prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
sampler = make_sampler(temp=0.7, top_p=0.95)
print(generate(model, tokenizer, prompt=prompt, max_tokens={max_new_tokens}, sampler=sampler))
```

## Use in Swift

With [mlx-swift-lm](https://github.com/ml-explore/mlx-swift-lm) 3:
{SWIFT if tokenizer_json else WITHOUT_TOKENIZER_JSON}
## Text from strangers

Encode it with tekken.json and mistral-common, as magistral-mlx does: through the chat template, text that spells a
control token such as `[/INST]` becomes one.
"""


def _front_matter(base_model: str | None, bits: str) -> str:
    lines = [] if base_model is None else [f"base_model: {base_model}"]
    lines += ["base_model_relation: quantized"] if base_model and bits else []
    lines += ["language:", *(f"- {language}" for language in LANGUAGES)]
    lines += ["library_name: mlx", "license: apache-2.0", "pipeline_tag: text-generation"]
    return "\n".join(
        [*lines, "tags:", "- mlx", "- magistral", "- reasoning", *([f"- {bits}"] if bits else [])]
    )
