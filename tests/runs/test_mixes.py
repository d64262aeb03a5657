"""One run with several data sets and rewards, resumed; its evaluations know the verifier."""

import shutil
from statistics import fmean

import pytest
from small_runs import EXTRAS, GROUP_SIZE, GROUPS, read_lines, read_metrics

from laser_fast.cli import train_run
from laser_fast.config import load_config
from laser_fast.log.jsonl import write_lines
from laser_fast.sandbox.task import rows

MODULE = """
from pathlib import Path

from laser_fast.rewards.judge import cached_judge

@cached_judge(Path(__file__).with_name("judge.sqlite"), concurrency=2)
async def style(completion, kind):
    if len(completion) % 7 == 0:
        raise TimeoutError("the judge is busy")
    return 2.0 * (kind == "easy") + len(completion) / 100

def short(completions):
    return [None if len(c) % 5 == 0 else -len(c) / 30 for c in completions]
"""
STYLE, SHORT = "mixed_rewards:style", "mixed_rewards:short"
WEIGHTS = {STYLE: 0.5, SHORT: 2.0}


@pytest.fixture(scope="module")
def run(tmp_path_factory, write_config):
    folder = tmp_path_factory.mktemp("mix")
    for name, kind in (("easy", "easy"), ("other", "other")):
        found = [row | {"kind": kind} for row in rows("train", seed=len(name))[:5]]
        write_lines(folder / f"{name}.jsonl", found)
    (folder / "mixed_rewards.py").write_text(MODULE)
    extras = {key: value for key, value in EXTRAS.items() if key in ("rollout", "optim")}
    config = write_config(
        folder,
        **extras | {"optim": EXTRAS["optim"] | {"steps": 2, "warmup_steps": 0}},
        data={
            "train": {str(folder / "easy.jsonl"): 2, str(folder / "other.jsonl"): 1},
            "eval_limit": 2,
        },
        reward={"extra": WEIGHTS},
        checkpoint={"every": 1},
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        train_run(load_config(config))
        copy = folder / "resumed"
        shutil.copytree(folder / "run", copy)
        shutil.rmtree(copy / "checkpoints" / "step-000002")
        train_run(load_config(config, [f"output_dir={copy}"]), resume=True)
    return folder / "run"


def test_a_resumed_mix_is_the_undisturbed_one_bit_for_bit(run):
    copy = run.parent / "resumed"
    assert read_metrics(copy) == read_metrics(run)
    assert read_lines(copy / "samples.jsonl") == read_lines(run / "samples.jsonl")


def test_samples_tell_verifier_and_total_and_each_function_apart(run):
    samples = read_lines(run / "samples.jsonl")
    assert len(samples) == 2 * GROUPS * GROUP_SIZE
    for sample in samples:
        length, is_easy = len(sample["text"]), sample["prompt_id"].startswith("easy.jsonl-")
        style, short = 2.0 * is_easy + length / 100, -length / 30
        said = {
            STYLE: None if length % 7 == 0 else style,
            SHORT: None if length % 5 == 0 else short,
        }
        assert sample["extras"] == pytest.approx(said)
        added = sum(WEIGHTS[name] * (value or 0.0) for name, value in said.items())
        assert sample["reward"] in (0.0, 1.0)
        assert sample["total"] == pytest.approx(sample["reward"] + added)
    for step in range(2):
        of_step = {s["prompt_id"] for s in samples if s["step"] == step}
        assert len(of_step) == GROUPS
    assert len({s["prompt_id"] for s in samples}) == 2 * GROUPS


def test_metrics_tell_them_apart_too(run):
    samples = read_lines(run / "samples.jsonl")
    for line in read_metrics(run):
        own = [s for s in samples if s["step"] == line["step"]]
        for name in ("easy.jsonl", "other.jsonl"):
            rewards = [s["reward"] for s in own if s["prompt_id"].startswith(f"{name}-")]
            assert line[f"reward/mean/{name}"] == pytest.approx(fmean(rewards))
        assert line["reward/total"] == pytest.approx(fmean(s["total"] for s in own), rel=1e-5)
        assert line["reward/mean"] == pytest.approx(fmean(s["reward"] for s in own))
        for name in WEIGHTS:
            said = [s["extras"][name] for s in own]
            there = [value for value in said if value is not None]
            assert line[f"reward/extra/{name}"] == pytest.approx(fmean(there), rel=1e-5)
            missing = len(said) - len(there)
            assert line[f"reward/extra_failed/{name}"] == pytest.approx(missing / len(said))


def test_evaluations_know_the_verifier_alone(run):
    """Its held-out prompts lack the field that a function asks for."""
    assert [line["step"] for line in read_lines(run / "evaluations.jsonl")] == [0, 2]
    assert all(0 <= line["accuracy"] <= 1 for line in read_lines(run / "evaluations.jsonl"))
