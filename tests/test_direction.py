"""The rooms depend on each other in one direction, modules in no circle, and the entrances load nothing heavy.

Every import counts: inside functions, under TYPE_CHECKING, relative, and `import_module` of a literal name.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src"
MECHANISMS = {"aggregation", "compression", "privacy", "secure"}
BELOW_PROGRAMS = {"core", "data", "learning", *MECHANISMS}
ALLOWED: dict[str, set[str]] = {
    "core": set(),
    **{room: {"core"} for room in ("data", "learning", "fleet", "observe", *MECHANISMS)},
    "algorithms": BELOW_PROGRAMS,
    **{
        room: BELOW_PROGRAMS | {"algorithms"}
        for room in ("adapters", "statistics", "vertical", "transfer", "incentives")
    },
}
SEE_ALL = {"", "cli"}  # "" is the package itself: its public names
NO_ARROW = {"fedelta.__version__"}  # a constant, there before anything else
HEAVY = ["torch", "numpy", "transformers", "peft", "datasets", "pandas", "sklearn", "matplotlib", "jinja2"]
ENTRANCES = ["fedelta", "fedelta.cli.main"]

Graph = dict[str, set[str]]


def name_of(file: Path, source: Path) -> str:
    parts = file.relative_to(source).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(tree: ast.Module, package: str) -> Iterator[str]:
    """Dotted names that a module may import; of `from a import b` both `a.b` and `a`, the longer one first."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            home = parts[: len(parts) - node.level + 1] if node.level else []
            base = ".".join([*home, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield node.args[0].value


def graph(source: Path) -> Graph:
    """Module -> the modules of ours that it imports."""
    files = {name_of(file, source): file for file in (source / "fedelta").rglob("*.py")}
    arrows: Graph = {}
    for name, file in files.items():
        package = name if file.name == "__init__.py" else name.rpartition(".")[0]
        arrows[name] = set()
        for target in imported(ast.parse(file.read_text(encoding="utf-8")), package):
            if target.split(".")[0] != "fedelta" or target in NO_ARROW:
                continue
            while target not in files and "." in target:  # a name in a module: the module is what is imported
                target = target.rpartition(".")[0]
            arrows[name] |= {target} - {name}
    return arrows


def room(module: str) -> str:
    """The room that a module is in; "" for the package itself."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


def backward(arrows: Graph) -> list[str]:
    """The arrows that run against the direction, and the rooms that have no place in it."""
    wrong = []
    for module, targets in sorted(arrows.items()):
        own = room(module)
        if own in SEE_ALL:
            continue
        if own not in ALLOWED:
            wrong.append(f"{module} is in no room of the design")
            continue
        wrong += [f"{module} -> {target}" for target in sorted(targets) if room(target) not in ALLOWED[own] | {own}]
    return wrong


def circle(arrows: Graph) -> list[str]:
    """One circle of modules, if there is one."""
    done: set[str] = set()

    def walk(module: str, path: list[str]) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return []
        for target in sorted(arrows.get(module, ())):
            found = walk(target, [*path, module])
            if found:
                return found
        done.add(module)
        return []

    return next((found for module in sorted(arrows) if (found := walk(module, []))), [])


def test_no_arrow_runs_backwards() -> None:
    arrows = graph(SOURCE)
    assert arrows["fedelta.aggregation.mean"] >= {"fedelta.core.messages", "fedelta.core.errors"}
    assert backward(arrows) == []


def test_no_modules_import_each_other_in_a_circle() -> None:
    assert circle(graph(SOURCE)) == []


@pytest.mark.parametrize(
    ("file", "text", "expected"),
    [
        ("core/a.py", "def f():\n    from fedelta.data.b import x\n", ["fedelta.core.a -> fedelta.data.b"]),
        ("learning/a.py", "import fedelta.data.b as b\n", ["fedelta.learning.a -> fedelta.data.b"]),
        ("learning/a.py", "from fedelta.data import b\n", ["fedelta.learning.a -> fedelta.data.b"]),
        ("learning/a.py", "from ..data import b\n", ["fedelta.learning.a -> fedelta.data.b"]),
        ("fleet/a.py", "import_module('fedelta.data.b')\n", ["fedelta.fleet.a -> fedelta.data.b"]),
        ("algorithms/a.py", "from fedelta.data.b import x\n", []),
        ("algorithms/a.py", "from fedelta.cli import main\n", ["fedelta.algorithms.a -> fedelta.cli"]),
        ("data/a.py", "from fedelta import Mean\n", ["fedelta.data.a -> fedelta"]),
        ("data/a.py", "from fedelta import __version__\n", []),
        ("data/a.py", "from .b import x\n", []),
        ("helpers/a.py", "", ["fedelta.helpers.a is in no room of the design"]),
        ("cli/a.py", "from fedelta.data.b import x\n", []),
    ],
)
def test_a_backward_arrow_is_found(tmp_path: Path, file: str, text: str, expected: list[str]) -> None:
    for path, content in (
        ("__init__.py", ""),
        ("cli/__init__.py", ""),
        ("data/__init__.py", ""),
        ("data/b.py", ""),
        (file, text),
    ):
        target = tmp_path / "fedelta" / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(content, encoding="utf-8")
    assert backward(graph(tmp_path)) == expected


def test_a_circle_is_found() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


@pytest.mark.parametrize("entrance", ENTRANCES)
def test_entrances_load_nothing_heavy(entrance: str) -> None:
    code = f"import sys, {entrance}; print(*sorted(set(sys.modules) & set({HEAVY})))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout.strip()) == (0, ""), result.stderr
