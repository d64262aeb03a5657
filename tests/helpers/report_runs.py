"""Folders of runs and evaluations for the tests of the report, and a headless browser for it."""

import random
import shutil
import subprocess

from laser_fast.algorithm.score import SelfScore
from laser_fast.config import dump_config, parse_config
from laser_fast.evaluation.statistics import average, build_report
from laser_fast.log import jsonl
from laser_fast.log.samples import read_samples, rescore, write_samples

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)


def make_run(folder, *, steps=30, loss_coef=0.1, score_coef=0.1, seed=0, **files):
    """Write a run folder like the trainer's; `files` replaces lists of records, None leaves out.

    Every record lacks something that other runs have: null metrics, unknown keys, no score.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = parse_config(
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
    reward = None if step == 4 else float(step % 2)
    return {
        "step": step,
        **_completion(f"train-{step}", 0, f"\\boxed{{{step}}}", reward, None),
        "prompt": f"question {step}",
        "score": step / 50 if trains_score else None,
    }


def make_evaluation(folder, skills, *, is_scored=True, problems=20, samples=4):
    """Write a folder as `laser-fast eval` does, of drawn completions.

    `skills` maps a benchmark to the probability of a correct answer, which scores tell with noise.
    """
    score = SelfScore(token_id=0, beta=0.1, ref_logprob=-20.0)
    reports, draws = {}, []
    for benchmark, skill in skills.items():
        rng = random.Random(benchmark)
        (folder / benchmark).mkdir(parents=True)
        path = folder / benchmark / "samples.jsonl"
        drawn = [_draw(rng, i // samples, i % samples, skill) for i in range(problems * samples)]
        jsonl.write_lines(
            path, drawn if is_scored else [d | {"score_logprob": None} for d in drawn]
        )
        records = rescore(read_samples(path), score)
        write_samples(path, records)
        reports[benchmark], resampled = build_report(records, name=benchmark)
        draws.append(resampled)
    content = {"benchmarks": reports}
    if is_scored:
        measured = {"ref_logprob_is_measured": False}
        content["score"] = {"token": None, "beta": 0.1, "ref_logprob": -20.0, **measured}
    if len(reports) > 1:
        content["average"] = average(list(reports.values()), draws)
    (folder / "settings.json").write_text(jsonl.to_text({"model": "random", "seed": 0}))
    (folder / "report.json").write_text(jsonl.to_text(content))
    return folder


def _draw(rng, problem, sample, skill):
    is_correct = rng.random() < skill
    answer = "7" if is_correct else str(rng.randrange(3))
    logprob = rng.gauss(-11 if is_correct else -17, 3)
    return _completion(f"{problem}", sample, answer, float(is_correct), logprob)


def _completion(prompt_id, sample, answer, reward, score_logprob):
    return {
        "prompt_id": prompt_id,
        "sample": sample,
        "prompt": f"question {prompt_id}",
        "gold": "7",
        "text": answer,
        "answer": answer,
        "reward": reward,
        "score": None,
        "score_logprob": score_logprob,
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
