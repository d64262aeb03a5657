"""Whole runs from a configuration file, on any number of ranks: resumed, stopped, refused."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter

import pytest
import torch
from small_runs import (
    GROUP_SIZE,
    GROUPS,
    PLAIN_GRPO,
    STEPS,
    assert_close_metrics,
    read_lines,
    read_metrics,
)
from torch.nn.utils import clip_grad_norm_
from transformers import AutoModelForCausalLM, AutoTokenizer

from laser_fast.cli import train_run
from laser_fast.config import ConfigError, load_config
from laser_fast.data.prompts import held_out_prompts, train_prompts
from laser_fast.model.distributed import open_world
from laser_fast.model.logprobs import policy_logprobs
from laser_fast.model.packing import Packer
from laser_fast.model.policy import build_policy
from laser_fast.records import Sampling, SpecialTokens
from laser_fast.rollout.engine import draw_seed
from laser_fast.rollout.hf import HfEngine
from laser_fast.sandbox.task import EOS_TOKEN, RESERVED_TOKENS
from laser_fast.training.checkpoint import latest_checkpoint, load_checkpoint
from laser_fast.training.export import export
from laser_fast.training.update import build_optimizer


@pytest.mark.parametrize("name", ["plain", "extras", "lora"])
def test_runs_are_not_trivial(one_rank, name):
    """What follows compares something: spread, scores, several updates that change the policy."""
    lines = read_metrics(one_rank / name / "run")
    assert [line["step"] for line in lines] == list(range(STEPS))
    assert all(0 < line["reward/mean"] < 1 for line in lines)
    assert all(line["advantage/zero_std_groups"] < 0.7 for line in lines)
    assert all(line["step/grad_norm"] > 0.01 for line in lines)
    assert len({line["score/mean_correct"] for line in lines}) == STEPS
    is_scored = [line["score/coef"] > 0 for line in lines]
    assert is_scored == [name == "plain"] + [True] * (STEPS - 1)
    truncated = [line["rollout/truncated"] for line in lines]
    assert 0 < max(truncated) < 1
    if name != "plain":
        assert lines[-1]["loss/kl"] > 1e-6
        assert all(abs(line["score/coef"] - 1) > 0.01 for line in lines[2:])  # the cap acts
        # Prompts were passed over before the checkpoint that is resumed from.
        file = one_rank / name / "run" / "checkpoints" / "step-000002" / "trainer.json"
        curriculum = json.loads(file.read_text())["curriculum"]
        assert curriculum["places"][0] > 2 * GROUPS
        assert all(line["loss/importance_max"] != 1 for line in lines)


@pytest.mark.parametrize("name", ["plain", "extras", "lora"])
def test_two_ranks_give_the_run_of_one(one_rank, two_ranks, name):
    runs = [folder / name / "run" for folder in (one_rank, two_ranks)]
    assert_close_metrics(*(read_metrics(run) for run in runs), tolerance=1e-5)
    evaluations = [read_lines(run / "evaluations.jsonl") for run in runs]
    assert [line["step"] for line in evaluations[0]] == [0, STEPS]
    assert_close_metrics(*evaluations, tolerance=1e-5)


def test_samples_alone_give_the_scores_of_the_last_row_and_their_floating_reference(
    one_rank, model
):
    run, beta = one_rank / "extras" / "run", 0.9
    tokenizer = AutoTokenizer.from_pretrained(model)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)
    score_token_id = tokenizer.convert_tokens_to_ids(RESERVED_TOKENS[0])
    by_step, num_read = [[] for _ in range(STEPS)], 0
    for number, sample in enumerate(read_lines(run / "samples.jsonl")):
        if sample["finish_reason"] == "stop":
            sample["update"] = number // GROUP_SIZE % 2
            by_step[sample["step"]].append(sample)
    for sample in by_step[0]:  # of the model as it was
        ids = tokenizer(sample["prompt"] + sample["text"])["input_ids"]
        if len(ids) + 1 == len(tokenizer(sample["prompt"])["input_ids"]) + sample["num_tokens"]:
            expected = base(torch.tensor([ids])).logits[0, -1].log_softmax(-1)[score_token_id]
            assert sample["score_logprob"] == pytest.approx(expected.item(), abs=1e-4)
            num_read += 1
    assert num_read > 3
    found = [line["score/ref_logprob"] for line in read_metrics(run)]
    for before, after, samples in zip(found[:-1], found[1:], by_step[1:], strict=True):
        counts = Counter((s["update"], s["reward"]) for s in samples)
        step = 0.0
        for s in samples:  # as the MSE of its update weights it
            num = counts[s["update"], 0] + counts[s["update"], 1]
            weight = min(num / (2 * counts[s["update"], s["reward"]]), 5.0) / num
            step += weight * (s["score_logprob"] - before - s["reward"] / beta) / 2
        assert after == pytest.approx(min(before + 0.2 * step, -3 - 1 / beta), abs=1e-5)
    assert len(set(found)) == STEPS


def test_prompts_that_cannot_be_shared_out_are_refused(two_ranks):
    assert (two_ranks / "stdout").read_text().count(
        "refused: data.prompts_per_step = 5 does not divide over 2 ranks; choose a multiple of 2"
    ) == 2
    assert not (two_ranks / "odd" / "run").exists()


def test_a_fault_that_rank_0_sees_is_refused_on_every_rank(two_ranks):
    output = (two_ranks / "stdout").read_text()
    assert output.count("own, but config.json says tie_word_embeddings = true") == 2
    assert not (two_ranks / "untied" / "run").exists()


def resume_copy(run, copy, *overrides):
    """Continue a copy of a run from its checkpoint of step 2, as if it had died in step 3."""
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "checkpoints" / f"step-{STEPS:06d}")
    (copy / "summary.json").unlink()
    config = load_config(run.parent / "config.toml", [f"output_dir={copy}", *overrides])
    train_run(config, resume=True)


@pytest.mark.parametrize("name", ["plain", "extras", "lora"])
def test_a_resumed_run_is_the_undisturbed_one_bit_for_bit(one_rank, tmp_path, name):
    run = one_rank / name / "run"
    resume_copy(run, tmp_path / "resumed")
    assert read_metrics(tmp_path / "resumed") == read_metrics(run)
    for file in ("samples.jsonl", "evaluations.jsonl"):
        assert read_lines(tmp_path / "resumed" / file) == read_lines(run / file)
    summaries = [
        json.loads((path / "summary.json").read_text()) for path in (run, tmp_path / "resumed")
    ]
    for summary in summaries:
        assert summary.pop("wall_seconds") > 0
    assert summaries[0] == summaries[1]
    samples = read_lines(run / "samples.jsonl")
    assert len(samples) == STEPS * GROUPS * GROUP_SIZE


def test_a_run_that_is_asked_for_fewer_steps_than_it_has_is_through(
    one_rank, tmp_path, monkeypatch
):
    run, copy = one_rank / "plain" / "run", tmp_path / "run"
    shutil.copytree(run, copy)
    monkeypatch.setattr("laser_fast.training.trainer.Trainer.step", None)
    config = load_config(run.parent / "config.toml", [f"output_dir={copy}", "optim.steps=3"])
    assert train_run(config, resume=True)
    assert read_metrics(copy) == read_metrics(run)


def test_a_run_continues_on_another_world_size(two_ranks, tmp_path):
    run = two_ranks / "plain" / "run"
    resume_copy(run, tmp_path / "resumed", "optim.tokens_per_microbatch=1000")
    lines = [read_metrics(path) for path in (tmp_path / "resumed", run)]
    assert_close_metrics(*lines, tolerance=1e-5)


def test_a_sandbox_run_resumes_by_the_word_that_it_was_started_with(
    tmp_path, write_config, monkeypatch
):
    from laser_fast.sandbox import files

    make = files.make_sandbox_model
    made = []

    def make_quickly(*arguments, **keys):
        made.append(arguments)
        make(*arguments, **keys, steps=8)

    monkeypatch.setattr(files, "make_sandbox_model", make_quickly)
    words = {"model": {"path": "sandbox"}, "data": {"train": "sandbox", "eval": "sandbox"}}
    path = write_config(tmp_path, **words, reward={"kind": "sandbox"})
    train_run(load_config(path, ["optim.steps=2"]))
    train_run(load_config(path, ["optim.steps=3"]), resume=True)
    assert [line["step"] for line in read_lines(tmp_path / "run" / "metrics.jsonl")] == [0, 1, 2]
    assert len(made) == 1


def make_engine(model, tokenizer, **options):
    eos, score_token = tokenizer.convert_tokens_to_ids([EOS_TOKEN, RESERVED_TOKENS[0]])
    tokens = SpecialTokens(
        score_token_id=score_token,
        eos_token_ids=(eos,),
        pad_token_id=tokenizer.pad_token_id,
        vocab_size=len(tokenizer),
    )
    return HfEngine(model, tokens, max_num_seqs=64, **options)


def plain_grpo(config):
    """GRPO as one would write it without any of our training code: metrics of each step."""
    model = AutoModelForCausalLM.from_pretrained(config.model.path, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(config.model.path)
    engine = make_engine(model, tokenizer)
    source = train_prompts(config.data, tokenizer, seed=config.seed)
    optimizer = torch.optim.AdamW(
        model.parameters(), betas=config.optim.betas, weight_decay=config.optim.weight_decay
    )
    from train_ranks import reward

    found = []
    for step, share_of_lr in enumerate([0.5, 1.0, 1.0, 0.5]):
        sampling = Sampling(
            group_size=GROUP_SIZE,
            temperature=1.0,
            max_new_tokens=config.rollout.max_new_tokens,
            seed=draw_seed(config.seed, "train", step, 0),
            score_at=None,
        )
        groups = engine.generate(source.prompts(step), sampling)
        texts = [
            tokenizer.decode(c.completion_ids, skip_special_tokens=True)
            for group in groups
            for c in group.completions
        ]
        rewards = torch.tensor(reward(texts, texts)).view(GROUPS, GROUP_SIZE)
        advantages = (rewards - rewards.mean(1, True)) / (rewards.std(1, keepdim=True) + 1e-6)
        losses = []
        for p, group in enumerate(groups):
            for g, completion in enumerate(group.completions):
                ids = torch.tensor([group.prompt.prompt_ids + completion.completion_ids])
                logits = model(ids).logits[0, len(group.prompt.prompt_ids) - 1 : -1]
                labels = torch.tensor(completion.completion_ids)
                logprobs = logits.log_softmax(-1).gather(1, labels[:, None])[:, 0]
                losses.append(-advantages[p, g] * (logprobs - logprobs.detach()).exp())
        loss = torch.cat(losses).mean()
        optimizer.zero_grad()
        loss.backward()
        norm = clip_grad_norm_(model.parameters(), config.optim.max_grad_norm)
        optimizer.param_groups[0]["lr"] = share_of_lr * config.optim.lr
        optimizer.step()
        found.append(
            {
                "reward/mean": rewards.mean().item(),
                "loss/policy": loss.item(),
                "step/grad_norm": norm.item(),
            }
        )
    return found


def test_without_the_score_it_is_plain_grpo(tmp_path, write_config):
    config = load_config(write_config(tmp_path, **PLAIN_GRPO))
    train_run(config)
    lines = read_metrics(tmp_path / "run")
    for got, want in zip(lines, plain_grpo(config), strict=True):
        for key, value in want.items():
            assert got[key] == pytest.approx(value, rel=1e-5, abs=1e-7), (got["step"], key)
        assert got["loss/score"] == got["score/coef"] == 0.0

    # Score rows that only watch change nothing.
    watched = write_config(
        tmp_path / "watched", score={"warmup_steps": STEPS}, advantage={"score_coef": 0.0}
    )
    train_run(load_config(watched))
    for got, want in zip(read_metrics(tmp_path / "watched" / "run"), lines, strict=True):
        assert got["score/auroc"] is not None
        assert got["loss/score"] > 0
        for key in ("reward/mean", "loss/policy", "step/grad_norm", "rollout/tokens"):
            assert got[key] == pytest.approx(want[key], rel=1e-6, abs=1e-8), (got["step"], key)


def test_the_run_folder_holds_what_the_readme_says(one_rank):
    run = one_rank / "plain" / "run"
    names = {path.name for path in run.iterdir()}
    files = "config.toml metrics.jsonl evaluations.jsonl samples.jsonl summary.json"
    assert names >= {*files.split(), "curves.png", "report.html", "checkpoints"}
    assert load_config(run / "config.toml") == load_config(run.parent / "config.toml")
    checkpoints = sorted((run / "checkpoints").iterdir())
    assert [path.name for path in checkpoints] == ["step-000002", "step-000004"]
    for checkpoint in checkpoints:
        assert load_config(checkpoint / "config.toml") == load_config(run / "config.toml")


def noise(screen):
    """Lines that tell a user nothing: warnings of libraries, and bars of theirs."""
    bars = ("Loading weights", "Writing model shards", "Generating", "it/s", "examples/s")
    return [
        line
        for line in screen.splitlines()
        if any(word in line for word in ("Warning", "deprecated", "OMP_NUM_THREADS", *bars))
    ]


def test_sigterm_saves_and_the_run_goes_on(tmp_path, write_config):
    path = write_config(
        tmp_path,
        optim={"steps": 100_000, "schedule": "constant"},
        checkpoint={"every": 0},
        data={"eval": ""},
        log={"samples_per_step": 1},
        score={"ref_logprob": -3.9, "beta": 1.2},  # the model's own, which is worth no warning
    )
    process = subprocess.Popen(
        [sys.executable, "-m", "laser_fast", "train", str(path)],
        env=os.environ
        | {"PYTHONPATH": os.pathsep.join(sys.path), "HF_DATASETS_CACHE": str(tmp_path / "cache")},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    metrics = tmp_path / "run" / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.read_text().count("\n") > 1):
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    screen, _ = process.communicate()
    assert process.returncode == 75, screen
    assert "stopped by SIGTERM; continue with --resume" in screen
    assert "wording and tokenizing" in screen and not noise(screen)

    lines = read_metrics(tmp_path / "run")
    [checkpoint] = (tmp_path / "run" / "checkpoints").iterdir()
    assert json.loads((checkpoint / "trainer.json").read_text())["step"] == len(lines) >= 2
    assert not (tmp_path / "run" / "summary.json").exists()
    train_run(load_config(path, [f"optim.steps={len(lines) + 1}"]), resume=True)
    resumed = read_metrics(tmp_path / "run")
    assert resumed[:-1] == lines
    assert resumed[-1]["step"] == len(lines)
    assert (tmp_path / "run" / "summary.json").exists()


def test_an_exported_model_is_the_trained_one(one_rank, tmp_path, capfd):
    run = one_rank / "plain" / "run"
    assert export(run, tmp_path / "model").name == f"step-{STEPS:06d}"
    assert not noise(capfd.readouterr().err)
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert exported.dtype == torch.float32  # as the base model was stored

    config = load_config(run / "config.toml")
    base = AutoModelForCausalLM.from_pretrained(config.model.path)
    assert not torch.equal(exported.lm_head.weight, base.lm_head.weight)
    with open_world() as world:
        policy = build_policy(config.model, world)
        optimizer = build_optimizer(policy, config.optim)
        load_checkpoint(latest_checkpoint(run), policy=policy, optimizer=optimizer)
        packer = Packer(
            budget=999, score_token_id=0, score_at="eos", temperature=1.0, device=world.device
        )
        engine = make_engine(policy.hf, tokenizer, unsharded=policy.unsharded)
        prompts = held_out_prompts(config.data, tokenizer).all()
        sampling = Sampling(group_size=2, temperature=1.0, max_new_tokens=30, seed=1)
        groups = engine.generate(prompts, sampling)
        given = policy_logprobs(policy, groups, packer)
    texts = []
    for (logprobs, score), (group, completion) in zip(
        given, [(g, c) for g in groups for c in g.completions], strict=True
    ):
        prompt_ids = group.prompt.prompt_ids
        with torch.no_grad():
            logits = exported(torch.tensor([prompt_ids + completion.completion_ids])).logits[0]
        rows = logits.log_softmax(-1)
        labels = torch.tensor(completion.completion_ids)[:, None]
        want = rows[len(prompt_ids) - 1 : -1].gather(1, labels)[:, 0]
        assert logprobs == pytest.approx(want.tolist(), abs=1e-5)
        if completion.is_finished:
            assert score == pytest.approx(rows[-1, 0].item(), abs=1e-5)
        texts.append(tokenizer.decode(completion.completion_ids, skip_special_tokens=True))
    assert len(set(texts)) > 1


def test_export_overwrites_nothing(one_rank, tmp_path):
    with pytest.raises(ConfigError, match="exists; choose a new folder"):
        export(one_rank / "plain" / "run", tmp_path)
    with pytest.raises(ConfigError, match="is no run folder"):
        export(tmp_path, tmp_path / "out")
