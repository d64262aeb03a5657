"""Supervised phases from a configuration file: on any number of ranks, resumed, refused."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tomli_w
import torch
from small_runs import assert_close_metrics, read_metrics, run_cli
from transformers import AutoModelForCausalLM, AutoTokenizer

from laser_fast.config import all_keys
from laser_fast.config_sft import SftConfig
from laser_fast.log.jsonl import read_lines, write_lines
from laser_fast.model.distributed import open_world
from laser_fast.sandbox.task import warm_up_rows
from laser_fast.training.sft import sft

HELPERS = Path(__file__).parents[1] / "helpers"
STEPS = 4


@pytest.fixture(scope="session")
def write_sft(model):
    """A function that writes the rows and the TOML of a small phase, and returns its path."""
    rows = zip(warm_up_rows(seed=1), range(20), strict=False)
    rows = [{"problem": problem, "response": text} for (problem, text), _ in rows]
    rows += [rows[0] | {"response": r"\boxed{1}"}, rows[0] | {"response": "1" * 40}]

    def write(folder, **sections):
        data = {
            "output_dir": str(folder / "run"),
            "model": {"path": str(model)},
            "data": {
                "train": str(folder / "rows.jsonl"),
                "template": "{prompt}",
                "max_prompt_tokens": 24,
                "max_response_tokens": 36,
                "rows_per_step": 21,  # all of them in every step, so that losses compare
            },
            "optim": {"steps": STEPS, "lr": 3e-3, "schedule": "cosine", "warmup_steps": 1},
            "checkpoint": {"every": 2, "keep": 9},
            "log": {"tensorboard": False},
        }
        for name, keys in sections.items():
            data[name] = {**data[name], **keys}
        folder.mkdir(parents=True, exist_ok=True)
        write_lines(folder / "rows.jsonl", rows)
        (folder / "sft.toml").write_text(tomli_w.dumps(data))
        return folder / "sft.toml"

    return write


def run(path, *overrides, resume=False):
    with open_world() as world:
        sft(SftConfig.load(path, overrides), world=world, resume=resume)


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


@pytest.fixture(scope="module")
def plain(tmp_path_factory, write_sft):
    folder = tmp_path_factory.mktemp("sft")
    run(write_sft(folder))
    return folder / "run"


def test_the_loss_falls_and_the_model_is_an_ordinary_folder(plain, model):
    lines = read_metrics(plain)
    assert [line["step"] for line in lines] == list(range(STEPS))
    assert lines[-1]["loss/response"] < lines[0]["loss/response"] - 0.1
    assert lines[0]["step/lr"] == 3e-3 > lines[-1]["step/lr"]
    summary = json.loads((plain / "summary.json").read_text())
    assert summary["steps"] == STEPS
    trained, base = load(plain / "model"), load(model)
    assert trained.keys() == base.keys()
    assert all(not torch.equal(trained[name], base[name]) for name in base)
    assert len(AutoTokenizer.from_pretrained(plain / "model")) == 33
    assert not list(plain.glob(".*"))


def test_two_ranks_packed_otherwise_give_the_run_of_one(plain, tmp_path, write_sft):
    path = write_sft(tmp_path, optim={"tokens_per_microbatch": 61})
    command = [sys.executable, HELPERS / "train_ranks.py", path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [read_metrics(folder) for folder in (tmp_path / "run", plain)]
    assert_close_metrics(*lines, tolerance=1e-5)
    one, two = load(plain / "model"), load(tmp_path / "run" / "model")
    for name, value in one.items():
        # Adam's first updates have the size of the learning rate, whatever a gradient's rounding.
        torch.testing.assert_close(two[name], value, rtol=0, atol=1e-4)


def test_a_resumed_phase_is_the_undisturbed_one_bit_for_bit(plain, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(plain, copy)
    shutil.rmtree(copy / "checkpoints" / f"step-{STEPS:06d}")
    shutil.rmtree(copy / "model")
    run(plain.parent / "sft.toml", f"output_dir={copy}", resume="auto")
    assert read_metrics(copy) == read_metrics(plain)
    assert all(torch.equal(load(copy / "model")[k], v) for k, v in load(plain / "model").items())


def test_long_responses_are_dropped_and_counted(tmp_path, write_sft, caplog):
    with caplog.at_level("INFO"):
        run(write_sft(tmp_path), "optim.steps=1")
    assert "dropped 1 rows with over-long prompts or responses" in caplog.text


@pytest.mark.parametrize(
    ("row", "overrides", "message"),
    [
        ('{"problem": "1+1="}', [], r'rows\.jsonl:2: no field "response" \(data\.answer_field\)'),
        ('{"problem": "1+1=", "response": ""}', [], r'rows\.jsonl:2: field "response".*is empty'),
        ('{"problem": "1+1=", "response": null}', [], r"is null"),
        ("{oops", [], r"rows\.jsonl:2: not valid JSON"),
        ("", ["data.max_response_tokens=1"], r"all responses are longer than .*= 1; raise it"),
        ("", ["data.max_response_tokens=105"], r"= 129 exceeds the 128 positions of the model"),
        ("", ["optim.tokens_per_microbatch=59"], r"= 60; raise it to that"),
        ("", ["optim.warmup_steps=9"], r"exceeds optim\.steps = 4"),
        ("", ["optim.minibatches=2"], r'unknown key "optim\.minibatches"'),
        ("", ["data.response_field=x"], r'unknown key "data\.response_field"'),
        ("", ["data.rows_per_step=0"], r"expected a number greater than or equal to 1"),
        ("", ["model.replicas=2"], r"model\.replicas = 2 does not divide the 1 ranks"),
    ],
)
def test_bad_input_is_one_sentence(
    row, overrides, message, tmp_path, write_sft, monkeypatch, capsys
):
    path, rows = write_sft(tmp_path), tmp_path / "rows.jsonl"
    rows.write_text(rows.read_text().splitlines()[0] + "\n" + row + "\n")
    monkeypatch.setattr("laser_fast.training.sft.build_policy", None)  # refused before
    code, stderr = run_cli(monkeypatch, capsys, "sft", path, *overrides)
    assert code == 2
    [line] = re.findall("^error: .*", stderr, re.MULTILINE)
    assert stderr.endswith(line + "\n")
    assert re.search(message, line), line
    assert not (tmp_path / "run").exists()


def test_train_says_of_such_a_file_whose_it_is(tmp_path, write_sft, monkeypatch, capsys):
    code, stderr = run_cli(monkeypatch, capsys, "train", write_sft(tmp_path))
    reason = "it is of a supervised phase, which is what `laser-fast sft` runs; remove it"
    assert code == 2 and re.search(rf'"data\.\w+" is refused: {reason}', stderr)


def test_a_phase_is_not_overwritten(plain, monkeypatch, capsys):
    path = plain.parent / "sft.toml"
    code, stderr = run_cli(monkeypatch, capsys, "sft", path)
    assert code == 2 and "is in use" in stderr
    for option in ("--resume", "--resume=auto"):
        code, stderr = run_cli(monkeypatch, capsys, "sft", path, option, "optim.lr=0.5")
        assert code == 2 and "optim.lr was 0.003 and is now 0.5" in stderr
    assert len(read_lines(plain / "metrics.jsonl")) == STEPS


@pytest.mark.parametrize("key", all_keys(SftConfig))
def test_every_key_is_documented(key):
    text = all_keys(SftConfig)[key]
    assert text.endswith(".") and text.isascii() and "\n" not in text and len(text) > 20
