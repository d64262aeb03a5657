"""JSON lines that every parser reads: no NaN, no infinity, no torn last line after a crash."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from laser_fast.config import ConfigError


def plain_value(value: Any) -> Any:
    """A value as JSON knows it: numpy and tensor scalars unwrapped, NaN and infinity as None."""
    if isinstance(value, Mapping):
        return {key: plain_value(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain_value(inner) for inner in value]
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def to_line(record: Mapping[str, Any]) -> str:
    """One record as one line of JSON, newline included."""
    return _dump(record) + "\n"


def to_text(record: Mapping[str, Any]) -> str:
    """One record as a JSON file for people."""
    return _dump(record, indent=2) + "\n"


def _dump(record: Mapping[str, Any], indent: int | None = None) -> str:
    text = json.dumps(plain_value(record), ensure_ascii=False, allow_nan=False, indent=indent)
    # UTF-8 has no lone surrogates; written as \\udXXX they are JSON's own escape.
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def read_lines(path: str | Path) -> list[dict[str, Any]]:
    """The records of a file; a last line without its newline was torn by a crash and is dropped.

    Raises:
        ConfigError: a line that is no JSON object; the message names file and line.
    """
    records = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").split("\n")[:-1], 1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ConfigError(f"{path}, line {number}: not valid JSON: {error}") from None
        if not isinstance(record, dict):
            raise ConfigError(f"{path}, line {number}: expected a JSON object, got {line[:60]}")
        records.append(record)
    return records


def read_json(path: str | Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ConfigError: the file holds no JSON object; the message names it.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected a JSON object, got {str(content)[:60]}")
    return content


def write_lines(path: str | Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Write a file whole or not at all."""
    replace_text(path, "".join(to_line(record) for record in records))


def keep_lines(path: str | Path, keep: Callable[[dict[str, Any]], bool]) -> None:
    """Drop the records that `keep` refuses, and a torn last line; a missing file stays missing."""
    if Path(path).exists():
        write_lines(path, filter(keep, read_lines(path)))


def replace_text(path: str | Path, text: str) -> None:
    """Put new text in place of a file in one step, so that a crash leaves the old one."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
