"""Imports go downwards and stay light, one clone has one converter, and files stay small."""

import ast
import json
import os
import site
import subprocess
import sys
import tomllib
from functools import cache
from graphlib import TopologicalSorter
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]

# Rooms, or files at the top of the package, and what they may import. A new room gets its row.
MAY_IMPORT = {
    "errors": "",
    "startup": "",
    "streams": "errors",
    "options": "errors",
    "files": "errors",
    "atomic_files": "files",
    "disk_space": "",
    "checkpoint": "disk_space errors files options streams",
    "tokenizer": "checkpoint errors files options streams",
    "model": "atomic_files checkpoint disk_space errors files options streams",
    "generation": "checkpoint errors files model options streams tokenizer",
    # The embedded model is converted when it is first loaded.
    "demo": "checkpoint convert errors files",
    "engine": "checkpoint demo errors files generation model options streams tokenizer",
    "serving": "checkpoint demo engine errors files generation model options streams tokenizer",
    "library": "atomic_files checkpoint demo errors files generation model options tokenizer",
    "terminal": "checkpoint engine errors files generation library model options startup streams "
    "tokenizer",
    "training": "checkpoint errors files generation model options streams tokenizer",
}
DOORS = {"__init__", "__main__", "bridge", "chat", "generate", "manage", "plan"}
CONVERTER_MAY_IMPORT = {
    "packing": "",
    "threads": "",
    "progress": "",
    "source": "packing progress threads",
    "recipe": "packing source",
    "calibration": "packing progress recipe source threads",
    "methods": "calibration packing progress recipe source threads",
    "output": "calibration methods packing progress recipe source threads",
    "pipeline": "calibration methods output packing progress recipe source threads",
    "verification": "calibration methods output packing progress recipe source threads",
}
CONVERTER_DOORS = {"__init__", "__main__", "verify"}
RUNTIME_FOR_CONVERTER = (
    "__init__ checkpoint demo disk_space errors files generation library model options streams "
    "terminal tokenizer"
)
# The rooms and files that may import a package.
THIRD_PARTY = {
    "mistral_common": "magistral_mlx.tokenizer magistral_mlx.training.demo "
    "magistral_mlx.convert.output.export",
    "huggingface_hub": "magistral_mlx.checkpoint.hub_api magistral_mlx.checkpoint.hub_cache "
    "magistral_mlx.library.hub_models magistral_mlx.checkpoint.hub_transfer",
    "click": "magistral_mlx.terminal magistral_mlx.generate magistral_mlx.chat magistral_mlx.plan "
    "magistral_mlx.manage magistral_mlx.__main__ magistral_mlx.convert.__main__ "
    "magistral_mlx.convert.verify",
    "transformers": "magistral_mlx.convert.output.export",
    "tokenizers": "magistral_mlx.convert.verification.parity",
    "jinja2": "magistral_mlx.convert.verification.parity",
    "rich": "magistral_mlx.terminal magistral_mlx.convert.progress",
    "markdown_it": "magistral_mlx.terminal.markdown",
    "prompt_toolkit": "magistral_mlx.terminal.prompt",
    "mlx_lm": "",
    "torch": "magistral_mlx.training.demo.refine",
}


@cache
def modules() -> dict[str, Path]:
    """Return the file of every module, the converter's included, by its dotted name."""
    files = [*(ROOT / "magistral_mlx").rglob("*.py"), *(ROOT / "convert").rglob("*.py")]
    found = {}
    for path in files:
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts[:2] != ("magistral_mlx", "convert"):
            parts = ("magistral_mlx", *parts) if parts[0] == "convert" else parts
            found[".".join(parts)] = path
    return found


@cache
def imported(path: Path) -> set[str]:
    """Return every module that a file imports, at any depth."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path} has a relative import; write the whole name"
            module = node.module or ""
            inner = {f"{module}.{alias.name}" for alias in node.names}
            names |= (inner & set(modules())) or {module}
    return names


def ours(module: str) -> set[str]:
    """Return the modules of the package that a module imports; a package is its ``__init__``."""
    known = modules()
    names = {name for name in imported(known[module]) if name.split(".")[0] == "magistral_mlx"}
    return {name if name in known else f"{name}.__init__" for name in names}


def room(module: str) -> str:
    """Return the room of a dotted module name, or the file's name at the top of a package."""
    parts = module.split(".")
    return parts[2] if parts[1] == "convert" else parts[1]


def is_converter(module: str) -> bool:
    return module.split(".")[1] == "convert"


@pytest.mark.parametrize("module", [m for m in modules() if not is_converter(m)])
def test_the_runtime_imports_downwards_only(module: str) -> None:
    if room(module) in DOORS:
        assert module.count(".") == 1
        return
    assert room(module) in MAY_IMPORT, f"{room(module)} has no row in the table of rooms"
    allowed = {room(module), *MAY_IMPORT[room(module)].split()}
    assert {"convert" if is_converter(name) else room(name) for name in ours(module)} <= allowed


@pytest.mark.parametrize("module", [m for m in modules() if is_converter(m)])
def test_the_converter_imports_downwards_only(module: str) -> None:
    if room(module) in CONVERTER_DOORS:
        return
    assert room(module) in CONVERTER_MAY_IMPORT, f"{room(module)} has no row in the table of rooms"
    inside = {room(name) for name in ours(module) if is_converter(name)}
    assert inside <= {room(module), *CONVERTER_MAY_IMPORT[room(module)].split()}


@pytest.mark.parametrize("module", [m for m in modules() if is_converter(m)])
def test_the_converter_never_imports_the_engine(module: str) -> None:
    outside = {room(name) for name in ours(module) if not is_converter(name)}
    assert outside <= set(RUNTIME_FOR_CONVERTER.split())


def test_no_module_imports_itself_by_way_of_others() -> None:
    graph = {module: ours(module) for module in modules()}
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the cycle


def test_nobody_imports_a_door() -> None:
    doors = {f"magistral_mlx.{door}" for door in DOORS - {"__init__"}}
    doors |= {f"magistral_mlx.convert.{door}" for door in CONVERTER_DOORS - {"__init__"}}
    for module in modules():
        assert not ours(module) & doors, module


@pytest.mark.parametrize("package", THIRD_PARTY)
def test_third_parties_have_one_home(package: str) -> None:
    homes = THIRD_PARTY[package].split()
    for module, path in modules().items():
        if any(name.split(".")[0] == package for name in imported(path)):
            assert any(f"{module}.".startswith(f"{home}.") for home in homes), module


def test_no_public_function_is_named_after_a_submodule() -> None:
    import magistral_mlx

    assert not {"generate", "convert", "chat", "plan"} & set(magistral_mlx.__all__)


def test_packages_and_data_in_pyproject_are_those_on_disk() -> None:
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    found = {name.removesuffix(".__init__") for name in modules() if name.endswith(".__init__")}
    assert set(tool["packages"]) == {name for name in found if "training" not in name}
    for package in tool["packages"]:
        folder = ROOT / package.replace(".", "/")
        data = {p for p in folder.iterdir() if p.is_file() and p.suffix not in (".py", ".pyc")}
        data -= {folder / "README.md"}
        patterns = tool["package-data"].get(package, [])
        assert data == {p for pattern in patterns for p in folder.glob(pattern)}, package


def test_nobody_imports_the_converter_by_its_folder() -> None:
    """``convert`` would be a second copy of every class of ``magistral_mlx.convert``."""
    for folder in ("magistral_mlx", "convert", "benchmarks", "tests"):
        for path in (ROOT / folder).rglob("*.py"):
            assert not {n for n in imported(path) if n.split(".")[0] == "convert"}, path


# A room of the benchmarks, or a file at their top, and what it may import of them.
BENCHMARKS_MAY_IMPORT = {
    "measure": "",
    "synthetic": "",
    "command_line": "",
    "runtime": "measure synthetic",
    "converter": "measure synthetic",
    "quality": "measure synthetic",
    "reasoning": "measure",
    "macs": "measure synthetic",
    "report": "measure",
    "commands": "command_line converter macs measure quality reasoning report runtime synthetic",
    "__main__": "commands",
}


def test_the_benchmarks_import_downwards_only_and_without_cycles() -> None:
    files = {path for path in (ROOT / "benchmarks").rglob("*.py") if path.name != "__init__.py"}
    graph: dict[str, set[str]] = {}
    for path in files:
        names = {name for name in imported(path) if name.startswith("benchmarks.")}
        parts = path.relative_to(ROOT).with_suffix("").parts
        allowed = {parts[1], *BENCHMARKS_MAY_IMPORT[parts[1]].split()}
        assert {name.split(".")[1] for name in names} <= allowed, path
        graph[".".join(parts)] = names
    TopologicalSorter(graph).prepare()


PROBE = """
import json, logging, os, resource, signal, sys, threading
limits = (resource.RLIMIT_NOFILE, resource.RLIMIT_AS, resource.RLIMIT_STACK)
loggers = [logging.getLogger(), logging.getLogger("magistral_mlx")]
def state():
    return {
        "limits": [resource.getrlimit(limit) for limit in limits],
        "signals": [str(signal.getsignal(number)) for number in signal.valid_signals()],
        "logging": [(len(log.handlers), log.level) for log in loggers],
        "environment": dict(os.environ),
        "threads": threading.active_count(),
    }
before = state()
import MODULE
packages = {name.split(".")[0] for name in sys.modules} - sys.stdlib_module_names
slow = [name for name in ("asyncio",) if name in sys.modules]
print(json.dumps({"same": before == state(), "packages": sorted(packages), "slow": slow}))
"""
LIGHT = {"__main__", "magistral_mlx", "mlx", "numpy", "safetensors"}


@pytest.mark.parametrize("module", ["magistral_mlx", "magistral_mlx.bridge"])
def test_importing_the_package_is_light_and_leaves_the_process_alone(module: str) -> None:
    command = [sys.executable, "-S", "-c", PROBE.replace("MODULE", module)]
    # -S leaves out the modules that .pth files import.
    path = os.pathsep.join([str(ROOT), *site.getsitepackages()])
    done = subprocess.run(
        command,
        cwd=ROOT,
        capture_output=True,
        check=True,
        text=True,
        env=os.environ | {"PYTHONPATH": path},
    )
    found = json.loads(done.stdout)
    assert found["same"]
    assert set(found["packages"]) <= LIGHT
    assert not found["slow"]


# Figures of .ci/figures.py, and the most that each may be.
LAWS = {
    "files in the widest folder, product": 14,
    "files in the widest folder, benchmarks": 14,
    "files in the widest folder, tests": 14,
    "largest file, lines": 300,
    "import floors, magistral_mlx": 8,
    "import floors, convert": 8,
    "import cycles": 0,
    "declarations of a loading option": 1,
    "StopIteration handlers outside streams.py": 0,
    "largest parameter list, others": 8,
    "docstrings anywhere, bad opening": 0,
}


@cache
def figures() -> dict[str, Any]:
    """Return the figures of the working tree by name."""
    spec = spec_from_file_location("figures", ROOT / ".ci" / "figures.py")
    assert spec is not None
    assert spec.loader is not None
    script = module_from_spec(spec)
    spec.loader.exec_module(script)
    return {name: value for name, value, _ in script.House(ROOT).rows()}


@pytest.mark.parametrize("name", LAWS)
def test_the_house_keeps_its_size(name: str) -> None:
    assert figures()[name] <= LAWS[name]
