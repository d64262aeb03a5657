import json
import multiprocessing
import os
from functools import partial
from pathlib import Path

import datasets
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from laser_fast.config import Config
from laser_fast.data.prompts import held_out_prompts, train_prompts
from laser_fast.sandbox import files
from laser_fast.sandbox.files import cached_rows, resolve_sandbox, write_sandbox
from laser_fast.sandbox.model import make_sandbox_model
from laser_fast.sandbox.task import TASKS, rows


def make_config(folder, *, seed=0, **sections):
    sections = {
        "seed": seed,
        "output_dir": str(folder),
        "model": {"path": "sandbox"},
        "data": {"train": "sandbox", "eval": "sandbox", "template": "{prompt}"},
        "optim": {"steps": 1},
    } | sections
    return Config.parse(sections, source="test")


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "datasets")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


@pytest.fixture
def short_warm_start(monkeypatch):
    """One step instead of 500; counts how often a model is made."""
    made = []

    def make(folder, *, task, seed, world):
        made.append(task)
        make_sandbox_model(folder, task=task, seed=seed, steps=1, world=world)

    monkeypatch.setattr(files, "make_sandbox_model", make)
    return made


def read(path):
    return [json.loads(line) for line in open(path)]


def test_resolving_names_the_files_and_changes_nothing_else(tmp_path):
    config = make_config(tmp_path)
    resolved = resolve_sandbox(config)
    folder = tmp_path / "sandbox" / "seed0"
    assert resolved.model.path == str(folder / "model")
    assert resolved.data.train == str(folder / "train.jsonl")
    assert resolved.data.eval == str(folder / "eval.jsonl")
    data = {"train": "sandbox", "eval": "sandbox"}
    assert (
        resolved.model_copy(
            update={
                "model": resolved.model.model_copy(update={"path": "sandbox"}),
                "data": resolved.data.model_copy(update=data),
            }
        )
        == config
    )
    assert resolve_sandbox(resolved) == resolved
    assert os.listdir(tmp_path) == []
    other = make_config(tmp_path, model={"path": "m"}, data={"train": "a.jsonl"})
    assert resolve_sandbox(other) == other


def test_files_are_made_once(tmp_path, world, short_warm_start):
    config = make_config(tmp_path / "run", seed=3)
    resolved = write_sandbox(config, world)
    assert resolved == resolve_sandbox(config)
    assert sorted(os.listdir(tmp_path / "run" / "sandbox" / "seed3")) == [
        "eval.jsonl",
        "model",
        "train.jsonl",
    ]
    assert read(resolved.data.train) == rows("train", seed=3)
    assert read(resolved.data.eval) == rows("eval", seed=3)
    model = AutoModelForCausalLM.from_pretrained(resolved.model.path)
    make_sandbox_model(tmp_path / "again", seed=3, steps=1)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again").state_dict()
    assert all(torch.equal(value, again[name]) for name, value in model.state_dict().items())
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    assert write_sandbox(config, world) == resolved
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == before
    assert len(short_warm_start) == 1


def test_every_task_has_files_of_its_own(tmp_path, world, short_warm_start):
    data = {"train": "sandbox-hard", "eval": "sandbox", "template": "{prompt}"}
    config = make_config(tmp_path, model={"path": "sandbox-hard"}, data=data)
    resolved = write_sandbox(config, world)
    assert Path(resolved.model.path) == tmp_path / "sandbox-hard" / "seed0" / "model"
    assert read(resolved.data.train) == rows("train", seed=0, task="sandbox-hard")
    assert read(resolved.data.eval) == rows("eval", seed=0)
    assert read(cached_rows("eval", 0, "sandbox-hard")) != read(cached_rows("eval", 0))
    assert short_warm_start == ["sandbox-hard"]


def test_the_tasks_may_be_mixed(tmp_path, world, short_warm_start):
    data = {"train": {"sandbox": 0.7, "sandbox-hard": 0.2, "my.jsonl": 0.1}}
    resolved = write_sandbox(make_config(tmp_path, model={"path": "m"}, data=data), world)
    places = {task: str(tmp_path / task / "seed0" / "train.jsonl") for task in TASKS}
    assert resolved.data.train == {
        places["sandbox"]: 0.7,
        places["sandbox-hard"]: 0.2,
        "my.jsonl": 0.1,
    }
    for task, place in places.items():
        assert read(place) == rows("train", seed=0, task=task)


def test_another_seed_has_a_model_of_its_own(tmp_path, world, short_warm_start):
    paths = [write_sandbox(make_config(tmp_path, seed=seed), world).model.path for seed in (0, 1)]
    weights = [AutoModelForCausalLM.from_pretrained(path).lm_head.weight for path in paths]
    assert not torch.equal(*weights)


def test_only_what_is_named_is_made(tmp_path, world, short_warm_start):
    config = make_config(tmp_path, model={"path": "m"}, data={"train": "t", "eval": "sandbox"})
    resolved = write_sandbox(config, world)
    assert (resolved.model.path, resolved.data.train) == ("m", "t")
    assert [path.name for path in (tmp_path / "sandbox" / "seed0").iterdir()] == ["eval.jsonl"]
    assert write_sandbox(
        make_config(tmp_path / "b", model={"path": "m"}, data={"train": "t"}), world
    )
    assert not (tmp_path / "b").exists()
    assert short_warm_start == []


def test_a_torn_file_is_mended(tmp_path, world, short_warm_start):
    config = make_config(tmp_path)
    path = write_sandbox(config, world).data.train
    whole = open(path).read()
    open(path, "w").write(whole[:1000])
    write_sandbox(config, world)
    assert open(path).read() == whole


def test_prompts_are_a_function_of_the_seed(tmp_path, world, short_warm_start):
    def source(folder, seed, split):
        config = write_sandbox(make_config(tmp_path / folder, seed=seed), world)
        tokenizer = AutoTokenizer.from_pretrained(config.model.path)
        if split == "eval":
            return held_out_prompts(config.data, tokenizer)
        return train_prompts(config.data, tokenizer, seed=seed)

    train, held_out = source("a", 0, "train"), source("a", 0, "eval")
    assert train.prompts(3) == source("b", 0, "train").prompts(3)
    assert train.prompts(3) != source("c", 1, "train").prompts(3)
    assert {p.text for p in train.all()}.isdisjoint(p.text for p in held_out.all())
    expected = rows("train", seed=0)
    for prompt in train.prompts(0):
        row = expected[int(prompt.prompt_id.removeprefix("train-").partition("@")[0])]
        assert {"problem": prompt.text, "answer": prompt.answer} == row


def test_the_held_out_problems_have_a_stable_place(cache):
    path = cached_rows("eval", 5)
    assert path == cache / "laser_fast" / "sandbox" / "eval-seed5.jsonl"
    assert read(path) == rows("eval", seed=5)
    status = path.stat()
    assert cached_rows("eval", 5) == path
    assert (path.stat().st_mtime_ns, path.stat().st_ino) == (status.st_mtime_ns, status.st_ino)
    assert cached_rows("eval", 6) != path


def test_without_a_cache_of_their_own_users_share_home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = tmp_path / ".cache" / "laser_fast" / "sandbox"
    assert cached_rows("eval", 0) == folder / "eval-seed0.jsonl"


def test_processes_may_ask_for_the_held_out_problems_at_once(cache):
    with multiprocessing.get_context("fork").Pool(2) as pool:
        paths = pool.map(partial(cached_rows, "eval"), [0] * 4)
    assert len(set(paths)) == 1 and read(paths[0]) == rows("eval", seed=0)
    assert os.listdir(cache / "laser_fast" / "sandbox") == ["eval-seed0.jsonl"]
