"""A hostile tekken.json: refused before mistral-common builds it, soon and in little memory."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from magistral_mlx.errors import TokenizerError
from magistral_mlx.tokenizer.tekken import Tokenizer
from magistral_mlx.tokenizer.tekken_file import MAX_TEKKEN_VALUES
from tests.support.tekken import write_tekken


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = write_tekken(tmp_path_factory.mktemp("sound"), vocab_size=1300)
    raw: dict[str, Any] = json.loads((folder / "tekken.json").read_text())
    return raw


def refusal(folder: Path, raw: object) -> str:
    (folder / "tekken.json").write_text(raw if isinstance(raw, str) else json.dumps(raw))
    with pytest.raises(TokenizerError) as caught:
        Tokenizer.from_folder(folder)
    return str(caught.value)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"default_num_special_tokens": 10**9}, "default_num_special_tokens is 1000000000"),
        ({"default_num_special_tokens": 10**9, "default_vocab_size": 10**9 + 300}, "special"),
        ({"default_num_special_tokens": -5}, "special"),
        ({"default_num_special_tokens": 1000.0}, "special"),
        ({"default_num_special_tokens": True}, "special"),
        ({"default_vocab_size": 10**9}, "default_vocab_size is 1000000000"),
        ({"default_vocab_size": 0}, "default_vocab_size is 0"),
        ({"pattern": ""}, "pattern is ''"),
        ({"pattern": None}, "pattern is None"),
        ({"pattern": "a" * 3000}, "pattern is 'aaa"),
        ({"pattern": "x"}, "does not match every character"),
        ({"pattern": "[^a]"}, "does not match every character"),
        ({"pattern": r"\p{L}+|\s+|\p{N}"}, "does not match every character"),
        ({"pattern": r"(a+)+(?=b)|[\s\S]"}, "may take for ever"),
        ({"pattern": r"(\S)\1*|[\s\S]"}, "may take for ever"),
        ({"pattern": r"(?:a?+a?+)*b|[\s\S]"}, "may take for ever"),
        ({"pattern": "(?:(?:a{1000}){1000}){1000}|[\\s\\S]"}, "compiling"),
        ({"version": ["v11"]}, "not a valid TokenizerVersion"),
    ],
)
def test_a_config_that_mistral_common_would_believe_is_refused(
    tmp_path: Path, sound: dict[str, Any], changes: dict[str, Any], named: str
) -> None:
    said = refusal(tmp_path, sound | {"config": sound["config"] | changes})
    assert named in said
    assert said.startswith(f"{tmp_path / 'tekken.json'} is damaged or unknown; download it again")


def test_a_panic_of_the_tokenizer_is_an_error_of_ours(
    tmp_path: Path, sound: dict[str, Any]
) -> None:
    pattern = {"pattern": "a*"}  # it matches nothing, which tiktoken cannot encode
    assert "Panic" in refusal(tmp_path, sound | {"config": sound["config"] | pattern})


@pytest.mark.parametrize("rank", [0, 10**9, -1, "3", None])
def test_a_control_token_has_the_id_of_its_place(
    tmp_path: Path, sound: dict[str, Any], rank: Any
) -> None:
    special = [dict(token) for token in sound["special_tokens"]]
    special[3]["rank"] = rank
    assert "special token 3 is" in refusal(tmp_path, sound | {"special_tokens": special})


@pytest.mark.parametrize(
    "text", ["[" + "0," * (MAX_TEKKEN_VALUES + 1), "[" * 50_000, '{"config": {}}', "[]", "\ufeff{}"]
)
def test_text_that_is_no_tokenizer_is_refused(tmp_path: Path, text: str) -> None:
    assert "download it again" in refusal(tmp_path, text)


def test_escape_sequences_of_a_file_never_reach_a_terminal(
    tmp_path: Path, sound: dict[str, Any]
) -> None:
    said = refusal(tmp_path, sound | {"config": sound["config"] | {"version": "v\x1b]0;x\x07"}})
    assert "\x1b" not in said


def test_what_is_for_images_and_audio_is_not_read(tmp_path: Path, sound: dict[str, Any]) -> None:
    raw = sound | {"image": {"\x1b[31m": 1}, "audio": 5, "multimodal": [], "model_settings": 3}
    (tmp_path / "tekken.json").write_text(json.dumps(raw))
    assert Tokenizer.from_folder(tmp_path).vocab_size == 1300


@pytest.mark.parametrize("name", ["tekken.json", "SYSTEM_PROMPT.txt"])
@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_what_is_no_plain_file_is_refused_at_once(
    tmp_path: Path, sound: dict[str, Any], name: str, kind: str
) -> None:
    (tmp_path / "tekken.json").write_text(json.dumps(sound))
    path = tmp_path / name
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    with pytest.raises(TokenizerError, match=name):
        Tokenizer.from_folder(tmp_path)
