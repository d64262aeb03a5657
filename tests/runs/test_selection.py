"""Runs that keep their best checkpoint, end early, export and upload while they go on."""

import json
import logging
import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch.distributed.checkpoint as dcp
from small_runs import read_lines, read_metrics
from transformers import AutoModelForCausalLM

from laser_fast.cli import train_run
from laser_fast.config import ConfigError, load_config
from laser_fast.log.run_log import RunLog
from laser_fast.training.checkpoint import list_checkpoints
from laser_fast.training.export import export
from laser_fast.training.trainer import Trainer

REPO = "me/model"
ACCURACY = (0.9, 0.2, 0.6, 0.6, 0.3)  # of the evaluations after 0, 1, ... steps


class Hub:
    """Takes uploads in place of huggingface_hub.HfApi."""

    calls: list = []

    def create_repo(self, repo_id, **keys):
        self.calls.append(("create", repo_id, keys))

    def upload_folder(self, *, repo_id, folder_path, commit_message):
        assert (Path(folder_path) / "config.json").is_file()
        self.calls.append(("upload", repo_id, Path(folder_path).name, commit_message))


@pytest.fixture(scope="module")
def patch():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module")
def runs(tmp_path_factory, write_config, patch):
    """A run with everything, and one that only saves and is stopped in its step 3 and continued."""
    log_evaluation = RunLog.log_evaluation
    patch.setattr(
        RunLog,
        "log_evaluation",
        lambda log, step, report: log_evaluation(log, step, report | {"accuracy": ACCURACY[step]}),
    )
    patch.setattr("laser_fast.cli._draw_run", lambda folder: None)
    patch.setattr("huggingface_hub.HfApi", Hub)
    patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    patch.setattr("huggingface_hub.get_token", lambda: "token")
    folder = tmp_path_factory.mktemp("selection")
    saves = {"every": 0, "keep": 1, "best": "eval/accuracy", "patience": 2}
    exports = {"asynchronous": True, "export_every": 2, "hub_repo": REPO}
    shared = {"data": {"eval_every": 1, "eval_limit": 2}, "optim": {"steps": 9}}
    paths = [
        write_config(folder / "whole", checkpoint=saves | exports, **shared),
        write_config(folder / "stopped", checkpoint=saves, **shared),
    ]
    records = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    logger = logging.getLogger("laser_fast")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        assert train_run(load_config(paths[0]))
    finally:
        logger.removeHandler(handler)
    said = "\n".join(records)

    step = Trainer.step

    def stopped(trainer, number):
        if number == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(trainer, number)

    with pytest.MonkeyPatch.context() as once:
        once.setattr(Trainer, "step", stopped)
        assert not train_run(load_config(paths[1]))
    assert names(folder / "stopped" / "run" / "checkpoints") == ["step-000002", "step-000003"]
    for _ in range(2):  # and once more, when there is nothing left to do
        assert train_run(load_config(paths[1]), resume=True)
    return folder, said


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_best_is_kept_beside_the_newest_and_the_run_ends_without_a_better_one(runs):
    folder, said = runs
    run = folder / "whole" / "run"
    assert names(run / "checkpoints") == ["step-000002", "step-000004"]
    assert [line["step"] for line in read_metrics(run)] == [0, 1, 2, 3]
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["steps"], summary["accuracy_after"]) == (4, 0.3)
    assert "best eval/accuracy so far: 0.6 after 2 steps" in said
    assert "no better one in 2 evaluations: the run ends" in said


def test_a_run_that_was_stopped_decides_as_the_undisturbed_one(runs):
    """And exports and background writing change no number."""
    whole, stopped = (runs[0] / name / "run" for name in ("whole", "stopped"))
    assert read_metrics(whole) == read_metrics(stopped)
    assert read_lines(whole / "evaluations.jsonl") == read_lines(stopped / "evaluations.jsonl")
    assert names(stopped / "checkpoints") == ["step-000002", "step-000004"]
    for name in names(whole / "checkpoints"):
        shards = [
            [line for line in (run / "checkpoints" / name / "SHA256SUMS").open() if "__" in line]
            for run in (whole, stopped)
        ]
        assert shards[0] == shards[1] and shards[0]


def test_exports_are_models_of_which_the_newest_stay_and_all_are_uploaded(runs):
    run = runs[0] / "whole" / "run"
    assert names(run / "exports") == ["step-000004"]
    export(run, runs[0] / "last")
    last = AutoModelForCausalLM.from_pretrained(runs[0] / "last").state_dict()
    found = AutoModelForCausalLM.from_pretrained(run / "exports" / "step-000004").state_dict()
    assert all((found[name] == value).all() for name, value in last.items())
    score = json.loads((run / "exports" / "step-000004" / "laser_fast.json").read_text())
    assert score == json.loads((runs[0] / "last" / "laser_fast.json").read_text())
    assert [call[1:3] for call in Hub.calls if call[0] == "upload"] == [
        (REPO, "step-000002"),
        (REPO, "step-000004"),
    ]
    assert Hub.calls[1][3].startswith("evaluation after 2 steps: accuracy 0.600")
    assert Hub.calls[0] == ("create", REPO, {"private": True, "exist_ok": True})


def test_the_best_can_be_exported_and_uploaded(runs):
    run = runs[0] / "stopped" / "run"
    assert export(run, runs[0] / "best", checkpoint="best", push=REPO).name == "step-000002"
    assert Hub.calls[-1] == ("upload", REPO, "best", "step-000002 of run")
    config = run / "config.toml"  # as if it had had two ranks
    config.write_text(config.read_text().replace("replicas = 1", "replicas = 2"))
    assert export(run, runs[0] / "four", checkpoint="4").name == "step-000004"
    weights = [(runs[0] / name / "model.safetensors").read_bytes() for name in ("best", "four")]
    assert weights[0] != weights[1]
    with pytest.raises(ConfigError, match=r'no checkpoint "3"; choose among latest, best .*, 2, 4'):
        export(run, runs[0] / "three", checkpoint="3")


def test_what_cannot_work_is_refused_at_the_start(tmp_path, write_config):
    path = write_config(tmp_path)
    for override, said in (
        (f"checkpoint.hub_repo={REPO}", "nothing can go to me/model while HF_HUB_OFFLINE is set"),
        ("checkpoint.best=acuracy", '"acuracy" is no number of an evaluation'),
    ):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(ConfigError, match=said):
            patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
            train_run(load_config(path, [override]))
    assert not (tmp_path / "run").exists()


def test_sigterm_completes_what_is_being_written(tmp_path, write_config, monkeypatch):
    write, begun = dcp.save, threading.Event()

    def save(*arguments, **keys):
        begun.set()
        time.sleep(0.5)
        return write(*arguments, **keys)

    step = Trainer.step

    def stopped(trainer, number):
        if number == 1:
            assert begun.wait(60) and not list_checkpoints(tmp_path / "run")
            os.kill(os.getpid(), signal.SIGTERM)
        return step(trainer, number)

    monkeypatch.setattr("laser_fast.training.checkpoint.dcp.save", save)
    monkeypatch.setattr(Trainer, "step", stopped)
    saves = {"every": 1, "asynchronous": True}
    config = load_config(write_config(tmp_path, checkpoint=saves, data={"eval": ""}))
    assert not train_run(config)
    [path] = list_checkpoints(tmp_path / "run")
    assert json.loads((path / "trainer.json").read_text())["step"] == 1
