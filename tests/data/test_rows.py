import json
import shutil
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from laser_fast.config import ConfigError
from laser_fast.data.fields import answer_text, find_fields, question_of
from laser_fast.data.rows import open_rows


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def read(path, question="problem", answer="answer", split="train"):
    fields = {question: "data.prompt_field", answer: "data.answer_field"}
    return [
        (question_of(row, fields, question, place), answer_text(row, fields, answer, place))
        for place, row in open_rows(str(path), split=split).read(fields)
    ]


def test_every_format_gives_the_same_rows(tmp_path):
    rows = [{"problem": f'say "{i}",\nor \u00e9', "answer": f"00{i}", "id": i} for i in range(3)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "lines.json").write_text("\n" + lines + "\n\n")
    (tmp_path / "array.json").write_text("\n" + json.dumps(rows, indent=1))
    (tmp_path / "a.csv").write_text(
        "answer,problem\n" + "".join(f'00{i},"say ""{i}"",\nor \u00e9"\n' for i in range(3)),
        encoding="utf-8-sig",
    )
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    (tmp_path / "arrays.json").write_text(json.dumps(rows[:2]) + "\n" + json.dumps(rows[2:]) + "\n")
    names = ["a.jsonl", "lines.json", "array.json", "arrays.json", "a.csv", "a.parquet"]
    for name in list(names):
        folder = tmp_path / name.replace(".", "-")
        folder.mkdir()
        shutil.copy(tmp_path / name, folder / f"train{Path(name).suffix}")
        names.append(folder.name)
    for name in names:
        expected = [(row["problem"], row["answer"]) for row in rows]
        assert read(tmp_path / name) == expected, name


def test_columns_of_mixed_type_read_the_same_from_every_format(tmp_path):
    answers = [5, "x", "007", [3, "4"], 2.5, '"q"', "true", 10**20]
    expected = ["5", "x", "007", "3, 4", "2.5", '"q"', "true", "1" + 20 * "0"]
    table = [{"problem": f"{i}?", "answer": answer} for i, answer in enumerate(answers)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in table))
    (tmp_path / "a.json").write_text(json.dumps(table))
    for name in ("a.jsonl", "a.json"):
        (tmp_path / "folder").mkdir()
        shutil.copy(tmp_path / name, tmp_path / "folder" / f"train.{name[2:]}")
        for path in (tmp_path / name, tmp_path / "folder"):
            assert [answer for _, answer in read(path)] == expected, path
        shutil.rmtree(tmp_path / "folder")
    # Parquet has mixed columns as JSON texts only, as `datasets` writes them.
    texts = pa.array([json.dumps(answer) for answer in answers])
    problems = pa.array([row["problem"] for row in table])
    mixed = pa.ExtensionArray.from_storage(pa.json_(), texts)
    pq.write_table(pa.table({"problem": problems, "answer": mixed}), tmp_path / "a.parquet")
    assert [answer for _, answer in read(tmp_path / "a.parquet")] == expected


def test_long_fields_of_csv(tmp_path):
    long = "x" * 200_000
    (tmp_path / "a.csv").write_text(f"problem,answer,solution\n1?,1,{long}\n{long},2,a\n")
    assert read(tmp_path / "a.csv") == [("1?", "1"), (long, "2")]


def test_the_home_folder_is_known(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.jsonl").write_text('{"problem": "a", "answer": "1"}\n')
    assert read("~/a.jsonl") == [("a", "1")]


def test_json_arrays_count_rows_and_lines(tmp_path):
    rows = [{"problem": "\u00e9" * i, "more": [{"a": "]"}], "answer": i} for i in range(1, 61)]
    path = tmp_path / "a.json"
    text = json.dumps(rows[:40], indent=2) + "\n \n" + json.dumps(rows[40:]) + "\n"
    for mark in ("", "\ufeff"):
        path.write_text(mark + text)
        assert read(path) == [(row["problem"], str(row["answer"])) for row in rows]
    path.write_text(text + "[{}]")
    with pytest.raises(ConfigError, match="a.json row 60: no field"):
        read(path)
    path.write_text(text.replace('"answer": 60', '"answer" 60'))
    with pytest.raises(ConfigError, match=f"a.json: not readable: .* line {2 + 40 * 9 + 2} column"):
        read(path)


def test_answers_become_text(tmp_path):
    answers = ["5", 70, 2.5, r"\frac{1}{2}", [3, "4"], " x "]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"problem": "?", "answer": a}) + "\n" for a in answers))
    texts = [answer for _, answer in read(path)]
    assert texts == ["5", "70", "2.5", r"\frac{1}{2}", "3, 4", " x "]


def test_the_identity_follows_the_content(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("{}\n")
    first = open_rows(str(path), split="train").identity
    assert open_rows(str(path), split="train").identity == first
    path.write_text("{} \n")
    assert open_rows(str(path), split="train").identity != first


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.jsonl",
            '{"problem": "a", "answer": 1}\n{"problem"\n',
            "a.jsonl:2: not valid JSON: .*line 1 column 11",
        ),
        ("a.jsonl", '{"problem": "a", "answer": 1}\n[1]\n', "a.jsonl:2: expected an object"),
        (
            "a.jsonl",
            '{"question": "a", "answer": 1, "id": 3}\n',
            'a.jsonl:1: no field "problem" .data.prompt_field.; .* are question, answer, id$',
        ),
        (
            "a.jsonl",
            '\n{"problem": "a", "answer": 1}\n\n{"problem": "a"}',
            'a.jsonl:4: no field "answer" .data.answer_field.; the fields are problem$',
        ),
        ("a.jsonl", '{"problem": "a", "answer": null}', 'a.jsonl:1: field "answer" .* is null'),
        ("a.jsonl", '{"problem": "a", "answer": NaN}', 'a.jsonl:1: field "answer" .* is null'),
        ("a.jsonl", '{"problem": " ", "answer": "1"}', 'a.jsonl:1: field "problem" .* is empty'),
        ("a.jsonl", '{"problem": ["a"], "answer": 1}', "expected text or a list of messages"),
        ("a.jsonl", '{"problem": "a", "answer": {"b": 1}}', "expected text, a number or a list"),
        ("a.jsonl", '{"problem": "a", "answer": true}', "expected text, a number or a list"),
        ("a.jsonl", '{"problem": "a", "answer": []}', "expected text, a number or a list"),
        ("a.jsonl", r'{"problem": "\ud83d", "answer": 1}', "a.jsonl:1: .* is not valid Unicode"),
        ("a.jsonl", b'{"problem": "\xff", "answer": 1}', "a.jsonl:1: not valid JSON: .utf-8"),
        ("a.json", '[\n{"problem": "a", "answer": 1},\n{"problem": }]', "not readable: .* line 3"),
        ("a.json", '[\n{"problem": "a", "answer": 1},\n\n', "not readable: .* line 2"),
        ("a.json", '[\n{"problem": "a", "answer": 1},\n{"answer": 1}]', "a.json row 1: no field"),
        ("a.json", b'[{"problem": "\xff", "answer": 1}]', "a.json: not readable: .utf-8. codec"),
        ("a.json", '[{"problem": "a", "answer": 1}]\nmore', "not readable: .* line 2 column 1"),
        ("a.json", '[{"problem": "a", "answer": 1}]\n[', "not readable: .* line 2 column 2"),
        ("a.json", "[" + "[" * 100_000, "a.json: not readable: RecursionError"),
        ("a.jsonl", "[" * 100_000, "a.jsonl:1: not valid JSON"),
        ("a.jsonl", "9" * 5000, "a.jsonl:1: not valid JSON"),
        ("a.jsonl", '{"problem": "a", "answer": Infinity}', "is null or not finite"),
        ("a.jsonl", '{"problem": "a", "answer": 1e999}', "is null or not finite"),
        ("a.jsonl", '{"problem": "a", "answer": [1, NaN]}', "is null or not finite"),
        ("a.jsonl", '{"problem": "a", "answer": [null]}', "is null or not finite"),
        ("a.jsonl", '{"problem": "a", "answer": ["1", ""]}', "is empty"),
        ("a.jsonl", r'{"problem": "a", "answer": ["\ud83d"]}', "is not valid Unicode"),
        ("a.csv", "problem,answer\na,1\nb\n", "a.csv:3: expected 2 columns"),
        ("a.csv", "problem,answer\na,1\nb,2,3\n", "a.csv:3: expected 2 columns"),
        ("a.csv", 'problem,answer\na,1\n"b,2\n', "a.csv:3: not valid CSV"),
        ("a.csv", b"problem,answer\n" + b"1,2\n" * 9000 + b"\xe9,\n", "UTF-8 after line 8"),
        (
            "a.json",
            b'{"problem": "a", "answer": 1}\n{"\xe9": 1}',
            "a.json:2: not valid JSON: .utf-8",
        ),
        ("a.csv", "problem,answer\na,\n", 'a.csv:2: field "answer" .* is empty'),
        ("a.parquet", "nothing like it", "a.parquet: not readable: Parquet"),
        ("a.txt", "problem", "expected a data file ending in one of .jsonl, .json, .csv, .parq"),
    ],
)
def test_a_bad_file_is_named_with_its_line_and_fault(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match=message) as caught:
        read(path)
    assert "\n" not in str(caught.value)


def test_a_missing_column_is_named_with_those_there(tmp_path):
    rows = [{"question": "a", "answer": 1.5, "id": 0}, {"question": "b", "answer": None, "id": 1}]
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "a.parquet", tmp_path / "folder" / "train.parquet"):
        pq.write_table(pa.Table.from_pylist(rows[:1]), path)
        data = path if path.parent == tmp_path else path.parent
        message = f'{path.name}: no field "problem" .*; the fields are question, answer, id'
        with pytest.raises(ConfigError, match=message):
            read(data)
        assert read(data, question="question") == [("a", "1.5")]
        pq.write_table(pa.Table.from_pylist(rows), path)
        with pytest.raises(ConfigError, match=f'{path.name} row 1: field "answer" .* is null'):
            read(data, question="question")


def test_what_is_not_there_is_said_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match=r"missing.jsonl: no such data file"):
        open_rows(str(tmp_path / "missing.jsonl"), split="train")
    for name in ("no-one/nothing", "sandbox"):  # a word of the command line and of no other place
        with pytest.raises(ConfigError, match=f'"{name}" is no file here, and as a data set'):
            open_rows(name, split="train")
    (tmp_path / "train.jsonl").write_text('{"problem": "a", "answer": "1"}\n')
    with pytest.raises(ConfigError, match='split "test".* does not load: .*test') as caught:
        open_rows(str(tmp_path), split="test")
    assert "\n" not in str(caught.value)


def test_floats_read_back_exactly_from_every_format(tmp_path):
    values = [0.00001, 1e20, 1e-30, 0.1, 70.0, 2.5e-7, 123456789.125, -1e16]
    texts = ["0.00001", "1" + 20 * "0", "0." + 29 * "0" + "1", "0.1", "70.0", "0.00000025"]
    texts += ["123456789.125", "-1" + 16 * "0"]
    rows = [{"problem": "?", "answer": value} for value in values]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "array.json").write_text(json.dumps(rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    (tmp_path / "folder").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "folder" / "train.parquet")
    for name in ("a.jsonl", "array.json", "a.parquet", "folder"):
        read_texts = [answer.removesuffix(".0") for _, answer in read(tmp_path / name)]
        assert read_texts == [text.removesuffix(".0") for text in texts], name
        assert [float(text) for text in read_texts] == values
    (tmp_path / "a.csv").write_text("problem,answer\n" + "".join(f"?,{v}\n" for v in values))
    assert [float(answer) for _, answer in read(tmp_path / "a.csv")] == values


def test_narrow_floats_of_parquet_are_what_they_were_made_from(tmp_path):
    texts = ["0.1", "0.00001", "3.14"]
    for kind in (pa.float32(), pa.float64()):
        answers = pa.array(map(float, texts), kind)
        lists = pa.array([[value] for value in map(float, texts)], pa.list_(kind))
        for number, column in enumerate((answers, lists, answers.dictionary_encode())):
            path = tmp_path / f"{kind}{number}.parquet"
            pq.write_table(pa.table({"problem": ["a"] * 3, "answer": column}), path)
            assert [answer for _, answer in read(path)] == texts, (kind, number)


def test_a_column_there_twice_and_a_row_of_null_are_named(tmp_path):
    columns = [pa.array(["a"])] * 3
    table = pa.Table.from_arrays(columns, names=["problem", "answer", "answer"])
    pq.write_table(table, tmp_path / "twice.parquet")
    with pytest.raises(ConfigError, match="columns of different names, got .*answer', 'answer'"):
        read(tmp_path / "twice.parquet")
    (tmp_path / "null.jsonl").write_text('null\n{"problem": "a", "answer": "b"}\n')
    with pytest.raises(ConfigError, match="null.jsonl:1"):
        find_fields(open_rows(str(tmp_path / "null.jsonl"), split="train"), "auto", "auto")
