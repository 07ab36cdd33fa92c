"""Ways to damage a checkpoint: each returns a function of its folder."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx

from tests.support.corpus import FIRST, INDEX, SECOND
from tests.support.sources import change_json

Damage = Callable[[Path], object]
# As deep as json reads; repr gives up at half of it.
NESTED: Any = json.loads("[" * 900 + "]" * 900)
LONG = "x" * 1_000_000
DIGITS = 10**4000
NORM, HEAD = "model.norm.weight", "lm_head.weight"
WHOLE, NATIVE, PARAMS = "model.safetensors", "consolidated.safetensors", "params.json"


def instead(name: str, put: Callable[[Path], object]) -> Damage:
    """Put something else in a file's place."""

    def damage(folder: Path) -> None:
        (folder / name).unlink()
        put(folder / name)

    return damage


def sparse(size: int) -> Callable[[Path], None]:
    def put(path: Path) -> None:
        with path.open("wb") as file:
            file.truncate(size)

    return put


def link(target: str) -> Callable[[Path], None]:
    return lambda path: path.symlink_to(target)


def loop(path: Path) -> None:
    path.symlink_to(path.name)


def text(name: str, content: str | bytes) -> Damage:
    return lambda folder: (folder / name).write_bytes(
        content.encode() if isinstance(content, str) else content
    )


def values(name: str, **changes: object) -> Damage:
    return lambda folder: change_json(folder / name, **changes)


def weight_map(**changes: object) -> Damage:
    def damage(folder: Path) -> None:
        raw = json.loads((folder / INDEX).read_text())
        (folder / INDEX).write_text(json.dumps(raw | {"weight_map": raw["weight_map"] | changes}))

    return damage


def without_index(damage: Damage) -> Damage:
    def both(folder: Path) -> None:
        (folder / INDEX).unlink()
        damage(folder)

    return both


def header(name: str, change: Callable[[dict[str, Any]], object | None]) -> Damage:
    """Change the header of a safetensors file, or replace its text."""

    def damage(folder: Path) -> None:
        content = (folder / name).read_bytes()
        size = int.from_bytes(content[:8], "little")
        raw = json.loads(content[8 : 8 + size])
        new = change(raw)
        found = new if isinstance(new, bytes) else json.dumps(raw).encode()
        (folder / name).write_bytes(len(found).to_bytes(8, "little") + found + content[8 + size :])

    return damage


def entry(tensor: str, name: str = FIRST, **changes: object) -> Damage:
    return header(name, lambda raw: raw[tensor].update(changes))


def renamed(old: str, new: str, name: str = FIRST) -> Damage:
    return header(name, lambda raw: raw.update({new: raw.pop(old)}))


def many(count: int, what: str) -> str:
    return ",".join(what % i for i in range(count))


def tensors(name: str, change: Callable[[dict[str, mx.array]], object]) -> Damage:
    def damage(folder: Path) -> None:
        found = mx.load(str(folder / name))
        assert isinstance(found, dict)
        mx.eval(found)
        change(found)
        mx.save_safetensors(str(folder / name), found, {"format": "pt"})

    return damage


def heads_of(size: int) -> Damage:
    """Let all tensors and the config agree on an impossible head size."""

    def damage(folder: Path) -> None:
        for name in (FIRST, SECOND):
            tensors(
                name, lambda found: found.update({n: _cut(n, a, size) for n, a in found.items()})
            )(folder)
        change_json(folder / "config.json", head_dim=size)

    return damage


def _cut(name: str, array: mx.array, size: int) -> mx.array:
    heads = {"q_proj": 4, "k_proj": 2, "v_proj": 2}.get(name.split(".")[-2])
    if heads:
        return array[: heads * size]
    return mx.contiguous(array[:, : 4 * size]) if "o_proj" in name else array


def then(*damages: Damage) -> Damage:
    return lambda folder: [damage(folder) for damage in damages]
