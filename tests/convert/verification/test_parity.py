"""mlx-lm as the oracle, in float32: the same checkpoints, the same logits, the same greedy ids."""

import os
import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from magistral_mlx.checkpoint.folder import open_checkpoint
from magistral_mlx.convert import convert_checkpoint
from magistral_mlx.demo import demo_checkpoint
from magistral_mlx.generation.decoding import Stepper, decode, prefill
from magistral_mlx.generation.params import SamplingParams
from magistral_mlx.generation.sampling import Sampler
from magistral_mlx.model.kv_cache import KVCache
from magistral_mlx.model.loader import load_model
from magistral_mlx.model.transformer import Transformer
from magistral_mlx.tokenizer.tekken import Tokenizer
from tests.support.tiny import DEMO

TOKENS = 256
QUESTIONS = ("What is 48 + 76?", "Combien font 123 x 4 ?", "How many r's are in strawberry?")


def ours(folder: Path) -> Transformer:
    return load_model(open_checkpoint(folder)).result()


def theirs(folder: Path) -> Any:
    """mlx-lm's model, cast: its bf16 on a CPU accumulates in bf16 and is no reference."""
    from mlx_lm.utils import load_model as load

    model, _ = load(folder)
    model.set_dtype(mx.float32)
    return model


def their_greedy_ids(model: Any, prompt: list[int]) -> list[int]:
    from mlx_lm.models.cache import make_prompt_cache

    cache, ids = make_prompt_cache(model), [*prompt]
    tokens = mx.array([prompt])
    while len(ids) < len(prompt) + TOKENS:
        ids.append(int(mx.argmax(model(tokens, cache=cache)[0, -1]).item()))
        tokens = mx.array([[ids[-1]]])
    return ids[len(prompt) :]


def our_greedy_ids(folder: Path, model: Transformer, prompt: list[int]) -> list[int]:
    step = Stepper(model, KVCache(open_checkpoint(folder).config, limit=1024))
    logits = prefill(step, prompt, chunk=16).result()
    greedy = Sampler(SamplingParams(temperature=0), 0)
    return [t.id for t in decode(step, logits, greedy, stop=frozenset(), max_tokens=TOKENS)]


@pytest.mark.parametrize("kind", ["bf16", "4 bit"])
@pytest.mark.slow
def test_greedy_ids_equal_mlx_lm_for_256_tokens(kind: str) -> None:
    folder = DEMO if kind == "bf16" else demo_checkpoint()
    our_model, their_model, tokenizer = ours(folder), theirs(folder), Tokenizer.from_folder(folder)
    for question in QUESTIONS:
        prompt = tokenizer.encode_chat(question)
        assert our_greedy_ids(folder, our_model, prompt) == their_greedy_ids(their_model, prompt)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make the demo with the tokenizer files that mlx-lm's convert needs."""
    folder = tmp_path_factory.mktemp("source") / "demo"
    convert_checkpoint(DEMO, folder.parent / "exported")
    shutil.copytree(
        DEMO,
        folder,
        ignore=lambda _, names: [n for n in names if n.endswith(".py") or n == "__pycache__"],
    )
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder.parent / "exported" / name, folder)
    (folder / "tekken.json").unlink()
    return folder


@pytest.fixture(autouse=True)
def _offline() -> Iterator[None]:
    before = os.environ.get("HF_HUB_OFFLINE")
    os.environ["HF_HUB_OFFLINE"] = "1"
    yield
    if before is None:
        del os.environ["HF_HUB_OFFLINE"]
    else:
        os.environ["HF_HUB_OFFLINE"] = before


@pytest.mark.parametrize(
    "options",
    [
        {"q_bits": 4, "q_group_size": 64},
        pytest.param({"q_bits": 8, "q_group_size": 64}, marks=pytest.mark.slow),
        {"quant_predicate": "mixed_4_6"},
        {"q_mode": "mxfp4", "q_bits": 4, "q_group_size": 32},
    ],
    ids=["4 bit", "8 bit", "mixed_4_6", "mxfp4"],
)
def test_what_mlx_lm_converts_gives_the_same_logits_here(
    source: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    from mlx_lm import convert

    folder = tmp_path / "theirs"
    convert(str(source), str(folder), quantize=True, **options)
    ids = mx.array([Tokenizer.from_folder(DEMO).encode_chat(QUESTIONS[0])])
    expected, logits = theirs(folder)(ids), ours(folder)(ids)
    assert float(mx.linalg.norm(logits - expected) / mx.linalg.norm(expected)) <= 1e-5


@pytest.mark.parametrize(
    "recipe",
    [
        "4bit",
        *(pytest.param(r, marks=pytest.mark.slow) for r in ("4bit-head6", "mixed_4_6", "8bit")),
    ],
)
def test_mlx_lm_loads_what_we_convert(tmp_path: Path, recipe: str) -> None:
    """Through its public door; its tokenizer gives our ids though mistral-common is installed."""
    from mlx_lm import load

    folder = tmp_path / "ours"
    convert_checkpoint(DEMO, folder, recipe=recipe)
    assert find_spec("mistral_common") is not None
    model, tokenizer = load(str(folder))
    model.set_dtype(mx.float32)
    prompt = Tokenizer.from_folder(folder).encode_chat(QUESTIONS[2])
    messages = [{"role": "user", "content": QUESTIONS[2]}]
    assert tokenizer.apply_chat_template(messages, add_generation_prompt=True) == prompt
    # mlx_lm.generate encodes the text of the prompt.
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert tokenizer.encode(text, add_special_tokens=False) == prompt
    ids = mx.array([prompt])
    expected, logits = model(ids), ours(folder)(ids)
    assert float(mx.linalg.norm(logits - expected) / mx.linalg.norm(expected)) <= 1e-5
