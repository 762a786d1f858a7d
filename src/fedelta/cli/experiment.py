"""Loading an experiment file: a Python file with `program()`, `site(name)`, `sites()`, and optionally `test()`."""

import importlib.util
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import click

from fedelta.algorithms.federation import Federation
from fedelta.core.errors import BadExperiment, FedeltaError
from fedelta.core.examples import Examples
from fedelta.core.program import SiteData

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Experiment:
    path: Path
    program: Callable[[], object]
    site: Callable[[str], object]
    sites: Callable[[], Sequence[str]]
    test: Callable[[], object] | None

    @classmethod
    def load(cls, path: Path, settings: dict[str, str]) -> "Experiment":
        """Import the file; `settings` replace its capitalised constants. Raises BadExperiment if it cannot be used."""
        if not path.is_file():
            raise BadExperiment(f"there is no experiment file {path}")
        spec = importlib.util.spec_from_file_location("fedelta_experiment", path)
        if spec is None or spec.loader is None:
            raise BadExperiment(f"{path} is not a Python file")
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        sys.path.insert(0, str(path.parent.resolve()))
        loader = spec.loader
        # cached bytecode counts as fresh if a file of the same size was written within the same second
        writes, sys.dont_write_bytecode = sys.dont_write_bytecode, True
        try:
            guarded(path, "it was loaded", lambda: loader.exec_module(module))
        finally:
            sys.dont_write_bytecode = writes
        for name, value in settings.items():
            _set(module, path, name, value)
        missing = [name for name in ("program", "site", "sites") if not callable(getattr(module, name, None))]
        if missing:
            raise BadExperiment(f"{path} does not define {' and '.join(f'{name}()' for name in missing)}")
        test = getattr(module, "test", None)
        return cls(path=path, program=module.program, site=module.site, sites=module.sites, test=test)

    def build(self) -> object:
        return guarded(self.path, "program() was called", self.program)

    def names(self) -> list[str]:
        names = list(guarded(self.path, "sites() was called", self.sites))
        if not names or not all(isinstance(name, str) for name in names) or len(set(names)) != len(names):
            raise BadExperiment(f"sites() of {self.path} must give distinct names, at least one; got {names[:5]}")
        return names

    def data(self, name: str) -> object:
        """Of one site; read where the site is, and in a simulation."""
        return guarded(self.path, f"site({name!r}) was called", lambda: self.site(name))

    def held_out(self) -> Examples | None:
        if self.test is None:
            return None
        return Examples.of(guarded(self.path, "test() was called", self.test))  # type: ignore[arg-type]


@dataclass(kw_only=True)
class Sites:
    """The data of a simulation's sites, each loaded once; what failed to load fails again when its site is asked."""

    load: Callable[[str], object]
    names: list[str]
    _loaded: dict[str, SiteData] = field(default_factory=dict)

    def __call__(self, name: str) -> SiteData:
        if name not in self._loaded:
            self._loaded[name] = SiteData.of(self.load(name))  # type: ignore[arg-type]
        return self._loaded[name]


def opened(
    path: Path, settings: Sequence[str], *, rounds: int | None, seed: int | None
) -> tuple[Federation[Any], Sites]:
    """The federation of an experiment file, with its test set, and its sites.

    `settings` are NAME=VALUE; `rounds` and `seed` replace the experiment's own where they are given.
    """
    loaded, federation = federated(path, settings, rounds=rounds, seed=seed, test=True)
    return federation, Sites(load=loaded.data, names=loaded.names())


def federated(
    path: Path, settings: Sequence[str], *, rounds: int | None = None, seed: int | None = None, test: bool
) -> tuple[Experiment, Federation[Any]]:
    """As `opened`, without asking for the sites; `test`: with the test set, which is the coordinator's alone."""
    loaded = Experiment.load(path, dict(_pair(setting) for setting in settings))
    program = loaded.build()
    if not isinstance(program, Federation):
        raise BadExperiment(f"program() of {path} must return a Federation, got {type(program).__name__}")
    held_out = loaded.held_out() if test else None
    changes: dict[str, Any] = {"rounds": rounds, "seed": seed, "test": held_out}
    return loaded, replace(program, **{k: v for k, v in changes.items() if v is not None})


def guarded(path: Path, when: str, call: Callable[[], T]) -> T:
    """The call's result; an exception of the user's code becomes one sentence with its line."""
    try:
        return call()
    except FedeltaError:
        raise
    except Exception as error:
        own = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        line = getattr(error, "lineno", None) or (own[-1].lineno if own else None)
        where = f"{path}, line {line}" if line else str(path)
        raise BadExperiment(f"{where}: {type(error).__name__}: {error} (when {when})") from error


def _pair(setting: str) -> tuple[str, str]:
    name, separator, value = setting.partition("=")
    if not separator or not name:
        raise click.BadParameter(f"{setting!r} is not of the form NAME=VALUE", param_hint="--set")
    return name, value


def _set(module: ModuleType, path: Path, name: str, text: str) -> None:
    """Replace a constant by `text`, read as the type that it has."""
    constants = {key: value for key, value in vars(module).items() if key.isupper()}
    if name not in constants:
        known = ", ".join(constants) or "none"
        raise BadExperiment(f"{path} has no constant {name} to set; it has {known}")
    kind = type(constants[name])
    try:
        if kind is bool:
            value: object = {"true": True, "false": False, "1": True, "0": False}[text.lower()]
        elif kind in (int, float, str, Path):
            value = kind(text)
        else:
            raise BadExperiment(f"{name} of {path} is {kind.__name__}, which cannot be set from the command line")
    except (KeyError, ValueError):
        raise BadExperiment(f"--set {name}={text}: {path} needs a {kind.__name__} there") from None
    setattr(module, name, value)
