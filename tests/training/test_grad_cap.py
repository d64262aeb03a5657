"""The cap's coefficient, from gradients made up for the purpose."""

import pytest
import torch

from laser_fast.training.grad_cap import GradientCap


def run_step(cap, world, *, policy_norm, score_norm):
    """One step of two microbatches whose rows have the given gradient norms in total."""
    coef = cap.coef()
    for share in (0.36, 0.64):
        grad = torch.zeros(5, 4)
        grad[1, 2] = policy_norm * share**0.5
        grad[4, 0] = -score_norm * share**0.5
        cap.observer(3)(grad)
    return coef, cap.update(world, coef=coef)


def test_no_cap(world):
    cap = GradientCap(loss_coef=0.5, max_ratio=0.0)
    for _ in range(2):
        coef, norms = run_step(cap, world, policy_norm=1.0, score_norm=100.0)
        assert coef == 0.5
        assert norms == {
            "loss/head_grad_norm": pytest.approx(1.0),
            "score/head_grad_norm": pytest.approx(100.0),
        }


def test_cap_follows_the_running_ratio(world):
    cap = GradientCap(loss_coef=0.5, max_ratio=2.0)
    first, _ = run_step(cap, world, policy_norm=1.0, score_norm=8.0)
    assert first == 0.5  # nothing is known yet
    # The ratio of the first step is 8, so the coefficient falls to 2/8 of its value ...
    second, _ = run_step(cap, world, policy_norm=3.0, score_norm=3.0)
    assert second == pytest.approx(0.5 * 2 / 8)
    # ... at which the score's norm was 3, so 12 at the full coefficient.
    policy_square = 0.8 * 1 + 0.2 * 9
    score_square = 0.8 * 64 + 0.2 * 144
    assert cap.coef() == pytest.approx(0.5 * 2 * (policy_square / score_square) ** 0.5)


def test_a_small_score_gradient_is_not_amplified(world):
    cap = GradientCap(loss_coef=0.5, max_ratio=2.0)
    run_step(cap, world, policy_norm=10.0, score_norm=1.0)
    assert cap.coef() == 0.5


def test_steps_of_the_warm_up_are_not_counted(world):
    cap = GradientCap(loss_coef=0.5, max_ratio=2.0)
    cap.observer(3)(torch.ones(5, 4))
    cap.update(world, coef=0.0)
    assert cap.coef() == 0.5
    assert cap.state_dict() == {"policy_square": 0.0, "score_square": 0.0}
    # Nor do their gradients leak into the next step.
    run_step(cap, world, policy_norm=1.0, score_norm=8.0)
    assert cap.state_dict() == {
        "policy_square": pytest.approx(1.0),
        "score_square": pytest.approx(64.0),
    }


def test_a_step_without_microbatches_or_score_rows(world):
    cap = GradientCap(loss_coef=0.5, max_ratio=2.0)
    assert set(cap.update(world, coef=0.5).values()) == {0.0}
    cap.observer(3)(torch.ones(3, 4))
    assert cap.update(world, coef=0.5)["loss/head_grad_norm"] == pytest.approx(12**0.5)
    assert cap.coef() == 0.5


def test_state_survives_a_resume(world):
    cap = GradientCap(loss_coef=0.5, max_ratio=2.0)
    run_step(cap, world, policy_norm=1.0, score_norm=8.0)
    resumed = GradientCap(loss_coef=0.5, max_ratio=2.0)
    resumed.load_state_dict(cap.state_dict())
    assert resumed.coef() == cap.coef() == 0.125
    again = [run_step(each, world, policy_norm=2.0, score_norm=1.0)[0] for each in (cap, resumed)]
    assert again[0] == again[1]
    assert cap.coef() == resumed.coef()
