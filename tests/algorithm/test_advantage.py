"""Advantages and their mixture with scores against hand tables and a naive twin in float64."""

import inspect
import math

import pytest
import torch

from laser_fast.algorithm.advantage import (
    group_advantages,
    has_reward_spread,
    mix_advantages,
    overlong_penalty,
)

T, F = True, False


def naive_group_advantages(rewards, is_valid, *, scale="std", eps=1e-6):
    """Eq. 4 for one group, in Python floats."""
    kept = [reward for reward, valid in zip(rewards, is_valid, strict=True) if valid]
    if len(kept) < 2 or max(kept) == min(kept):
        return [0.0] * len(rewards)
    mean = sum(kept) / len(kept)
    std = math.sqrt(sum((reward - mean) ** 2 for reward in kept) / (len(kept) - 1))
    divisor = std + eps if scale == "std" else 1.0
    return [
        (reward - mean) / divisor if valid else 0.0
        for reward, valid in zip(rewards, is_valid, strict=True)
    ]


def naive_mix(advantages, scores, is_finished, *, tau, min_std):
    """Eq. 15 for one group, in Python floats."""
    clamped = [
        min(max(score, 0.0), 1.0) if finished else 0.0
        for score, finished in zip(scores, is_finished, strict=True)
    ]
    mean = sum(clamped) / len(clamped)
    std = math.sqrt(sum((score - mean) ** 2 for score in clamped) / (len(clamped) - 1))
    if std <= min_std:
        return advantages
    return [
        (1 - tau) * advantage + tau * (score - mean) / std
        for advantage, score in zip(advantages, clamped, strict=True)
    ]


def assert_equals(actual, expected):
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float32))


def test_signatures_are_the_published_ones():
    parameters = inspect.signature(group_advantages).parameters
    assert list(parameters) == ["rewards", "is_valid", "scale", "eps"]
    assert [p.default for p in parameters.values()][1:] == [None, "std", 1e-6]
    parameters = inspect.signature(mix_advantages).parameters
    assert list(parameters)[:5] == ["advantages", "scores", "is_finished", "tau", "min_std"]
    assert all(p.kind is p.KEYWORD_ONLY for p in list(parameters.values())[3:])


@pytest.mark.parametrize(
    ("rewards", "is_valid", "expected"),
    [
        # mean 1/4, unbiased std 1/2: 1.5 and -0.5.
        ([1, 0, 0, 0], [T, T, T, T], [1.5, -0.5, -0.5, -0.5]),
        # mean 1/2, std sqrt(1/2).
        ([1, 0], [T, T], [math.sqrt(0.5), -math.sqrt(0.5)]),
        # The failed grade leaves [1, 0, 0]: mean 1/3, std sqrt(1/3).
        ([1, 0, 0, 0], [T, T, T, F], [2 / math.sqrt(3), *[-1 / math.sqrt(3)] * 2, 0]),
        # No spread, correct and incorrect.
        ([1, 1, 1, 1], [T, T, T, T], [0, 0, 0, 0]),
        ([0, 0, 0, 0], [T, T, T, T], [0, 0, 0, 0]),
        # Spread only because of the one that failed.
        ([1, 0, 0, 0], [F, T, T, T], [0, 0, 0, 0]),
        # Fewer than two valid ones.
        ([1, 0, 0, 0], [T, F, F, F], [0, 0, 0, 0]),
        ([1, 0, 0, 0], [F, F, F, F], [0, 0, 0, 0]),
    ],
)
def test_group_advantages_by_hand(rewards, is_valid, expected):
    actual = group_advantages(torch.tensor([rewards]), is_valid=torch.tensor([is_valid]), eps=0.0)
    assert_equals(actual, [expected])


def test_every_completion_is_valid_by_default():
    assert_equals(group_advantages(torch.tensor([[1.0, 0, 0, 0]]), eps=0.0), [[1.5, *[-0.5] * 3]])


@pytest.mark.parametrize("scale", ["std", "none"])
def test_group_advantages_equal_the_naive_ones(scale):
    rewards = torch.randn(40, 6, dtype=torch.float64)
    is_valid = torch.rand(40, 6) < 0.6
    expected = [
        naive_group_advantages(*group, scale=scale)
        for group in zip(rewards.tolist(), is_valid.tolist(), strict=True)
    ]
    assert_equals(group_advantages(rewards, is_valid=is_valid, scale=scale), expected)


def test_no_scale_is_dr_grpo():
    assert_equals(
        group_advantages(torch.tensor([[1.0, 0, 0, 0]]), scale="none"), [[0.75, *[-0.25] * 3]]
    )


def test_eps_is_added_to_the_standard_deviation():
    # std 1/2: 0.75 / (0.5 + 0.25).
    assert_equals(
        group_advantages(torch.tensor([[1.0, 0, 0, 0]]), eps=0.25), [[1.0, *[-1 / 3] * 3]]
    )


def test_a_failed_grade_may_be_anything():
    rewards = torch.tensor([[1.0, 0.0, float("nan"), float("inf")]])
    is_valid = torch.tensor([[T, T, F, F]])
    half = math.sqrt(0.5)
    assert_equals(group_advantages(rewards, is_valid=is_valid, eps=0.0), [[half, -half, 0, 0]])
    assert has_reward_spread(rewards, is_valid).tolist() == [T]


def test_groups_do_not_see_each_other():
    rewards = torch.randn(5, 4)
    alone = torch.cat([group_advantages(row[None]) for row in rewards])
    torch.testing.assert_close(group_advantages(rewards), alone, rtol=0, atol=0)


def test_group_of_one_and_empty_step():
    assert group_advantages(torch.ones(3, 1)).tolist() == [[0], [0], [0]]
    assert group_advantages(torch.ones(0, 4)).shape == (0, 4)


def test_group_advantages_refuse_nonsense():
    with pytest.raises(ValueError, match=r"expected rewards, .* \[P, G\], got \(4,\)"):
        group_advantages(torch.zeros(4))
    with pytest.raises(ValueError, match=r"one shape \[P, G\], got \(2, 4\), \(4, 2\)"):
        group_advantages(torch.zeros(2, 4), is_valid=torch.ones(4, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match='expected scale "std" or "none", got "batch"'):
        group_advantages(torch.zeros(2, 4), scale="batch")


def test_reward_spread_by_hand():
    rewards = torch.tensor([[1, 0], [1, 1], [0, 0], [1, 0], [1, 0]])
    is_valid = torch.tensor([[T, T], [T, T], [T, T], [T, F], [F, F]])
    assert has_reward_spread(rewards, is_valid).tolist() == [T, F, F, F, F]


def test_mixture_by_hand():
    # Clamped scores 1, 0, 0 and 0 for the unfinished one: mean 1/4, std 1/2.
    mixed = mix_advantages(
        torch.tensor([[1.0, -1.0, 2.0, 0.5]]),
        torch.tensor([[1.7, -0.3, 0.0, 0.9]]),
        torch.tensor([[T, T, T, F]]),
        tau=0.1,
        min_std=0.1,
    )
    assert_equals(mixed, [[0.9 + 0.15, -0.9 - 0.05, 1.8 - 0.05, 0.45 - 0.05]])


def test_an_unscaled_mixture_scales_neither_part():
    """Scores with a small spread are not blown up beside rewards that are left as they are."""
    rewards = torch.tensor([[1.0, 0.0, 0.0, 0.0]])
    scores = torch.tensor([[0.9, 0.1, 0.0, 0.2]])
    options = {"tau": 0.2, "min_std": 0.1, "scale": "none"}
    advantages = group_advantages(rewards, scale="none")
    mixed = mix_advantages(advantages, scores, torch.ones(1, 4, dtype=torch.bool), **options)
    naive = 0.8 * (rewards - rewards.mean()) + 0.2 * (scores - scores.mean())
    assert_equals(mixed, naive.tolist())
    with pytest.raises(ValueError, match='mix_advantages: expected scale "std" or "none"'):
        mix_advantages(advantages, scores, scores > 0, tau=0.2, min_std=0.1, scale="max")


@pytest.mark.parametrize("tau", [0.0, 0.1, 0.6, 1.0])
def test_mixture_equals_the_naive_one(tau):
    advantages = torch.randn(50, 5, dtype=torch.float64)
    scores = 0.5 + torch.randn(50, 1) * torch.randn(50, 5, dtype=torch.float64)
    is_finished = torch.rand(50, 5) < 0.8
    min_std = 0.3
    rows = zip(advantages.tolist(), scores.tolist(), is_finished.tolist(), strict=True)
    expected = [naive_mix(*row, tau=tau, min_std=min_std) for row in rows]
    # The table holds groups of either kind.
    kept = [row == old for row, old in zip(expected, advantages.tolist(), strict=True)]
    assert tau == 0 or 5 < sum(kept) < 45
    assert_equals(
        mix_advantages(advantages, scores, is_finished, tau=tau, min_std=min_std), expected
    )


def test_a_group_at_the_threshold_keeps_its_advantages():
    # Scores 1/4 and 3/4: std sqrt(1/8), exact in no float, so take the computed one as threshold.
    scores = torch.tensor([[0.25, 0.75]])
    advantages = torch.tensor([[0.7, -0.7]])
    is_finished = torch.tensor([[T, T]])
    std = float(scores.std())
    at = mix_advantages(advantages, scores, is_finished, tau=0.5, min_std=std)
    assert at.tolist() == advantages.tolist()
    below = mix_advantages(advantages, scores, is_finished, tau=0.5, min_std=std - 1e-6)
    half = math.sqrt(0.5)
    assert_equals(below, [[0.35 - half / 2, -0.35 + half / 2]])


@pytest.mark.parametrize(
    ("scores", "is_finished"),
    [
        ([0.4, 0.4, 0.4], [T, T, T]),
        ([2.0, 3.0, 4.0], [T, T, T]),  # all clamped to 1
        ([0.1, 0.5, 0.9], [F, F, F]),
        ([float("nan"), 0.0, 0.0], [F, T, T]),
    ],
)
def test_scores_without_spread_change_nothing(scores, is_finished):
    advantages = torch.tensor([[1.0, -0.25, -0.75]])
    mixed = mix_advantages(
        advantages, torch.tensor([scores]), torch.tensor([is_finished]), tau=0.3, min_std=0.0
    )
    assert mixed.tolist() == advantages.tolist()


def test_scores_inform_groups_without_reward_spread():
    mixed = mix_advantages(
        torch.zeros(1, 2), torch.tensor([[1.0, 0.0]]), torch.tensor([[T, T]]), tau=0.1, min_std=0.1
    )
    assert_equals(mixed, [[0.1 * math.sqrt(0.5), -0.1 * math.sqrt(0.5)]])


def test_an_unfinished_completion_never_gains_from_its_score():
    scores = torch.full((1, 4), 5.0)
    is_finished = torch.tensor([[T, T, T, F]])
    mixed = mix_advantages(torch.zeros(1, 4), scores, is_finished, tau=0.1, min_std=0.1)
    # Clamped scores 1, 1, 1, 0: mean 3/4, std 1/2.
    assert_equals(mixed, [[0.05, 0.05, 0.05, -0.15]])


def test_mixture_refuses_other_shapes():
    is_finished = torch.ones(2, 4, dtype=torch.bool)
    with pytest.raises(
        ValueError, match=r"of one shape \[P, G\], got \(2, 4\), \(4, 2\), \(2, 4\)"
    ):
        mix_advantages(torch.zeros(2, 4), torch.zeros(4, 2), is_finished, tau=0.1, min_std=0.1)
    flat = torch.zeros(4)
    with pytest.raises(ValueError, match=r"\[P, G\]"):
        mix_advantages(flat, flat, flat.bool(), tau=0.1, min_std=0.1)


def test_overlong_penalty_by_hand():
    # DAPO: 0 up to L_max - L_cache = 12, then (12 - length) / 4, and -1 from L_max = 16 on.
    lengths = torch.tensor([[1, 11, 12, 13], [14, 15, 16, 17]])
    penalty = overlong_penalty(lengths, max_new_tokens=16, buffer=4)
    assert_equals(penalty, [[0, 0, 0, -0.25], [-0.5, -0.75, -1, -1]])


def test_a_failed_grade_is_dropped_from_the_mixture():
    """Scores 1 and 0 remain: mean 1/2, std 1/sqrt(2), so +-1/sqrt(2); the failed grade gets 0."""
    mixed = mix_advantages(
        torch.tensor([[1.0, -1.0, 5.0]]),
        torch.tensor([[1.0, 0.0, 0.3]]),
        torch.tensor([[T, T, T]]),
        tau=0.5,
        min_std=0.1,
        is_valid=torch.tensor([[T, T, F]]),
    )
    half = 0.5 + 0.5 * math.sqrt(0.5)
    assert_equals(mixed, [[half, -half, 0.0]])
