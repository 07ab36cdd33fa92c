"""Count the house: rooms, import floors, parameter lists, docstrings and lines.

    python .ci/figures.py                     the working tree
    python .ci/figures.py c88c83b             a revision of git
    python .ci/figures.py --compare c88c83b   a Markdown table: the revision, now, the goals

The product is magistral_mlx/ and convert/. A room is a folder, or a file at the top of a package.
Floors are the longest chain of rooms that import each other, doors included, lazy imports left out.
A cycle is a circle of modules, lazy imports included; every module imports the package itself,
so that one is left out. A loading option is declared by each signature and each class that has both
`kv_bits` and `memory_gb`.
"""

import ast
import io
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parents[1]
TREES = ("magistral_mlx", "convert", "benchmarks", "tests")
PRODUCT = TREES[:2]
LOADING = {"kv_bits", "memory_gb"}  # every list of loading options has these
BAD_OPENING = r"(What|How|Whether|Of|As|Those|Where|Which)\b"
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
Arrows = dict[str, set[str]]
Row = tuple[str, str | int, str]  # name, value, goal


class House:
    """The Python files of one revision, parsed."""

    def __init__(self, root: Path) -> None:
        self.root = root
        found = [path for tree in TREES for path in (root / tree).rglob("*.py")]
        self.texts = {path.relative_to(root): path.read_text() for path in found}
        self.trees = {path: ast.parse(text) for path, text in self.texts.items()}
        self.modules = {}  # convert/ is magistral_mlx.convert
        for path in self.files(*PRODUCT):
            name = ".".join(path.with_suffix("").parts).removesuffix(".__init__")
            self.modules[name if path.parts[0] != "convert" else f"magistral_mlx.{name}"] = path

    def files(self, *trees: str) -> list[Path]:
        return [path for path in self.texts if path.parts[0] in trees]

    def nodes(self, *trees: str) -> list[ast.AST]:
        return [node for path in self.files(*trees) for node in ast.walk(self.trees[path])]

    def lines(self, *trees: str) -> list[str]:
        return [line for path in self.files(*trees) for line in self.texts[path].splitlines()]

    def widest(self, *trees: str) -> int:
        folders = [path.parent for path in self.files(*trees)]
        return max(map(folders.count, folders))

    def imports(self, module: str, *, lazy: bool) -> set[str]:
        """Return the product's modules that a module imports."""
        path = self.modules[module]
        package = module if path.name == "__init__.py" else module.rpartition(".")[0]
        named: set[str] = set()
        for node in ast.walk(self.trees[path]) if lazy else self.trees[path].body:
            if isinstance(node, ast.Import):
                named |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                above = package.split(".")[: package.count(".") + 2 - node.level]
                source = ".".join([*(above if node.level else []), *filter(None, [node.module])])
                inner = {f"{source}.{alias.name}" for alias in node.names}
                named |= (inner & self.modules.keys()) or {source}
        named = {f"magistral_mlx.{n}" if n.split(".")[0] == "convert" else n for n in named}
        return named & self.modules.keys() - {module, "magistral_mlx"}

    def floors(self, package: str) -> int:
        """Return the longest chain of a package's rooms that import each other."""
        depth = package.count(".") + 1

        def room(module: str) -> str:
            parts = [*module.split("."), "__init__"]
            is_inside = f"{module}.".startswith(f"{package}.")
            return parts[depth] if is_inside and parts[depth] != "convert" else ""

        arrows: Arrows = {}
        for module in filter(room, self.modules):
            others = {room(other) for other in self.imports(module, lazy=False)}
            arrows.setdefault(room(module), set()).update(others - {room(module), ""})
        return longest_chain(arrows)

    def declarations(self) -> int:
        """Count the signatures and classes that list the loading options."""
        count = 0
        for node in self.nodes(*PRODUCT):
            if isinstance(node, ast.ClassDef):
                fields = [item.target for item in node.body if isinstance(item, ast.AnnAssign)]
                count += {*map(ast.unparse, fields)} >= LOADING
            elif isinstance(node, ast.FunctionDef):
                count += {*parameters(node)} >= LOADING
        return count

    def handlers(self) -> int:
        """Count the handlers of StopIteration outside streams.py."""
        trees = [self.trees[path] for path in self.files(*PRODUCT) if path.name != "streams.py"]
        nodes = [node for tree in trees for node in ast.walk(tree)]
        types = [node.type for node in nodes if isinstance(node, ast.ExceptHandler) and node.type]
        return sum("StopIteration" in ast.unparse(found) for found in types)

    def rows(self) -> list[Row]:
        functions = [node for node in self.nodes(*PRODUCT) if isinstance(node, ast.FunctionDef)]
        counts = [(is_command(function), len(parameters(function))) for function in functions]
        docstrings = [doc for function in functions if (doc := ast.get_docstring(function))]
        kinds = [node for node in self.nodes(*TREES) if isinstance(node, DOCUMENTED)]
        documents = [ast.get_docstring(node) or "" for node in kinds]
        lines = [line for line in self.lines(*PRODUCT) if line]
        sizes = [len(self.texts[path].splitlines()) for path in self.files(*PRODUCT)]
        spans = [(f.end_lineno or f.lineno) - f.lineno + 1 for f in functions]
        readme = (self.root / "README.md").read_text()
        arrows = {module: self.imports(module, lazy=True) for module in self.modules}
        cycles = set(circles(arrows).values()) - {frozenset()}
        return [
            ("files in the widest folder, product", self.widest(*PRODUCT), "14"),
            ("files in the widest folder, benchmarks", self.widest("benchmarks"), "14"),
            ("files in the widest folder, tests", self.widest("tests"), "14"),
            ("largest file, lines", max(sizes), "300"),
            ("import floors, magistral_mlx", self.floors("magistral_mlx"), "8"),
            ("import floors, convert", self.floors("magistral_mlx.convert"), "8"),
            ("import cycles", len(cycles), "0"),
            ("declarations of a loading option", self.declarations(), "1"),
            ("StopIteration handlers outside streams.py", self.handlers(), "0"),
            ("largest parameter list, click commands", max(counts)[1], "-"),
            ("largest parameter list, others", max(n for door, n in counts if not door), "8"),
            ("docstrings of functions, bad opening", share(map(is_bad, docstrings)), "0.0 %"),
            ("docstrings anywhere, bad opening", sum(map(is_bad, documents)), "0"),
            ("lines over 100 columns", share(len(s) > 100 for s in lines), "0.0 %"),
            ("functions over 60 lines", sum(span > 60 for span in spans), "-"),
            ("product lines", f"{sum(sizes):,}", "15,794"),
            ("benchmark lines", f"{len(self.lines('benchmarks')):,}", "5,200"),
            ("README words", f"{len(readme.split()):,}", "1,200"),
            ("README, longest sentence in words", longest_sentence(readme), "30"),
        ]


def parameters(function: ast.FunctionDef) -> list[str]:
    own = function.args
    names = [argument.arg for argument in (*own.posonlyargs, *own.args, *own.kwonlyargs)]
    return [name for name in names if name not in ("self", "cls")]


def is_command(function: ast.FunctionDef) -> bool:
    return any("command" in ast.unparse(decorator) for decorator in function.decorator_list)


def is_bad(docstring: str) -> bool:
    return re.match(BAD_OPENING, docstring) is not None


def share(flags: Iterable[bool]) -> str:
    found = list(flags)
    return f"{100 * sum(found) / len(found):.1f} %"


def longest_sentence(markdown: str) -> int:
    """Count the words of the longest sentence outside code, tables and headings."""
    prose = re.sub(r"^```.*?^```$|^\|.*?$|^#.*?$", "\n\n", markdown, flags=re.M | re.S)
    return max(len(part.split()) for part in re.split(r"(?<=[.:?!;])\**\s+|\n\s*\n|\n- ", prose))


def circles(arrows: Arrows) -> dict[str, frozenset[str]]:
    """Map every node to the nodes that stand in a circle with it."""
    reached = {node: set(targets) for node, targets in arrows.items()}
    for middle in arrows:
        for node in arrows:
            if middle in reached[node]:
                reached[node] |= reached[middle]
    return {n: frozenset(m for m in reached[n] if n in reached[m]) for n in arrows}


def longest_chain(arrows: Arrows) -> int:
    """Return the nodes of the longest chain, where a circle counts as one node."""
    joined = {node: min(circle | {node}) for node, circle in circles(arrows).items()}

    def height(node: str) -> int:
        below = {joined[n] for m in arrows if joined[m] == node for n in arrows[m]} - {node}
        return 1 + max(map(height, below), default=0)

    return max(map(height, joined.values()))


def rows_of(revision: str | None) -> list[Row]:
    """Return the figures of a revision, or of the working tree."""
    if not revision:
        return House(ROOT).rows()
    command = ["git", "-C", str(ROOT), "archive", revision, "README.md", *TREES]
    archive = subprocess.run(command, check=True, capture_output=True).stdout
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(fileobj=io.BytesIO(archive)) as files:
            files.extractall(folder, filter="data")
        return House(Path(folder)).rows()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--compare"]:
        print(f"| | {sys.argv[2]} | now | goal, at most |\n|---|---|---|---|")
        pairs = zip(rows_of(sys.argv[2]), rows_of(None), strict=True)
        for (name, before, _), (_, now, goal) in pairs:
            print(f"| {name} | {before} | {now} | {goal} |")
    else:
        for name, value, _ in rows_of(sys.argv[1] if sys.argv[1:] else None):
            print(f"{name:44}{value:>8}")
