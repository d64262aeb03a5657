"""Steps on the real policy: of the gradient cap, without grades, with a floating reference."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from tiny_models import SCORE_TOKEN, make_config, make_group, make_sequences
from torch.optim import AdamW

from laser_fast.algorithm.score import SelfScore
from laser_fast.config import LossConfig, ModelConfig
from laser_fast.log.timer import StageTimer
from laser_fast.model.packing import Packer
from laser_fast.model.policy import build_policy
from laser_fast.rewards import RewardError
from laser_fast.training.objective import Objective
from laser_fast.training.run import _settle_score
from laser_fast.training.schedule import GradientCap
from laser_fast.training.step_metrics import RowMetrics
from laser_fast.training.trainer import Trainer

SCORE = SelfScore(token_id=SCORE_TOKEN, beta=0.2, ref_logprob=-7.5)


def make_trainer(model, world, *, max_ratio):
    config = make_config()
    policy = build_policy(ModelConfig(path=str(model)), world)
    packer = Packer(
        budget=48, score_token_id=SCORE_TOKEN, score_at="eos", temperature=0.7, device=world.device
    )
    return Trainer(
        sampler=SimpleNamespace(
            config=config, world=world, stage=None, packer=packer, policy=policy
        ),
        reference=None,
        optimizer=AdamW(policy.parameters()),
        score=SCORE,
        cap=GradientCap(loss_coef=0.8, max_ratio=max_ratio),
    )


def gradients(trainer):
    found = [parameter.grad.full_tensor().clone() for parameter in trainer.policy.parameters()]
    trainer.optimizer.zero_grad()
    return found


@pytest.mark.parametrize("max_ratio", [0.05, 1e6])
def test_gradients_formed_apart_join_to_the_capped_ones(world, model_folders, max_ratio):
    trainer = make_trainer(model_folders / "qwen2-tied", world, max_ratio=max_ratio)
    objective = Objective(loss=LossConfig(), score=SCORE, score_coef=0.8)
    batches = trainer.packer.microbatches(make_sequences(9, seed=5))
    assert len(batches) > 1

    rows = RowMetrics(LossConfig(), world.device)
    norms = trainer._backward_apart(objective, batches, rows)
    joined = gradients(trainer)

    capped = replace(objective, score_coef=trainer.cap.coef())
    plain_rows = RowMetrics(LossConfig(), world.device)
    trainer._backward(capped, batches, plain_rows)
    for actual, expected in zip(joined, gradients(trainer), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)
    assert rows.finish(world, num_tokens=99) == pytest.approx(
        plain_rows.finish(world, num_tokens=99)
    )
    # The cap holds exactly in the step that measures.
    assert norms["score/grad_norm"] <= max_ratio * norms["loss/grad_norm"] * (1 + 1e-6)
    assert (trainer.cap.coef() < 0.8) == (max_ratio < 1)


def test_a_step_without_any_grade_updates_nothing(world, model_folders, caplog):
    trainer = make_trainer(model_folders / "qwen2-tied", world, max_ratio=0.5)
    completions = [(3, True, -1.0), (4, False, None)]
    rewards = [1.0, 0.0], [None, None], [1.0, None]

    def step(groups, **reward):
        trainer.stage = StageTimer(world.device)
        trainer.config = make_config(optim={"minibatches": 2}, reward=reward)
        trainer.sampler = SimpleNamespace(
            sample=lambda step: groups, staleness=1, sync_disagreement=0.0
        )
        before = [parameter.full_tensor().clone() for parameter in trainer.policy.parameters()]
        metrics, _ = trainer.step(0)
        after = [parameter.full_tensor() for parameter in trainer.policy.parameters()]
        return metrics, all(map(torch.equal, before, after))

    graded, failed, half = (make_group("a", completions, row) for row in rewards)
    _, is_same = step([graded, graded])
    assert not is_same  # and now AdamW has momentum
    metrics, is_same = step([failed, failed])
    assert is_same
    assert math.isnan(metrics["reward/mean"]) and math.isnan(metrics["step/grad_norm"])
    assert "step 0: every grade failed, so there is no update" in caplog.text
    assert not step([failed, half])[1]  # in its second minibatch
    with pytest.raises(RewardError, match="75% of the grades failed, more than reward.max_failed"):
        step([failed, half], max_failed=0.7)


def test_the_cap_waits_for_a_step_in_which_something_has_finished(world, model_folders):
    trainer = make_trainer(model_folders / "qwen2-tied", world, max_ratio=0.05)
    trainer.stage, trainer.config = StageTimer(world.device), make_config()
    found = []
    for number, is_finished in enumerate((False, True, True)):
        members = [(3, is_finished, -9.0 if is_finished else None), (4, False, None)]
        groups = [make_group("a", members, [1.0, 0.0])]
        trainer.sampler = SimpleNamespace(
            sample=lambda step, groups=groups: groups, staleness=1, sync_disagreement=0.0
        )
        metrics, _ = trainer.step(number)
        found.append(("score/grad_norm" in metrics, metrics["score/coef"] < 0.8))
    assert found == [(False, False), (True, True), (False, True)]


FLOATING = {"ref_logprob": "floating", "beta": 0.2, "max_class_weight": 1.0}


def test_a_floating_reference_moves_in_the_step_that_it_reads(world, model_folders):
    trainer = make_trainer(model_folders / "qwen2-tied", world, max_ratio=0.0)
    members = [(3, True, -10.0), (4, True, -14.0), (2, True, -30.0), (4, False, None)]
    groups = [make_group(n, [*members, (3, True, -15.0)], [1.0, 0.0, None, 0.0, 0.0]) for n in "ab"]
    trainer.stage = StageTimer(world.device)
    trainer.config = make_config(score=FLOATING, optim={"minibatches": 2})
    trainer.sampler = SimpleNamespace(
        sample=lambda step: groups, staleness=1, sync_disagreement=0.0
    )
    metrics, _ = trainer.step(0)
    # One right and two wrong are finished and graded, whose weights in the MSE are 1, clipped, and
    # 3/4; a fifth of the way.
    right, wrong = -10 - 1 / 0.2 + 7.5, (-14 - 15 + 2 * 7.5) * 3 / 4
    assert trainer.score.ref_logprob == pytest.approx(-7.5 + 0.2 * (right + wrong) / 3)
    assert metrics["score/ref_logprob"] == trainer.score.ref_logprob


def test_a_floating_reference_starts_where_a_score_that_knows_nothing_is_one_half():
    sampler = SimpleNamespace(
        config=make_config(score=FLOATING),
        vocabulary=SimpleNamespace(special=SimpleNamespace(score_token_id=SCORE_TOKEN)),
        measure_ref_logprob=lambda: -12.0,
    )
    assert _settle_score(sampler, None).of(-12.0) == pytest.approx(0.5)
    assert _settle_score(sampler, -9.25).ref_logprob == -9.25  # that of a checkpoint
