"""Several passes over a step's completions, against the naive loss and its updates in float64."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from small_runs import read_batch
from tiny_models import SCORE_TOKEN, make_config, make_group, naive_logprobs, naive_loss
from torch.nn.utils import clip_grad_norm_
from torch.optim import SGD
from transformers import AutoModelForCausalLM

from laser_fast.algorithm.score import SelfScore
from laser_fast.config import ModelConfig
from laser_fast.log.timer import StageTimer
from laser_fast.model.packing import Packer
from laser_fast.model.policy import build_policy
from laser_fast.training import trainer as trainer_module
from laser_fast.training.objective import Objective
from laser_fast.training.schedule import GradientCap
from laser_fast.training.tables import gather_tables, step_advantages, training_sequences
from laser_fast.training.trainer import Trainer

SCORE = SelfScore(token_id=SCORE_TOKEN, beta=0.2, ref_logprob=-7.5)
TEMPERATURE, LR, SCORE_COEF = 0.7, 0.2, 0.3
GROUPS = [
    make_group(name, [(2 + k, True, -3.0), (3, True, -2.0), (5, False, None)], [1.0, 0.0, 0.0])
    for k, name in enumerate("abcd")
]
# Near those of the model, -5.5 on average, so that sequences are on both sides of the cap.
GROUPS = [
    replace(
        group,
        completions=tuple(
            replace(c, rollout_logprobs=tuple(-5.5 + 0.3 * p for p in c.rollout_logprobs))
            for c in group.completions
        ),
    )
    for group in GROUPS
]


def settings(epochs):
    return make_config(
        optim={"minibatches": 2, "epochs": epochs, "lr": LR},
        rollout={"group_size": 3},
        loss={"clip_low": 0.02, "clip_high": 0.03, "importance": "sequence-truncate"},
    )


def make_trainer(model, world, *, epochs):
    policy = build_policy(ModelConfig(path=str(model)), world)
    packer = Packer(
        budget=48,
        score_token_id=SCORE_TOKEN,
        score_at="eos",
        temperature=TEMPERATURE,
        device=world.device,
    )
    sampler = SimpleNamespace(
        config=settings(epochs), world=world, stage=StageTimer(), packer=packer, policy=policy
    )
    sampler.sample, sampler.staleness, sampler.sync_disagreement = lambda step: GROUPS, 1, 0.0
    return Trainer(
        sampler=sampler,
        reference=None,
        optimizer=SGD(policy.parameters()),
        score=SCORE,
        cap=GradientCap(loss_coef=SCORE_COEF, max_ratio=0.0),
    )


def parts_of(world, config):
    """The sequences of both updates of a pass."""
    tables = gather_tables(GROUPS, world)
    advantages = step_advantages(tables, config, SCORE)
    found = training_sequences(GROUPS, world, tables, advantages, config)
    return [[s for i, s in enumerate(found) if i // 3 % 2 == part] for part in (0, 1)]


def chosen_logprobs(model, sequence):
    with torch.no_grad():
        rows, _ = naive_logprobs(model, sequence, temperature=TEMPERATURE)
    return rows.gather(1, torch.tensor(sequence.completion_ids)[:, None])[:, 0]


def test_each_pass_updates_by_ratios_to_the_first_log_probs_and_trains_the_score(
    world, model_folders
):
    folder = model_folders / "qwen2-tied"
    once = make_trainer(folder, world, epochs=1).step(0)[0]
    trainer = make_trainer(folder, world, epochs=2)
    before = [parameter.full_tensor().clone() for parameter in trainer.policy.parameters()]
    metrics, _ = trainer.step(0)

    config = settings(2)
    exact = AutoModelForCausalLM.from_pretrained(folder).double()
    objective = Objective(loss=config.loss, score=SCORE, score_coef=SCORE_COEF)
    alone = Objective(loss=config.loss, score=SCORE, score_coef=0.0)
    parts = parts_of(world, config)
    old = [[chosen_logprobs(exact, sequence) for sequence in part] for part in parts]
    optimizer, norms, losses, policy_losses = SGD(exact.parameters(), lr=LR), [], [], []
    for number in (0, 1, 0, 1):
        arguments = {"temperature": TEMPERATURE, "old": old[number]}
        loss = naive_loss(exact, parts[number], objective, **arguments)
        losses.append(loss.item())
        policy_losses.append(naive_loss(exact, parts[number], alone, **arguments).item())
        loss.backward()
        norms.append(float(clip_grad_norm_(exact.parameters(), config.optim.max_grad_norm)))
        optimizer.step()
        optimizer.zero_grad()

    pairs = zip(trainer.policy.parameters(), before, exact.parameters(), strict=True)
    for got, start, want in pairs:
        moved = want.detach() - start.double()
        assert (got.full_tensor() - want).norm() < 1e-3 * moved.norm()
    assert metrics["step/grad_norm"] == pytest.approx(sum(norms) / 4, rel=1e-4)
    assert metrics["loss/policy"] == pytest.approx(sum(policy_losses) / 4, rel=1e-4)
    score_losses = (sum(losses) - sum(policy_losses)) / SCORE_COEF
    assert metrics["loss/score"] == pytest.approx(score_losses / 4, rel=1e-4)
    # The second pass has met the clip more often; the score is verified before it has seen them.
    assert metrics["loss/clip_frac"] > once["loss/clip_frac"]
    assert metrics["loss/score"] < once["loss/score"]
    verified = [key for key in once if key.startswith("score/")]
    assert {"score/mean_correct", "score/f1"} <= {*verified}
    assert {key: metrics[key] for key in verified} == {key: once[key] for key in verified}
    assert 0 < once["loss/importance_cut"] < 1
    # What is sampled and computed: old log-probs and weights are one for all passes.
    for name in ("loss/importance_mean", "loss/importance_ess", "rollout/disagreement"):
        assert metrics[name] == pytest.approx(once[name]), name
    for name in ("pack/tokens", "pack/flop"):
        assert metrics[name] == 2 * once[name]


def test_a_bad_update_of_a_later_pass_is_dumped_as_its_own(
    world, model_folders, monkeypatch, tmp_path
):
    trainer, applied = make_trainer(model_folders / "qwen2-tied", world, epochs=2), []
    trainer.bad_steps.folder = tmp_path
    monkeypatch.setattr(
        trainer_module,
        "apply_gradients",
        lambda *_, **__: applied.append(1) or (math.nan if len(applied) == 4 else 1.0),
    )
    metrics, _ = trainer.step(0)
    assert len(applied) == 4 and math.isnan(metrics["step/grad_norm"])
    [dump] = tmp_path.iterdir()
    assert dump.name == "step-000000-update-3-rank-0.jsonl"
    assert read_batch(dump) == [s for s in parts_of(world, trainer.config)[1] if s.has_rows]
