"""The documents name commands, Python, files and folders that exist, and stay easy to read."""

import ast
import re
import shlex
from pathlib import Path

import pytest

import magistral_mlx as mm
from benchmarks.__main__ import benchmarks
from magistral_mlx import __main__ as group
from magistral_mlx import bridge

ROOT = Path(__file__).parents[1]
DOCUMENTS = {
    name: (ROOT / name).read_text()
    for name in (
        "README.md",
        "SECURITY.md",
        "CHANGELOG.md",
        ".github/CONTRIBUTING.md",
        "benchmarks/README.md",
        "convert/README.md",
        "examples/swift/README.md",
        "magistral_mlx/README.md",
    )
}
README = DOCUMENTS["README.md"]


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def prose(text: str) -> str:
    """Return a document without code, tables and headings, each as an end of a paragraph."""
    return re.sub(r"^```.*?^```$|^\|.*?$|^#.*?$", "\n\n", text, flags=re.DOTALL | re.MULTILINE)


# Files that the examples read and write.
MADE = ("problem.txt", "answer.txt", "report.txt", "/.config/magistral-mlx/config.toml")
COMMANDS = [
    line
    for text in DOCUMENTS.values()
    for block in blocks(text, "sh")
    for line in block.splitlines()
    if line.startswith("magistral ") or "| magistral " in line
]


def test_the_readme_begins_with_the_two_commands() -> None:
    first = blocks(README, "sh")[0]
    assert [line.split()[:2] for line in first.splitlines()] == [["make", "demo"], ["make", "test"]]


@pytest.mark.parametrize("line", COMMANDS)
def test_the_commands_are_understood(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAGISTRAL_MODEL", "demo")
    words = shlex.split(line[line.index("magistral ") :], comments=True)
    name, arguments = words[1], words[2:]
    if ">" in arguments:
        arguments = arguments[: arguments.index(">")]
    command = group.command.get_command(group.command.make_context("magistral", [name]), name)
    assert command is not None
    command.make_context(name, arguments)  # parses, and runs nothing


@pytest.mark.parametrize("name", DOCUMENTS)
def test_the_benchmarks_exist(name: str) -> None:
    if name != "CHANGELOG.md":
        for command in re.findall(r"python -m benchmarks ([a-z-]+)", DOCUMENTS[name]):
            assert command in benchmarks.commands, command


def test_the_readme_s_python_names_what_exists() -> None:
    code = blocks(README, "python")
    assert code
    assert all(block.count("\n") <= 12 for block in code)
    public = {
        "mm": mm,
        "magistral": mm.Magistral,
        "reply": mm.Reply,
        "stream": mm.Stream,
        "segment": mm.Text,
        "chat": mm.Chat,
        "call": mm.ToolCall,
        "bridge": bridge,
    }
    for node in ast.walk(ast.parse("".join(code))):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            known = {*dir(public[node.value.id])}
            known |= {*getattr(public[node.value.id], "__dataclass_fields__", ())}
            assert node.attr in known, f"{node.value.id}.{node.attr}"


@pytest.mark.parametrize("name", DOCUMENTS)
def test_files_and_folders_exist(name: str) -> None:
    text, home = DOCUMENTS[name], (ROOT / name).parent
    if name == "CHANGELOG.md":  # names what is gone, too
        return
    for path in re.findall(r"[\w/.-]*\w\.(?:py|md|toml|txt)\b", text):
        names = [home / path, ROOT / path, ROOT / "magistral_mlx" / path]
        is_bare = "/" not in path and any(ROOT.glob(f"*/**/{path}"))
        is_made = path in MADE
        assert is_made or is_bare or any(found.exists() for found in names), path


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_lead_somewhere(name: str) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", DOCUMENTS[name]):
        path, _, heading = target.partition("#")
        found = (ROOT / name).parent / path if path else ROOT / name
        assert found.exists(), target
        if heading:
            headings = re.findall(r"^#+ (.*)$", found.read_text(), re.MULTILINE)
            slugs = {re.sub(r"[^\w -]", "", text).lower().replace(" ", "-") for text in headings}
            assert heading in slugs, target


@pytest.mark.parametrize("package", ["magistral_mlx", "convert"])
def test_every_room_has_its_line(package: str) -> None:
    folders = {path.parent.name for path in (ROOT / package).glob("*/__init__.py")} - {"convert"}
    assert folders
    for folder in folders:
        assert f"{folder}/" in DOCUMENTS[f"{package}/README.md"], folder


@pytest.mark.parametrize("name", DOCUMENTS)
def test_sentences_and_paragraphs_are_short(name: str) -> None:
    for paragraph in re.split(r"\n\s*\n|\n(?=- |\d+\. )", prose(DOCUMENTS[name])):
        assert len(paragraph.split()) <= 80, paragraph
        for sentence in re.split(r"(?<=[.:?!;])\**\s+", paragraph):
            assert len(sentence.split()) <= 30, sentence


def test_the_readme_is_short() -> None:
    assert len(README.split()) <= 1300


@pytest.mark.slow
def test_the_readme_s_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in blocks(README, "python"):
        exec(block.replace("magistral-4bit", "demo"), names)
    assert (tmp_path / "talk.cache").exists()
