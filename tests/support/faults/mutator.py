"""Damage a checkpoint at random: bytes, JSON, headers, or something in a file's place."""

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.support.corpus import FIRST, INDEX, OWN
from tests.support.faults.damage import PARAMS

NUMBERS = (
    0,
    1,
    -1,
    2,
    3,
    64,
    0.5,
    -0.0,
    1e-45,
    1e308,
    2**31 - 1,
    2**31,
    2**32,
    2**53,
    2**63,
    2**64,
    10**30,
    10**4000,
)
ODD: tuple[Any, ...] = (
    *NUMBERS, None, True, False, "", "x", "\0", "\ud800", "../x", "é" * 5000, [], {}, [0],
    [1, 2, 3], {"a": 1}, float("nan"), float("inf"), -float("inf"), "F8_E4M3", "BF16",
    "model.norm.weight", FIRST,
)  # fmt: skip
RAW = (
    "9" * 5000,
    "[" * 3000,
    '{"a":' * 3000,
    "1e999",
    "01",
    "'x'",
    "NaN",
    "\ufeff1",
    "//",
    "[" + "0," * 9999 + "0]",
)
BYTES = b'0123456789-+.eE{}[]",: \\aUntrfF\x00\x7f\x80\xff\xc0'


class Pairs(list[tuple[Any, Any]]):
    """A JSON object whose keys may occur twice."""


def parse(text: bytes) -> Any:
    return json.loads(text, object_pairs_hook=Pairs)


def dump(value: Any) -> str:
    if isinstance(value, Pairs):
        return "{" + ",".join(f"{json.dumps(key)}:{dump(item)}" for key, item in value) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(dump, value)) + "]"
    return value.text if isinstance(value, Raw) else json.dumps(value)


class Raw:
    """Text in place of a JSON value, valid or not."""

    def __init__(self, text: str) -> None:
        self.text = text


def places(value: Any) -> list[tuple[Any, int]]:
    """Return every list or object of a document with each position in it."""
    if not isinstance(value, list):
        return []
    inner = [item[1] for item in value] if isinstance(value, Pairs) else value
    return [(value, i) for i in range(len(value))] + [
        place for item in inner for place in places(item)
    ]


def change_tree(chance: random.Random, text: bytes) -> bytes:
    """Change one value, key or order of a JSON document."""
    tree = parse(text)
    every = places(tree)
    holder, i = chance.choice(every)
    other, j = chance.choice(every)
    is_object = isinstance(holder, Pairs)

    def put(value: Any) -> None:
        holder[i] = (holder[i][0], value) if is_object else value

    value = holder[i][1] if is_object else holder[i]
    match chance.randrange(9):
        case 0:
            del holder[i]
        case 1:
            holder.insert(chance.randrange(len(holder) + 1), holder[i])
        case 2:
            put(chance.choice(ODD))
        case 3:
            put(Raw(chance.choice(RAW)))
        case 4 if isinstance(value, int | float):
            put(
                chance.choice(
                    (value + 1, value - 1, -value, value * 2, float(value), str(value), [value])
                )
            )
        case 5 if is_object:
            holder[i] = (
                chance.choice(
                    ("", "x", "__metadata__", holder[i][0] + "x", holder[j % len(holder)][0])
                ),
                value,
            )
        # Names change places.
        case 6 if is_object and isinstance(other, Pairs):
            holder[i], other[j] = (other[j][0], holder[i][1]), (holder[i][0], other[j][1])
        # Values change places.
        case 7 if is_object and isinstance(other, Pairs):
            holder[i], other[j] = (holder[i][0], other[j][1]), (other[j][0], holder[i][1])
        case _:
            for k, item in enumerate(sorted(holder, key=lambda _: chance.random())):
                holder[k] = item
            return dump(tree).encode() + chance.choice((b"", b"", b" ", b"\n", b"}"))
    return dump(tree).encode()


def change_bytes(chance: random.Random, content: bytes) -> bytes:
    """Flip, replace, remove, add or double bytes, or cut off the end."""
    found = bytearray(content)
    for _ in range(chance.choice((1, 1, 2, 5))):
        at = chance.randrange(len(found) + 1)
        match chance.randrange(6):
            case 0 if at < len(found):
                found[at] ^= 1 << chance.randrange(8)
            case 1 if at < len(found):
                found[at] = chance.choice(BYTES)
            case 2:
                del found[at : at + chance.choice((1, 2, 9))]
            case 3:
                found[at:at] = bytes([chance.choice(BYTES)])
            case 4:
                found[at:at] = found[at : at + chance.randrange(1, 60)]
            case _ if not chance.randrange(4):
                del found[at:]
    return bytes(found)


def change_document(chance: random.Random, content: bytes) -> bytes:
    return chance.choice((change_tree, change_bytes))(chance, content)


def change_shard(chance: random.Random, content: bytes) -> bytes:
    """Change the header of a safetensors file, its length, or the length of the data."""
    size = int.from_bytes(content[:8], "little")
    text, data = content[8 : 8 + size], content[8 + size :]
    kind = chance.randrange(10)
    if kind == 0:
        size = chance.choice(
            (
                *[n for n in NUMBERS if type(n) is int and 0 <= n < 2**64],
                size - 1,
                size + 1,
                size + 8,
            )
        )
        return (size % 2**64).to_bytes(8, "little") + text + data
    if kind == 1:
        return change_bytes(chance, content[:8]) + text + data
    if kind == 2:
        return content[
            : chance.choice((chance.randrange(len(content)), chance.randrange(8 + size)))
        ]
    if kind == 3:
        return content + bytes(chance.choice((1, 7, 4096)))
    text = change_document(chance, text)
    kept = len(text) if chance.randrange(5) else size
    return kept.to_bytes(8, "little") + text + data


def replace_file(chance: random.Random, path: Path) -> str:
    """Put nothing, or something that is not a file, in a file's place."""
    path.unlink()
    kind = chance.choice(
        ("nothing", "empty", "folder", "pipe", "device", "loop", "dangling", "sparse")
    )
    match kind:
        case "empty":
            path.touch()
        case "folder":
            path.mkdir()
        case "pipe":
            os.mkfifo(path)
        case "device":
            path.symlink_to(chance.choice(("/dev/zero", "/dev/null", "/dev/full", "/dev/random")))
        case "loop":
            path.symlink_to(path.name)
        case "dangling":
            path.symlink_to("nowhere")
        case "sparse":
            with path.open("wb") as file:
                file.truncate(chance.choice((8, 100_000, 10**8, 10**11)))
    return kind


# Files that hold more to be damaged come twice.
FILES: dict[str, tuple[str, ...]] = {
    "hf": ("*.safetensors", "*.safetensors", "config.json", INDEX, INDEX),
    "own": (
        "*.safetensors",
        "*.safetensors",
        "config.json",
        INDEX,
        "tekken.json",
        "SYSTEM_PROMPT.txt",
        OWN,
    ),
    "community": ("*.safetensors", "*.safetensors", "config.json", "tekken.json"),
    "native": ("*.safetensors", "*.safetensors", "params.json", "params.json", "config.json"),
}


def mutate(chance: random.Random, folder: Path, kind: str) -> str:
    """Damage one file of a folder, or add one; return its name and the damage."""
    path = chance.choice(sorted(folder.glob(chance.choice(FILES[kind]))))
    if not chance.randrange(25):
        return f"{path.name}: {replace_file(chance, path)}"
    if not chance.randrange(40):
        stray = path.with_name(
            chance.choice(("model-x.safetensors", "model.gguf", PARAMS, INDEX, f"x{path.name}"))
        )
        stray.write_bytes(path.read_bytes())
        return f"{stray.name}: {path.name}"
    change: Callable[[random.Random, bytes], bytes] = change_document
    if path.suffix == ".safetensors":
        change = change_shard
    elif path.suffix != ".json":
        change = change_bytes
    path.write_bytes(change(chance, path.read_bytes()))
    return f"{path.name}: {change.__name__}"
