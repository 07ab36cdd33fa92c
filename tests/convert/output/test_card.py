"""The model card: what the hub reads of it, and that what it tells to run runs."""

import re
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from magistral_mlx.convert.output.card import model_card
from magistral_mlx.convert.output.export import exports, make_config
from magistral_mlx.tokenizer.tekken import Tokenizer
from tests.support import tiny
from tests.support.tekken import write_tekken

CONFIG = tiny.make_config(vocab_size=2048)


def card(base_model: str | None = "org/name-1.0", bits: int | None = 4, **options: Any) -> str:
    quantization = None if bits is None else {"group_size": 64, "bits": bits, "mode": "affine"}
    defaults: dict[str, Any] = {"form": "text", "max_new_tokens": 123, "tokenizer_json": True}
    return model_card(make_config(CONFIG, quantization), base_model, **(defaults | options))


def front_matter(text: str) -> dict[str, Any]:
    yaml = pytest.importorskip("yaml")
    found = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    assert found
    data: dict[str, Any] = yaml.safe_load(found[1])
    return data


def test_the_hub_reads_its_front_matter() -> None:
    data = front_matter(card())
    assert data["library_name"] == data["tags"][0] == "mlx"
    assert (data["base_model"], data["base_model_relation"]) == ("org/name-1.0", "quantized")
    assert (data["pipeline_tag"], data["license"]) == ("text-generation", "apache-2.0")
    assert len(set(data["language"])) == 24
    assert all(
        isinstance(code, str) and len(code) == 2 for code in data["language"]
    )  # "no" would be a boolean
    assert "4-bit" in data["tags"]
    plain = front_matter(card(base_model=None, bits=None))
    assert not {"base_model", "base_model_relation"} & plain.keys()
    assert not any("bit" in tag for tag in plain["tags"])
    assert front_matter(card(bits=None)).keys() == plain.keys() | {"base_model"}


def test_it_says_what_was_converted_and_how() -> None:
    assert (
        "# name-1.0, 4-bit, for MLX\n\nThis is [org/name-1.0](https://huggingface.co/org/name-1.0)"
        in card()
    )
    assert "Weights: 4 bit (affine, groups of 64)." in card()
    assert "Weights: bfloat16." in card(bits=None)
    assert "a Magistral Small checkpoint" in card(base_model=None)
    assert "<think>" in card()
    assert "[THINK]" in card(form="control")
    assert "<think>" not in card(form="control")
    assert "```swift" in card()
    without = card(tokenizer_json=False)
    assert "```swift" not in without
    assert "needs tokenizer.json" in without


@pytest.mark.parametrize("version", ["v11", pytest.param("v13", marks=pytest.mark.slow)])
def test_its_example_for_mlx_lm_runs(
    tmp_path: Path, version: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("mlx_lm")
    pytest.importorskip("transformers")
    folder = tiny.write_checkpoint(tmp_path, CONFIG, tiny.make_weights(CONFIG, mx.bfloat16))
    write_tekken(folder, CONFIG.vocab_size, version)
    for name, content in exports(folder, make_config(CONFIG, None), tokenizer_json=True).items():
        (folder / name).write_bytes(content)
    found = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    assert found
    example = (
        found[1].replace("THIS_FOLDER", str(folder)).replace("max_tokens=40960", "max_tokens=4")
    )
    assert "max_tokens=4," in example
    scope: dict[str, Any] = {}
    exec(example, scope)
    assert capsys.readouterr().out
    assert scope["prompt"] == Tokenizer.from_folder(folder).encode_chat(
        "How many r's are in strawberry?"
    )
