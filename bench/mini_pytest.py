"""Just enough of pytest to run tests where it is not installed, such as a bare GPU machine.

Marks, parametrize, fixtures of any scope as if function-scoped, raises, skip and the fixtures
`tmp_path` and `monkeypatch` (setenv, delenv). A test that needs more is reported as skipped.
"""

from __future__ import annotations

import importlib.util
import inspect
import itertools
import os
import re
import sys
import tempfile
import types
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple


class Skipped(BaseException):
    """Raised by `skip`; as in pytest no Exception, so that tests do not catch it."""


class Mark:
    """`pytest.mark.name`, with or without arguments."""

    def __init__(self, name: str, args: tuple = (), kwargs: dict | None = None) -> None:
        self.name, self.args, self.kwargs = name, args, kwargs or {}

    def __call__(self, *args, **kwargs):
        """Decorate a test, or take the mark's arguments."""
        if len(args) == 1 and inspect.isfunction(args[0]) and not kwargs:
            args[0].marks = [*getattr(args[0], "marks", []), self]
            return args[0]
        return Mark(self.name, args, kwargs)


class _Marks:
    def __getattr__(self, name: str) -> Mark:
        return Mark(name)


class Param(NamedTuple):
    """A parameter set; its marks and its id are not used."""

    values: tuple


class _Raised:
    value: BaseException | None = None


@contextmanager
def raises(expected, match: str | None = None) -> Iterator[_Raised]:
    """Fail unless the block raises `expected`, with a message that `match` finds."""
    info = _Raised()
    try:
        yield info
    except expected as error:
        info.value = error
        assert match is None or re.search(match, str(error)), f"{match!r} not in {error}"
        return
    raise AssertionError(f"did not raise {expected}")


def _skip(reason: str = "") -> None:
    raise Skipped(reason)


def _import_or_skip(name: str) -> types.ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise Skipped(f"needs {name}") from None


def _fixture(function: Callable | None = None, **options):
    if function is None:
        return lambda f: _fixture(f, **options)
    function.fixture_options = options
    return function


class _MonkeyPatch:
    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack

    def setenv(self, name: str, value: str) -> None:
        self.delenv(name, raising=False)
        os.environ[name] = value

    def delenv(self, name: str, raising: bool = True) -> None:
        before = os.environ.pop(name, None)
        undo = os.environ.pop if before is None else os.environ.__setitem__
        self._stack.callback(undo, name, before)


def install() -> None:
    """Let `import pytest` find this module's stand-in."""
    stand_in = types.ModuleType("pytest")
    stand_in.__dict__.update(
        mark=_Marks(),
        fixture=_fixture,
        raises=raises,
        skip=_skip,
        importorskip=_import_or_skip,
        param=lambda *values, **options: Param(values),
    )
    sys.modules["pytest"] = stand_in


def run_file(path: Path, marker: str, on_result: Callable[[str, str, str], None]) -> None:
    """Run the tests of a file that carry `marker`; `on_result` hears name, outcome, reason."""
    folders = [folder for folder in reversed(path.parents) if (folder / "conftest.py").exists()]
    fixtures: dict[str, Callable] = {}
    for source in [*(folder / "conftest.py" for folder in folders), path]:
        module = _load(source)
        fixtures |= {n: f for n, f in vars(module).items() if hasattr(f, "fixture_options")}
    common = getattr(module, "pytestmark", [])
    common = list(common) if isinstance(common, list) else [common]
    for name, test in vars(module).items():
        if not name.startswith("test") or not inspect.isfunction(test):
            continue
        marks = [*common, *getattr(test, "marks", [])]
        if marker not in {mark.name for mark in marks}:
            continue
        for label, arguments in _cases([m for m in marks if m.name == "parametrize"]):
            on_result(f"{path.name}::{name}{label}", *_run(test, marks, fixtures, arguments))


def _load(path: Path) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(f"mini_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _cases(marks: list[Mark]) -> Iterator[tuple[str, dict]]:
    """Every combination of the parameters, as (label, arguments)."""
    axes = []
    for mark in marks:
        names, sets = mark.args[:2]
        names = [n.strip() for n in names.split(",")] if isinstance(names, str) else list(names)
        sets = [s.values if isinstance(s, Param) else s if len(names) > 1 else (s,) for s in sets]
        axes.append([dict(zip(names, values, strict=True)) for values in sets])
    for parts in itertools.product(*axes):
        arguments = {name: value for part in parts for name, value in part.items()}
        label = "-".join(str(value) for value in arguments.values())
        yield (f"[{label}]" if label else ""), arguments


def _run(test: Callable, marks: list[Mark], fixtures: dict, arguments: dict) -> tuple[str, str]:
    with ExitStack() as stack:
        known = dict(arguments)

        def value(name: str):
            if name not in known:
                known[name] = _make(name, fixtures, value, stack)
            return known[name]

        try:
            for mark in marks:
                if mark.name == "skip" or (mark.name == "skipif" and mark.args[0]):
                    raise Skipped(mark.kwargs.get("reason", ""))
            for name, fixture in fixtures.items():
                if fixture.fixture_options.get("autouse"):
                    value(name)
            test(**{name: value(name) for name in inspect.signature(test).parameters})
        except Skipped as reason:
            return "skipped", str(reason)
        except Exception as error:
            return "failed", f"{type(error).__name__}: {error}"[:500]
    return "passed", ""


def _make(name: str, fixtures: dict, value: Callable, stack: ExitStack):
    if name == "tmp_path":
        return Path(stack.enter_context(tempfile.TemporaryDirectory()))
    if name == "monkeypatch":
        return _MonkeyPatch(stack)
    if name not in fixtures or "params" in fixtures[name].fixture_options:
        raise Skipped(f"fixture {name} needs pytest")
    function = fixtures[name]
    made = function(**{n: value(n) for n in inspect.signature(function).parameters})
    if inspect.isgenerator(made):
        stack.callback(next, made, None)
        return next(made)
    return made
