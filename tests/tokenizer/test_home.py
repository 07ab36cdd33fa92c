"""A checkpoint without tekken.json: that of its base model, or a named one, before its weights."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import magistral_mlx as mm
from magistral_mlx import bridge, plan
from magistral_mlx.checkpoint.folder import resolve
from magistral_mlx.checkpoint.hub_transfer import HEAD_BYTES
from magistral_mlx.convert import __main__ as convert_door
from magistral_mlx.convert import verify_checkpoint
from magistral_mlx.errors import CheckpointError, HubError, MagistralError, TokenizerError
from magistral_mlx.tokenizer import home
from magistral_mlx.tokenizer.home import find_tokenizer
from magistral_mlx.tokenizer.tekken import Tokenizer
from tests.support.hub_server import REPO, Hub, go_offline, serving, use
from tests.support.sources import content, convert_quickly
from tests.support.tiny import DEMO

BASE, OTHER = "org/Base-1", "org/Other-1"
CARD = "---\nlanguage: en\nbase_model: {}\ntags:\n- mlx\n---\n# A model\n"
WEIGHTS = "model.safetensors"
PROMPT = "Think.\n<think>\n</think>\n\nProblem:\n\n"


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a folder as mlx-lm leaves it: tokenizer.json, and neither tekken.json nor a prompt."""
    folder = tmp_path_factory.mktemp("converted")
    convert_quickly(DEMO, folder / "ours")
    # Of another release, with two control ids more.
    raw = json.loads((DEMO / "tekken.json").read_text())
    controls = raw["special_tokens"]
    for tag in ("[THINK]", "[/THINK]"):
        controls.append({"rank": len(controls), "token_str": tag, "is_control": True})
    raw["config"] |= {"version": "v13", "default_num_special_tokens": len(controls)}
    raw["config"]["num_vocab_tokens"] -= 2
    raw["vocab"] = raw["vocab"][:-2]
    (folder / "other.json").write_text(json.dumps(raw))
    theirs = Path(shutil.copytree(folder / "ours", folder / "theirs"))
    for name in ("magistral_mlx.json", "tekken.json", "SYSTEM_PROMPT.txt", "README.md"):
        (theirs / name).unlink()
    (theirs / "tokenizer.json").write_text(tokenizer_json(folder / "ours"))
    return theirs


def tokenizer_json(folder: Path, change: dict[int, str] | None = None) -> str:
    """Write the ids of a tekken.json by mistral-common's table of pieces, some changed."""
    tekken = Tokenizer.from_folder(folder)._tekken
    visible = [b for b in range(256) if chr(b).isprintable() and not chr(b).isspace()]
    hidden = [b for b in range(256) if b not in visible]
    spelled = {b: chr(b) for b in visible} | {b: chr(256 + i) for i, b in enumerate(hidden)}
    names = {}
    for i in range(tekken.n_words):
        is_text = i >= tekken.num_special_tokens
        piece = tekken.id_to_byte_piece(i) if is_text else b""
        names[i] = "".join(spelled[b] for b in piece) if is_text else tekken.id_to_piece(i)
    names |= change or {}
    added = [{"id": i, "content": names[i]} for i in range(tekken.num_special_tokens)]
    vocab = {name: i for i, name in names.items() if i >= tekken.num_special_tokens}
    return json.dumps({"added_tokens": added, "model": {"type": "BPE", "vocab": vocab}})


@pytest.fixture
def folder(converted: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(converted, tmp_path / "theirs"))


@pytest.fixture
def hub(converted: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """Serve the folder with a card that names its base, the base, and another release."""
    state = Hub(content(converted) | {"README.md": CARD.format(BASE).encode()})
    tekken = (DEMO / "tekken.json").read_bytes()
    state.repositories = {
        BASE: {"tekken.json": tekken, "SYSTEM_PROMPT.txt": PROMPT.encode(), "big": b"x"},
        OTHER: {"tekken.json": (converted.parent / "other.json").read_bytes()},
    }
    with serving(state) as endpoint:
        use(monkeypatch, endpoint, tmp_path)
        yield state


def fetched_before(hub: Hub, name: str) -> list[str]:
    """Return the files whose content was asked for before ``name``."""
    got = [r.name for r in hub.requests if r.method == "GET" and "/resolve/" in r.path]
    return got[: got.index(name)]


def test_a_hub_model_takes_that_of_its_base_before_its_weights(hub: Hub) -> None:
    magistral = mm.load(REPO)
    assert magistral.tokenizer.system_prompt == PROMPT
    assert "124" in magistral.ask("What is 48 + 76?", mm.SamplingParams(temperature=0)).answer
    assert "tekken.json" in fetched_before(hub, WEIGHTS)
    assert "big" not in hub.fetched()
    hub.forget()
    find_tokenizer(resolve(REPO, revision=hub.commit))
    assert not hub.requests  # both are in the hub's cache


@pytest.mark.parametrize(
    ("base", "options", "words"),
    [
        (None, {}, r"tekken.json is missing, and no file .* tokenizer=mistralai/Magistral"),
        ("/a/folder", {}, "names '/a/folder' as its base model, which is no hub id"),
        ("org/gone-1", {}, "base model is not here: org/gone-1"),
        (OTHER, {}, r"is not the tokenizer of .*tokenizer.json: id 34 is .*THINK"),
        (BASE, {"tokenizer": OTHER}, r"is not the tokenizer of .*tokenizer.json: id 34 is .*THINK"),
        (BASE, {"tokenizer": "none"}, "none is no folder and no hub id"),
        (None, {"tokenizer": "org/gone-1"}, "org/gone-1"),
    ],
)
def test_it_is_refused_before_the_weights_are_fetched(
    hub: Hub, base: str | None, options: dict[str, Any], words: str
) -> None:
    card = "no front matter" if base is None else CARD.format(base)
    hub.files["README.md"] = card.encode()
    with pytest.raises(MagistralError, match=words):
        mm.load(REPO, **options)
    assert WEIGHTS not in hub.fetched()


def test_plan_and_convert_say_so_before_the_weights_are_fetched(
    hub: Hub, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    hub.files["README.md"] = b""
    flags = ["--no-tokenizer-json", "--q-method", "round", "--mlx-path", str(tmp_path / "out")]
    assert plan.main(["--model", REPO]) == 2
    assert convert_door.main(["--hf-path", REPO, *flags]) == 2
    assert convert_door.main(["--hf-path", REPO, *flags, "--stream"]) == 2
    err = capfd.readouterr().err
    assert err.count("that this model was made from, such as --tokenizer mistralai/") == 3
    assert hub.sent[WEIGHTS] <= HEAD_BYTES  # a stream reads the header
    assert plan.main(["--model", REPO, "--tokenizer", BASE]) == 0
    hub.files["README.md"] = CARD.format(f"\n- {BASE}").encode()
    assert convert_door.main(["--hf-path", REPO, *flags, "--stream", "--q-bits", "8"]) == 0
    assert (tmp_path / "out" / "tekken.json").read_bytes() == (DEMO / "tekken.json").read_bytes()
    told = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert told["base_model"] == REPO


def test_a_folder_takes_the_named_one(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(TokenizerError, match=r"tekken\.json is missing"):
        mm.load(folder)
    assert mm.load(folder, tokenizer=DEMO).tokenizer.path == DEMO / "tekken.json"
    assert mm.load(folder, tokenizer="demo").tokenizer.path == DEMO / "tekken.json"
    assert plan.main(["--model", str(folder)]) == 2
    assert plan.main(["--model", str(folder), "--tokenizer", "demo"]) == 0
    with pytest.raises(TokenizerError, match=r"has no tekken\.json; let tokenizer name"):
        mm.load(folder, tokenizer=folder)


@pytest.mark.slow
def test_a_conversion_of_it_is_complete_and_verifies(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert_quickly(folder, out, tokenizer="demo", q_bits=8)
    assert (out / "tekken.json").read_bytes() == (DEMO / "tekken.json").read_bytes()
    assert convert_quickly(folder, out, tokenizer=DEMO, q_bits=8).already_complete
    assert verify_checkpoint(out, folder).passed


def test_a_host_fetches_none(hub: Hub, folder: Path) -> None:
    (folder / "README.md").write_text(CARD.format(BASE))
    answer = bridge.plan(str(folder))
    assert not answer["ok"]
    assert "nothing is fetched here" in str(answer)
    assert not hub.requests
    assert bridge.plan(str(folder), tokenizer=str(DEMO))["ok"]
    find_tokenizer(folder)
    hub.forget()
    assert bridge.plan(str(folder))["ok"]  # from the hub's cache
    assert not hub.requests


def test_what_mlx_lm_copies_names_the_base(hub: Hub, folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps({"base_model": BASE}))
    assert (find_tokenizer(folder) / "SYSTEM_PROMPT.txt").read_text() == PROMPT


@pytest.mark.parametrize(
    ("card", "base"),
    [
        (f"base_model: {BASE}", BASE),
        (f"base_model: '{BASE}'  \r", BASE),
        (f"base_model:\r\n  - {BASE}\r\n  - {OTHER}\r", BASE),
        ("base_model:" + " " * 1_000_000, None),
        ("base_model_relation: quantized", None),
        ("x: y\n---\nbase_model: org/later", None),
    ],
)
def test_the_base_is_read_off_the_card(folder: Path, card: str, base: str | None) -> None:
    (folder / "README.md").write_bytes(f"---\n{card}\n---\n# A model\n".encode())
    with pytest.raises(MagistralError, match=base or "no file beside it names the base model"):
        find_tokenizer(folder, fetches=False)


def test_a_file_far_too_large_is_not_fetched(
    hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(home, "MAX_TEKKEN_BYTES", 1000)
    with pytest.raises(HubError, match="far too many for what it is"):
        find_tokenizer(folder, BASE)
    assert not hub.fetched()


def test_what_arrived_damaged_is_deleted(hub: Hub, folder: Path) -> None:
    (folder / "README.md").write_text(CARD.format(BASE))
    hub.damaged = frozenset({"tekken.json"})
    with pytest.raises(HubError, match="arrived damaged"):
        find_tokenizer(folder)
    hub.damaged = frozenset()
    taken = Tokenizer.of_model(folder, 2048).path
    assert taken.read_bytes() == (DEMO / "tekken.json").read_bytes()


def test_without_a_network_the_message_names_both_ways(
    hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "README.md").write_text(CARD.format(f"'{BASE}'"))
    go_offline(monkeypatch, "flag")
    with pytest.raises(
        HubError, match=r"name a folder that has it by .*org/Base-1 cannot be fetched"
    ):
        find_tokenizer(folder)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (lambda f: tokenizer_json(DEMO, {1500: "Ġelse"}), "id 1500 is"),
        (lambda f: tokenizer_json(DEMO, {3: "[ELSE]"}), r"id 3 is '\[INST\]'"),
        (lambda f: "[" * 100_000, "damaged or of another kind"),
        (lambda f: "[0" + ",0" * 3_000_001 + "]", "far too large"),
        (lambda f: '{"model": 1, "added_tokens": []}', "damaged or of another kind"),
    ],
)
def test_a_tokenizer_json_of_another_model_is_found(folder: Path, text: Any, words: str) -> None:
    (folder / "tokenizer.json").write_text(text(folder))
    with pytest.raises(TokenizerError, match=words):
        Tokenizer.of_model(folder, 2048, given="demo")


def test_a_vocabulary_of_another_size_is_found(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match="has 2048 ids, the model has 2050"):
        Tokenizer.of_model(folder, 2050, given="demo")
