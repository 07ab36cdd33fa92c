"""Who may import whom, what importing the package costs and leaves alone, and that one clone has one converter."""

import ast
import json
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# A module and the modules of the runtime it may import; a new file gets its row.
MAY_IMPORT = {
    "errors": "",
    "paths": "errors",
    "durable": "",
    "reasoning": "",
    "config": "errors",
    "sampling": "errors",
    "content": "errors",
    "tool_calls": "content errors reasoning",
    "messages": "content errors reasoning tool_calls",
    "release": "errors messages reasoning record safetensors_header",
    "tokenizer": "content errors messages reasoning release tool_calls",
    "safetensors_header": "errors",
    "remote": "errors",
    "hub": "errors remote",
    "cache": "config errors",
    "device": "errors",
    "memory": "config device errors checkpoint",
    "mac_table": "config errors memory",
    "model": "config cache",
    "multimodal": "errors safetensors_header",
    "record": "errors safetensors_header",
    "checkpoint": "config errors safetensors_header hub remote multimodal record",
    "cache_file": "cache config durable errors safetensors_header",
    "loader": "checkpoint config errors model",
    "drafting": "",
    "decoding": "cache drafting errors sampling model",
    "row_costs": "cache config decoding drafting model paths sampling",
    "draft_model": "cache config decoding model sampling",
    "speculation": "checkpoint draft_model drafting errors loader memory model row_costs sampling tokenizer",
    "looping": "",
    "budget": "errors sampling tokenizer",
    "reply": "budget looping reasoning sampling tokenizer",
    "past": "cache cache_file config errors",
    "shared_cache": "cache",
    "batch": "errors model sampling shared_cache",
    "single": "decoding model past reasoning reply sampling speculation tokenizer",
    "several": "batch cache config decoding errors memory model past reply sampling shared_cache tokenizer",
    "conversation": "errors memory past paths reasoning reply sampling tool_calls",
    "magistral": "cache_file checkpoint config conversation errors memory model past paths reasoning reply sampling "
    "several single speculation tokenizer",
    "api": "checkpoint conversation demo device errors loader magistral memory paths reasoning speculation tokenizer",
    "failures": "errors",
    "plain": "errors failures",
    "events": "failures memory reasoning reply tool_calls",
    "event_schema": "events",
    "channel": "events failures",
    "owner": "channel events failures",
    "resident": "api channel checkpoint demo device errors events failures magistral memory plain reasoning reply "
    "sampling tool_calls",
    "hosted": "channel events failures owner resident",
    "bridge": "checkpoint errors hosted memory plain reasoning resident sampling",
    "window": "",
    "trace_window": "reasoning window",
    "markdown": "reasoning window",
    "display": "markdown reasoning reply trace_window window",
    "entry": "errors",
    "session": "conversation display entry errors magistral reply sampling",
    "command_line": "errors",
    "console": "api cache_file command_line display magistral reasoning sampling",
    "generate": "command_line console display errors reasoning reply sampling",
    "chat": "command_line console conversation display entry errors paths reasoning sampling session",
    "plan": "checkpoint command_line console demo mac_table memory",
    "__main__": "command_line",
    "__init__": "api conversation errors magistral reasoning reply sampling",
    "demo.__init__": "checkpoint convert paths",
    "demo.phrases": "",
    "demo.problems": "demo",
    "demo.examples": "demo",
    "demo.train": "checkpoint config conversation demo loader model",
}
CONVERTER_MAY_IMPORT = (
    "__version__ cache checkpoint command_line config decoding device durable errors loader mac_table memory messages "
    "model multimodal reasoning record release remote reply safetensors_header sampling tokenizer"
)
DEMO_FILES = {"magistral_mlx/demo/examples.py", "magistral_mlx/demo/train.py"}
COMMAND_LINES = ("command_line", "console", "generate", "chat", "plan", "__main__")
CLICK_FILES = {f"magistral_mlx/{name}.py" for name in COMMAND_LINES} | {
    "convert/__main__.py",
    "convert/verify.py",
}
THIRD_PARTY = {  # package -> the files that may import it
    "mistral_common": {
        "magistral_mlx/tokenizer.py",
        "convert/export.py",
        "magistral_mlx/demo/examples.py",
        "magistral_mlx/demo/train.py",
    },
    "huggingface_hub": {"magistral_mlx/hub.py", "magistral_mlx/remote.py"},
    "click": CLICK_FILES,
    "transformers": {"convert/export.py"},
    "tokenizers": {"convert/parity.py"},
    "jinja2": {"convert/parity.py"},
    "rich": {"magistral_mlx/markdown.py", "magistral_mlx/trace_window.py", "convert/bar.py"},
    "markdown_it": {"magistral_mlx/markdown.py"},
    "prompt_toolkit": {"magistral_mlx/entry.py"},
    "mlx_lm": set(),
}


def modules() -> dict[str, Path]:
    package = ROOT / "magistral_mlx"
    return {
        ".".join(p.relative_to(package).with_suffix("").parts): p
        for p in sorted(package.rglob("*.py"))
    }


@cache
def imported(path: Path) -> set[str]:
    """Every module a file imports, at any depth."""
    names: set[str] = set()
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names |= (
                {node.module or ""}
                if node.module != "magistral_mlx"
                else {f"magistral_mlx.{a.name}" for a in node.names}
            )
    return names


@pytest.mark.parametrize("module", modules())
def test_the_runtime_imports_downwards_only(module: str) -> None:
    assert module in MAY_IMPORT, f"{module} has no row in the import table"
    ours = {
        name.split(".")[1]
        for name in imported(modules()[module])
        if name.startswith("magistral_mlx.")
    }
    assert ours - {"__version__"} <= set(MAY_IMPORT[module].split())


def test_the_converter_never_imports_the_library() -> None:
    for path in (ROOT / "convert").glob("*.py"):
        ours = {name.split(".")[1] for name in imported(path) if name.startswith("magistral_mlx.")}
        assert ours - {"convert"} <= set(CONVERTER_MAY_IMPORT.split()), path


@pytest.mark.parametrize("package", THIRD_PARTY)
def test_third_parties_stay_in_their_room(package: str) -> None:
    files = [*(ROOT / "magistral_mlx").rglob("*.py"), *(ROOT / "convert").glob("*.py")]
    users = {
        str(p.relative_to(ROOT))
        for p in files
        if any(n.split(".")[0] == package for n in imported(p))
    }
    assert users <= THIRD_PARTY[package]


def test_no_public_function_is_named_after_a_submodule() -> None:
    import magistral_mlx

    assert not {"generate", "convert", "chat", "plan"} & set(magistral_mlx.__all__)


def test_packages_and_data_in_pyproject_are_those_on_disk() -> None:
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    found = {"magistral_mlx.convert"} | {
        str(p.parent.relative_to(ROOT)).replace("/", ".")
        for p in (ROOT / "magistral_mlx").rglob("__init__.py")
    }
    assert set(tool["packages"]) == found
    for package, patterns in tool["package-data"].items():
        folder = ROOT / tool["package-dir"].get(package, package.replace(".", "/"))
        data = {p for p in folder.iterdir() if p.is_file() and p.suffix not in (".py", ".pyc")}
        assert data == {p for pattern in patterns for p in folder.glob(pattern)}, package


def test_nobody_imports_the_converter_by_its_folder() -> None:
    """``convert`` would be a second copy of every class of ``magistral_mlx.convert``."""
    for folder in ("magistral_mlx", "convert", "benchmarks", "tests"):
        for path in (ROOT / folder).rglob("*.py"):
            assert not {n for n in imported(path) if n.split(".")[0] == "convert"}, path


PROBE = """
import json, logging, os, resource, signal, sys, threading, time
def state():
    return {
        "limits": [resource.getrlimit(r) for r in (resource.RLIMIT_NOFILE, resource.RLIMIT_AS, resource.RLIMIT_STACK)],
        "signals": [str(signal.getsignal(s)) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGPIPE)],
        "logging": [(len(log.handlers), log.level) for log in map(logging.getLogger, (None, "magistral_mlx"))],
        "environment": dict(os.environ),
        "threads": threading.active_count(),
    }
before, started = state(), time.process_time()
import MODULE
cpu = time.process_time() - started
names = ("mlx_lm", "transformers", "mistral_common", "huggingface_hub", "click", "rich", "prompt_toolkit")
heavy = [m for m in names if m in sys.modules]
print(json.dumps({"cpu": cpu, "same": before == state(), "heavy": heavy}))
"""


@pytest.mark.parametrize("module", ["magistral_mlx", "magistral_mlx.bridge"])
def test_importing_the_package_is_cheap_and_leaves_the_process_alone(module: str) -> None:
    command = [sys.executable, "-c", PROBE.replace("MODULE", module)]
    runs = [
        json.loads(
            subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True).stdout
        )
        for _ in range(3)
    ]
    assert runs[0]["same"]
    assert runs[0]["heavy"] == []
    assert min(run["cpu"] for run in runs) <= 0.3
