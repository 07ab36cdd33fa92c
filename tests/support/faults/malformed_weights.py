"""Weight files and indexes damaged by hand, and the words of their refusal."""

import json
import os
import shutil
from pathlib import Path
from typing import NamedTuple

from tests.support.corpus import FIRST, INDEX, SECOND, Step
from tests.support.faults.damage import (
    DIGITS,
    HEAD,
    LONG,
    NATIVE,
    NESTED,
    NORM,
    Damage,
    entry,
    header,
    instead,
    link,
    loop,
    many,
    renamed,
    sparse,
    text,
    then,
    weight_map,
    without_index,
)


class Case(NamedTuple):
    """A kind of ``corpus.write_kinds``, its damage, and the steps that refuse it in these words."""

    kind: str
    steps: tuple[Step, ...]
    damage: Damage
    words: str


def hf(damage: Damage, words: str) -> Case:
    return Case("hf", ("run", "convert"), damage, words)


def packed(damage: Damage, words: str) -> Case:
    return Case("community", ("run",), damage, words)


def native(damage: Damage, words: str) -> Case:
    return Case("native", ("convert",), damage, words)


FILES = {
    "index is a pipe": hf(
        instead(INDEX, os.mkfifo), f"{INDEX} cannot be read (it is no plain file)"
    ),
    "index is a folder": hf(
        instead(INDEX, Path.mkdir), f"{INDEX} cannot be read (it is no plain file)"
    ),
    "index is a device": hf(
        instead(INDEX, link("/dev/zero")), f"{INDEX} cannot be read (it is no plain"
    ),
    "index links to nothing": hf(instead(INDEX, link("gone")), f"{INDEX} cannot be read ("),
    "index links to itself": hf(instead(INDEX, loop), f"{INDEX} cannot be read ("),
    "index has no end": hf(instead(INDEX, sparse(10**11)), f"{INDEX} has 100000000000 bytes"),
    "config is a pipe": hf(instead("config.json", os.mkfifo), "has no config.json"),
    "config is a folder": hf(instead("config.json", Path.mkdir), "has no config.json"),
    "config is a device": hf(instead("config.json", link("/dev/zero")), "has no config.json"),
    "config links to nothing": hf(instead("config.json", link("gone")), "has no config.json"),
    "config is over its limit": hf(instead("config.json", sparse(10**7 + 1)), "has 10000001 bytes"),
    "config is zeros": hf(
        instead("config.json", sparse(10**7)), "config.json is damaged: it is not JSON"
    ),
    "shard is a pipe": hf(instead(SECOND, os.mkfifo), f"said to be in {SECOND}, which is missing"),
    "shard links to itself": hf(instead(SECOND, loop), f"said to be in {SECOND}, which is missing"),
    "shard without index is a pipe": hf(
        without_index(instead(FIRST, os.mkfifo)), f"{FIRST} cannot be read (it is no plain file)"
    ),
    "shard without index is a folder": hf(
        without_index(instead(FIRST, Path.mkdir)), f"{FIRST} cannot be read (it is no plain file)"
    ),
    "shard without index is a device": hf(
        without_index(instead(FIRST, link("/dev/zero"))),
        f"{FIRST} cannot be read (it is no plain file)",
    ),
    "shard without index links to nothing": hf(
        without_index(instead(SECOND, link("gone"))), f"{SECOND} cannot be read ("
    ),
    "shard is 10 GB of zeros": hf(
        instead(FIRST, sparse(10**10)), f"{FIRST} is damaged: its header"
    ),
    "tekken.json is a pipe": hf(instead("tekken.json", os.mkfifo), "tekken.json is missing"),
    "tekken.json is a folder": hf(instead("tekken.json", Path.mkdir), "tekken.json is missing"),
    "tekken.json links to nothing": hf(
        instead("tekken.json", link("gone")), "tekken.json is missing"
    ),
    "tekken.json has no end": hf(instead("tekken.json", sparse(10**11)), "has 100000000000 bytes"),
    "tekken.json is nested": hf(text("tekken.json", "[" * 90_000), "tekken.json is damaged"),
    "prompt is a pipe": hf(
        instead("SYSTEM_PROMPT.txt", os.mkfifo), "SYSTEM_PROMPT.txt is no plain"
    ),
    "prompt has no end": hf(
        instead("SYSTEM_PROMPT.txt", sparse(10**11)), "SYSTEM_PROMPT.txt is no pl"
    ),
    "prompt links to nothing": hf(
        instead("SYSTEM_PROMPT.txt", link("gone")), "SYSTEM_PROMPT.txt is no plain file"
    ),
}

HEADERS = {
    "key twice behind 80,000": hf(
        header(
            FIRST, lambda _: f'{{{many(80_000, chr(34) + "%d" + chr(34) + ":1")},"7":1}}'.encode()
        ),
        f"{FIRST} is damaged: it is not JSON (the key '7' occurs twice)",
    ),
    "300,000 tensors": hf(
        header(FIRST, lambda _: f"[{many(300_000, '%d')}]".encode()), "does not start with '{'"
    ),
    "300,000 values": hf(
        header(FIRST, lambda _: f'{{"{HEAD}":[{many(300_000, "%d")}]}}'.encode()),
        "values, 250000 are allowed",
    ),
    "10 MB of metadata": hf(
        header(FIRST, lambda raw: raw.update({"__metadata__": {"a": "€" * 3_300_000}})),
        "10000000 are allowed",
    ),
    "length from the other end": hf(
        lambda f: (f / FIRST).write_bytes(
            (f / FIRST).read_bytes()[7::-1] + (f / FIRST).read_bytes()[8:]
        ),
        f"{FIRST} is damaged: its header should take",
    ),
    "shape nested 900 deep": hf(
        entry(HEAD, shape=NESTED), f"tensor '{HEAD}' has the impossible shape ["
    ),
    "shape of a million": hf(
        entry(HEAD, shape=[2**31 - 1] * 200_000), f"'{HEAD}' has the impossible"
    ),
    "shape of nine": hf(
        entry(HEAD, shape=[1] * 9), f"tensor '{HEAD}' has the impossible shape [1, 1, "
    ),
    "shape is NaN": hf(
        entry(HEAD, shape=[float("nan"), 128]), f"tensor '{HEAD}' has the impossible sha"
    ),
    "shape is null": hf(entry(HEAD, shape=None), f"tensor '{HEAD}' has the impossible shape None"),
    "a row of none": hf(
        entry(HEAD, shape=[0, 128]), f"tensor '{HEAD}' (BF16, [0, 128]) needs 0 bytes"
    ),
    "rows and columns swapped": hf(
        entry(HEAD, shape=[128, 1300]), f"tensor '{HEAD}' is BF16 [128, 1300], config.json implies"
    ),
    "offsets of 4000 digits": hf(
        entry(HEAD, data_offsets=[DIGITS, DIGITS]),
        f"tensor '{HEAD}' (BF16, [1300, 128]) needs 332800",
    ),
    "offsets to infinity": hf(
        entry(HEAD, data_offsets=[0, float("inf")]),
        f"tensor '{HEAD}' has data_offsets [0, inf], expected",
    ),
    "offsets nested": hf(
        entry(HEAD, data_offsets=[NESTED, 1]), f"tensor '{HEAD}' has data_offsets [["
    ),
    "type is a megabyte": hf(entry(HEAD, dtype=LONG), f"tensor '{HEAD}' has dtype 'xxx"),
    "type in small letters": hf(entry(HEAD, dtype="bf16"), f"tensor '{HEAD}' has dtype 'bf16'"),
    "type of complex numbers": hf(entry(HEAD, dtype="C64"), "start from the bf16 checkpoint"),
    "name is a megabyte": hf(
        header(FIRST, lambda raw: raw.update({LONG: 1})), "xxx' is not described by dtype, shape"
    ),
    "name with control characters": hf(
        header(FIRST, lambda raw: raw.update({"\x1b[2J\n": 1})),
        r"tensor '\x1b[2J\n' is not described",
    ),
    "name is half a character": hf(
        renamed(HEAD, "\ud800"), f"{FIRST} is damaged: the safetensors librar"
    ),
    "name is empty": hf(
        renamed(HEAD, ""), f"{INDEX}: tensor '' should be in no file, but is in {FIRST}"
    ),
    "name of the metadata": hf(
        renamed(HEAD, "__metadata__"), "__metadata__ is not a table of strings"
    ),
    "metadata is nested": hf(
        header(FIRST, lambda raw: raw.update({"__metadata__": {"a": NESTED}})),
        "__metadata__ is not a",
    ),
    "text behind": hf(
        header(FIRST, lambda raw: json.dumps(raw).encode() + b"}"), "it is not JSON (Extra"
    ),
    "byte order mark": hf(
        header(FIRST, lambda raw: b"\xef\xbb\xbf" + json.dumps(raw).encode()),
        "does not start with '{'",
    ),
    "zeros behind": hf(
        header(FIRST, lambda raw: json.dumps(raw).encode() + b"\0" * 8), "it is not JSON"
    ),
}

INDEXES = {
    "file name of 5000": hf(
        weight_map(**{NORM: "m" * 5000 + ".safetensors"}), f"tensor '{NORM}' is said to be in 'mmm"
    ),
    "file name of 250": hf(
        weight_map(**{NORM: "m" * 250 + ".safetensors"}), f"tensor '{NORM}' is said to be in 'mmm"
    ),
    "file name nested": hf(weight_map(**{NORM: NESTED}), f"tensor '{NORM}' is said to be in [[["),
    "file name of digits": hf(
        weight_map(**{NORM: DIGITS}), f"tensor '{NORM}' is said to be in 1000"
    ),
    "tensor's name is a megabyte": hf(weight_map(**{LONG: "../a"}), "xxx' is said to be in '../a'"),
    "tensor with control characters": hf(weight_map(**{"\n": FIRST}), r"tensor '\n' should be in"),
    "key twice behind 80,000 in the index": hf(
        text(INDEX, f'{{"weight_map":{{{many(80_000, chr(34) + "%d" + chr(34) + ":1")},"7":1}}}}'),
        f"{INDEX} is damaged: it is not JSON (the key '7' occurs twice)",
    ),
    "300,000 tensors in the index": hf(
        text(INDEX, f'{{"weight_map":[{many(300_000, "%d")}]}}'), "values, 250000 are allowed"
    ),
    "index of Mistral's file": hf(
        then(lambda f: shutil.copy(f / FIRST, f / NATIVE), weight_map(**{NORM: NATIVE})),
        f"{FIRST}: tensor 'lm_head.weight' is also in {NATIVE}",
    ),
}
