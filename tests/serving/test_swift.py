"""The Swift sources agree with the bridge's schema and functions; with a toolchain, they run."""

import json
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest

from magistral_mlx import bridge
from magistral_mlx.generation.params import SamplingParams
from magistral_mlx.model.load_options import LoadOptions
from magistral_mlx.options import options_of
from magistral_mlx.serving.events import SCHEMA
from tests.support.host.libpython import shared_library

PACKAGE = Path(__file__).parents[2] / "examples" / "swift"
SOURCES = PACKAGE / "Sources" / "MagistralBridge"
EVENTS = (SOURCES / "MagistralEvent.swift").read_text()
BRIDGE = (SOURCES / "MagistralBridge.swift").read_text()
DEFINITIONS: dict[str, Any] = json.loads(SCHEMA.read_text())["$defs"]
NUMBERS = {"integer": "Int", "number": "Double", "string": "String", "boolean": "Bool"}


def block(source: str, opening: str) -> str:
    """Return the text between the braces after ``opening``."""
    start = source.index("{", source.index(opening)) + 1
    depth, end = 1, start
    while depth:
        depth += {"{": 1, "}": -1}.get(source[end], 0)
        end += 1
    return source[start : end - 1]


def keys_of(body: str) -> dict[str, str]:
    """Return the cases of a CodingKeys or string enum, and their raw values."""
    found = re.findall(r"^\s*case (\w+)(?: = \"(\w+)\")?$", body, re.MULTILINE)
    return {case: raw or case for case, raw in found}


def fields_of(struct: str, source: str = EVENTS) -> dict[str, str]:
    """Return the keys of a Codable struct's properties, and their types."""
    body = block(source, f"struct {struct}:")
    keys = keys_of(block(body, "enum CodingKeys")) if "enum CodingKeys" in body else {}
    properties = re.findall(r"^\s*public (?:let|var) (\w+): (\S+)$", body, re.MULTILINE)
    assert not keys or set(keys) == {name for name, _ in properties}, struct
    return {keys.get(name, name): kind for name, kind in properties}


def check(schema: dict[str, Any], kind: str) -> None:
    """Check that a property's schema and its Swift type agree."""
    if "anyOf" in schema:
        inner, null = schema["anyOf"]
        assert null == {"type": "null"}
        assert kind.endswith("?")
        check(inner, kind.removesuffix("?"))
    elif "enum" in schema:
        assert set(keys_of(block(EVENTS, f"enum {kind}: String")).values()) == set(schema["enum"])
    elif schema["type"] == "object":
        check_struct(schema, kind)
    else:
        assert NUMBERS[schema["type"]] == kind


def check_struct(schema: dict[str, Any], struct: str) -> None:
    fields = fields_of(struct)
    properties = {name: value for name, value in schema["properties"].items() if name != "kind"}
    assert set(fields) == set(properties), struct
    for name, kind in fields.items():
        check(properties[name], kind)


@pytest.mark.parametrize("name", DEFINITIONS)
def test_every_event_has_a_type_with_its_fields(name: str) -> None:
    check_struct(DEFINITIONS[name], name)


def test_the_enum_has_every_kind_and_reads_and_writes_it() -> None:
    kinds = {
        name: definition["properties"]["kind"]["enum"][0]
        for name, definition in DEFINITIONS.items()
    }
    body = block(EVENTS, "enum MagistralEvent")
    cases = dict(re.findall(r"^    case (\w+)\((\w+)\)$", body, re.MULTILINE))
    written = keys_of(block(body, "enum Kind"))
    assert {struct: written[case] for case, struct in cases.items()} == kinds
    read = re.findall(r"case \.(\w+): self = \.(\w+)\(try (\w+)\(from: decoder\)\)", body)
    assert {(a, b, struct) for a, b, struct in read} == {
        (case, case, struct) for case, struct in cases.items()
    }
    encoded = re.findall(
        r"case \.(\w+)\(let event\):\s+try container.encode\(Kind\.(\w+), forKey", body
    )
    assert set(encoded) == {(case, case) for case in cases}
    lasts = re.findall(r"case ([.\w, ]+): true", block(body, "var isLast"))[0]
    assert lasts == ".ready, .done, .error"


@pytest.mark.parametrize(
    ("struct", "options"), [("Options", LoadOptions), ("Sampling", SamplingParams)]
)
def test_swift_options_are_options_of_the_bridge(struct: str, options: type) -> None:
    taken = {option.name: str(option.type) for option in options_of(options)}
    swift = {"Int": "int|16", "Double": "float", "String": "str", "[String]": "tuple"}
    for name, kind in fields_of(struct, BRIDGE).items():
        assert re.search(swift[kind.removesuffix("?")], taken[name]), name


def test_swift_calls_functions_of_the_bridge() -> None:
    called = set(re.findall(r"call\(\"(\w+)\"", BRIDGE))
    assert called == {"plan", "load", "start", "next_event", "cancel", "save", "resume", "close"}
    assert called <= set(dir(bridge))


def test_the_bridge_file_imports_nothing_of_one_platform() -> None:
    assert re.findall(r"^\s*@?\w*\s*import (\w+)", BRIDGE, re.MULTILINE) == ["Foundation"]
    assert "try!" not in "".join(path.read_text() for path in PACKAGE.rglob("*.swift"))


@pytest.mark.slow
@pytest.mark.skipif(
    shutil.which("swift") is None, reason="no Swift toolchain (Debian 13 has swiftlang)"
)
@pytest.mark.skipif(shared_library() is None, reason="no shared libpython")
def test_the_package_is_built_and_runs(tmp_path: Path) -> None:
    shutil.copytree(PACKAGE, tmp_path / "package", ignore=shutil.ignore_patterns(".build"))
    places = [str(shared_library()), sys.base_prefix, sysconfig.get_path("purelib")]

    def run(program: str, *words: str) -> str:
        command = [
            "swift",
            "run",
            "--disable-sandbox",
            "--package-path",
            str(tmp_path / "package"),
            program,
        ]
        done = subprocess.run(
            [*command, *places, *words], capture_output=True, text=True, check=False, timeout=500
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    assert "124" in run("magistral-sample", "demo", "What is 48 + 76?")
    assert run("magistral-checks").endswith("all ok\n")
