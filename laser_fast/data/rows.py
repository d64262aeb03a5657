"""Rows of a data set, one at a time, each with the place an error message can name.

Local files by suffix: .jsonl, .json (an array of objects, or one object a line), .csv and
.parquet. Anything else is a data set of the Hugging Face hub, `owner/name` or
`owner/name:configuration`, or a folder that `datasets.load_dataset` understands. All are streamed
but a JSON array, which is read whole.

Text formats are read here and not by `datasets`, whose readers guess one type per column (the CSV
answer 007 becomes 7, NA becomes null, numbers beside texts fail) and do not tell the line of a
broken row.
"""

import csv
import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from laser_fast.config import ConfigError

Row = tuple[str, Any]  # the place, for messages; a dict of fields if the data is sound
Fields = Mapping[str, str]  # field of the data -> the configuration key that names it

_BATCH = 1000
_BETWEEN_ITEMS = re.compile(r"[\s,]*")


@dataclass(frozen=True)
class RowSource:
    """A data set that can be read from its first row, any number of times.

    `name` is for messages. `identity` changes when the content may have changed. `read(fields)`
    yields rows that hold at least `fields`, unless the data lacks them.
    """

    name: str
    identity: tuple[str, ...]
    read: Callable[[Fields], Iterator[Row]]


def open_rows(name: str, *, split: str) -> RowSource:
    """Find the data set that `name` means, without reading its rows; a ConfigError if none."""
    if not name:
        raise ConfigError("the name of a data set is empty; set data.train or data.eval")
    path = Path(name)
    if path.suffix not in _READERS and path.is_file():
        raise ConfigError(f"{name}: expected a data file ending in one of {', '.join(_READERS)}")
    if path.suffix not in _READERS:
        return _open_hub(name, split)
    if not path.is_file():
        raise ConfigError(f"{name}: no such data file")
    status = path.stat()
    # The time of the last change of anything, which nobody can set, and the file that has the name.
    facts = (status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)
    identity = (str(path.resolve()), *map(str, facts))
    return RowSource(name, identity, partial(_READERS[path.suffix], path))


def question_text(row: Any, fields: Fields, field: str, place: str) -> str:
    """Return the question of a row; a ConfigError names the place, the field and its fault."""
    value, about = _value(row, fields, field, place)
    if not isinstance(value, str):
        raise ConfigError(f"{about}: expected text, got {type(value).__name__}")
    return value


def answer_text(row: Any, fields: Fields, field: str, place: str) -> str:
    """Return the gold answer of a row as text.

    Numbers become their usual text (70, 0.5). A list is several values, joined by ", ", as sets
    of olympiad problems write them.
    """
    value, about = _value(row, fields, field, place)
    items = value if isinstance(value, list) else [value]
    for item in items or [None]:
        if isinstance(item, bool) or not isinstance(item, (str, int, float, Decimal)):
            raise ConfigError(
                f"{about}: expected text, a number or a list of them, got {value!r:.60}"
            )
    return ", ".join(str(item) for item in items)


def _value(row: Any, fields: Fields, field: str, place: str) -> tuple[Any, str]:
    """A value that is not empty, and how messages name it."""
    if not isinstance(row, dict):
        raise ConfigError(f"{place}: expected an object with fields, got {type(row).__name__}")
    _check_fields(place, {field: fields[field]}, row)
    value = row[field]
    about = f'{place}: field "{field}" ({fields[field]})'
    if value is None or value != value:  # nan is the null of a column of floats
        raise ConfigError(f"{about} is null; fill it in or remove the row")
    if isinstance(value, str):
        if not value.strip():
            raise ConfigError(f"{about} is empty; fill it in or remove the row")
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise ConfigError(f"{about} is not valid Unicode: {error.reason}") from None
    return value, about


def _check_fields(place: str, fields: Fields, there: Collection[str]) -> None:
    for field, key in fields.items():
        if field not in there:
            names = ", ".join(there)
            raise ConfigError(f'{place}: no field "{field}" ({key}); the fields are {names}')


def _read_jsonl(path: Path, fields: Fields) -> Iterator[Row]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            place = f"{path}:{number}"
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                fault = f"not valid JSON: {error.msg} at column {error.colno}"
                raise ConfigError(f"{place}: {fault}") from None
            except UnicodeDecodeError as error:
                raise ConfigError(f"{place}: not valid UTF-8: {error.reason}") from None
            yield place, row


def _read_json(path: Path, fields: Fields) -> Iterator[Row]:
    with open(path, "rb") as file:
        start = file.read(1 << 20).removeprefix(b"\xef\xbb\xbf").lstrip()
    yield from (_read_array if start.startswith(b"[") else _read_jsonl)(path, fields)


def _read_array(path: Path, fields: Fields) -> Iterator[Row]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start)
        raise ConfigError(f"{path}: not valid UTF-8 after line {line}: {error.reason}") from None
    decoder, line, position, end = json.JSONDecoder(), 1, 0, text.index("[") + 1
    while gap := _BETWEEN_ITEMS.match(text, end):  # it may be empty
        line += text.count("\n", position, gap.end())
        position = gap.end()
        if text.startswith("]", position):
            return
        try:
            row, end = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            raise ConfigError(f"{path}:{error.lineno}: not valid JSON: {error.msg}") from None
        yield f"{path}:{line}", row


def _read_csv(path: Path, fields: Fields) -> Iterator[Row]:
    with open(path, newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            for row in reader:
                place = f"{path}:{reader.line_num}"
                if None in row or None in row.values():
                    raise ConfigError(f"{place}: expected {len(reader.fieldnames or ())} columns")
                yield place, row
        except csv.Error as error:
            raise ConfigError(f"{path}:{reader.reader.line_num}: not valid CSV: {error}") from None
        except UnicodeDecodeError as error:
            fault = f"not valid UTF-8 after line {reader.line_num}: {error.reason}"
            raise ConfigError(f"{path}: {fault}") from None


def _read_parquet(path: Path, fields: Fields) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            _check_fields(str(path), fields, file.schema_arrow.names)
            batches = file.iter_batches(batch_size=_BATCH, columns=list(fields))
            yield from _number((batch.to_pylist() for batch in batches), str(path))
    except (pyarrow.ArrowException, OSError) as error:
        raise ConfigError(f"{path}: not a readable parquet file: {error}") from None


def _open_hub(name: str, split: str) -> RowSource:
    import datasets

    repository, _, configuration = name.partition(":")
    try:
        rows = datasets.load_dataset(repository, configuration or None, split=split)
    except (datasets.exceptions.DatasetsError, ValueError, OSError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(
            f'"{name}" is no file here, and as a data set of the hub (split "{split}") it does '
            f"not load: {reason}"
        ) from None

    def read(fields: Fields) -> Iterator[Row]:
        _check_fields(name, fields, rows.column_names)
        columns = rows.select_columns(list(fields)).with_format("arrow")
        yield from _number((table.to_pylist() for table in columns.iter(_BATCH)), name)

    # Cache files carry the revision of the data set in their path.
    identity = (name, split, *(file["filename"] for file in rows.cache_files))
    return RowSource(name, identity, read)


def _number(batches: Iterator[list[dict[str, Any]]], name: str) -> Iterator[Row]:
    for number, row in enumerate(chain.from_iterable(batches)):
        yield f"{name} row {number}", row


_READERS = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
