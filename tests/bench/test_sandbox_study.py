"""The sandbox study: what it starts, and the arithmetic of its table."""

import json
import math
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from laser_fast.cli import train_run
from laser_fast.config import dump_config, load_config

ROOT = Path(__file__).parents[2]


@pytest.fixture
def study(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from bench import sandbox_study

    return sandbox_study


def _records(study, accuracies):
    """Runs of every method with these accuracies by seed; GRPO has no AUROC."""
    return [
        {
            "method": method,
            "seed": seed,
            "before": {"step": 0, "accuracy": 0.5},
            "after": {
                "step": 120,
                "num_prompts": 400,
                "samples_per_prompt": 8,
                "accuracy": accuracy,
                "auroc": None if method == "GRPO" else 0.8,
            },
            "wall_seconds": 100.0 + seed,
        }
        for method, values in zip(study.DEFAULT, accuracies, strict=True)
        for seed, accuracy in enumerate(values)
    ]


def test_methods_are_valid_configurations(study):
    file = study.CONFIGS / "quickstart.toml"
    configs = {method: load_config(file, overrides) for method, overrides in study.METHODS.items()}
    assert configs["LaSeR, last, floating"] == load_config(file)
    assert (configs["LaSeR"].score.position, configs["LaSeR"].score.ref_logprob) == ("eos", "auto")
    assert configs["LaSeR without mixing"].score.loss_coef > 0
    assert configs["LaSeR without mixing"].advantage.score_coef == 0
    grpo = configs["GRPO"]
    assert grpo.score.loss_coef == grpo.advantage.score_coef == 0
    assert grpo.optim == configs["LaSeR"].optim and study.BASELINE == "GRPO"


def test_student_interval_by_hand(study):
    mean, half_width = study.interval([0.80, 0.84, 0.88])
    assert mean == pytest.approx(0.84)
    assert half_width == pytest.approx(4.303 * 0.04 / math.sqrt(3))
    assert study.interval([0.2, 0.4])[1] == pytest.approx(12.706 * math.sqrt(0.02) / math.sqrt(2))
    assert study.interval([0.5])[0] == 0.5 and math.isnan(study.interval([0.5])[1])
    assert all(map(math.isnan, study.interval([0.5, None])))


def test_gains_are_paired_by_seed(study):
    records = _records(study, [(0.9, 0.7, 0.8), (0.85, 0.65, 0.75), (0.88, 0.68, 0.78)])
    summary = study.summarize(records)
    # Seeds differ much, the two methods of a seed always by the same.
    gain = summary["gain"]["LaSeR"]["accuracy"]
    assert gain == pytest.approx((0.02, 0.0), abs=1e-12)
    assert summary["after"]["LaSeR"]["accuracy"][1] == pytest.approx(4.303 * 0.1 / math.sqrt(3))
    assert summary["before"]["before training"]["accuracy"] == pytest.approx((0.5, 0.0))
    assert math.isnan(summary["gain"]["LaSeR"]["auroc"][0])
    text = study.document({"commit": "abc"}, records)
    assert "- commit: abc" in text and "- seeds: 0, 1, 2" in text
    assert "400 held-out problems, k = 8 completions each, after 120 steps" in text
    assert "| LaSeR | 0.800 +- 0.248 | - | - | 0.800 +- 0.000 |" in text
    assert "| LaSeR without mixing | -0.030 +- 0.000 |" in text
    assert "LaSeR 101, " in text


def test_rate_of_a_method_is_its_most_accurate_with_a_score(study):
    found = {
        ("GRPO", 1e-4): (0.90, 0.0),
        ("GRPO", 2e-4): (0.95, 0.0),
        ("LaSeR", 1e-4): (0.90, 0.80),
        ("LaSeR", 2e-4): (0.92, 0.75),
        ("LaSeR", 3e-4): (0.95, 0.74),
        ("LaSeR, last", 1e-4): (0.91, None),
        ("LaSeR, last", 2e-4): (0.93, 0.70),
    }
    trials = [
        {"method": method, "rate": rate, "after": {"accuracy": accuracy, "f1": f1, "auroc": 0.5}}
        for (method, rate), (accuracy, f1) in found.items()
    ]
    assert study.best_rates(trials) == {"GRPO": 2e-4, "LaSeR": 2e-4, "LaSeR, last": 2e-4}
    records = _records(study, [(0.9,), (0.85,), (0.88,)])
    text = study.document({}, records, trials)
    assert "| LaSeR | 0.0002 (chosen) | 0.920 | 0.750 | 0.500 | - |" in text
    assert "| LaSeR | 0.0003 | 0.950 | 0.740 | 0.500 | - |" in text
    assert "tried on seed" not in study.document({}, records)
    alone = study.document({"task": "chains"}, [], trials)
    assert alone.startswith("# chains with GRPO; LaSeR; LaSeR, last\n\n- task: chains\n")
    assert alone.endswith(text[text.index("Learning rates, tried on") :])


def test_every_method_is_tuned_and_runs_at_its_own_rate(study, tmp_path, monkeypatch, capsys):
    started = []

    def train(run, config, method, overrides, *, num_ranks):
        run.mkdir()
        rate = next(float(o.split("=")[1]) for o in overrides if o.startswith("optim.lr="))
        accuracy = 0.9 - abs(rate - (1e-4 if method == "GRPO" else 3e-4))
        report = {"accuracy": accuracy, "f1": 0.8, "num_prompts": 4, "samples_per_prompt": 2}
        study.jsonl.write_lines(
            run / "evaluations.jsonl", [{"step": step, **report} for step in (0, 120)]
        )
        (run / "summary.json").write_text('{"wall_seconds": 5.0}')
        started.append((method, rate, run.name))

    def make_sandbox_model(base, **options):
        base.mkdir(parents=True)
        (base / "model.safetensors").touch()

    monkeypatch.setattr(study, "train", train)
    monkeypatch.setattr(study, "make_sandbox_model", make_sandbox_model)
    study.main(
        ["--runs", str(tmp_path), "--methods", "GRPO", "LaSeR", "--seeds", "0", "1", "--jobs", "2"]
        + ["--tune", "1e-4", "3e-4"]
    )
    assert set(started[:4]) == {
        ("GRPO", 1e-4, "grpo_100_lr0.0001"),
        ("GRPO", 3e-4, "grpo_100_lr0.0003"),
        ("LaSeR", 1e-4, "laser_100_lr0.0001"),
        ("LaSeR", 3e-4, "laser_100_lr0.0003"),
    }
    assert {(method, rate) for method, rate, _ in started[4:]} == {("GRPO", 1e-4), ("LaSeR", 3e-4)}
    assert len(started) == 8 and (tmp_path / "base_sandbox_100").exists()
    assert "- seeds: 0, 1\n" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        study.main(["--seeds", "100", "--runs", str(tmp_path)])


def test_finished_run_is_not_repeated(study, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a finished run was started again")

    file = study.CONFIGS / "quickstart.toml"
    overrides = [*study.METHODS["LaSeR"], f"output_dir={tmp_path}", "seed=3"]
    made = [f"data.{split}={tmp_path / split}.jsonl" for split in ("train", "eval")]  # by the run
    (tmp_path / "config.toml").write_text(dump_config(load_config(file, [*overrides, *made])))
    (tmp_path / "summary.json").write_text('{"wall_seconds": 5.0}')
    (tmp_path / "evaluations.jsonl").write_text('{"step": 120}\n{"step": 0}\n')
    monkeypatch.setattr(study.subprocess, "run", refuse)
    study.train(tmp_path, file, "LaSeR", overrides, num_ranks=2)
    assert study.read_result(tmp_path) == {
        "before": {"step": 0},
        "after": {"step": 120},
        "wall_seconds": 5.0,
    }
    with pytest.raises(SystemExit, match="another configuration; choose another --runs"):
        study.train(tmp_path, file, "LaSeR", [*overrides, "optim.lr=1e-3"], num_ranks=2)
    assert (tmp_path / "summary.json").exists()
    (tmp_path / "summary.json").unlink()  # cut off: starts again
    with pytest.raises(AssertionError):
        study.train(tmp_path, file, "LaSeR", overrides, num_ranks=2)


@pytest.mark.slow
def test_smoke_trains_every_method(study, tmp_path, monkeypatch):
    run, commands = subprocess.run, []

    def run_first_then_train_here(command, **options):
        """One start of torchrun shows that the command is right."""
        if "torch.distributed.run" not in command:
            return run(command, **options)
        commands.append(command)
        if len(commands) == 1:
            return run(command, **options)
        start = command.index("train")
        assert command[: start + 2] == commands[0][: start + 2]
        train_run(load_config(command[start + 1], command[start + 2 :]))
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(study.subprocess, "run", run_first_then_train_here)
    study.main(["--smoke", "--json", str(tmp_path / "study.json")])
    result = json.loads((tmp_path / "study.json").read_text())
    assert [row["method"] for row in result["rows"]] == list(study.DEFAULT)
    assert all(row["after"]["step"] == 1 for row in result["rows"])
    assert len(commands) == 3
    text = (tmp_path / "study.md").read_text()
    assert "- op: sandbox_study" in text and "2 held-out problems, k = 2 completions each" in text
