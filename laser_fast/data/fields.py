"""What a row holds: a question, as text or as messages, and its gold answer.

A field may be nested, "reward_model.ground_truth". "auto" is the first of the names below that the
first row has, so that rows made for verl and for TRL are read as they are.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from decimal import Decimal
from typing import Any

from laser_fast.config import ConfigError
from laser_fast.data.rows import Fields, Row, RowSource, check_fields

Question = str | list[dict[str, str]]  # or messages, of which the last is not the assistant's

AUTO = "auto"
QUESTIONS = ("problem", "prompt", "question", "messages", "query", "instruction")
ANSWERS = ("answer", "reward_model.ground_truth", "ground_truth", "final_answer", "solution")


def find_fields(source: RowSource, question: str, answer: str) -> tuple[str, str]:
    """The fields of question and answer in a data set; "auto" is looked for in its first row."""
    if AUTO not in (question, answer):
        return question, answer
    first = next(source.read({}), None)
    if first is None:
        raise ConfigError(f"{source.name}: the data set has no rows")
    place, row = first
    wanted = (question, QUESTIONS, "data.prompt_field"), (answer, ANSWERS, "data.answer_field")
    found = []
    for given, names, key in wanted:
        name = next((n for n in names if _has(place, row, n)), None) if given == AUTO else given
        if name is None:
            raise ConfigError(
                f"{place}: no field among {', '.join(names)}; set {key}, the fields are "
                f"{', '.join(row)}"
            )
        found.append(name)
    return found[0], found[1]


def kept(source: RowSource, where: Mapping[str, Sequence[bool | str | float]]) -> RowSource:
    """The rows whose fields have one of the given values each."""
    if not where:
        return source

    def read(fields: Fields) -> Iterator[Row]:
        wanted = {**fields, **dict.fromkeys(where, "data.where")} if fields else {}
        for place, row in source.read(wanted):
            if all(_get(place, row, f, "data.where") in values for f, values in where.items()):
                yield place, row

    named = f"{source.name} where {json.dumps(where, sort_keys=True)}"
    return replace(source, name=named, identity=(*source.identity, named), read=read)


def question_of(row: Any, fields: Fields, field: str, place: str) -> Question:
    """Return the question of a row; a ConfigError names the place, the field and its fault."""
    value, about = _value(row, fields, field, place)
    if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        return [_message(item, f"{about}: message {i}") for i, item in enumerate(value)]
    if not isinstance(value, str):
        expected = "expected text or a list of messages with role and content"
        raise ConfigError(f"{about}: {expected}, got {type(value).__name__}")
    return value


def _message(item: dict[str, Any], about: str) -> dict[str, str]:
    role, content = item.get("role"), item.get("content")
    if not isinstance(role, str) or not isinstance(content, str):
        raise ConfigError(f"{about}: expected role and content as text, got {item!r:.80}")
    _check_text(content, about)
    return {"role": role, "content": content}


def answer_text(row: Any, fields: Fields, field: str, place: str) -> str:
    """Return the gold answer of a row as text.

    Numbers become digits that read back exactly (70, 0.5, 0.00001 and not 1e-05). A list is
    several values, joined by ", ", as sets of olympiad problems write them.
    """
    value, about = _value(row, fields, field, place)
    items = value if isinstance(value, list) else [value]
    for item in items or [None]:
        if isinstance(item, bool) or not isinstance(item, (str, int, float, Decimal)):
            raise ConfigError(
                f"{about}: expected text, a number or a list of them, got {value!r:.60}"
            )
    return ", ".join(
        f"{Decimal(str(item)):f}" if isinstance(item, (float, Decimal)) else str(item)
        for item in items
    )


def fields_of(row: Any, names: Sequence[str], place: str) -> dict[str, Any]:
    """What a row holds under the names that a reward function asks for."""
    return {name: _get(place, row, name, "which the reward function asks for") for name in names}


def _value(row: Any, fields: Fields, field: str, place: str) -> tuple[Any, str]:
    """A value that is not empty, and how messages name it."""
    value = _get(place, row, field, fields[field])
    about = f'{place}: field "{field}" ({fields[field]})'
    for item in value if isinstance(value, list) else [value]:
        # nan is the null of a column of floats.
        if item is None or (isinstance(item, float) and not math.isfinite(item)):
            raise ConfigError(f"{about} is null or not finite; fill it in or remove the row")
        if isinstance(item, str):
            _check_text(item, about)
    return value, about


def _check_text(text: str, about: str) -> None:
    if not text.strip():
        raise ConfigError(f"{about} is empty; fill it in or remove the row")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"{about} is not valid Unicode: {error.reason}") from None


def _get(place: str, row: Any, field: str, key: str) -> Any:
    if not isinstance(row, dict):
        raise ConfigError(f"{place}: expected an object with fields, got {type(row).__name__}")
    if field in row:
        return row[field]
    check_fields(place, {field: key}, row)
    value = row
    for part in field.split("."):
        if not isinstance(value, dict) or part not in value:
            raise ConfigError(f'{place}: no field "{field}" ({key})')
        value = value[part]
    return value


def _has(place: str, row: Any, field: str) -> bool:
    try:
        _get(place, row, field, "")
    except ConfigError:
        if not isinstance(row, dict):
            raise
        return False
    return True
