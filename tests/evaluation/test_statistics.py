"""The report of a benchmark against the summary, scikit-learn, numbers by hand; the bootstrap."""

import json
import math
from dataclasses import replace
from statistics import fmean

import numpy as np
import pytest
from sklearn.metrics import brier_score_loss, roc_auc_score

from laser_fast.evaluation.statistics import (
    ReportOptions,
    average,
    bootstrap,
    build_report,
    interval,
    summarize,
)
from laser_fast.log.samples import group_by_prompt

FEW = ReportOptions(num_resamples=50)


def _value(report, name):
    return report["metrics"][name]["value"]


def test_all_samples_give_the_summary(random_records):
    records = random_records(30, 6)
    report, _ = build_report(records, options=FEW)
    summary = summarize(records)
    assert report["ks"] == [1, 2, 4, 6] and report["uses_scores"]
    for name in ("majority", "weighted_majority", "best_of"):
        assert _value(report, f"{name}@6") == pytest.approx(summary[name])
    for name in ("accuracy", "truncated", "mean_length"):
        assert _value(report, name) == pytest.approx(summary[name])
    assert _value(report, "verification_accuracy") == pytest.approx(
        summary["verification_accuracy"]
    )
    for name in ("tpr", "tnr", "f1", "auroc", "ece", "brier", "ece_corrected", "brier_corrected"):
        assert _value(report, name) == pytest.approx(summary[name])
    # Every rule is one completion's accuracy at k = 1.
    for name in ("pass", "majority", "weighted_majority", "best_of"):
        assert _value(report, f"{name}@1") == pytest.approx(summary["accuracy"])
    assert _value(report, "weighted_gain@4") == pytest.approx(
        _value(report, "weighted_majority@4") - _value(report, "majority@4")
    )


def test_score_metrics_against_sklearn(random_records):
    records = random_records(40, 4)
    report, _ = build_report(records, options=FEW)
    correct = np.array([record.is_correct for record in records])
    scores = np.array([record.score for record in records])
    assert _value(report, "auroc") == pytest.approx(roc_auc_score(correct, scores))
    clipped = scores.clip(0, 1)
    assert _value(report, "brier") == pytest.approx(brier_score_loss(correct, clipped))
    rate = correct[[record.is_finished for record in records]].mean()
    assert report["base_rate"] == pytest.approx(rate)
    corrected = rate * clipped / (rate * clipped + (1 - rate) * (1 - clipped))
    assert _value(report, "brier_corrected") == pytest.approx(brier_score_loss(correct, corrected))
    verdict = corrected > 0.5
    assert _value(report, "tpr_corrected") == pytest.approx(verdict[correct].mean())
    assert _value(report, "tnr_corrected") == pytest.approx((~verdict[~correct]).mean())
    assert _value(report, "verification_accuracy_corrected") == pytest.approx(
        (verdict == correct).mean()
    )
    within = [
        roc_auc_score([r.is_correct for r in problem], [r.score for r in problem])
        for problem in group_by_prompt(records)
        if len({r.is_correct for r in problem}) == 2
    ]
    assert _value(report, "auroc_within") == pytest.approx(fmean(within))


def test_the_base_rate_may_be_given(random_records):
    report, _ = build_report(
        random_records(20, 4), options=ReportOptions(base_rate=0.5, num_resamples=2)
    )
    assert report["base_rate"] == 0.5
    # At one half the correction is the identity.
    assert _value(report, "brier_corrected") == pytest.approx(_value(report, "brier"))
    assert report["reliability"]["corrected"] == report["reliability"]["raw"]


def test_intervals_hold_the_value_and_shrink_with_problems(random_records):
    def width(num_problems):
        report, draws = build_report(random_records(num_problems, 4))
        entry = report["metrics"]["majority@4"]
        assert entry["low"] <= entry["value"] <= entry["high"]
        assert draws["majority@4"].shape == (1000,)
        return entry["high"] - entry["low"]

    assert width(400) < 0.6 * width(60)


def test_intervals_draw_whole_problems(make_record):
    """Problems of eight equal completions: pooled over completions the interval would be a third
    of what it is over problems."""
    records = [
        make_record(f"p{p}", sample, reward=float(p % 2), answer=str(p % 2))
        for p in range(40)
        for sample in range(8)
    ]
    entry = build_report(records)[0]["metrics"]["accuracy"]
    assert entry["value"] == 0.5
    assert entry["high"] - entry["low"] == pytest.approx(2 * 1.96 * 0.5 / 40**0.5, rel=0.15)


def test_failed_grades_are_left_out_and_counted(make_record):
    rewards = {"a": [1.0, None, 0.0, 0.0], "b": [None] * 4}
    records = [
        make_record(name, i, reward=reward, answer=str(i % 2))
        for name, own in rewards.items()
        for i, reward in enumerate(own)
    ]
    report, _ = build_report(records, options=FEW)
    assert report["num_failed_grades"] == 5 and report["num_prompts"] == 2
    assert _value(report, "accuracy") == pytest.approx(1 / 3)
    # Of a's three graded completions (answers 0, 0, 1), all vote at k = 4.
    assert _value(report, "majority@4") == 1.0


def test_without_scores_only_accuracy_and_plain_votes(random_records):
    records = [
        replace(record, score=None if record.is_finished else 0.0, score_logprob=None)
        for record in random_records(10, 4)
    ]
    report, _ = build_report(records, options=FEW)
    assert _value(report, "majority@4") is not None
    assert _value(report, "weighted_majority@4") is None and _value(report, "best_of@4") is None
    assert "f1" not in report["metrics"] and report["reliability"] == {}
    json.dumps(report, allow_nan=False)


def test_one_score_that_is_no_number_leaves_none(random_records):
    records = random_records(10, 4)
    place = next(i for i, record in enumerate(records) if record.is_finished)
    records[place] = replace(records[place], score=None, score_logprob=-math.inf)
    report, _ = build_report(records, options=FEW)
    assert _value(report, "weighted_majority@4") is None and report["uses_scores"] is False
    assert "f1" not in report["metrics"] and report["calibrated"] is None


def test_all_grades_failed_gives_an_empty_report(make_record):
    report, draws = build_report([make_record("a", 0, reward=None)], options=FEW)
    assert report["metrics"] == {} and draws == {} and report["num_failed_grades"] == 1


def test_answers_vote_by_equivalence(make_record):
    answers = ["0.5", "1/2", "3", "3"]
    records = [
        make_record("a", i, answer=answer, reward=float(i < 2), score=0.9 if i < 2 else 0.1)
        for i, answer in enumerate(answers)
    ]
    same = build_report(records, options=FEW, same_answer=lambda a, b: {a, b} == {"0.5", "1/2"})[0]
    assert _value(same, "weighted_majority@4") == 1.0 and _value(same, "majority@4") == 1.0
    # Without equivalence the two right answers split, and 3 wins the plain vote.
    assert _value(build_report(records, options=FEW)[0], "majority@4") == 0.0


def test_k_beyond_the_samples_is_refused(random_records):
    with pytest.raises(ValueError, match="expected 1 <= k <= 4 samples"):
        build_report(random_records(3, 4), options=ReportOptions(ks=(1, 8)))


@pytest.mark.parametrize(
    ("f1", "mean"),
    [
        ([56.3, 42.5, 51.4, 50.8, 38.5], 47.9),
        ([86.0, 79.6, 70.8, 67.3, 76.0], 75.9),
        ([86.8, 79.4, 71.0, 71.4, 75.5], 76.8),
        ([85.9, 78.1, 73.8, 79.2, 77.3], 78.9),
        ([87.2, 79.7, 64.6, 77.7, 78.7], 77.6),
    ],
)
def test_average_gives_the_papers_means(f1, mean):
    """F1 of five verifiers on five sets of different sizes: the paper's mean is over the sets."""
    reports = [{"ks": [1], "metrics": {"f1": {"value": value}}} for value in f1]
    draws = [{"f1": np.array([value])} for value in f1]
    assert _value(average(reports, draws), "f1") == pytest.approx(mean, abs=0.051)


def test_average_is_over_benchmarks_with_its_own_interval(random_records):
    parts = [build_report(random_records(20, n, seed=n), options=FEW) for n in (2, 4)]
    reports, draws = [part[0] for part in parts], [part[1] for part in parts]
    whole = average(reports, draws)
    assert whole["num_benchmarks"] == 2 and whole["ks"] == [1, 2]
    assert _value(whole, "accuracy") == pytest.approx(
        fmean(_value(report, "accuracy") for report in reports)
    )
    assert "majority@2" in whole["metrics"] and "majority@4" not in whole["metrics"]
    widths = [r["metrics"]["accuracy"]["high"] - r["metrics"]["accuracy"]["low"] for r in reports]
    own = whole["metrics"]["accuracy"]["high"] - whole["metrics"]["accuracy"]["low"]
    # Independent benchmarks: the mean of two is known better than either.
    assert own < max(widths)


def test_benchmarks_of_one_size_are_drawn_independently(random_records):
    records = random_records(30, 4)
    parts = [build_report(records, name=name) for name in ("aime24", "aime25")]
    reports, draws = [part[0] for part in parts], [part[1] for part in parts]
    assert _value(reports[0], "mean_length") == _value(reports[1], "mean_length")

    def width(report):
        entry = report["metrics"]["mean_length"]
        return entry["high"] - entry["low"]

    # The mean of two independent ones has 1 / sqrt(2) of the width of one.
    own = fmean(width(report) for report in reports)
    assert width(average(reports, draws)) / own == pytest.approx(0.5**0.5, rel=0.1)


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
