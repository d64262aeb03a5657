"""Scores, class weights and the beta rule against the paper's numbers and hand tables."""

import inspect
import math
import warnings
from dataclasses import replace

import pytest
import torch

from laser_fast.algorithm.score import (
    SelfScore,
    check_reference,
    check_score_target,
    class_weights,
    is_correct,
    refit_reference,
    score_loss,
    self_reward_score,
)

T, F = True, False


def test_signatures_are_the_published_ones():
    parameters = inspect.signature(self_reward_score).parameters
    assert list(parameters) == ["logprobs", "beta", "ref_logprob"]
    assert parameters["beta"].kind is inspect.Parameter.KEYWORD_ONLY
    assert parameters["ref_logprob"].kind is inspect.Parameter.KEYWORD_ONLY
    parameters = inspect.signature(class_weights).parameters
    assert list(parameters) == ["rewards", "is_finished", "max_weight"]
    assert parameters["max_weight"].default == float("inf")
    assert parameters["max_weight"].kind is inspect.Parameter.KEYWORD_ONLY
    parameters = inspect.signature(check_score_target).parameters
    assert list(parameters) == ["beta", "ref_logprob"]
    assert all(p.kind is inspect.Parameter.KEYWORD_ONLY for p in parameters.values())


def test_score_scale_of_the_paper():
    # Qwen2.5: c_ref = -23 and beta = 0.1 put 0, 0.5 and 1 at -23, -18 and -13.
    logprobs = torch.tensor([-23.0, -18.0, -13.0, -33.0, -3.0], dtype=torch.float64)
    scores = self_reward_score(logprobs, beta=0.1, ref_logprob=-23.0)
    # Outside [0, 1] the score is not clamped.
    expected = torch.tensor([0.0, 0.5, 1.0, -1.0, 2.0], dtype=torch.float64)
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-12)


def test_a_self_score_is_the_scale_of_its_model():
    score = SelfScore(token_id=7, beta=0.1, ref_logprob=-23.0)
    assert score.of(-18.0) == self_reward_score(-18.0, beta=0.1, ref_logprob=-23.0)
    torch.testing.assert_close(score.of(torch.tensor([-23.0, -13.0])), torch.tensor([0.0, 1.0]))
    assert math.isnan(replace(score, ref_logprob=math.nan).of(-18.0))


@pytest.mark.parametrize("share", [0.3, 0.05, 0.0])  # of right ones, whose weight is clipped at 5
def test_a_floating_reference_ends_where_the_loss_moves_all_scores_nowhere(share):
    torch.manual_seed(0)
    score = SelfScore(token_id=7, beta=0.2, ref_logprob=-30.0)
    rewards = (torch.rand(6, 8) < share).double()
    logprobs = -20 + torch.randn(6, 8, dtype=torch.float64) + 2 * rewards
    has_target = torch.rand(6, 8) < 0.8
    weights = class_weights(rewards, has_target, max_weight=5.0) / has_target.sum()
    clipped = weights.max() * has_target.sum() == pytest.approx(5.0)
    assert clipped == (share == 0.05)
    for _ in range(200):
        score = refit_reference(score, logprobs, rewards, weights)
    shift = torch.zeros((), dtype=torch.float64, requires_grad=True)
    scale = {"beta": score.beta, "ref_logprob": score.ref_logprob}
    score_loss(logprobs + shift, rewards, weights, **scale).sum().backward()
    assert float(shift.grad) == pytest.approx(0.0, abs=1e-6)
    if share == 0.3:
        right, wrong = (has_target & (rewards == value) for value in (1, 0))
        scores = score.of(logprobs)
        assert float(scores[right].mean() + scores[wrong].mean()) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("accuracy", [0.05, 0.5, 0.92])
def test_a_floating_reference_and_what_it_follows_stay_where_they_are(accuracy):
    # A score that can tell little, trained as the loss says, as long as a run is.
    generator = torch.Generator().manual_seed(0)
    score = SelfScore(token_id=7, beta=0.1, ref_logprob=-28.0)
    level = torch.tensor(-23.0, requires_grad=True)
    slope = torch.tensor(0.0, requires_grad=True)
    optimizer = torch.optim.Adam([level, slope], lr=0.05)
    for _ in range(400):
        rewards = (torch.rand(8, 8, generator=generator) < accuracy).float()
        logprobs = level + slope * (torch.randn(8, 8, generator=generator) + rewards)
        weights = class_weights(rewards, torch.ones(8, 8, dtype=torch.bool), max_weight=5.0) / 64
        score = refit_reference(score, logprobs.detach(), rewards, weights)
        scale = {"beta": score.beta, "ref_logprob": score.ref_logprob}
        optimizer.zero_grad()
        score_loss(logprobs, rewards, weights, **scale).sum().backward()
        optimizer.step()
    # With weights that are balanced, not clipped, -43.8, -27.8 and -15.6.
    assert -29.5 < score.ref_logprob < -26


def test_a_floating_reference_moves_by_a_fifth():
    score = SelfScore(token_id=7, beta=0.2, ref_logprob=-30.0)
    logprobs, weights = torch.tensor([[-20.0, -20.0]]), torch.tensor([[0.5, 0.5]])
    moved = refit_reference(score, logprobs, torch.tensor([[1.0, 0.0]]), weights)
    assert moved.ref_logprob == pytest.approx(-30 + 0.2 * 7.5)  # its own is -20 - 0.5 / 0.2
    # One class has half the weight.
    moved = refit_reference(score, logprobs, torch.tensor([[1.0, 1.0]]), weights / 2)
    assert moved.ref_logprob == pytest.approx(-30 + 0.2 * 0.5 * 5)
    assert refit_reference(score, logprobs, torch.tensor([[1.0, 0.0]]), 0 * weights) == score


def test_a_floating_reference_keeps_the_token_improbable():
    score = SelfScore(token_id=7, beta=0.2, ref_logprob=-8.1)
    logprobs, rewards = torch.zeros(1, 2), torch.tensor([[1.0, 0.0]])
    moved = refit_reference(score, logprobs, rewards, torch.tensor([[0.5, 0.5]]))
    assert moved.ref_logprob + 1 / score.beta == -3.0


def test_score_keeps_shape_and_gradient():
    logprobs = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(2, 3, dtype=torch.float64)
    scores = self_reward_score(logprobs, beta=0.15, ref_logprob=-9.0)
    (grad,) = torch.autograd.grad(scores, logprobs, upstream)
    torch.testing.assert_close(grad, 0.15 * upstream)


def test_correct_means_above_one_half():
    assert is_correct(torch.tensor([0.0, 0.5, 0.50001, 1.0, -1.0])).tolist() == [F, F, T, T, F]
    assert bool(is_correct(0.75)) and not bool(is_correct(0.5))


@pytest.mark.parametrize(
    ("rewards", "is_finished", "expected"),
    [
        # 1 correct and 3 incorrect: 4/2 = 2 and 4/6 = 2/3.
        ([[1, 0], [0, 0]], [[T, T], [T, T]], [[2, 2 / 3], [2 / 3, 2 / 3]]),
        # The unfinished correct one enters no count: 1 and 2 of 3 finished, 3/2 and 3/4.
        ([[1, 1], [0, 0]], [[T, F], [T, T]], [[1.5, 0], [0.75, 0.75]]),
        # An unfinished incorrect one: 1 and 1 of 2 finished.
        ([[1, 0], [0, 0]], [[T, T], [F, F]], [[1, 1], [0, 0]]),
        # One class only: N / 2N.
        ([[1, 1], [1, 1]], [[T, T], [T, T]], [[0.5, 0.5], [0.5, 0.5]]),
        ([[0, 0], [0, 1]], [[T, T], [T, F]], [[0.5, 0.5], [0.5, 0]]),
        # Nothing finished.
        ([[1, 0], [0, 1]], [[F, F], [F, F]], [[0, 0], [0, 0]]),
        # A graded reward counts as correct above one half.
        ([[0.75, 0.25, 0.0]], [[T, T, T]], [[1.5, 0.75, 0.75]]),
    ],
)
def test_class_weights_by_hand(rewards, is_finished, expected):
    weights = class_weights(torch.tensor(rewards), torch.tensor(is_finished))
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights, torch.tensor(expected, dtype=torch.float32))


def test_class_weights_balance_the_whole_step():
    rewards = (torch.rand(16, 8) < 0.2).float()
    is_finished = torch.rand(16, 8) < 0.8
    weights = class_weights(rewards, is_finished)
    total = is_finished.sum() / 2
    torch.testing.assert_close(weights[rewards == 1].sum(), total)
    torch.testing.assert_close(weights[rewards == 0].sum(), total)
    # Counts are those of the step, not of the group.
    assert len(weights[(rewards == 1) & is_finished].unique()) == 1


def test_class_weights_are_clipped_one_by_one():
    rewards = torch.zeros(1, 20)
    rewards[0, 3] = 1
    is_finished = torch.ones(1, 20, dtype=torch.bool)
    assert class_weights(rewards, is_finished)[0, 3] == 10
    clipped = class_weights(rewards, is_finished, max_weight=5.0)
    assert clipped[0, 3] == 5
    torch.testing.assert_close(clipped[0, 0], torch.tensor(20 / 38))


def test_class_weights_of_an_empty_step():
    assert class_weights(torch.zeros(0, 4), torch.zeros(0, 4, dtype=torch.bool)).shape == (0, 4)


def test_class_weights_refuse_other_shapes():
    with pytest.raises(ValueError, match=r"expected .*\[P, G\], got .*\(2, 3\).*\(3, 2\)"):
        class_weights(torch.zeros(2, 3), torch.ones(3, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"\[P, G\]"):
        class_weights(torch.zeros(4), torch.ones(4, dtype=torch.bool))


def test_score_loss_by_hand():
    # Scores 0.5 and 1.2 against rewards 1 and 0; terms w (r_s - r_v)^2.
    logprobs = torch.tensor([-18.0, -11.0], dtype=torch.float64, requires_grad=True)
    terms = score_loss(
        logprobs,
        torch.tensor([1.0, 0.0], dtype=torch.float64),
        torch.tensor([2.0, 0.25], dtype=torch.float64),
        beta=0.1,
        ref_logprob=-23.0,
    )
    expected = torch.tensor([2 * 0.25, 0.25 * 1.44], dtype=torch.float64)
    torch.testing.assert_close(terms, expected)
    # 2 beta w (r_s - r_v): also outside [0, 1], where a clamp would stop it.
    upstream = torch.tensor([0.7, -1.3], dtype=torch.float64)
    (grad,) = torch.autograd.grad(terms, logprobs, upstream)
    expected = upstream * torch.tensor([0.2 * 2 * -0.5, 0.2 * 0.25 * 1.2], dtype=torch.float64)
    torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize(
    ("beta", "ref_logprob"), [(0.1, -23.0), (0.1, -25.0), (0.1, -28.5), (0.05, -23.0), (0.1, -13.0)]
)
def test_targets_of_the_paper_pass_in_silence(beta, ref_logprob):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert check_score_target(beta=beta, ref_logprob=ref_logprob) is None


@pytest.mark.parametrize(
    ("beta", "ref_logprob", "target"), [(0.1, -12.9, -2.9), (0.1, -11.5, -1.5), (0.5, -4.0, -2)]
)
def test_targets_near_zero_warn(beta, ref_logprob, target):
    with pytest.warns(UserWarning, match=rf"= {target:g}, must stay well below 0"):
        check_score_target(beta=beta, ref_logprob=ref_logprob)


@pytest.mark.parametrize(("beta", "ref_logprob"), [(0.1, -10.9), (0.04, -23.0), (1.0, -0.5)])
def test_targets_above_minus_one_are_refused(beta, ref_logprob):
    with pytest.raises(ValueError, match="must stay well below 0; choose"):
        check_score_target(beta=beta, ref_logprob=ref_logprob)


def test_refusal_shows_the_arithmetic():
    with pytest.raises(ValueError, match=r"-12 \+ 1/0.05 = 8, must .*; choose beta >= 0.112"):
        check_score_target(beta=0.05, ref_logprob=-12.0)
    # No beta helps a token that is already likely.
    with pytest.raises(ValueError, match="choose a token"):
        check_score_target(beta=10.0, ref_logprob=-0.5)


@pytest.mark.parametrize("ref_logprob", [-6.0, -10.0, -12.0, -17.3, -23.0, -28.5])
def test_following_the_advice_ends_the_complaint(ref_logprob):
    with pytest.raises(ValueError, match="choose beta") as caught:
        check_score_target(beta=0.01, ref_logprob=ref_logprob)
    advised = float(str(caught.value).rpartition(">=")[2])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_score_target(beta=advised, ref_logprob=ref_logprob)


@pytest.mark.parametrize(
    ("beta", "ref_logprob"),
    [(0.0, -23.0), (-0.1, -23.0), (float("nan"), -23.0), (0.1, float("-inf")), (0.1, float("nan"))],
)
def test_beta_and_reference_must_make_a_scale(beta, ref_logprob):
    with pytest.raises(ValueError, match="expected beta > 0 and a finite ref_logprob, got"):
        check_score_target(beta=beta, ref_logprob=ref_logprob)


def test_a_logprob_that_is_no_number_moves_no_reference():
    score = SelfScore(token_id=1, beta=0.2, ref_logprob=-9.0)
    rewards, weights = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.5, 0.5]])
    for value in (float("nan"), float("-inf")):
        logprobs = torch.tensor([[value, -8.0]])
        assert refit_reference(score, logprobs, rewards, weights) == score


@pytest.mark.parametrize(("ref_logprob", "is_said"), [(-9.0, False), (-9.4, False), (-12.0, True)])
def test_a_reference_of_another_model_is_named_with_that_of_this_one(ref_logprob, is_said, recwarn):
    logprobs = torch.tensor([[-8.0, -10.0], [-9.0, 0.0]])
    is_finished = torch.tensor([[True, True], [True, False]])
    score = SelfScore(token_id=1, beta=0.2, ref_logprob=ref_logprob)
    check_reference(score, logprobs, is_finished)
    check_reference(score, logprobs, torch.zeros_like(is_finished))
    said = [str(warning.message) for warning in recwarn]
    assert len(said) == is_said
    if is_said:
        assert "score.ref_logprob = -12, but" in said[0] and "is -9.00" in said[0]
        assert "scores start at 0.60 instead of 0; set score.ref_logprob = -9.00" in said[0]
