"""Folders of runs and evaluations for the tests of the report, and a headless browser for it."""

import random
import shutil
import subprocess

from typer.testing import CliRunner

from laser_fast.cli import app
from laser_fast.config import Config, dump_config
from laser_fast.log import jsonl

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)


def make_run(folder, *, steps=30, loss_coef=0.1, score_coef=0.1, seed=0, **files):
    """Write a run folder like the trainer's; `files` replaces lists of records, None leaves out.

    Every record lacks something that other runs have: null metrics, unknown keys, no score.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = Config.parse(
        {
            "output_dir": str(folder),
            "seed": seed,
            "model": {"path": "sandbox"},
            "data": {"train": "sandbox"},
            "score": {"loss_coef": loss_coef},
            "advantage": {"score_coef": score_coef},
            "optim": {"steps": steps},
        },
        source="test",
    )
    (folder / "config.toml").write_text(dump_config(config))
    trains_score = loss_coef > 0
    records = {
        "metrics": [_metrics(step, trains_score) for step in range(steps)],
        "evaluations": [_evaluation(step) for step in (0, steps)],
        "samples": [_sample(step, trains_score) for step in range(steps)],
        **files,
    }
    for name, lines in records.items():
        if lines is not None:
            jsonl.write_lines(folder / f"{name}.jsonl", lines)
    return folder


def _metrics(step, trains_score):
    metrics = {
        "step": step,
        "reward/mean": 0.5 + step / 100,
        "loss/policy": -0.1,
        "loss/score": 0.0,
        "loss/entropy": 0.3 / (1 + step),
        "rollout/disagreement": 0.0 if step == 3 else 1e-7 * (1 + step),
        "step/grad_norm": 1.0 / (1 + step),
        "memory/peak_gb": 1.5,
        "time/rollout": 0.25,
        "time/loss": 0.75,
        "time/pack": 0.0001,
        "something/new": "text",
    }
    if trains_score:
        # Undefined while one class is empty.
        metrics["score/mean_correct"] = None if step < 5 else step / 100
        metrics["score/f1"] = step / 100
    if step == 7:
        del metrics["time/loss"]
    return metrics


def _evaluation(step):
    return {
        "step": step,
        "num_prompts": 400,
        "samples_per_prompt": 8,
        "accuracy": 0.5 + step / 100,
        "majority": 0.75,
        "f1": None,
        "uses_scores": True,
    }


def _sample(step, trains_score):
    return {
        "step": step,
        "prompt": f"question {step}",
        "completion": f"\\boxed{{{step}}}",
        "reward": None if step == 4 else float(step % 2),
        "score": step / 50 if trains_score else None,
        "finish_reason": "stop",
    }


def make_evaluation(folder, skills, *, is_scored=True, problems=20, samples=4):
    """Let `laser-fast rescore` write an evaluation of drawn completions.

    `skills` maps a benchmark to the probability of a correct answer, which scores tell with noise.
    """
    source = folder.with_name(f"{folder.name}-drawn")
    for benchmark, skill in skills.items():
        rng = random.Random(benchmark)
        (source / benchmark).mkdir(parents=True)
        jsonl.write_lines(
            source / benchmark / "samples.jsonl",
            [
                _completion(rng, problem, sample, skill, is_scored)
                for problem in range(problems)
                for sample in range(samples)
            ],
        )
    score = ("--beta", "0.1", "--ref-logprob", "-20") if is_scored else ()
    arguments = ["rescore", str(source), str(folder), *score]
    CliRunner().invoke(app, arguments, catch_exceptions=False)
    shutil.rmtree(source)
    return folder


def _completion(rng, problem, sample, skill, is_scored):
    is_correct = rng.random() < skill
    answer = "7" if is_correct else str(rng.randrange(3))
    return {
        "prompt_id": f"{problem}",
        "sample": sample,
        "prompt": f"question {problem}",
        "gold": "7",
        "text": f"\\boxed{{{answer}}}",
        "answer": answer,
        "reward": float(is_correct),
        "score": None,
        "score_logprob": rng.gauss(-11 if is_correct else -17, 3) if is_scored else None,
        "finish_reason": "stop",
        "num_tokens": 5,
    }


def browse(path, folder, *options, fragment="") -> str:
    """What a headless browser says about a page after its script has run."""
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        f"--user-data-dir={folder}",
        *options,
        f"{path.resolve().as_uri()}{fragment}",
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
