"""JSON lines that any parser reads, and that survive a crash."""

import json

import numpy as np
import pytest
import torch

from laser_fast.config import ConfigError
from laser_fast.log import jsonl


def test_undefined_numbers_become_null():
    record = {
        "nan": float("nan"),
        "inf": float("inf"),
        "tensor": torch.tensor(0.5),
        "numpy": np.float32("nan"),
        "count": np.int64(3),
        "nested": {"list": [1, -float("inf")]},
    }
    expected = {
        "nan": None,
        "inf": None,
        "tensor": 0.5,
        "numpy": None,
        "count": 3,
        "nested": {"list": [1, None]},
    }
    for text in (jsonl.to_line(record), jsonl.to_text(record)):
        assert json.loads(text, parse_constant=pytest.fail) == expected
    assert jsonl.to_line(record).count("\n") == 1


def test_lone_surrogates_are_written_as_escapes(tmp_path):
    record = {"text": "\ud83d and \u00e9 \U0001f600"}
    jsonl.write_lines(tmp_path / "x.jsonl", [record])
    assert jsonl.read_lines(tmp_path / "x.jsonl") == [record]
    assert "\\ud83d and \u00e9 \U0001f600" in (tmp_path / "x.jsonl").read_text("utf-8")
    (tmp_path / "x.json").write_text(jsonl.to_text(record), "utf-8")
    assert jsonl.read_json(tmp_path / "x.json") == record


def test_line_separators_inside_text_stay_inside(tmp_path):
    records = [{"text": "a\u2028b\nc\x0bd"}, {"text": "e"}]
    path = tmp_path / "x.jsonl"
    jsonl.write_lines(path, records)
    assert jsonl.read_lines(path) == records


def test_torn_last_line_is_dropped(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"step": 0}\n{"step": 1}\n{"step": 2, "rew')
    assert jsonl.read_lines(path) == [{"step": 0}, {"step": 1}]
    jsonl.keep_lines(path, lambda line: line["step"] < 1)
    assert path.read_text() == '{"step": 0}\n'
    assert [p.name for p in tmp_path.iterdir()] == ["x.jsonl"]


def test_missing_file_stays_missing(tmp_path):
    jsonl.keep_lines(tmp_path / "x.jsonl", lambda line: True)
    assert not (tmp_path / "x.jsonl").exists()


def test_broken_line_is_named(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"step": 0}\n{"step"\n{"step": 2}\n')
    with pytest.raises(ConfigError, match=r"x.jsonl, line 2: not valid JSON"):
        jsonl.read_lines(path)
    path.write_text('{"step": 0}\n[1]\n')
    with pytest.raises(ConfigError, match=r"x.jsonl, line 2: expected a JSON object, got \[1\]"):
        jsonl.read_lines(path)
