"""Who may write into a run folder, and with which configuration a run goes on."""

import importlib.util
from pathlib import Path

import pytest

from laser_fast.config import Config, ConfigError, all_keys, dump_config
from laser_fast.log.run_folder import (
    _FREE_KEYS,
    _FREE_SECTIONS,
    RunFolder,
    config_differences,
    moved_config,
    open_run_folder,
    resumed_config,
)


def _config(folder, **sections) -> Config:
    data = {
        "output_dir": str(folder),
        "model": {"path": "sandbox"},
        "data": {"train": "sandbox"},
        "optim": {"steps": 10},
    }
    for name, values in sections.items():
        data[name] = {**data.get(name, {}), **values}
    return Config.parse(data, source="test")


def _start(folder, **sections) -> None:
    folder.mkdir()
    (folder / "config.toml").write_text(dump_config(_config(folder, **sections)))


def test_new_folder_is_only_looked_at(tmp_path):
    folder = open_run_folder(_config(tmp_path / "run"), resume=False)
    assert folder.path == tmp_path / "run" and not folder.path.exists()


def test_folder_with_other_things_is_free(tmp_path):
    (tmp_path / "launcher.log").write_text("")
    assert open_run_folder(_config(tmp_path), resume=False).path == tmp_path


@pytest.mark.parametrize("taken", RunFolder(Path()).contents(), ids=lambda path: path.name)
def test_folder_in_use_is_refused(tmp_path, taken):
    (tmp_path / taken.name).write_text("precious")
    with pytest.raises(ConfigError, match=f"in use: it holds {taken.name}; .* --resume"):
        open_run_folder(_config(tmp_path), resume=False)
    assert (tmp_path / taken.name).read_text() == "precious"


def test_file_in_place_of_the_folder(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(ConfigError, match="run is a file"):
        open_run_folder(_config(tmp_path / "run"), resume=False)


def test_nothing_to_resume(tmp_path):
    with pytest.raises(ConfigError, match=r"holds no run to resume \(.*config.toml is missing\)"):
        open_run_folder(_config(tmp_path), resume=True)


def test_resume_names_every_difference_with_both_values(tmp_path):
    _start(tmp_path / "run", loss={"kind": "gspo"})
    changed = _config(tmp_path / "run", optim={"lr": 2e-6}, score={"ref_logprob": -20.0})
    with pytest.raises(ConfigError) as error:
        open_run_folder(changed, resume=True)
    text = str(error.value)
    assert "loss.kind was 'gspo' and is now 'grpo'" in text
    assert "optim.lr was 1e-06 and is now 2e-06" in text
    assert "score.ref_logprob was 'auto' and is now -20.0" in text
    assert text.count(" was ") == 3


def test_resume_with_what_may_change(tmp_path):
    _start(tmp_path / "run")
    (tmp_path / "run").rename(tmp_path / "moved")
    changed = _config(
        tmp_path / "moved",
        optim={"steps": 20, "tokens_per_microbatch": 8192},
        log={"tensorboard": False},
        checkpoint={"keep": 5},
        model={"gradient_checkpointing": True},
    )
    assert open_run_folder(changed, resume=True).path == tmp_path / "moved"


def _files(folder, **changes):
    """The sections of a run that keeps its model and data below its own folder."""
    paths = {name: str(folder / "sandbox" / name) for name in ("model", "train", "eval")} | changes
    return {
        "model": {"path": paths["model"]},
        "data": {"train": paths["train"], "eval": paths["eval"]},
    }


@pytest.fixture
def moved(tmp_path):
    """The folder of a run that was moved, with all that lay in it, and the old one."""
    before, now = tmp_path / "run", tmp_path / "elsewhere" / "moved"
    _start(before, **_files(before))
    (before / "sandbox" / "model").mkdir(parents=True)
    for name in ("train", "eval"):
        (before / "sandbox" / name).write_text("")
    now.parent.mkdir()
    before.rename(now)
    return before, now


def test_what_lies_in_a_run_folder_moves_with_it(moved):
    before, now = moved
    old = _config(before, **_files(before))
    assert moved_config(old, now) == _config(now, **_files(now))
    assert moved_config(old, before) == old
    mix = {str(before / "sandbox" / "train"): 0.7, "/data/train.jsonl": 0.3}
    found = moved_config(_config(before, **_files(before, train=mix)), now)
    assert found.data.train == {str(now / "sandbox" / "train"): 0.7, "/data/train.jsonl": 0.3}
    outside = _config(before, **_files(before, train="/data/train.jsonl", eval="", model="a/b"))
    assert moved_config(outside, now) == outside.model_copy(update={"output_dir": str(now)})


def test_hub_id_that_looks_like_a_path_in_the_folder_stays(moved, monkeypatch):
    _, now = moved
    monkeypatch.chdir(now)
    config = _config(".", **_files(Path(), model="org/model", train="sandbox/train", eval=""))
    found = moved_config(config, now)
    assert found.model.path == "org/model" and found.data.train == str(now / "sandbox" / "train")


def test_moved_run_resumes(moved):
    """With the configuration made for its new place, or with that of before."""
    before, now = moved
    for place in (before, now):
        config = _config(now, **_files(place))
        assert open_run_folder(config, resume=True).path == now
        assert resumed_config(config) == _config(now, **_files(now))
    other = _config(now, **_files(now, train="/data/other.jsonl"))
    with pytest.raises(ConfigError, match="data.train was '.*moved/sandbox/train' and is now '/da"):
        open_run_folder(other, resume=True)


def test_differences_are_pure_and_complete(tmp_path):
    old = _config(tmp_path)
    assert config_differences(old, old) == {}
    new = _config(tmp_path, data={"eval": "sandbox"}, optim={"steps": 11, "betas": [0.9, 0.99]})
    assert config_differences(old, new) == {
        "data.eval": ("", "sandbox"),
        "optim.betas": ((0.9, 0.999), (0.9, 0.99)),
    }
    assert list(config_differences(new, old)) == ["data.eval", "optim.betas"]


def test_what_saves_memory_and_changes_no_number_may_change(tmp_path):
    saves = {"gradient_checkpointing": True, "activation_offload": True}
    new = _config(tmp_path, model={"path": "m", **saves, "reshard_after_forward": False})
    assert config_differences(_config(tmp_path, model={"path": "m"}), new) == {}


def test_with_steps_ahead_the_schedule_of_checkpoints_stays(tmp_path):
    ahead = {"engine": "vllm_server", "server_url": "http://h", "steps_ahead": 1}
    for rollout, differences in (({}, {}), (ahead, {"checkpoint.every": (10, 5)})):
        old, new = (
            _config(tmp_path, rollout=rollout, checkpoint={"every": every, "keep": every})
            for every in (10, 5)
        )
        assert config_differences(old, new) == differences
    # That of the best evaluation may come after any.
    best = {"checkpoint": {"best": "accuracy"}, "rollout": ahead}
    old, new = (_config(tmp_path, data={"eval": "e", "eval_every": n}, **best) for n in (2, 3))
    assert config_differences(old, new) == {"data.eval_every": (2, 3)}
    saves = {"data": {"eval": "e"}, "rollout": ahead}
    old, new = _config(tmp_path, **saves), _config(tmp_path, **saves, checkpoint=best["checkpoint"])
    assert config_differences(old, new) == {"checkpoint.best": ("", "accuracy")}


def test_keys_that_may_change_exist():
    assert all_keys(Config).keys() >= _FREE_KEYS
    for section in _FREE_SECTIONS:
        assert any(key.startswith(section) for key in all_keys(Config))


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_missing_dashboard_names_the_extra(tmp_path, monkeypatch, name):
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: None)
    config = _config(tmp_path / "run", log={name: "project"})
    with pytest.raises(ConfigError, match=rf'pip install "laser-fast\[{name}\]"'):
        open_run_folder(config, resume=False)
