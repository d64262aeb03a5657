"""JSON lines that every parser reads: no NaN, no infinity, no torn last line after a crash."""

import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from laser_fast.config_errors import ConfigError, reading
from laser_fast.files import replacing


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


def to_text(record: Mapping[str, Any], *, indent: int | None = 2) -> str:
    """One record as a JSON file for people."""
    text = json.dumps(plain_value(record), ensure_ascii=False, allow_nan=False, indent=indent)
    # UTF-8 has no lone surrogates; written as \\udXXX they are JSON's own escape.
    return text.encode("utf-8", "backslashreplace").decode("utf-8") + "\n"


def to_line(record: Mapping[str, Any]) -> str:
    """One record as one line of JSON, newline included."""
    return to_text(record, indent=None)


def read_lines(path: str | Path) -> list[dict[str, Any]]:
    """The records of a file; a last line without its newline was torn by a crash and is dropped."""
    with reading(f"{path}: not readable"):
        lines = Path(path).read_text(encoding="utf-8").split("\n")[:-1]
    return [_object(line, f"{path}, line {number}") for number, line in enumerate(lines, 1)]


def read_json(path: str | Path) -> dict[str, Any]:
    """The object in a JSON file."""
    with reading(f"{path}: not readable"):
        return _object(Path(path).read_text(encoding="utf-8"), str(path))


def write_lines(path: str | Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Write a file whole or not at all."""
    replace_text(path, "".join(map(to_line, records)))


def keep_lines(path: str | Path, keep: Callable[[dict[str, Any]], bool]) -> None:
    """Drop the records that `keep` refuses, and a torn last line; a missing file stays missing."""
    if Path(path).exists():
        write_lines(path, (line for line in read_lines(path) if keep(line)))


def replace_text(path: str | Path, text: str) -> None:
    """Put new text in place of a file in one step, so that a crash leaves the old one."""
    with replacing(Path(path)) as partial:
        partial.write_text(text, encoding="utf-8")


def _object(text: str, place: str) -> dict[str, Any]:
    with reading(f"{place}: not valid JSON"):
        found = json.loads(text)
    if not isinstance(found, dict):
        raise ConfigError(f"{place}: expected a JSON object, got {text[:60]}")
    return found
