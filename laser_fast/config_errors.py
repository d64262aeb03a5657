"""What a user wrote, as nested dicts, and what is wrong with it, as one sentence.

Imports no pydantic, so that what raises a ConfigError runs on a machine without it.
"""

from __future__ import annotations

import difflib
import textwrap
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pydantic import ValidationError

# What is known elsewhere and not here, each with the reason.
_WHOLE = "training samples the whole distribution, whose log-probs its ratios are made of"
_REFUSED = {
    **{f"rollout.{key}": f"{_WHOLE}; rollout.eval_{key} is for evaluations"
       for key in ("top_p", "top_k", "min_p")},
    **dict.fromkeys(("rollout.repetition_penalty", "rollout.frequency_penalty"), _WHOLE),
    **dict.fromkeys(("rollout.stop", "rollout.stop_strings"),
                    "a completion ends with an EOS id of the model, where its score is read"),
    **dict.fromkeys(("data.rows_per_step", "data.max_response_tokens"),
                    "it is of a supervised phase, which is what `laser-fast sft` runs"),
}  # fmt: skip

REPORTED = "reported by its rank"  # a note on an error that needs no further words


class ConfigError(ValueError):
    """A configuration or input that cannot run; the message is one sentence for the user."""


class RunError(RuntimeError):
    """A run that cannot go on; the message is one sentence for the user."""


def first_line(error: BaseException) -> str:
    """What an error says in one line, or its kind if it says nothing."""
    text = str(error)
    if hasattr(error, "errors"):  # of pydantic, whose first line only counts them
        first = error.errors()[0]
        text = ": ".join([*map(str, first["loc"]), first["msg"].removeprefix("Value error, ")])
    return text.strip().partition("\n")[0] or type(error).__name__


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Refuse what a user brought, in one sentence that `what` opens, if its reader fails within.

    For files and templates that other packages read. A broken one surfaces wherever they first
    trip over it: as KeyError, TypeError, RecursionError, or as an error of their own.
    """
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        kind = "" if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: "
        reason = textwrap.shorten(f"{kind}{error}", 240, placeholder=" ...")
        raise ConfigError(f"{what}: {reason}") from error


@contextmanager
def needs_package(package: str, key: str, *, extra: str) -> Iterator[None]:
    """Say which extra brings what a key asks for, where its import fails within."""
    try:
        yield
    except ImportError:
        raise ConfigError(f"{key} needs {package}; pip install 'laser-fast[{extra}]'") from None


def read_toml(path: str | Path) -> dict[str, Any]:
    """Read a configuration file, or the packaged one of this name, as dicts, not validated yet."""
    packaged = {file.stem: file for file in Path(__file__).with_name("configs").glob("*.toml")}
    file = path if Path(path).is_file() else packaged.get(str(path), path)
    try:
        return tomllib.loads(Path(file).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot read the configuration: {error.strerror}; name a TOML file or "
            f"one of {', '.join(sorted(packaged))}"
        ) from None
    except (ValueError, RecursionError) as error:  # numbers and nesting beyond all bounds, too
        raise ConfigError(f"{path}: not valid TOML: {error}") from None


def apply_override(data: dict[str, Any], override: str) -> None:
    """Set one key of nested sections from `section.key=value`, in place."""
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f'override "{override}": expected section.key=value')
    with reading(f'override "{key}"'):
        text.encode()  # bytes of a command line that are no UTF-8 come as lone surrogates
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        value = text
    *sections, last = key.split(".")
    for depth, section in enumerate(sections, start=1):
        data = data.setdefault(section, {})
        if not isinstance(data, dict):
            path = ".".join(sections[:depth])
            raise ConfigError(
                f'override "{override}": {path} is a value, not a section; write {path}=value'
            )
    data[last] = value


def explain(error: ValidationError, docs: Mapping[str, str]) -> str:
    """Word the first problem; `docs` holds every dotted key with its documentation.

    An unknown key goes before a missing one, since it may be the missing one misspelt.
    """
    problems = error.errors(include_url=False)
    first = min(problems, key=lambda problem: problem["type"] != "extra_forbidden")
    # Deeper parts of a location are members of a union and places in a tuple.
    depth = 1 if set(first["loc"][:1]) & docs.keys() else 2
    location, value = first["loc"][:depth], first["input"]
    path = ".".join(map(str, location))
    is_missing = first["type"] == "missing" and first["loc"] == location
    if path not in docs and (reason := _REFUSED.get(path)):
        return f'"{path}" is refused: {reason}; remove it'
    if first["type"] == "extra_forbidden":
        return _unknown(path, value, docs)
    if first["type"] == "value_error":
        return str(first["ctx"]["error"])
    if path not in docs and is_missing:
        return f"the section [{path}] is missing; add it"
    if path not in docs:
        key = _keys(path, docs)[0]
        return f'"{path}" is a section, got {value!r:.60}; set its keys instead, such as {key}'
    about = f" ({docs[path].split('. ')[0].rstrip('.')})"
    if is_missing:
        return f'"{path}" is missing; set it{about}'
    own = [problem for problem in problems if problem["loc"][:depth] == location]
    for problem in own:  # in a table, where another kind of value could stand as well
        if any(str(part).startswith("dict[") for part in problem["loc"][:-1]):
            what = f"{_expected(problem)} for {problem['loc'][-1]!r}"
            return f'"{path}": expected {what}, got {problem["input"]!r:.60}{about}'
    expected = " or ".join(dict.fromkeys(map(_expected, own)))
    return f'"{path}": expected {expected}, got {value!r:.60}{about}'


def _unknown(path: str, value: Any, docs: Mapping[str, str]) -> str:
    section, _, name = path.rpartition(".")
    if not section and isinstance(value, dict):
        sections = list(dict.fromkeys(key.partition(".")[0] for key in docs if "." in key))
        if found := nearest(name, sections):
            return f"unknown section [{name}]: rename it to [{found[0]}] or remove it"
        return f"unknown section [{name}]: remove it; the sections are {', '.join(sections)}"
    own = _keys(section, docs)
    if found := nearest(name, own) or nearest(name, docs):
        return f'unknown key "{path}": rename it to "{found[0]}" or remove it'
    names = ", ".join(nearest(name, own, 0.0))
    return f'unknown key "{path}": remove it or choose one of these, nearest first: {names}'


def _expected(problem: Mapping[str, Any]) -> str:
    """Pydantic's "Input should be ...", fit to follow the word expected."""
    if problem["type"] == "missing":
        return "one more value"
    text = problem["msg"].removeprefix("Input should be ").removeprefix("String should have ")
    text = text.replace("a valid int", "an int").replace("valid ", "").replace("tuple", "list")
    is_bound = problem["type"].startswith(("greater_than", "less_than"))
    return f"a number {text}" if is_bound else text[:1].lower() + text[1:]


def _keys(section: str, docs: Mapping[str, str]) -> Sequence[str]:
    """Keys of a section; of the top level for an empty name."""
    return [key for key in docs if key.rpartition(".")[0] == section]


def likely(name: str, keys: Iterable[str]) -> str:
    """The end of a message about an unknown name: what it may be misspelt for."""
    return "".join(f'; did you mean "{key}"?' for key in nearest(name, keys)[:1])


def nearest(name: str, keys: Iterable[str], minimum: float = 0.6) -> list[str]:
    """The keys like the name, the nearest first; below a likeness of 0.6 it would be a guess."""

    def likeness(key: str) -> float:
        return difflib.SequenceMatcher(None, name, key.rpartition(".")[2]).ratio()

    return sorted((key for key in keys if likeness(key) >= minimum), key=likeness, reverse=True)
