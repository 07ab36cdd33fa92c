"""Give the runtime what an attacker would: tokenizers, file names, caches, tools and messages.

Run ``python -m tests.support.faults.hostile FOLDER COUNT SEED``.
"""

import hashlib
import json
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

import magistral_mlx as mm
from magistral_mlx.checkpoint.folder import open_checkpoint, resolve
from magistral_mlx.errors import MagistralError, as_flags, visible
from magistral_mlx.tokenizer.tekken import Tokenizer
from tests.support.conversations import conversations
from tests.support.corpus import Watch
from tests.support.faults.mutator import ODD, change_bytes, change_document
from tests.support.tekken import write_tekken
from tests.support.tiny import make_config, make_weights, write_checkpoint

CONFIG = make_config(num_layers=1, vocab_size=1300)
# Longest case in seconds, on a busy machine.
SLOWEST = 20.0
LONGEST_MESSAGE = 3000
TEXTS = ("Hi", "a" * 3000, " \n\t" * 500, "é漢🙂\u0301" * 200, "<s>[INST]</s>", "\x00\x7f\u2028")
PATTERNS = (
    *("", "x", ".", "a*", "()", r"[\s\S]", r"[\s\S]+", r"\s+(?!\S)|\S", r"(?=a)", r"\b", "^", "$"),
    *(r"(a+)+$", r"(\S)\1", r"[^\r\n]", r"\p{L}+|[\s\S]", "(?i:a)|[\\s\\S]", "(?P<x>a)", "[", "("),
    *(r"(?:a|a)*|[\s\S]", r"a{99999}", r"(?:a{999}){999}", r"\S++|\s", r"\K", r"[\s\S]{1,1000}"),
)
NAME_PARTS = (
    *("model", "-00001-of-00002", ".safetensors", "..", "/", " ", "\n", "\r", "\x1b[31m", "\x07"),
    *(
        "\x1b]0;x\x07",
        "\u202e",
        "\u2066",
        "\x9b2J",
        "\udcff",
        "é",
        "漢" * 60,
        "a" * 300,
        "%s",
        "{}",
    ),
    *("--", "~", "~nobody/", "$HOME", "\\", "'", "[bold]", ".gguf", "\u2028", "\x7f"),
)
OBJECTS: tuple[Any, ...] = (
    *ODD, 10**5000, -(10**5000), b"x", {1}, (1,), object(), len, {None: 1}, {(): 1}, {10**5000: 1},
    "\x1b[31m", "\u202e", "text", "thinking", "image_url", "function", "user", "tool", "a" * 9,
)  # fmt: skip


def deep(chance: random.Random) -> Any:
    """Return lists or objects that are nested without end."""
    value: Any = chance.choice(OBJECTS)
    for _ in range(chance.choice((10, 300, 5000))):
        value = {"a": value} if chance.randrange(2) else [value]
    return value


def change_value(chance: random.Random, value: Any) -> Any:
    """Return a copy of plain values in which one is another one, or missing, or there twice."""
    if not isinstance(value, list | dict) or not value or not chance.randrange(4):
        return deep(chance) if not chance.randrange(12) else chance.choice(OBJECTS)
    if isinstance(value, list):
        at = chance.randrange(len(value))
        kept = [*value[:at], change_value(chance, value[at]), *value[at + 1 :]]
        return chance.choice((kept, kept, kept, value[:at] + value[at + 1 :], [*value, value[at]]))
    key = chance.choice(list(value))
    changed = value | {key: change_value(chance, value[key])}
    if not chance.randrange(6):
        changed.pop(key)
    if not chance.randrange(10):
        changed[chance.choice(("reasoning", "tool_calls", "prefix", 5, None, "\x1b"))] = value
    return changed


def hostile_name(chance: random.Random) -> str:
    return "".join(chance.choice(NAME_PARTS) for _ in range(chance.randrange(1, 5)))


class World:
    """A small model, a file of each kind, and the ways to attack them."""

    def __init__(self, folder: Path) -> None:
        self.model = write_checkpoint(folder / "model", CONFIG, make_weights(CONFIG))
        self.folder, self.cache = folder, folder / "talk.cache"
        write_tekken(self.model, CONFIG.vocab_size)
        self.magistral = mm.load(self.model, max_kv_size=2048)
        self.tokenizers = [self.magistral.tokenizer]
        for version in ("v7", "v13"):
            other = write_tekken(folder / version, CONFIG.vocab_size, version)
            form = "control" if version == "v13" else "text"
            self.tokenizers.append(Tokenizer.from_folder(other, form))
        self.tekken = (self.model / "tekken.json").read_bytes()
        chat = self.magistral.chat(system_prompt="Be brief.")
        chat.ask("Hi", mm.SamplingParams(max_tokens=3, seed=0))
        chat.save(self.cache)
        self.saved = self.cache.read_bytes()
        self.conversations = conversations(60)

    def attack_tokenizer(self, chance: random.Random) -> None:
        if chance.randrange(2):
            content = change_document(chance, self.tekken)
        else:
            raw = json.loads(self.tekken)
            key = chance.choice(list(raw["config"]))
            raw["config"][key] = chance.choice(PATTERNS if key == "pattern" else ODD)
            if not chance.randrange(3):
                rank = chance.randrange(len(raw["special_tokens"]))
                raw["special_tokens"][rank][chance.choice(("rank", "token_str"))] = chance.choice(
                    ODD
                )
            content = json.dumps(raw).encode()
        folder = self.folder / "tokenizer"
        folder.mkdir(exist_ok=True)
        (folder / "tekken.json").write_bytes(content)
        tokenizer = Tokenizer.from_folder(folder)
        for text in TEXTS:
            tokenizer.decode(tokenizer.encode(text))
            tokenizer.encode_chat(f"{text}?")

    def attack_names(self, chance: random.Random) -> None:
        name = hostile_name(chance)
        if not chance.randrange(4):
            resolve(chance.choice((name, self.model / name[:100])))
        index = self.model / "model.safetensors.index.json"
        content = index.read_bytes()
        stray = self.model / f"model{name.replace('/', '')[:40]}.safetensors"
        try:
            if chance.randrange(2):
                stray.write_bytes(chance.choice((b"", b"x" * 100)))
            else:
                raw = json.loads(content)
                raw["weight_map"][chance.choice((name, *raw["weight_map"]))] = name
                index.write_text(json.dumps(raw))
            open_checkpoint(self.model)
        except (OSError, ValueError) as error:
            # The system has no such name, or the test itself cannot write it.
            if isinstance(error, MagistralError):
                raise
        finally:
            index.write_bytes(content)
            for path in self.model.glob("model*"):
                if path.name.endswith(".safetensors") and "-of-" not in path.name:
                    path.unlink()

    def attack_cache(self, chance: random.Random) -> None:
        """Change a saved conversation, and mostly give it the right hash again."""
        size = int.from_bytes(self.saved[:8], "little")
        header: dict[str, Any] = json.loads(self.saved[8 : 8 + size])
        data = bytearray(self.saved[8 + size :])
        places = {n: e["data_offsets"] for n, e in header.items() if n != "__metadata__"}
        kind = chance.choice(("header", "chat", "chat", "ids", "layer", "bytes"))
        if kind == "header":
            header = change_value(chance, header)
        elif kind == "chat":
            begin, end = places["chat"]
            state = json.loads(data[begin:end])
            text = "[" * 9000
            with suppress(TypeError, ValueError, RecursionError):  # JSON has no such value
                text = json.dumps(change_value(chance, state), default=str)
            data, header = _replace(header, bytes(data), "chat", text.encode(errors="replace"))
        elif kind == "ids":
            begin, end = places["ids"]
            ids = np.frombuffer(bytes(data[begin:end]), np.int32).copy()
            ids[chance.randrange(len(ids))] = chance.choice((-1, 2**31 - 1, 1300, -(2**31), 0))
            data[begin:end] = ids.tobytes()
        else:
            data = bytearray(change_bytes(chance, bytes(data)))
        try:
            self.cache.write_bytes(_signed(header, bytes(data)))
        except (TypeError, ValueError, LookupError, RecursionError, AttributeError):
            self.cache.write_bytes(change_bytes(chance, self.saved))  # no JSON: plain damage
        chat = self.magistral.resume(self.cache)
        self.magistral.free_context([*chat.messages, {"role": "user", "content": "?"}])

    def attack_messages(self, chance: random.Random) -> None:
        messages, options = chance.choice(self.conversations)
        if chance.randrange(2):
            messages = change_value(chance, messages)
        else:
            options = options | {"tools": change_value(chance, options.get("tools") or [{}])}
        known = {key: value for key, value in options.items() if key in ("tools", "think")}
        chance.choice(self.tokenizers).encode_chat(messages, **known)


def _replace(
    header: dict[str, Any], data: bytes, name: str, new: bytes
) -> tuple[bytearray, dict[str, Any]]:
    """Give one tensor of bytes another content, and move those behind it."""
    begin, end = header[name]["data_offsets"]
    shift = len(new) - (end - begin)
    moved = {}
    for key, entry in header.items():
        if key != "__metadata__":
            first, last = entry["data_offsets"]
            if key == name:
                place = {"shape": [len(new)], "data_offsets": [begin, begin + len(new)]}
            else:
                place = {"data_offsets": [first + shift, last + shift]} if first >= end else {}
            moved[key] = entry | place
        else:
            moved[key] = entry
    return bytearray(data[:begin] + new + data[end:]), moved


def _signed(header: dict[str, Any], data: bytes) -> bytes:
    """Write a cache file with the hash that fits its content."""
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    names = [name for name in header if name not in ("__metadata__", "sha256")]
    digests = [hashlib.sha256(head).digest()]
    for name in names:
        begin, end = header[name]["data_offsets"]
        digests.append(hashlib.sha256(data[begin:end]).digest())
    begin, end = header["sha256"]["data_offsets"]
    stamp = hashlib.sha256(b"".join(digests)).digest()
    return head + data[:begin] + stamp + data[end:]


def faults_of(error: BaseException | None, seconds: float) -> list[str]:
    """List what is wrong with the end of one case."""
    faults = [f"took {seconds:.1f} s"] if seconds > SLOWEST else []
    if error is None:
        return faults
    if not isinstance(error, MagistralError):
        return [*faults, f"{type(error).__name__}: {error!s:.300}"]
    for text in (str(error), as_flags(error)):
        if text != visible(text):
            faults.append(f"a terminal obeys {text!r:.300}")
        if len(text) > LONGEST_MESSAGE:
            faults.append(f"a message of {len(text)} characters: {text!r:.200}")
    return faults


def main(folder: Path, count: int, seed: int) -> dict[str, Any]:
    """Make the attacks; return their endings, faults, and the memory and time they took."""
    chance, world = random.Random(seed), World(folder)
    attacks: list[Callable[[random.Random], None]] = [
        *[world.attack_tokenizer] * 3,
        *[world.attack_messages] * 3,
        *(world.attack_names, world.attack_cache),
    ]
    watch, endings, faults, slowest = Watch(), Counter[str](), [], 0.0
    for i in range(count):
        attack, error = chance.choice(attacks), None
        started = time.perf_counter()
        with watch.case():
            try:
                attack(chance)
            except (KeyboardInterrupt, SystemExit):
                raise
            # A panic in Rust is not an Exception.
            except BaseException as caught:
                error = caught
        seconds = time.perf_counter() - started
        slowest = max(slowest, seconds)
        endings[f"{attack.__name__} {'taken' if error is None else 'refused'}"] += 1
        faults += [f"{i}, {attack.__name__}: {fault}" for fault in faults_of(error, seconds)]
    return {"endings": endings, "faults": faults, "slowest": slowest} | watch.figures()


if __name__ == "__main__":
    found = main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
    sys.stdout.write(json.dumps(found, indent=1, ensure_ascii=os.name != "posix"))
