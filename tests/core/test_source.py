import argparse
import ast
import collections
import functools
import gc
import operator
import textwrap
import threading
import types

import pytest
import torch

from fedelta.core import source
from fedelta.core.parameters import Layout
from fedelta.core.source import Sources, canonical, home, is_installed, methods, outer_names, own_digest


def definitions(value):
    found = Sources().of_class(value) if isinstance(value, type) else Sources().of_function(value)
    return [ast.unparse(node) for node in found]


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("def f(a, b=B): c = a; return c + D + len(b)", {"B", "D", "len"}),
        ("lambda x: [y for y in x if y in Z]", {"Z"}),
        ("@wrap(1)\ndef f(x: Hint) -> Other: return f(x)", {"wrap", "Hint", "Other", "f"}),
        (
            "class A(Base, metaclass=Meta):\n  x = X\n  y = x\n  def f(self): return super().f(x)",
            {"Base", "Meta", "X", "x"},
        ),
        ("def f():\n  nonlocal n\n  n = n + m\n  global g\n  return g", {"m", "g"}),
        ("def f():\n  def inner(): return a + b\n  b = 1\n  return inner", {"a"}),
        ("def f(x): return x.site.data(k=v)", {"v"}),
        ("async def f():\n  async for x in source(): yield x", {"source"}),
    ],
)
def test_outer_names_are_those_that_a_definition_takes_from_outside(text, names):
    found = outer_names(ast.parse(text).body[0])
    assert names <= found
    assert found - names <= {"super", "n"}  # `n` of the nonlocal is found by its closure


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("x = 1  # one", "x=1", True),
        ("f(a,\n  b,)", "f(a, b)", True),
        ("'a'", '"a"', True),
        ("x = (1)", "x = 1", True),
        ("x = 1", "x = 1.0", False),
        ("x = 1", "x = True", False),
        ("x = 'a'", "x = b'a'", False),
        ("f(None)", "f()", False),
        ("f([])", "f(())", False),
        ("f(a=[])", "f(a=())", False),
        ("lambda: None", "lambda: ...", False),
        ("def f(a, /): pass", "def f(a): pass", False),
        ("a - (b - c)", "(a - b) - c", False),
        ("x[:]", "x[None:]", False),
        ("return_ = 1", "return_ = -1", False),
    ],
)
def test_canonical_text_is_equal_where_the_meaning_is(one, other, same):
    assert (canonical(ast.parse(one)) == canonical(ast.parse(other))) == same


def test_lambdas_of_one_line_are_told_apart():
    several = [lambda: 1, lambda: 2, lambda x: lambda: x]
    assert [definitions(function) for function in several] == [["lambda: 1"], ["lambda: 2"], ["lambda x: lambda: x"]]
    assert definitions(several[2](0)) == ["lambda: x"]


def test_lambdas_that_begin_on_one_line_and_end_on_others():
    pair = (lambda: (
        1
    ), lambda: (
        2
    ))  # fmt: skip
    assert [definitions(function) for function in pair] == [["lambda: 1"], ["lambda: 2"]]


def decorate(function):
    return functools.wraps(function)(lambda *args: function(*args))


class Outer:
    @decorate
    def plain(self):
        return 1

    @property
    def value(self):
        return textwrap.dedent("""
no indent
""")

    @staticmethod
    def free():
        return 2

    @functools.cached_property
    def kept(self):
        return 3

    class Inner:
        pass

    borrowed = operator.add
    added = decorate


def factory(flag):
    if flag:

        class Local:
            first = 1

    else:

        class Local:
            second = 2

    return Local


def test_methods_are_those_written_in_the_class():
    assert [function.__name__ for function in methods(Outer)] == ["plain", "value", "free", "kept"]
    assert definitions(next(methods(Outer))) == ["@decorate\ndef plain(self):\n    return 1"]


def test_classes_are_found_wherever_they_are_defined():
    assert definitions(Outer.Inner) == ["class Inner:\n    pass"]
    assert definitions(Outer)[0].startswith("class Outer:\n")
    # which branch was taken is not written in the class: both count
    assert definitions(factory(True)) == ["class Local:\n    first = 1", "class Local:\n    second = 2"]


def test_home_is_the_file_and_the_module_level_names():
    filename, names = home(Outer)
    assert filename == __file__
    assert names["Outer"] is Outer
    assert home(Outer.Inner)[0] == __file__


@pytest.mark.parametrize(
    ("value", "installed"),
    [
        (torch.nn.Linear, True),
        (collections.OrderedDict, True),
        (int, True),
        (types.SimpleNamespace, True),
        (Layout, True),
        (source, True),
        (torch, True),
        (textwrap.dedent, True),
        (torch.nn.functional.relu, True),
        (Outer, False),
        (decorate, False),
        (types.ModuleType("mine"), False),
    ],
)
def test_what_is_installed(value, installed):
    assert is_installed(value) is installed


def test_the_digest_of_the_own_source_changes_with_names_and_contents(tmp_path, monkeypatch):
    monkeypatch.setattr(source, "_OWN", tmp_path)
    (tmp_path / "room").mkdir()
    (tmp_path / "room" / "part.py").write_text("one")
    found = [own_digest()]
    assert own_digest() == found[0]
    (tmp_path / "room" / "part.py").write_text("two")
    found.append(own_digest())
    (tmp_path / "room" / "part.py").rename(tmp_path / "part.py")
    found.append(own_digest())
    (tmp_path / "other.txt").write_text("no source")
    assert own_digest() == found[-1]
    assert len(set(found)) == 3


class Interrupting:
    """Garbage whose finalizer lets another thread parse something, less deep in its stack."""

    def __init__(self, ran):
        self.itself, self.ran = self, ran

    def __del__(self):
        other = threading.Thread(target=ast.parse, args=("a = 1",))
        other.start()
        other.join()
        self.ran.append("parsed")


def deep(calls, function):
    return deep(calls - 1, function) if calls else function()


def test_another_thread_may_parse_meanwhile():
    """It makes CPython 3.11 fail with a SystemError: one count of the depth is for all threads."""
    ran = []
    gc.collect()
    before = gc.get_threshold()
    gc.set_threshold(2000)
    try:
        Interrupting(ran)
        assert deep(100, lambda: Sources().of_class(argparse.ArgumentParser))
    finally:
        gc.set_threshold(*before)
    assert ran == ["parsed"]
