"""Bootstrap draws and intervals against cases with a known answer."""

import math

import numpy as np
import pytest

from laser_fast.evaluation.bootstrap import bootstrap, interval


def test_two_problems_are_drawn_by_the_binomial():
    """The mean of a resample of (0, 1) is 0, 1/2, 1 with probabilities 1/4, 1/2, 1/4."""
    values = np.array([0.0, 1.0])
    draws = bootstrap(lambda rows: values[rows].mean(keepdims=True), 2, num_resamples=4000, seed=1)
    found, counts = np.unique(draws, return_counts=True)
    assert found.tolist() == [0.0, 0.5, 1.0]
    np.testing.assert_allclose(counts / 4000, [0.25, 0.5, 0.25], atol=0.03)
    assert [float(bound) for bound in interval(draws[:, 0])] == [0.0, 1.0]


def test_interval_of_a_mean_is_the_normal_one():
    """For 400 problems the percentile interval is mean +- 1.96 std / sqrt(400)."""
    values = np.random.default_rng(0).random(400)
    draws = bootstrap(
        lambda rows: np.array([values[rows].mean(), 2 * values[rows].mean()]), 400, seed=2
    )
    low, high = interval(draws)
    half = 1.96 * values.std() / 20
    np.testing.assert_allclose(low, [values.mean() - half, 2 * values.mean() - 2 * half], atol=0.01)
    np.testing.assert_allclose(high[0], values.mean() + half, atol=0.01)
    # The same draws serve every statistic, so twice the mean has twice the interval.
    np.testing.assert_allclose([low[1], high[1]], [2 * low[0], 2 * high[0]])


def test_draws_are_named_by_the_seed():
    def draw(seed):
        return bootstrap(lambda rows: rows.astype(float), 5, num_resamples=3, seed=seed)

    np.testing.assert_array_equal(draw(0), draw(0))
    assert not np.array_equal(draw(0), draw(1))


def test_undefined_draws_are_left_out():
    draws = np.array([[1.0, math.nan], [math.nan, math.nan], [3.0, math.nan]])
    low, high = interval(draws, level=0.5)
    assert (low[0], high[0]) == pytest.approx((1.5, 2.5))
    assert math.isnan(low[1]) and math.isnan(high[1])
