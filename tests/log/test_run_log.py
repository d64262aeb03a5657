"""A run's files: what is in them, what a resumed run keeps, and what is never overwritten."""

import json
import logging
import sys
import types

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from laser_fast.config import Config, ConfigError, dump_config, load_config
from laser_fast.log.jsonl import read_lines
from laser_fast.log.run_log import RunLog
from laser_fast.log.samples import SampleRecord, read_samples


def _config(folder, *, steps=4, **log):
    data = {
        "output_dir": str(folder),
        "model": {"path": "sandbox"},
        "data": {"train": "sandbox"},
        "score": {"beta": 0.1},
        "optim": {"steps": steps},
        "log": {"tensorboard": False, "samples_per_step": 2} | log,
    }
    return Config.parse(data, source="test")


def _report(accuracy: float) -> dict:
    return {"samples_per_prompt": 8, "accuracy": accuracy, "f1": float("nan"), "majority": 0.9}


def _samples(step: int) -> list[SampleRecord]:
    return [
        SampleRecord(
            step=step,
            prompt_id=f"id-{index}",
            sample=0,
            prompt="question",
            gold="1",
            text="answer",
            answer=None,
            reward=None,
            score=0.5,
            score_logprob=-15.0,
            finish_reason="stop",
            num_tokens=3,
        )
        for index in range(2)
    ]


def test_files_of_a_run(tmp_path, capsys, caplog):
    caplog.set_level(logging.INFO)
    folder = tmp_path / "runs" / "a"
    config = _config(folder, steps=2)
    with RunLog(folder, config) as log:
        log.log_evaluation(0, _report(0.5))
        for step in range(2):
            log.log_step(step, {"reward/mean": torch.tensor(0.5 + step), "score/f1": float("nan")})
            log.log_samples(_samples(step))
            # On disk at once: a killed run keeps what it had.
            assert len(read_lines(folder / "metrics.jsonl")) == step + 1
            assert len(read_lines(folder / "samples.jsonl")) == 2 * (step + 1)
        log.log_evaluation(2, _report(0.8))
        log.finish(2, wall_seconds=12.0)
    assert load_config(folder / "config.toml") == config
    assert read_lines(folder / "metrics.jsonl") == [
        {"step": 0, "reward/mean": 0.5, "score/f1": None},
        {"step": 1, "reward/mean": 1.5, "score/f1": None},
    ]
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["accuracy_before"] == 0.5 and summary["accuracy_after"] == 0.8
    assert summary["wall_seconds"] == 12.0 and summary["self_verification_f1_after"] is None
    assert read_samples(folder / "samples.jsonl") == _samples(0) + _samples(1)
    assert "2 steps, 12 s" in capsys.readouterr().out
    assert [record.message for record in caplog.records if "laser_fast" in record.name] == [
        "evaluation after 0 steps: accuracy 0.500",
        "step 0/2  reward 0.500",
        "step 1/2  reward 1.500",
        "evaluation after 2 steps: accuracy 0.800",
    ]


def test_second_new_run_overwrites_nothing(tmp_path):
    with RunLog(tmp_path, _config(tmp_path)) as log:
        log.log_step(0, {"reward/mean": 0.5})
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    with pytest.raises(ConfigError, match="in use by another run"):
        RunLog(tmp_path, _config(tmp_path, steps=9))
    assert before == {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()}


def test_resume_counts_nothing_twice(tmp_path):
    with RunLog(tmp_path, _config(tmp_path)) as log:
        log.log_evaluation(0, _report(0.5))
        for step in range(4):
            log.log_step(step, {"reward/mean": float(step)})
            log.log_samples(_samples(step))
            log.log_evaluation(step + 1, _report(0.6 + step / 10))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "rew')  # killed in the middle of a line
    longer = _config(tmp_path, steps=5)
    with RunLog(tmp_path, longer, resume_step=2) as log:
        assert list(log.folder.reports()) == [0, 1, 2]
        assert log.folder.reports()[0]["accuracy"] == 0.5
        log.log_step(2, {"reward/mean": 2.0})
        log.log_samples(_samples(2))
        log.log_evaluation(2, _report(0.75))
        assert log.folder.reports()[2]["accuracy"] == 0.75
    assert [line["step"] for line in read_lines(tmp_path / "evaluations.jsonl")] == [0, 1, 2]
    assert [line["step"] for line in read_lines(tmp_path / "metrics.jsonl")] == [0, 1, 2]
    assert [line["step"] for line in read_lines(tmp_path / "samples.jsonl")] == [0, 0, 1, 1, 2, 2]
    assert (tmp_path / "config.toml").read_text() == dump_config(longer)


def test_failed_run_closes_its_files(tmp_path):
    with pytest.raises(RuntimeError, match="boom"), RunLog(tmp_path, _config(tmp_path)) as log:
        log.log_step(0, {"reward/mean": 0.5})
        raise RuntimeError("boom")
    assert read_lines(tmp_path / "metrics.jsonl") and not (tmp_path / "summary.json").exists()
    with pytest.raises(ValueError, match="closed file"):
        log.log_step(1, {})
    log.close()


def _events(folder) -> EventAccumulator:
    return EventAccumulator(str(folder / "tensorboard")).Reload()


def test_tensorboard_hides_what_comes_again(tmp_path):
    config = _config(tmp_path, tensorboard=True)
    with RunLog(tmp_path, config) as log:
        log.log_evaluation(0, _report(0.5))
        for step in range(3):
            log.log_step(step, {"reward/mean": float(step), "score/f1": None})
    with RunLog(tmp_path, config, resume_step=1) as log:
        log.log_step(1, {"reward/mean": 1.5})
    events = _events(tmp_path)
    assert set(events.Tags()["scalars"]) == {
        "reward/mean",
        "eval/accuracy",
        "eval/majority",
        "eval/samples_per_prompt",
    }
    found = [(event.step, event.value) for event in events.Scalars("reward/mean")]
    assert found == [(0, 0.0), (1, 1.5)]


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_dashboard_gets_finite_numbers_and_no_step_twice(tmp_path, monkeypatch, name):
    runs = []

    class Run:
        def __init__(self, **settings):
            self.settings, self.sent, self.is_finished = settings, [], False
            runs.append(self)

        def log(self, metrics, step):
            self.sent.append((step, metrics))

        def finish(self):
            self.is_finished = True

    monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(init=Run))
    config = _config(tmp_path, **{name: "my-project"})
    with RunLog(tmp_path, config) as log:
        log.log_evaluation(0, _report(0.5))
        for step in range(3):
            log.log_step(step, {"reward/mean": float(step), "score/f1": float("nan")})
    with RunLog(tmp_path, config, resume_step=1) as log:
        for step in range(1, 4):
            log.log_step(step, {"reward/mean": float(step)})
    first, second = runs
    assert first.is_finished and second.is_finished
    assert first.settings["project"] == "my-project" and first.settings["resume"] == "allow"
    # The resumed run is the same run to the dashboard.
    assert first.settings == second.settings
    assert first.sent[0] == (
        0,
        {"eval/samples_per_prompt": 8, "eval/accuracy": 0.5, "eval/majority": 0.9},
    )
    assert first.sent[1:] == [(step, {"reward/mean": step}) for step in range(3)]
    assert second.sent == [(3, {"reward/mean": 3.0})]
