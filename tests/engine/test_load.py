"""Loading the embedded model in 4 bit, and arguments that are refused."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

import magistral_mlx as mm
from magistral_mlx.engine.load import loading
from tests.support.tiny import DEMO

GREEDY = mm.SamplingParams(temperature=0)
QUESTION = "What is 48 + 76?"

WRONG_TYPES: dict[str, Callable[[mm.Magistral], object]] = {
    "a model that is a list": lambda _: mm.load(["demo"]),  # type: ignore[arg-type]
    "no model": lambda _: mm.load(""),
    "a revision of the demo": lambda _: mm.load("demo", revision="main"),
    "a revision that is a number": lambda _: mm.load("demo", revision=3),  # type: ignore[arg-type]
    "a draft that is a list": lambda _: mm.load("demo", draft_model=["demo"]),  # type: ignore[arg-type]
    "a context that is text": lambda _: mm.load("demo", max_kv_size="x"),  # type: ignore[arg-type]
    "half a position": lambda _: mm.load("demo", max_kv_size=1.5),  # type: ignore[arg-type]
    "half an id a pass": lambda _: mm.load("demo", prefill_step_size=1.5),  # type: ignore[arg-type]
    "memory that is text": lambda _: mm.load("demo", memory_gb="x"),  # type: ignore[arg-type]
    "memory that is a truth": lambda _: mm.load("demo", memory_gb=True),
    "no question": lambda m: m.ask(None),  # type: ignore[arg-type]
    "sampling that is text": lambda m: m.ask(QUESTION, "x"),  # type: ignore[arg-type]
    "sampling that is a table": lambda m: m.ask(QUESTION, {}),  # type: ignore[arg-type]
    "a chat asked with a number": lambda m: m.chat().ask(5),  # type: ignore[arg-type]
    "a chat asked with messages": lambda m: m.chat().ask([{"role": "user", "content": "x"}]),  # type: ignore[arg-type]
    "a system prompt that is a number": lambda m: m.chat(system_prompt=5),  # type: ignore[arg-type]
    "tools that are text": lambda m: m.chat(tools="x"),  # type: ignore[arg-type]
    "a tool that is nothing": lambda m: m.chat(tools=[{}]),
    "a path that is a number": lambda m: m.chat().save(5),  # type: ignore[arg-type]
    "a path with a zero byte": lambda m: m.resume("a\0b"),
    "a cache that is a list": lambda m: m.ask(QUESTION, prompt_cache_file=["c"]),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("case", WRONG_TYPES)
def test_what_is_of_no_use_is_an_option_error(magistral: mm.Magistral, case: str) -> None:
    with pytest.raises(mm.OptionError):
        WRONG_TYPES[case](magistral)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantized_cache_is_smaller_and_survives_a_file(bits: int, tmp_path: Path) -> None:
    plain, packed = mm.load("demo", max_kv_size=512), mm.load("demo", max_kv_size=512, kv_bits=bits)
    plain.ask(QUESTION, GREEDY)
    first = packed.ask(QUESTION, GREEDY, prompt_cache_file=tmp_path / "c")
    # float32 here: 64 values take 256 bytes, or 8 * bits and two float32
    assert packed.prefix_cache.cache.nbytes / plain.prefix_cache.cache.nbytes == pytest.approx(
        (8 * bits + 8) / 256
    )
    packed.prefix_cache.clear()
    assert packed.ask(QUESTION, GREEDY, prompt_cache_file=tmp_path / "c").answer == first.answer


def test_loading_reports_bytes_and_checks_the_vocabulary(tmp_path: Path) -> None:
    steps = list(loading("demo"))
    assert steps[-1].done == steps[-1].total > 0
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in (f for f in DEMO.iterdir() if f.suffix in (".json", ".safetensors")):
        (broken / file.name).write_bytes(file.read_bytes())
    tekken = json.loads((broken / "tekken.json").read_text())
    tekken["config"]["default_vocab_size"] -= 1
    tekken["vocab"].pop()
    (broken / "tekken.json").write_text(json.dumps(tekken))
    with pytest.raises(mm.MagistralError, match="2047"):
        mm.load(broken)
