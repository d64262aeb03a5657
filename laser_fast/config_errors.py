"""What a user did wrong, as one sentence: the key, what is wrong, what to do.

Imports no pydantic, so that what raises a ConfigError runs on a machine without it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pydantic import ValidationError

# Below this similarity (difflib's ratio) a proposed name would be a guess.
_CLOSE = 0.6


class ConfigError(ValueError):
    """A configuration or input that cannot run; the message is one sentence for the user."""


def explain(error: ValidationError, docs: Mapping[str, str]) -> str:
    """Word the first problem; `docs` holds every dotted key with its documentation.

    An unknown key goes before a missing one, since it may be the missing one misspelt.
    """
    problems = error.errors(include_url=False)
    unknown = [problem for problem in problems if problem["type"] == "extra_forbidden"]
    first = (unknown or problems)[0]
    # Deeper parts of a location are members of a union and places in a tuple.
    location = first["loc"][:2]
    path = ".".join(str(part) for part in location)
    if first["type"] == "extra_forbidden":
        return _unknown(path, first["input"], docs)
    if first["type"] == "value_error":
        return str(first["ctx"]["error"])
    if path in _sections(docs):
        if first["type"] == "missing":
            return f"the section [{path}] is missing; add it"
        return (
            f'"{path}" is a section, got {_shown(first["input"])}; set its keys instead, such as '
            f"{_keys(path, docs)[0]}"
        )
    about = f" ({docs[path].split('. ')[0].rstrip('.')})"
    if first["type"] == "missing" and first["loc"] == location:
        return f'"{path}" is missing; set it{about}'
    expected = " or ".join(
        _expected(problem) for problem in problems if problem["loc"][:2] == location
    )
    return f'"{path}": expected {expected}, got {_shown(first["input"])}{about}'


def _unknown(path: str, value: Any, docs: Mapping[str, str]) -> str:
    section, _, name = path.rpartition(".")
    if not section and isinstance(value, dict):
        sections = _sections(docs)
        nearest = _by_similarity(name, sections)
        if _similarity(name, nearest[0]) >= _CLOSE:
            return f"unknown section [{name}]: rename it to [{nearest[0]}] or remove it"
        return f"unknown section [{name}]: remove it; the sections are {', '.join(sections)}"
    for pool in (_keys(section, docs), list(docs)):
        nearest = _by_similarity(name, pool)
        if _similarity(name, nearest[0]) >= _CLOSE:
            return f'unknown key "{path}": rename it to "{nearest[0]}" or remove it'
    names = ", ".join(_by_similarity(name, _keys(section, docs)))
    return f'unknown key "{path}": remove it or choose one of these, nearest first: {names}'


def _expected(problem: Mapping[str, Any]) -> str:
    """Pydantic's "Input should be ...", fit to follow the word expected."""
    if problem["type"] == "missing":
        return "one more value"
    text = (
        problem["msg"]
        .removeprefix("Input should be ")
        .replace("a valid int", "an int")
        .replace("valid ", "")
    )
    is_bound = problem["type"].startswith(("greater_than", "less_than"))
    return f"a number {text}" if is_bound else text[:1].lower() + text[1:]


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _sections(docs: Mapping[str, str]) -> list[str]:
    return list(dict.fromkeys(key.partition(".")[0] for key in docs if "." in key))


def _keys(section: str, docs: Mapping[str, str]) -> list[str]:
    """Keys of a section; of the top level for an empty name."""
    return [key for key in docs if key.rpartition(".")[0] == section]


def _by_similarity(name: str, keys: Iterable[str]) -> list[str]:
    return sorted(keys, key=lambda key: -_similarity(name, key))


def _similarity(name: str, key: str) -> float:
    """Likeness of two names, the key's without its section."""
    return difflib.SequenceMatcher(None, name, key.rpartition(".")[2]).ratio()
