"""The [P, G] tables of a step, against numbers worked out by hand."""

import math
from dataclasses import replace

import pytest
import torch
from tiny_models import make_config, make_group

from laser_fast.algorithm.advantage import has_reward_spread
from laser_fast.algorithm.score import SelfScore
from laser_fast.model.distributed import World
from laser_fast.training.tables import (
    gather_tables,
    step_advantages,
    step_weights,
    training_sequences,
)

CPU = torch.device("cpu")
# Per completion: (length, is_finished, score log-prob); then the rewards.
GROUPS = [
    # The last grade failed.
    make_group("a", [(2, True, -1.0), (3, True, -9.0), (4, True, -5.0)], [1.0, 0.0, None]),
    # The second was truncated, so it has no score.
    make_group("b", [(5, True, -4.5), (10, False, None), (1, True, -5.5)], [1.0, 1.0, 0.0]),
    # All rewards are equal.
    make_group("c", [(2, True, -2.0), (2, True, -2.0), (3, True, -3.0)], [0.0] * 3),
    # All scores are nearly equal.
    make_group("d", [(1, True, -5.0), (9, True, -5.1), (2, True, -5.2)], [0.0, 1.0, 0.0]),
]
SCORE = SelfScore(token_id=5, beta=0.1, ref_logprob=-10.0)

HALF = math.sqrt(0.5)  # (1 - 1/2) / std of (1, 0)
THIRD = 1 / math.sqrt(3)  # (1 - 2/3) / std of (1, 1, 0), and (0 - 1/3) / std of (0, 1, 0)
A_REWARD = [[HALF, -HALF, 0.0], [THIRD, THIRD, -2 * THIRD], [0.0] * 3, [-THIRD, 2 * THIRD, -THIRD]]


@pytest.fixture
def tables(world):
    return gather_tables(GROUPS, world)


def close(actual, expected):
    torch.testing.assert_close(actual, torch.tensor(expected), rtol=1e-5, atol=1e-5)


def test_gathered_tables(tables):
    assert tables.rewards.tolist() == [[1, 0, 0], [1, 1, 0], [0, 0, 0], [0, 1, 0]]
    assert tables.is_graded.tolist() == [[True, True, False]] + [[True] * 3] * 3
    assert tables.is_finished.tolist() == [[True] * 3, [True, False, True], [True] * 3, [True] * 3]
    assert tables.lengths.tolist() == [[2, 3, 4], [5, 10, 1], [2, 2, 3], [1, 9, 2]]
    close(tables.score_logprobs[:2], [[-1.0, -9.0, -5.0], [-4.5, 0.0, -5.5]])
    assert tables.has_score_target.tolist() == [
        [True, True, False],
        [True, False, True],
        [True] * 3,
        [True] * 3,
    ]
    assert has_reward_spread(tables.totals, tables.is_graded).tolist() == [True, True, False, True]


def test_reward_advantages_leave_failed_grades_out(tables):
    config = make_config()
    advantages = step_advantages(tables, config, None)
    close(advantages, A_REWARD)


def test_unscaled_advantages(tables):
    config = make_config(advantage={"scale": "none"})
    advantages = step_advantages(tables, config, None)
    close(advantages[:2], [[0.5, -0.5, 0.0], [1 / 3, 1 / 3, -2 / 3]])


def test_mixed_advantages(tables):
    config = make_config(advantage={"score_coef": 0.25, "score_min_std": 0.02})
    advantages = step_advantages(tables, config, SCORE)
    # Scores 0.1 (logprob + 10): 0.9, 0.1 beside a failed grade, like the rewards 1, 0.
    first = [HALF, -HALF, 0.0]
    # 0.55, 0 (truncated), 0.45 have mean 1/3 and std 0.2929733.
    a_score = [0.7395441, -1.1377600, 0.3982161]
    second = [0.75 * a_reward + 0.25 * a for a_reward, a in zip(A_REWARD[1], a_score, strict=True)]
    # 0.8, 0.8, 0.7 have mean 23/30 and std 0.1/sqrt(3): rewards without spread, yet a signal.
    third = [0.25 * THIRD, 0.25 * THIRD, -0.5 * THIRD]
    # 0.5, 0.49, 0.48 have std 0.01, no more than the minimum.
    close(advantages, [first, second, third, A_REWARD[3]])


def test_soft_penalty_of_long_completions(tables):
    config = make_config(reward={"overlong": "penalty", "overlong_buffer": 4})
    advantages = step_advantages(tables, config, None)
    # Lengths 1, 9, 2 of at most 10: the penalties are 0, -3/4, 0, so the rewards 0, 1/4, 0.
    close(advantages[3], A_REWARD[3])
    # Lengths 5, 10, 1: the rewards are 1, 0, 0, mean 1/3, std 1/sqrt(3).
    close(advantages[1], [2 * THIRD, -THIRD, -THIRD])


def test_weights_of_a_single_update(tables):
    token, score = step_weights(tables, make_config())
    # Graded tokens: 2 + 3, 5 + 10 + 1, 2 + 2 + 3, 1 + 9 + 2.
    expected = [[1.0] * 3 for _ in range(4)]
    expected[0][2] = 0.0
    close(token * 40, expected)
    # Finished and graded: 3 correct (a0, b0, d1), 7 incorrect; divided by the 10 of the MSE.
    correct, incorrect = 10 / 6 / 10, 10 / 14 / 10
    close(
        score,
        [
            [correct, incorrect, 0.0],
            [correct, 0.0, incorrect],
            [incorrect] * 3,
            [incorrect, correct, incorrect],
        ],
    )
    assert score.sum() == pytest.approx(1.0)


def test_class_weights_are_capped(tables):
    _, score = step_weights(tables, make_config(score={"max_class_weight": 1.25}))
    assert score[0, 0].item() == pytest.approx(0.125)
    assert score[0, 1].item() == pytest.approx(1 / 14)


def test_masked_truncated_completions_leave_the_denominator(tables):
    config = make_config(reward={"overlong": "mask"})
    token, _ = step_weights(tables, config)
    close(token[1] * 30, [1.0, 0.0, 1.0])


@pytest.mark.parametrize(
    ("aggregation", "expected"),
    [("seq-mean-token-mean", 1 / (11 * 5)), ("seq-mean-token-sum-norm", 1 / (11 * 10))],
)
def test_other_aggregations(tables, aggregation, expected):
    token, _ = step_weights(tables, make_config(loss={"aggregation": aggregation}))
    assert token[1, 0].item() == pytest.approx(expected)  # 11 trained, its length is 5
    assert token[0, 2] == 0


def test_minibatches_take_every_second_prompt(tables):
    token, score = step_weights(tables, make_config(optim={"minibatches": 2}))
    # Prompts 0 and 2: 2 + 3 + 7 tokens, and 1 correct, 4 incorrect of 5.
    # Prompts 1 and 3: 16 + 12 tokens, and 2 correct, 3 incorrect of 5.
    even, odd = 1 / 12, 1 / 28
    close(token, [[even, even, 0.0], [odd] * 3, [even] * 3, [odd] * 3])
    close(score, [[1 / 2, 1 / 8, 0.0], [1 / 4, 0.0, 1 / 6], [1 / 8] * 3, [1 / 6, 1 / 4, 1 / 6]])


@pytest.mark.parametrize("position", ["eos", "last", None])
def test_sequences_take_their_rows_of_the_tables(tables, position):
    without = {"score": {"loss_coef": 0.0}, "advantage": {"score_coef": 0.0}}
    config = make_config(**({"score": {"position": position}} if position else without))
    advantages = torch.arange(12.0).reshape(4, 3)
    token, score = step_weights(tables, config)
    sequences = training_sequences(GROUPS[1:2], World(1, 4, CPU), tables, advantages, config)
    assert [s.advantage for s in sequences] == [3.0, 4.0, 5.0]
    assert [s.reward for s in sequences] == [1.0, 1.0, 0.0]
    # A truncated completion has no EOS to read a score at.
    is_scored = [True, False, True]
    assert [s.score_at for s in sequences] == [position if x else None for x in is_scored]
    assert [s.token_weight for s in sequences] == token[1].tolist()
    assert [s.score_weight for s in sequences] == score[1].tolist()
    for sequence, completion in zip(sequences, GROUPS[1].completions, strict=True):
        assert sequence.prompt_ids == (7, 8, 9)
        assert sequence.completion_ids == completion.completion_ids
        assert sequence.rollout_logprobs == completion.rollout_logprobs


def test_a_failed_grade_has_no_score_row(tables):
    world, advantages = World(0, 4, CPU), torch.ones(4, 3)
    sequences = training_sequences(GROUPS[:1], world, tables, advantages, make_config())
    assert [s.score_at is not None for s in sequences] == [True, True, False]
    assert sequences[2].token_weight == sequences[2].score_weight == 0


def test_everything_failed(world):
    tables = gather_tables([replace(GROUPS[0], rewards=(None,) * 3, totals=(None,) * 3)], world)
    config = make_config()
    advantages = step_advantages(tables, config, SCORE)
    token, score = step_weights(tables, config)
    assert (advantages == 0).all()
    assert (token == 0).all()
    assert (score == 0).all()
