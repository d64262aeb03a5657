"""Rows of a data set, one at a time, each with the place an error message can name.

Local files by suffix: .jsonl, .json (an array of objects, or one object a line), .csv and
.parquet. Anything else is a data set of the Hugging Face hub, `owner/name` or
`owner/name:configuration`, or a folder that `datasets.load_dataset` understands. All are streamed,
but for an array, which is read whole.

Files, also those of a folder, are read here and not by `datasets`, whose readers guess one type per
column (the CSV answer 007 becomes 7, NA becomes null, texts beside numbers get quotes) and do not
tell the line of a broken row. A hub data set stored as text is read as `datasets` guesses it.
"""

import csv
import json
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain, count
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from pyarrow.parquet import ParquetFile

from laser_fast.config import ConfigError
from laser_fast.config_errors import reading

Row = tuple[str, Any]  # the place, for messages; a dict of fields if the data is sound
Fields = Mapping[str, str]  # field of the data -> the configuration key that names it

_BATCH = 1000
_NARROW = {"float": np.float32, "halffloat": np.float16}  # by the names of Arrow


@dataclass(frozen=True)
class RowSource:
    """A data set that can be read from its first row, any number of times.

    `name` is for messages. `identity` changes when the content may have changed. `read(fields)`
    yields rows that hold at least `fields`, unless the data lacks them; without any, all of them.
    `splits` are those that the data set has, of a folder or the hub.
    """

    name: str
    identity: tuple[str, ...]
    read: Callable[[Fields], Iterator[Row]]
    splits: tuple[str, ...] = ()


def open_rows(name: str, *, split: str) -> RowSource:
    """Find the data set that `name` means, without reading its rows; a ConfigError if none."""
    if not name:
        raise ConfigError("the name of a data set is empty; set data.train or data.eval")
    path = Path(name).expanduser()
    if path.suffix not in _READERS and path.is_file():
        raise ConfigError(f"{name}: expected a data file ending in one of {', '.join(_READERS)}")
    if path.suffix not in _READERS:
        return _open_hub(str(path), split)
    if not path.is_file():
        raise ConfigError(f"{name}: no such data file")
    return _open_files(name, [path])


def _open_files(name: str, paths: list[Path]) -> RowSource:
    def read(fields: Fields) -> Iterator[Row]:
        for path in paths:
            with reading(f"{path}: not readable"):
                yield from _READERS[path.suffix](path, fields)

    identity: list[str] = []
    for path in paths:
        facts = path.stat()
        # The last is the time of any change, which nobody can set back.
        numbers = facts.st_ino, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns
        identity.extend((str(path.resolve()), *map(str, numbers)))
    return RowSource(name, tuple(identity), read)


def _read_jsonl(path: Path, fields: Fields) -> Iterator[Row]:
    with open(path, "rb") as file:
        for number, line in enumerate(map(bytes.strip, file), start=1):
            if not line:
                continue
            place = f"{path}:{number}"
            with reading(f"{place}: not valid JSON"):
                row = json.loads(line)
            yield place, row


def _read_json(path: Path, fields: Fields) -> Iterator[Row]:
    """Yield the items of an array, or of several in a row; without any, JSON lines."""
    with open(path, "rb") as file:
        is_array = file.read(1 << 20).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")
    if not is_array:
        yield from _read_jsonl(path, fields)
        return
    text, decoder = path.read_text(encoding="utf-8-sig").rstrip(), json.JSONDecoder()
    position, numbers = 0, count()
    while position < len(text):
        while text[position].isspace():
            position += 1
        rows, position = decoder.raw_decode(text, position)
        for row in rows:
            yield f"{path} row {next(numbers)}", row


def _read_csv(path: Path, fields: Fields) -> Iterator[Row]:
    csv.field_size_limit(sys.maxsize)  # of this process; a solution may exceed 131072 characters
    with open(path, newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            for row in reader:
                place = f"{path}:{reader.line_num}"
                names = reader.fieldnames or ()  # the same name twice makes one field of two
                if None in row or None in row.values() or len(row) < len(names):
                    raise ConfigError(f"{place}: expected {len(names)} columns of different names")
                yield place, row
        except csv.Error as error:
            raise ConfigError(f"{path}:{reader.reader.line_num}: not valid CSV: {error}") from None
        except UnicodeDecodeError as error:  # its own position is in the piece that was decoded
            fault = f"not valid UTF-8 after line {reader.line_num}: {error.reason}"
            raise ConfigError(f"{path}: {fault}") from None


def _read_parquet(path: Path, fields: Fields) -> Iterator[Row]:
    with ParquetFile(path) as file:
        names = file.schema_arrow.names
        if len({*names}) < len(names):
            raise ConfigError(f"{path}: expected columns of different names, got {names}")
        own = check_fields(str(path), fields, names) or None
        batches = file.iter_batches(batch_size=_BATCH, columns=own)
        yield from _number(batches, file.schema_arrow, str(path))


def check_fields(place: str, fields: Fields, there: Collection[str]) -> list[str]:
    """The columns that hold fields, which may be nested; refuses a place without one of them."""
    found: dict[str, None] = {}
    for field, key in fields.items():
        column = field if field in there else field.split(".")[0]
        if column not in there:
            names = ", ".join(there)
            raise ConfigError(f'{place}: no field "{field}" ({key}); the fields are {names}')
        found[column] = None
    return list(found)


def _open_hub(name: str, split: str) -> RowSource:
    repository, _, configuration = name.partition(":")
    with reading(
        f'"{name}" is no file here, and as a data set of the hub (split "{split}") it does not load'
    ):
        if Path(repository).is_dir():
            builder = datasets.load_dataset_builder(repository, configuration or None)
            files = builder.config.data_files or {}
            paths = [Path(file) for file in files.get(split, ())]
            if paths and all(path.suffix in _READERS for path in paths):
                return replace(_open_files(name, paths), splits=tuple(map(str, files)))
        rows = datasets.load_dataset(repository, configuration or None, split=split)

    def read(fields: Fields) -> Iterator[Row]:
        names = rows.column_names
        own = check_fields(name, fields, names) or names
        table = rows.select_columns(own).with_format("arrow")
        yield from _number(table.iter(_BATCH), table.features.arrow_schema, name)

    # Cache files carry the revision of the data set in their path.
    identity = (name, split, *(file["filename"] for file in rows.cache_files))
    return RowSource(name, identity, read, tuple(rows.info.splits or ()))


def _number(batches: Iterable[Any], schema: pa.Schema, name: str) -> Iterator[Row]:
    """Yield the rows of Arrow batches; `datasets` stores columns of mixed type as JSON texts."""
    mixed = {field.name for field in schema if "arrow.json" in str(field.type)}
    types = {field.name: str(getattr(field.type, "value_type", field.type)) for field in schema}
    narrow = {name: _NARROW[kind] for name, kind in types.items() if kind in _NARROW}
    rows = chain.from_iterable(batch.to_pylist() for batch in batches)
    for number, row in enumerate(rows):
        decoded = {field: _from_json(row[field]) for field in mixed & row.keys()}
        decoded |= {f: _shortest(row[f], kind) for f, kind in narrow.items() if f in row}
        yield f"{name} row {number}", row | decoded


def _shortest(value: Any, kind: type) -> Any:
    """A float32 0.1 as 0.1, which it was made from, and not as 0.10000000149011612."""
    if isinstance(value, list):
        return [_shortest(item, kind) for item in value]
    return value if value is None else float(str(kind(value)))


def _from_json(value: Any) -> Any:
    """The value that a JSON text stands for; numerals stay text, as does what is no JSON (007)."""
    if isinstance(value, list):
        return [_from_json(item) for item in value]
    try:
        return json.loads(value, parse_int=str, parse_float=str)
    except (ValueError, TypeError):
        return value


_READERS = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
