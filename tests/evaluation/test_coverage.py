"""Risk-coverage curves by hand."""

import math

import numpy as np
import pytest

from laser_fast.evaluation.coverage import risk_at, risk_curve


def test_curve_by_hand():
    # By falling score: right, wrong, right, wrong.
    curve = risk_curve([0.2, 0.9, 0.7, 0.4], np.array([False, True, False, True]))
    np.testing.assert_allclose(curve, [0, 1 / 2, 1 / 3, 2 / 4])
    assert curve.mean() == pytest.approx((0 + 1 / 2 + 1 / 3 + 1 / 2) / 4)
    assert risk_at(curve, 0.5) == pytest.approx(1 / 2)
    assert risk_at(curve, 0.51) == pytest.approx(1 / 3)
    assert risk_at(curve, 0.01) == 0.0
    assert risk_at(curve, 1.0) == pytest.approx(1 / 2)


def test_ties_share_their_mean_whatever_the_order():
    scores, correct = np.array([0.5, 0.5, 0.5, 0.9]), np.array([True, False, False, True])
    expected = [0, (2 / 3) / 2, (4 / 3) / 3, 2 / 4]
    for order in ([0, 1, 2, 3], [2, 3, 0, 1]):
        np.testing.assert_allclose(risk_curve(scores[order], correct[order]), expected)


def test_a_constant_score_gives_a_flat_curve():
    np.testing.assert_allclose(risk_curve([0.0] * 4, np.array([True, False, True, True])), 0.25)


def test_nothing_has_no_risk():
    assert math.isnan(risk_at(risk_curve([], np.array([], bool)), 0.5))


def test_shapes_are_checked():
    with pytest.raises(ValueError, match="risk_curve: expected scores"):
        risk_curve([0.1, 0.2], np.array([1, 0]))
