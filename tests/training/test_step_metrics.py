"""Metrics of a step, against numbers worked out by hand."""

import math
from dataclasses import replace

import pytest
import torch
from tiny_models import SCORE_TOKEN, make_group

from laser_fast.algorithm.score import SelfScore
from laser_fast.config import LossConfig
from laser_fast.model.packing import Packer
from laser_fast.records import TrainingSequence
from laser_fast.training.objective import HeadResult
from laser_fast.training.step_metrics import RowMetrics, table_metrics
from laser_fast.training.tables import gather_tables

CPU = torch.device("cpu")


def make_batch(members):
    """One microbatch of (rollout log-probs, advantage, reward or None without a score row).

    Completions of two tokens are probes.
    """
    sequences = [
        TrainingSequence(
            prompt_ids=(7,),
            completion_ids=tuple(range(10, 10 + len(rollout))),
            rollout_logprobs=rollout,
            score_at=None if reward is None else "eos",
            is_probe=len(rollout) == 2,
            advantage=advantage,
            token_weight=0.1,
            reward=reward or 0.0,
            score_weight=0.1,
        )
        for rollout, advantage, reward in members
    ]
    packer = Packer(
        budget=99, score_token_id=SCORE_TOKEN, score_at="eos", temperature=1.0, device=CPU
    )
    return packer.pack(sequences)


def make_result(logprobs, *, policy_loss, score_loss):
    return HeadResult(
        loss=torch.tensor(0.0),
        logprobs=torch.tensor(logprobs),
        policy_loss=torch.tensor(policy_loss),
        score_loss=torch.tensor(score_loss),
        router_loss=torch.tensor(0.0),
    )


def with_logprobs(batch, old, ref):
    return replace(batch, policy=replace(batch.policy, old_logprobs=old, ref_logprobs=ref))


SCORE = SelfScore(token_id=SCORE_TOKEN, beta=0.1, ref_logprob=-10.0)
FIRST = make_batch([((-1.0, -2.0), 1.0, 1.0), ((-3.0,), -1.0, 0.0)])
SECOND = make_batch([((-2.0, -4.0), -1.0, None)])
FIRST_RESULT = make_result([-1.1, -2.0, -3.5, -2.0, -6.0], policy_loss=0.25, score_loss=0.5)
SECOND_RESULT = make_result([-2.0, -4.2], policy_loss=-0.75, score_loss=0.0)


def test_sums_over_microbatches(world):
    rows = RowMetrics(LossConfig(tis_cap=0.0), CPU)
    rows.add(FIRST, FIRST_RESULT)
    assert rows.disagreement(world) == pytest.approx((0.1 + 0.0) / 2)
    rows.add(SECOND, SECOND_RESULT)
    assert rows.disagreement(world) == pytest.approx(0.3 / 4)
    metrics = rows.finish(world, num_tokens=5)
    assert metrics == {
        "loss/policy": pytest.approx(-0.5),
        "loss/score": pytest.approx(0.5),
        "loss/clip_frac": 0.0,
        "rollout/disagreement": pytest.approx(0.3 / 4),
    }


def test_clipped_share_and_kl(world):
    rows = RowMetrics(LossConfig(clip_low=0.2, clip_high=0.3, kl_coef=0.1), CPU)
    # Ratios e^.4 and 1 at A > 0, e^-.5 at A < 0: the first and the third are clipped.
    old = torch.tensor([-1.5, -2.0, -3.0])
    ref = torch.tensor([-1.1, -1.0, -3.5])
    rows.add(with_logprobs(FIRST, old, ref), FIRST_RESULT)
    # Ratio e^.1 at A < 0 passes, and so does e^-.2 = 0.82.
    old, ref = torch.tensor([-2.1, -4.0]), torch.tensor([-2.0, -4.2])
    rows.add(with_logprobs(SECOND, old, ref), SECOND_RESULT)
    metrics = rows.finish(world, num_tokens=5)
    assert metrics["loss/clip_frac"] == pytest.approx(2 / 5)
    # One token differs by 1: k3 = e - 1 - 1.
    assert metrics["loss/kl"] == pytest.approx((math.e - 2) / 5)
    # The engine is compared with the policy that it sampled from.
    assert metrics["rollout/disagreement"] == pytest.approx((0.5 + 0.0 + 0.1 + 0.0) / 4)


@pytest.mark.parametrize(
    ("kind", "ratios", "weights"),
    [  # cap 1.2
        ("token-truncate", [0.5, 2.0, 3.0], [0.5, 1.2, 1.2]),
        ("token-mask", [0.5, 2.0, 3.0], [0.5, 0.0, 0.0]),
        ("sequence-truncate", [1.0, 1.0, 3.0], [1.0, 1.0, 1.2]),
        ("sequence-mask", [1.0, 1.0, 3.0], [1.0, 1.0, 0.0]),
    ],
)
def test_importance_weights_of_what_trains(world, kind, ratios, weights):
    rows = RowMetrics(LossConfig(tis_cap=1.2, importance=kind), CPU)
    gaps = torch.tensor([0.5, 2.0, 3.0]).log()
    for _ in range(2):  # two passes with the same old log-probs
        rows.add(with_logprobs(FIRST, FIRST.policy.rollout_logprobs + gaps, None), FIRST_RESULT)
        untrained = replace(SECOND.policy, weights=torch.zeros(2))
        rows.add(replace(SECOND, policy=untrained), SECOND_RESULT)
    metrics = rows.finish(world, num_tokens=5, epochs=2)
    found = {name: metrics[f"loss/importance_{name}"] for name in ("mean", "max", "cut", "ess")}
    assert found == pytest.approx(
        {
            "mean": sum(weights) / 3,
            "max": max(ratios),
            "cut": sum(ratio > 1.2 for ratio in ratios) / 3,
            "ess": sum(weights) ** 2 / (3 * sum(w * w for w in weights)),
        }
    )


def test_without_a_token_that_trains_there_are_no_importance_weights(world):
    rows = RowMetrics(LossConfig(), CPU)
    untrained = replace(SECOND.policy, weights=torch.zeros(2))
    rows.add(replace(SECOND, policy=untrained), SECOND_RESULT)
    metrics = rows.finish(world, num_tokens=2)
    for name in ("mean", "max", "cut", "ess"):
        assert math.isnan(metrics[f"loss/importance_{name}"]), name


def test_passes_are_averaged(world):
    once, twice = (RowMetrics(LossConfig(kl_coef=0.1), CPU) for _ in range(2))
    ref, moved = torch.tensor([-1.1, -1.0, -3.5]), torch.tensor([0.5, 0.0, 0.0, 0.0, 0.0])
    batch = with_logprobs(FIRST, FIRST_RESULT.logprobs[:3], ref)
    later = FIRST_RESULT._replace(
        logprobs=FIRST_RESULT.logprobs + moved, policy_loss=torch.tensor(0.75)
    )
    once.add(batch, FIRST_RESULT)
    twice.add(batch, FIRST_RESULT)
    twice.add(batch, later)  # one ratio of e^.5 at A > 0 is clipped, and k3 there e^-.5 - 1 + .5
    first = once.finish(world, num_tokens=3)
    both = twice.finish(world, num_tokens=3, epochs=2)
    assert both == pytest.approx(
        first
        | {
            "loss/policy": (0.25 + 0.75) / 2,
            "loss/clip_frac": 1 / 3 / 2,
            "loss/kl": first["loss/kl"] + (math.exp(-0.5) - 0.5) / 3 / 2,
        }
    )


def test_scores_count_truncated_completions_as_rejected(world):
    rows = RowMetrics(LossConfig(), CPU)
    rows.add(FIRST, FIRST_RESULT)
    rows.add(SECOND, SECOND_RESULT)
    # Scores 0.1 (logprob + 10): 0.8 of a correct answer, 0.4 of an incorrect one. A third
    # completion was truncated though right, the fourth was truncated and could not be graded.
    group = make_group(
        "a",
        [(2, True, None), (1, True, None), (2, False, None), (2, False, None)],
        [1.0, 0.0, 1.0, None],
    )
    metrics = rows.score_metrics(world, gather_tables([group], world), SCORE)
    assert metrics == {
        "score/mean_correct": pytest.approx(0.8),
        "score/mean_incorrect": pytest.approx(0.4),
        "score/tpr": pytest.approx(1 / 2),
        "score/tnr": pytest.approx(1.0),
        "score/f1": pytest.approx(2 / 3),
        "score/auroc": pytest.approx(1 / 2),
    }


def test_scores_of_a_step_without_score_rows(world):
    rows = RowMetrics(LossConfig(), CPU)
    rows.add(SECOND, SECOND_RESULT)
    group = make_group("a", [(2, False, None), (2, False, None)], [None, None])
    metrics = rows.score_metrics(world, gather_tables([group], world), SCORE)
    assert all(math.isnan(value) for value in metrics.values())


def test_metrics_of_the_tables(world):
    groups = [
        make_group("a", [(2, True, -1.0), (3, True, -2.0)], [1.0, None]),
        make_group("b", [(10, False, None), (1, True, -2.0)], [0.5, 0.0]),
    ]
    tables = gather_tables(groups, world)
    advantages = torch.tensor([[0.0, 0.0], [0.5, -0.5]])
    assert table_metrics(tables, advantages) == {
        "rollout/mean_length": pytest.approx(4.0),
        "rollout/mean_length_correct": pytest.approx(2.0),
        "rollout/mean_length_incorrect": pytest.approx((10 + 1) / 2),  # a failed grade is neither
        "rollout/truncated": pytest.approx(1 / 4),
        "rollout/tokens": 16.0,
        # Token t has the log-prob -0.1 (t + 1).
        "loss/entropy": pytest.approx((0.3 + 0.6 + 5.5 + 0.1) / 16),
        "reward/mean": pytest.approx(1.5 / 3),
        "reward/failed": 1.0,
        "advantage/zero_std_groups": pytest.approx(1 / 2),
        "advantage/mean_abs": pytest.approx(0.25),
    }
    failed = gather_tables([make_group("a", [(2, True, -1.0)], [None])], world)
    for name in ("reward/mean", "rollout/mean_length_correct", "rollout/mean_length_incorrect"):
        assert math.isnan(table_metrics(failed, torch.zeros(1, 1))[name])
