"""Votes that stop early: replayed by hand, against the online form, and compared as curves."""

import math
from dataclasses import replace
from statistics import fmean

import numpy as np
import pytest

from laser_fast.algorithm.vote import Calibrated, answer_classes
from laser_fast.evaluation import stopping
from laser_fast.evaluation.statistics import ReportOptions, build_report
from laser_fast.evaluation.stopping import calibrate_votes, compare, replay, stops
from laser_fast.log.samples import group_by_prompt
from laser_fast.rollout.adaptive import adaptive_vote

READER = Calibrated(base_rate=0.7, num_wrong=2.0)


def _ballot(make_record, rows):
    """Records of (answer, score, reward), where an unfinished one has no score."""
    return [
        make_record(
            "p",
            place,
            answer=answer,
            reward=reward,
            score=0.0 if score is None else score,
            finish_reason="length" if score is None else "stop",
        )
        for place, (answer, score, reward) in enumerate(rows)
    ]


def _classes(ballot):
    return answer_classes([record.answer for record in ballot])


def test_every_rule_by_hand(make_record, monkeypatch):
    monkeypatch.setattr(stopping, "_orders", lambda n: [list(range(n))])
    rows = [(None, 0.2, 0.0), ("1", 0.5, 0.0), ("2", 0.9, 1.0), ("2", 0.3, 1.0), ("1", None, 0.0)]
    ballot = _ballot(make_record, rows)
    found = replay(ballot, _classes(ballot), READER, 5)
    # After each sample the plain winner is none, 1, 1 (seen first), 2, 2 (as many as 1).
    assert found["fixed"].tolist() == [[1, 1, 2, 3, 4, 5], [0, 0, 0, 0, 1, 0]]
    # Leads are 0, 1, 0, 1, 0: a lead of 1 stops at once, and none of 2 is reached.
    assert found["agreement"].tolist() == [[1, 2, 5, 5, 5, 5], [0, 0, 0, 0, 0, 0]]
    samples, right = found["posterior"]
    # The unfinished completion is no evidence, so 2 stays the winner to the end.
    assert (samples[0], right[0]) == (1, 0) and (samples[-1], right[-1]) == (5, 1)
    # .7 after "1" alone, which the corrected score of 1/2 is.
    place = stops("posterior", 5).index(1 - 2**-1.5)  # .646
    assert (samples[place], right[place]) == (2, 0) and samples[place + 1] == 3


def test_an_unfinished_completion_may_be_the_one_that_was_graded_right(make_record):
    ballot = _ballot(make_record, [("1", 0.9, 0.0), ("1", None, 1.0)])
    assert replay(ballot, [0, 0], READER, 2)["posterior"][:, -1].tolist() == [2, 1]


def test_replay_is_the_online_vote_in_every_order(random_records):
    for ballot in group_by_prompt(random_records(6, 6)):
        classes = _classes(ballot)
        found = replay(ballot, classes, READER, 6)["posterior"]
        orders = stopping._orders(6)
        assert len(orders) == stopping.NUM_ORDERS and all(
            sorted(o) == list(range(6)) for o in orders
        )
        for place, threshold in enumerate(stops("posterior", 6)):
            if not 0 < threshold < 1:
                continue
            votes = []
            for order in orders:
                drawn = iter([ballot[i] for i in order])

                def sample(drawn=drawn):
                    record = next(drawn)
                    return record.answer, record.score if record.is_finished else None

                votes.append(
                    adaptive_vote(sample, threshold=threshold, max_samples=6, calibrated=READER)
                )
            assert found[0, place] == pytest.approx(fmean(vote.num_samples for vote in votes))
            assert found[1, place] == pytest.approx(fmean(vote.answer == "1" for vote in votes))


def test_without_calibration_there_is_no_posterior(make_record):
    ballot = _ballot(make_record, [("1", 0.5, 1.0)])
    found = replay(ballot, [0], None, 1)
    assert list(found) == ["agreement", "fixed"]
    values = compare(found)
    assert values["samples_fixed"] == 1 and math.isnan(values["samples_posterior"])
    assert math.isnan(values["area_fixed"])


def test_a_rule_that_is_not_there_needs_no_samples_where_nothing_is_right(make_record):
    found = compare(replay(_ballot(make_record, [("1", 0.5, 0.0)] * 3), [0] * 3, None, 3))
    assert found["samples_fixed"] == 1 and math.isnan(found["samples_posterior"])


def test_curves_are_compared_along_the_line(monkeypatch):
    curves = {
        "posterior": np.array([[1.0, 3.0, 5.0], [0.5, 0.9, 0.9]]),
        "agreement": np.array([[1.0, 5.0], [0.5, 0.7]]),
        "fixed": np.array([[1.0, 5.0], [0.5, 0.9]]),
    }
    found = compare(curves)
    # A triangle of base 4 and height .2 over the fixed number, over 4 samples.
    assert found["area_fixed"] == pytest.approx(0.1, abs=1e-3)
    assert found["area_agreement"] == pytest.approx(0.2, abs=1e-3)
    # .895 is reached at 1 + 2 * .395 / .4 and 1 + 4 * .395 / .4; lead never gets there.
    assert found["samples_posterior"] == pytest.approx(2.975, abs=0.02)
    assert found["samples_fixed"] == pytest.approx(4.95, abs=0.02)
    assert math.isnan(found["samples_agreement"])


def test_calibration_by_hand(make_record):
    problems = [
        # Three wrong pairs, one of which agrees; the unfinished one and no answer are none.
        [("2", 0.1, 0.0), ("2", 0.3, 0.0), ("3", 0.2, 0.0), ("2", None, 0.0), (None, 0.2, 0.0)],
        [("1", 0.4, 1.0), ("1", 0.9, 1.0), ("5", 0.1, 0.0)],
    ]
    ballots = [_ballot(make_record, rows) for rows in problems]
    found = calibrate_votes(ballots, [_classes(ballot) for ballot in ballots])
    # One pair more that agrees: (3 + 1) / (1 + 1).
    assert found == Calibrated(threshold=pytest.approx(0.35), base_rate=2 / 7, num_wrong=2.0)
    assert calibrate_votes([], []) == Calibrated()


def _halves(make_record, *, even, odd):
    """Problems in turn from two kinds, each of one right and one wrong completion."""
    return [
        make_record(f"p{p}", i, reward=float(not i), answer=str(i), score=scores[i])
        for p in range(20)
        for scores in ((even, odd)[p % 2],)
        for i in range(2)
    ]


def test_no_problem_chooses_the_threshold_that_reads_it(make_record):
    records = _halves(make_record, even=(0.9, 0.7), odd=(0.4, 0.2))
    options = ReportOptions(num_resamples=5)
    report, _ = build_report(records, options=options)
    # Each half by itself has F1 1, at .8 and .3; by the other's it takes all or nothing.
    assert report["metrics"]["f1_calibrated"]["value"] == pytest.approx(0.5)
    assert report["metrics"]["tpr_calibrated"]["value"] == 0.5
    assert report["calibrated_by"] == "the other half"
    stored = Calibrated(threshold=0.8, base_rate=0.25)
    options = ReportOptions(num_resamples=5, calibrated=stored)
    report, _ = build_report(records, options=options)
    rates = [report["metrics"][f"{name}_calibrated"]["value"] for name in ("tpr", "tnr")]
    assert rates == [0.5, 1.0] and report["base_rate"] == 0.25
    assert report["calibrated_by"] == "the model's file"


def test_a_given_base_rate_reads_the_votes_too(random_records):
    records = random_records(12, 4)
    stored = Calibrated(threshold=0.6, base_rate=0.02, num_wrong=2.0)

    def report(reader, **given):
        options = ReportOptions(num_resamples=3, calibrated=reader, **given)
        return build_report(records, options=options)[0]

    found = report(stored, base_rate=0.6)
    assert found == report(replace(stored, base_rate=0.6))
    assert found["stopping"] != report(stored)["stopping"]


def test_posterior_votes_and_curves_in_a_report(random_records):
    records = random_records(40, 6)
    report, draws = build_report(records, options=ReportOptions(num_resamples=50))
    metrics = report["metrics"]
    accuracy = metrics["posterior_majority@1"]["value"]
    # At k = 1 an unfinished completion has no posterior and so no vote.
    finished = fmean(record.is_correct and record.is_finished for record in records)
    assert accuracy == pytest.approx(finished)
    gap = metrics["posterior_majority@6"]["value"] - metrics["majority@6"]["value"]
    assert metrics["posterior_gain@6"]["value"] == pytest.approx(gap)
    gap = metrics["best_of@6"]["value"] - metrics["accuracy"]["value"]
    assert metrics["best_over_mean@6"]["value"] == pytest.approx(gap)
    fixed = report["stopping"]["fixed"]
    assert fixed["stop"] == list(range(7)) and fixed["samples"][1:] == [1, 2, 3, 4, 5, 6]
    assert fixed["accuracy"][1] == pytest.approx(metrics["majority@1"]["value"], abs=0.05)
    assert report["stopping"]["posterior"]["stop"][-1] is None  # never
    entry = metrics["samples_posterior"]
    assert 1 <= entry["low"] <= entry["high"] <= 6 and draws["samples_posterior"].shape == (50,)
    # Scores that do not spread weight nothing, and stop nothing.
    flat = [replace(record, score=0.01 * record.sample) for record in records]
    report, _ = build_report(flat, options=ReportOptions(num_resamples=2))
    metrics = report["metrics"]
    assert metrics["posterior_majority@6"]["value"] == metrics["majority@6"]["value"]
    assert list(report["stopping"]) == ["agreement", "fixed"]
    assert (
        "stopping" in report
        and not build_report(records, options=ReportOptions(num_resamples=0))[0]["stopping"]
    )
