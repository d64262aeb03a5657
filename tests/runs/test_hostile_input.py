"""Hostile inputs to every verb: one sentence that names the key, file or option, and exit code 2.

A case is what the sentence must name, and a function from a `Place` to arguments.
"""

import gzip
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tomli_w
from small_runs import run_cli

from laser_fast.training import run as training_run

ROW = '{"problem": "1a+1=", "answer": "2"}\n'
LONG, BAD = "x" * 5000, b"\xff"
SCORE = [
    "score.token=<|reserved_0|>",
    "score.ref_logprob=-9",
    "data.template={prompt}",
    "data.prompt_suffix=",
]
LENGTHS = ["data.max_prompt_tokens=24", "rollout.max_new_tokens=48"]
GRADED = ["--limit", "1", "reward.kind=sandbox", "reward.workers=1", *LENGTHS, *SCORE]


class Place(SimpleNamespace):
    """A folder with `config`, a sound configuration, and `model`, a folder that it names."""

    def write(self, name, content):
        """A file of these bytes, or as the function `content` makes it."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if callable(content):
            content(path)
        else:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    def copy_model(self, name, content):
        """A copy of the model with one file written anew; a dict changes keys of a JSON file."""
        folder = self.folder / "model"
        shutil.copytree(self.model, folder)
        if isinstance(content, dict):
            content = json.dumps(json.loads((folder / name).read_text()) | content)
        (folder / name).unlink(missing_ok=True)
        self.write(f"model/{name}", content)
        return folder


@pytest.fixture
def place(tmp_path, model, write_config, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(training_run, "make_engine", None)  # what is accepted fails here
    monkeypatch.syspath_prepend(tmp_path)
    return Place(folder=tmp_path, model=model, config=write_config(tmp_path), out=tmp_path / "out")


def folder(path):
    path.mkdir()


def loop(path):
    path.symlink_to(path)


def table(**columns):
    return lambda path: pq.write_table(pa.table(columns), path)


def half_of(make):
    def write(path):
        make(path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    return write


def damaged(path):
    table(problem=list(map(str, range(999))), answer=["2"] * 999)(path)
    content = bytearray(path.read_bytes())
    content[60:200] = b"\xff" * 140
    path.write_bytes(content)


TOML = {
    "binary": bytes(range(256)),
    "utf-16": 'output_dir = "a"'.encode("utf-16"),
    "nul": b"seed = 1\0",
    "yaml": b"seed: 1\n",
    "json": b'{"seed": 1}',
    "unterminated": b'output_dir = "a',
    "twice": b"seed = 1\nseed = 2",
    "section twice": b"[data]\n[data]",
    "deep array": b"a = " + b"[" * 100_000,
    "deep table": b"a = " + b"{a = " * 5000 + b"1" + b"}" * 5000,
    "deep key": b"a" + b".a" * 1500 + b" = 1",
    "large number": b"seed = " + b"9" * 5000,
    "date": b"seed = 2020-01-01",
    "empty": b"",
    "folder": folder,
    "loop": loop,
    "truncated gzip": gzip.compress(b"seed = 1" * 99)[:40],
}

OVERRIDES = [
    ("seed=" + "9" * 5000, '"seed": expected an integer'),
    ("optim.betas=" + "[" * 3000 + "]" * 3000, "optim.betas"),
    ("optim.lr.a" + ".a" * 900 + "=1", "optim.lr"),
    (".=3", "unknown section"),
    ("optim..lr=3", 'unknown key "optim."'),
    ("optim.lr=1e999", "optim.lr"),
    ("data.template={prompt}\udcff", "data.template"),
    ("output_dir=", '"output_dir"'),
    ("output_dir=a\0b", "output_dir"),
    (f"output_dir={LONG}", "File name too long"),
    ("output_dir=/dev/null", "output_dir /dev/null is a file"),
    ("output_dir=/dev/null/run", "output_dir '/dev/null/run' cannot be written"),
    ("output_dir=/proc/none/run", "output_dir '/proc/none/run' cannot be written"),
    ("model.path=", '"model.path"'),
    ('model.path="a\\u0000b"', "model.path"),
    (f"model.path={LONG}", "File name too long"),
    ("model.path=https://host/model", "model.path"),
    ("model.path=a b/c", "model.path"),
    ("data.train=a\0b", "a\0b"),
    (f"data.train={LONG}.jsonl", "File name too long"),
    ("score.token=", "score.token"),
    ("score.token=<eos>", "score.token"),
    ("reward.range=[1, 1]", "reward.range"),
    ("reward.kind=", "reward.kind"),
    ("reward.kind=:f", "reward.kind"),
]

DATA = {
    "empty.json": "",
    "empty.csv": "",
    "empty.parquet": "",
    "blank.jsonl": "\n \t\n",
    "bom.jsonl": b"\xef\xbb\xbf",
    "binary.jsonl": bytes(range(256)) * 9,
    "binary.csv": bytes(range(256)) * 9,
    "binary.json": bytes(range(256)) * 9,
    "nul.jsonl": b"\0" * 999,
    "nul.csv": b"\0" * 999,
    "nul.json": b"\0" * 999,
    "nul.parquet": b"\0" * 999,
    "utf16.jsonl": ROW.encode("utf-16"),
    "utf16.csv": "problem,answer\n1,2\n".encode("utf-16"),
    "latin1.csv": "problem,answer\n\xe9,2\n".encode("latin-1"),
    "latin1.json": '[{"problem": "\xe9", "answer": "2"}]'.encode("latin-1"),
    "whole.jsonl": gzip.compress(ROW.encode() * 99),
    "cut.csv": gzip.compress(ROW.encode() * 99)[:40],
    "rows.jsonl.gz": gzip.compress(ROW.encode() * 99)[:40],
    "rows.zip": b"PK\3\4",
    "folder.jsonl": folder,
    "folder.parquet": folder,
    "loop.json": loop,
    "loop.csv": loop,
    "html.jsonl": "<!DOCTYPE html><p>404",
    "pointer.csv": "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
    "number.json": "5",
    "strings.json": '["a", "b"]',
    "wrapped.json": '{"data": [{"problem": "1", "answer": "2"}]}',
    "pretty.json": json.dumps({"problem": "1", "answer": "2"}, indent=1),
    "python.jsonl": "{'problem': '1', 'answer': '2'}\n",
    "joined.jsonl": ROW.strip() * 2,
    "control.jsonl": '{"problem": "a\1b", "answer": "2"}\n',
    "deep.jsonl": '{"a":' * 20_000,
    "huge.jsonl": '{"problem": "' + "1" * 200_000 + '", "answer": "2"}\n',
    "huge.csv": "problem,answer\n" + "1" * 200_000 + ",2\n",
    "semicolons.csv": "problem;answer\n1;2\n",
    "spaced.csv": "problem, answer\n1,2\n",
    "twice.csv": "problem,problem,answer\n1,2,3\n",
    "header.csv": "problem,answer\n",
    "quoted.csv": 'problem,answer\n"a"b,2\n',
    "column.parquet": table(a=[1]),
    "none.parquet": table(problem=pa.array([], pa.string()), answer=pa.array([], pa.string())),
    "bytes.parquet": table(problem=[b"\xff"], answer=["1"]),
    "time.parquet": table(problem=["1"], answer=pa.array([0], pa.timestamp("s"))),
    "cut.parquet": half_of(table(problem=["1"] * 999, answer=["2"] * 999)),
    "damaged.parquet": damaged,
    "unknown.jsonl": '{"problem": "\xc4\xd6", "answer": "2"}\n',  # by the tokenizer
}

MODELS = {
    "config.json": [b"[" * 100_000, b"\0" * 9, gzip.compress(b"{}"), {"model_type": "none"}, loop],
    "tokenizer.json": [b"[" * 100_000, b"\0" * 9],
    "tokenizer_config.json": [b"\xff", {"pad_token": [1]}, {"model_max_length": "long"}],
}

TEMPLATES = [
    "{% if %}",
    "{{ nope() }}",
    "{{ raise_exception('no') }}",
    "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}",
    "{{ ''.__class__.__mro__ }}",
    "{% for i in range(10 ** 9) %}x{% endfor %}",
    "hello",
    5,
]

REWARDS = {
    "def (": "SyntaxError",
    "import sys; sys.exit(3)": "SystemExit",
    "raise KeyboardInterrupt": "KeyboardInterrupt",
    "def reward(): reward()\nreward()": "RecursionError",
    "reward = 5": "is int, not a function",
    "def other(): pass": "has no attribute",
    "x = 1\0": "null bytes",
}

OPTIONS = {
    "train": ["--resume=yes"],
    "sft": ["--nope"],
    "export": ["a"],
    "report": ["a", "b", "c"],
    "plan": ["a", "--gpus", "0", "--memory", "80"],
    "calibrate": ["a", "--data", "b", "--prompts", "x"],
    "eval": ["a", "-b", "b", "--base-rate", "2"],
    "rescore": ["a", "b", "--k", "0"],
    "score": ["a", "b", "c", "--beta", "-1"],
}
NAMED = ["--resume", "--nope", "out", "c", "--gpus", "--prompts", "--base-rate", "--k", "--beta"]

RUN_FILES = {
    "config.toml": b"\xff",
    "metrics.jsonl": b"\xff\n",
    "samples.jsonl": b"[" * 100_000 + b"\n",
    "evaluations.jsonl": b"5\n",
    "summary.json": b"\0",
}

PAIRS = [
    (b"\0", "pairs.jsonl:1"),
    (b'{"prompt": "\\ud800", "response": "1"}', "pairs.jsonl:1"),
    (b'{"prompt": "1", "response": "\\ud800"}', "pairs.jsonl:1"),
    (b'{"prompt_ids": [1, 1e3], "completion_ids": [1]}', "prompt_ids"),
    (b'{"prompt_ids": [99999999999999999999], "completion_ids": [1]}', "prompt_ids"),
]


def cases():
    """(name, what the sentence names, function from a place to arguments) of every case."""
    yield "no such verb", "nope", lambda p: ["nope"]
    yield "no arguments", "config", lambda p: ["train"]
    yield "configuration's name", "File name too long", lambda p: ["train", LONG]
    for name, content in TOML.items():
        yield f"toml {name}", "hostile.toml", lambda p, c=content: [
            "train", p.write("hostile.toml", c)]  # fmt: skip
    for override, named in OVERRIDES:
        yield f"override {override[:24]!r}", named, lambda p, o=override: ["train", p.config, o]
    for name, content in DATA.items():
        yield f"data {name}", name, lambda p, n=name, c=content: [
            "train", p.config, f"data.train={p.write(n, c)}", "data.eval="]  # fmt: skip
    yield "data folder", "train.csv", lambda p: [
        "train", p.config, f"data.train={p.write('d/train.csv', BAD).parent}"]  # fmt: skip
    for name, contents in MODELS.items():
        for content in contents:
            yield f"model {name} {str(content)[:9]}", "model", lambda p, n=name, c=content: [
                "train", p.config, f"model.path={p.copy_model(n, c)}"]  # fmt: skip
    yield "tokenizer is a folder", "model", lambda p: [
        "train", p.config, f"model.path={p.copy_model('tokenizer.json', folder)}"]  # fmt: skip
    yield "model is a file", "model.path", lambda p: ["train", p.config, f"model.path={p.config}"]
    for template in TEMPLATES:
        yield f"template {template}", "data.template", lambda p, t=template: [
            "train", p.config, "data.template=chat",
            f"model.path={p.copy_model('tokenizer_config.json', {'chat_template': t})}",
        ]  # fmt: skip
    for number, (code, named) in enumerate(REWARDS.items()):
        file = f"reward_{number}.py"
        yield f"reward {named}", named, lambda p, f=file, c=code: [
            "train", p.config, f"reward.kind={p.write(f, c).stem}:reward"]  # fmt: skip
    for (verb, given), named in zip(OPTIONS.items(), NAMED, strict=True):
        yield f"option of {verb}", named, lambda p, v=verb, g=given: [v, *g]
    for name, content in RUN_FILES.items():

        def report(p, name=name, content=content):
            shutil.copy(p.config, p.write("run/config.toml", b""))
            return ["report", p.write(f"run/{name}", content).parent]

        yield f"report {name}", name, report
    yield "report of no run", "none", lambda p: ["report", p.folder / "none"]
    yield "report's name", "File name too long", lambda p: ["report", LONG]
    yield "export of no run", "none", lambda p: ["export", p.folder / "none", p.out]
    yield "sft's output", "output_dir", lambda p: ["sft", sft(p), "output_dir="]
    yield "sft's data", "none.csv", lambda p: ["sft", sft(p), "data.train=none.csv"]
    for content, named in PAIRS:
        yield f"pairs {content[:20]}", named, lambda p, c=content: [
            "score", p.model, p.write("pairs.jsonl", c + b"\n"), p.out, *SCORE]  # fmt: skip
    yield "score's output", "no such folder", lambda p: [
        "score", p.model, p.model / "eval.jsonl", p.folder / "a" / "b", *SCORE]  # fmt: skip
    for content in (b"\xff", b"5", b"[" * 100_000, b'{"score": {"beta": "x"}}'):
        yield f"laser_fast.json {content[:9]}", "laser_fast.json", lambda p, c=content: [
            "score", p.copy_model("laser_fast.json", c), p.model / "eval.jsonl", p.out]  # fmt: skip
    for content in (b"\xff", b"[]"):
        yield f"settings.json {content[:9]}", "settings.json", lambda p, c=content: [
            "eval", p.model, "-b", p.model / "eval.jsonl", *GRADED,
            "--out", p.write("evaluation/settings.json", c).parent]  # fmt: skip
    yield "eval's output", "config.toml", lambda p: [
        "eval", p.model, "-b", p.model / "eval.jsonl", "--out", p.config, *GRADED]  # fmt: skip
    yield "benchmark", "gsm8k", lambda p: ["eval", p.model, "-b", "gsm8", "--out", p.out]
    yield "calibrate's template", "template", lambda p: [
        "calibrate", p.model, "--data", p.model / "eval.jsonl", "--template", "x"]  # fmt: skip
    for content in (b"", b"\xff\n", b"\0\n", b"[" * 100_000 + b"\n", b'{"prompt_id": "a"}\n'):
        yield f"rescore {content[:9]}", "samples.jsonl", lambda p, c=content: [
            "rescore", p.write("old/b/samples.jsonl", c).parents[1], p.out]  # fmt: skip


def sft(place):
    data = {"train": str(place.model / "train.jsonl"), "template": "{prompt}"}
    data |= {"max_prompt_tokens": 24, "max_response_tokens": 48}
    sections = {"model": {"path": str(place.model)}, "data": data, "optim": {"steps": 1}}
    return place.write("sft.toml", tomli_w.dumps({"output_dir": str(place.out), **sections}))


CASES = {name: (named, arguments) for name, named, arguments in cases()}


@pytest.mark.parametrize("name", CASES)
def test_a_hostile_input_is_one_sentence(name, place, monkeypatch, capsys):
    named, arguments = CASES[name]
    code, stderr = run_cli(monkeypatch, capsys, *arguments(place))
    lines = [line for line in stderr.splitlines() if line]
    assert code == 2 and lines[-1].startswith("error: ") and named in lines[-1], stderr
    assert "Traceback" not in stderr and stderr.count("error: ") == 1
    assert not (place.folder / "run" / "checkpoints").exists() and not Path(place.out).exists()


def test_there_are_a_hundred():
    assert len(CASES) >= 100
