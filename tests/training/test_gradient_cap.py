"""The cap's coefficient by hand, and the joined gradients of a measuring step against autograd."""

import pytest

from laser_fast.training.schedule import MEASURE_EVERY, GradientCap


def test_no_cap_never_measures():
    cap = GradientCap(loss_coef=0.5, max_ratio=0.0)
    assert not any(cap.is_due(step) for step in range(2 * MEASURE_EVERY))
    assert cap.coef() == 0.5


def test_measures_at_once_and_then_now_and_again():
    cap = GradientCap(loss_coef=0.5, max_ratio=1.0)
    assert all(cap.is_due(step) for step in range(3))  # as long as there is nothing to go by
    cap.measure(policy_norm=1.0, score_norm=1.0)
    due = [step for step in range(2 * MEASURE_EVERY + 1) if cap.is_due(step)]
    assert due == [0, MEASURE_EVERY, 2 * MEASURE_EVERY]
    assert not GradientCap(loss_coef=0.0, max_ratio=1.0).is_due(0)


def test_cap_follows_the_running_ratio():
    cap = GradientCap(loss_coef=0.5, max_ratio=2.0)
    cap.measure(policy_norm=1.0, score_norm=8.0)
    assert cap.coef() == pytest.approx(0.5 * 2 / 8)
    # 8 and 4 average to 6.
    cap.measure(policy_norm=3.0, score_norm=12.0)
    assert cap.coef() == pytest.approx(0.5 * 2 / 6)


@pytest.mark.parametrize("norms", [(float("nan"), 1.0), (1.0, float("nan")), (float("inf"), 1.0)])
def test_a_gradient_that_is_no_number_does_not_poison_the_cap(norms):
    cap = GradientCap(loss_coef=0.5, max_ratio=2.0)
    cap.measure(policy_norm=1.0, score_norm=8.0)
    cap.measure(policy_norm=norms[0], score_norm=norms[1])
    assert cap.coef() == pytest.approx(0.5 * 2 / 8)


def test_a_small_score_gradient_is_not_amplified():
    cap = GradientCap(loss_coef=0.5, max_ratio=2.0)
    cap.measure(policy_norm=10.0, score_norm=1.0)
    assert cap.coef() == 0.5


@pytest.mark.parametrize(("policy_norm", "score_norm"), [(0.0, 1.0), (1.0, 0.0)])
def test_without_one_of_the_gradients_the_last_ratio_stays(policy_norm, score_norm):
    cap = GradientCap(loss_coef=0.5, max_ratio=1.0)
    cap.measure(policy_norm=policy_norm, score_norm=score_norm)
    assert cap.coef() == 0.5 and cap.is_due(1)
    cap.measure(policy_norm=1.0, score_norm=4.0)
    cap.measure(policy_norm=policy_norm, score_norm=score_norm)
    assert cap.coef() == pytest.approx(0.125) and not cap.is_due(1)


def test_state_survives_a_resume():
    cap = GradientCap(loss_coef=0.5, max_ratio=2.0)
    cap.measure(policy_norm=1.0, score_norm=8.0)
    resumed = GradientCap(loss_coef=0.5, max_ratio=2.0)
    resumed.ratio = cap.ratio
    for each in (cap, resumed):
        each.measure(policy_norm=2.0, score_norm=1.0)
    assert cap.coef() == resumed.coef()
