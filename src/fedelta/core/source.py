"""The source of functions and classes as syntax trees, for digests.

A definition is found in the parsed file by its position, not by cutting lines out of the text: a lambda within a call
and a method with an unindented text are found as well.

Limits: what was never in a file (typed at a prompt, made by `exec`, `type()` or `namedtuple()`) has no source here.
"""

import ast
import copy
import functools
import hashlib
import inspect
import linecache
import os
import symtable
import sys
import sysconfig
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fedelta.core.errors import BadExperiment

_OWN = Path(__file__).parents[1]
_STDLIB = tuple(Path(sysconfig.get_paths()[name]) for name in ("stdlib", "platstdlib"))


class Sources:
    """Finds definitions in the files that hold them; each file is parsed once."""

    def __init__(self) -> None:
        self._trees: dict[str, ast.Module] = {}

    def of_function(self, function: types.FunctionType) -> list[ast.AST]:
        """The definition; all candidates where several lambdas of one line cannot be told apart."""
        code = function.__code__
        tree = self._tree(code.co_filename)
        if code.co_name == "<lambda>":
            lambdas = [n for n in ast.walk(tree) if isinstance(n, ast.Lambda) and n.lineno == code.co_firstlineno]
            places = set(code.co_positions())
            exact = [n for n in lambdas if _span(n.body) in places]
            found: list[ast.AST] = list(exact if len(exact) == 1 else lambdas)
        else:
            found = [n for n in ast.walk(tree) if _is_definition(n, code.co_name, code.co_firstlineno)]
        if not found:
            raise _no_source(f"{function.__qualname__}()", code.co_filename)
        return found

    def of_class(self, kind: type) -> list[ast.AST]:
        """Every definition of that qualified name in the file, for it may be defined under an `if`."""
        filename, _ = home(kind)
        found: list[ast.AST] = list(_classes(self._tree(filename), "", kind.__qualname__))
        if not found:
            raise _no_source(f"class {kind.__qualname__}", filename)
        return found

    def of_module(self, module: types.ModuleType) -> list[ast.AST]:
        return [self._tree(module.__file__ or "")]

    def _tree(self, filename: str) -> ast.Module:
        if filename not in self._trees:
            linecache.checkcache(filename)
            text = "".join(linecache.getlines(filename))
            self._trees[filename] = _parsed(text, filename)
        return self._trees[filename]


def _parsed(text: str, filename: str, tries: int = 5) -> ast.Module:
    try:
        return ast.parse(text)
    except SyntaxError:
        raise _no_source("a part of the experiment", filename) from None
    except SystemError:
        # CPython 3.11 has one count of the depth for all threads, and another one has parsed meanwhile: it
        # prints a traceback, say.
        if not tries:
            raise
        return _parsed(text, filename, tries - 1)


def is_installed(value: type | types.FunctionType | types.ModuleType) -> bool:
    """Whether `value` comes with Python, fedelta or an installed package, and not from a file of the user."""
    if isinstance(value, types.FunctionType):
        return _is_installed_file(value.__code__.co_filename)
    if isinstance(value, types.ModuleType):
        name, filename = value.__name__, getattr(value, "__file__", None)
    else:
        name, filename = value.__module__, getattr(sys.modules.get(value.__module__), "__file__", None)
    if filename is None:
        return name in sys.modules and name != "__main__"  # built in
    if name == "types" and not hasattr(value, "__file__"):
        return hasattr(types, value.__name__)  # make_dataclass() puts its classes there before Python 3.12
    return _is_installed_file(filename)


def home(kind: type) -> tuple[str, Mapping[str, Any]]:
    """The file of a class, and the module-level names that it sees.

    Its methods know both for certain; a module may have been loaded a second time under the same name.
    """
    for function in methods(kind):
        return function.__code__.co_filename, function.__globals__
    module = sys.modules.get(kind.__module__)
    return getattr(module, "__file__", None) or "", vars(module) if module else {}


def methods(kind: type) -> Iterator[types.FunctionType]:
    """The functions that are written in the body of a class, without decorators; not those that dataclass() made."""
    for value in vars(kind).values():
        if isinstance(value, property):
            wrapped = [value.fget, value.fset, value.fdel]
        elif isinstance(value, functools.cached_property):
            wrapped = [value.func]
        else:
            wrapped = [getattr(value, "__func__", value)]
        for function in map(inspect.unwrap, filter(callable, wrapped)):
            if isinstance(function, types.FunctionType):
                code = function.__code__
                if code.co_qualname.startswith(f"{kind.__qualname__}.") and not code.co_filename.startswith("<"):
                    yield function


def own_digest() -> str:
    """SHA-256 over the names and the contents of all source files of fedelta as it is installed, in hexadecimal."""
    found = hashlib.sha256()
    for path in sorted(_OWN.rglob("*.py")):
        content = path.read_bytes()
        found.update(f"{path.relative_to(_OWN).as_posix()}|{len(content)}|".encode() + content)
    return found.hexdigest()


def canonical(node: object) -> str:
    """A tree as text, without positions, and alike in every version of Python (`ast.dump` is not)."""
    if isinstance(node, ast.AST):
        fields = [(name, value) for name, value in ast.iter_fields(node) if value is not None and value != []]
        text = ",".join(f"{name}={canonical(value)}" for name, value in fields if name not in ("kind", "type_comment"))
        return f"{type(node).__name__}({text})"
    if isinstance(node, list):
        return f"[{','.join(canonical(item) for item in node)}]"
    return ascii(node)


def outer_names(node: ast.AST) -> set[str]:
    """The names that a definition takes from outside: of its module, built in, or of enclosing functions."""
    tree = _NoNonlocal().visit(copy.deepcopy(node))
    table = symtable.symtable(ast.unparse(ast.fix_missing_locations(tree)), "source", "exec")
    return set(_outer(table, top=True))


class _NoNonlocal(ast.NodeTransformer):
    """A definition cut out of its function would not compile with `nonlocal`."""

    def visit_Nonlocal(self, node: ast.Nonlocal) -> ast.Pass:
        return ast.Pass()


def _outer(table: symtable.SymbolTable, top: bool = False) -> Iterator[str]:
    for symbol in table.get_symbols():
        if symbol.is_referenced() and (top or symbol.is_global()):
            yield symbol.get_name()
    for child in table.get_children():
        yield from _outer(child)


def _classes(node: ast.AST, prefix: str, target: str) -> Iterator[ast.ClassDef]:
    for child in ast.iter_child_nodes(node):
        inner = prefix
        if isinstance(child, ast.ClassDef):
            if prefix + child.name == target:
                yield child
            inner = f"{prefix}{child.name}."
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            inner = f"{prefix}{child.name}.<locals>."
        yield from _classes(child, inner, target)


def _is_definition(node: ast.AST, name: str, line: int) -> bool:
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or node.name != name:
        return False
    return line == min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])


def _span(node: ast.expr) -> tuple[int, int | None, int, int | None]:
    return node.lineno, node.end_lineno, node.col_offset, node.end_col_offset


def _is_installed_file(filename: str) -> bool:
    if filename.startswith("<frozen "):
        return True
    path = Path(os.path.abspath(filename))
    if {"site-packages", "dist-packages"} & set(path.parts):
        return True
    return any(path.is_relative_to(root) for root in (_OWN, *_STDLIB))


def _no_source(what: str, filename: str) -> BadExperiment:
    return BadExperiment(
        f"the source of {what} is not found in {filename or 'any file'}, so two parties could not compare it; "
        "define it in a file with def, class or lambda, and start again if that file was edited"
    )
