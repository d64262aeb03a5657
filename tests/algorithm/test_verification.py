"""Self-verification metrics against scikit-learn and numbers worked out by hand."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, brier_score_loss, recall_score, roc_auc_score

from laser_fast.algorithm.verification import (
    auroc,
    best_threshold,
    brier_score,
    calibration_error,
    class_rates,
    correct_class_prior,
    harmonic_mean,
    reliability,
    verify,
)


def _random_scores(seed: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores rounded to one decimal, so that many are tied, within and outside [0, 1]."""
    rng = np.random.default_rng(seed)
    correct = rng.random(size) < 0.3
    return np.round(rng.normal(0.3 + 0.3 * correct, 0.4), 1), correct


@pytest.mark.parametrize("seed", range(4))
def test_metrics_agree_with_scikit_learn(seed):
    scores, correct = _random_scores(seed, 257)
    verdict = scores > 0.5
    found = verify(scores, correct)
    assert found["auroc"] == pytest.approx(roc_auc_score(correct, scores), abs=1e-12)
    assert found["tpr"] == pytest.approx(recall_score(correct, verdict), abs=1e-12)
    assert found["tnr"] == pytest.approx(recall_score(~correct, ~verdict), abs=1e-12)
    assert found["verification_accuracy"] == pytest.approx(
        accuracy_score(correct, verdict), abs=1e-12
    )
    p = scores.clip(0, 1)
    assert found["brier"] == pytest.approx(brier_score_loss(correct, p), abs=1e-12)
    posterior = correct_class_prior(scores, correct.mean())
    assert found["brier_corrected"] == pytest.approx(
        brier_score_loss(correct, posterior), abs=1e-12
    )


def test_rates_and_f1_by_hand():
    # Correct: .9 .6 .5 -> two above the threshold; incorrect: .7 .4 -> one at or below it.
    scores, correct = [0.9, 0.6, 0.5, 0.7, 0.4], np.array([True, True, True, False, False])
    tpr, tnr = class_rates(scores, correct)
    assert (tpr, tnr) == (pytest.approx(2 / 3), 0.5)
    assert harmonic_mean(tpr, tnr) == pytest.approx(2 * (2 / 3) * 0.5 / (2 / 3 + 0.5))


def test_f1_of_the_papers_verifier_row():
    """The mean of TPR and TNR would be .5 for a verifier that accepts everything; F1 is 0."""
    assert harmonic_mean(1.0, 0.0) == 0.0
    assert harmonic_mean(0.0, 0.0) == 0.0
    assert harmonic_mean(0.777, 0.761) == pytest.approx(0.7689, abs=1e-4)
    assert math.isnan(harmonic_mean(float("nan"), 0.0))
    assert math.isnan(harmonic_mean(0.8, float("nan")))


def test_auroc_counts_ties_as_one_half():
    correct = np.array([True, True, False, False])
    # Pairs: (.5, .5) tie, (.5, .1) won, (.3, .5) lost, (.3, .1) won.
    assert auroc([0.5, 0.3, 0.5, 0.1], correct) == 2.5 / 4
    assert auroc([0.2, 0.2, 0.2, 0.2], correct) == 0.5


def test_missing_class_is_undefined_not_zero():
    found = verify([0.9, 0.2], np.array([True, True]))
    assert found["tpr"] == 0.5
    for value in (found["tnr"], found["f1"], found["auroc"], found["mean_incorrect"]):
        assert math.isnan(value)
    empty = verify([], np.array([], bool))
    for value in (
        empty["tpr"],
        empty["verification_accuracy"],
        empty["auroc"],
        empty["ece"],
        empty["brier"],
    ):
        assert math.isnan(value)


def test_unfinished_completions_count_as_score_zero():
    scores = torch.tensor([0.9, float("nan"), 0.8, 0.1, float("nan")])
    correct = torch.tensor([True, True, False, False, False])
    found = verify(scores, correct, is_finished=torch.tensor([True, False, True, False, False]))
    assert (found["tpr"], found["tnr"]) == (0.5, pytest.approx(2 / 3))
    # Pairs: .9 beats .8, 0 and 0; the unfinished correct one loses to .8 and ties twice.
    assert found["auroc"] == pytest.approx((3 + 2 / 2) / 6)
    # Class means are of scores that exist.
    assert (found["mean_correct"], found["mean_incorrect"]) == pytest.approx((0.9, 0.8))
    # One of the two finished completions is correct, so the correction is the identity.
    assert found["ece_corrected"] == pytest.approx(found["ece"])


def test_only_unfinished_completions_have_rates():
    found = verify([0.0, 0.0], np.array([True, False]), is_finished=np.array([False, False]))
    assert (found["tpr"], found["tnr"], found["f1"], found["auroc"]) == (0.0, 1.0, 0.0, 0.5)
    assert found["ece"] == found["ece_corrected"] == 0.5


def test_a_certain_base_rate_leaves_unfinished_completions_incorrect():
    finished = np.array([True, True, False, False])
    found = verify([0.9, 0.0, 0.0, 0.0], finished, is_finished=finished)
    # The base rate of the finished ones is 1; the two truncated ones stay a sure no.
    assert found["verification_accuracy_corrected"] == 1.0
    assert found["ece_corrected"] == found["brier_corrected"] == 0.0


def test_reliability_and_ece_by_hand():
    p = [0.0, 0.1, 0.49, 0.5, 0.9, 1.0]
    correct = np.array([False, True, False, True, True, False])
    counts, confidence, share = reliability(p, correct, num_bins=2)
    np.testing.assert_array_equal(counts, [3, 3])
    np.testing.assert_allclose(confidence, [0.59 / 3, 0.8])
    np.testing.assert_allclose(share, [1 / 3, 2 / 3])
    expected = (3 * abs(0.59 / 3 - 1 / 3) + 3 * abs(0.8 - 2 / 3)) / 6
    assert calibration_error(p, correct, num_bins=2) == pytest.approx(expected)
    counts, confidence, _ = reliability(p, correct, num_bins=10)
    # .1 opens its bin, .5 too, and 1 belongs to the last; empty bins weigh nothing.
    np.testing.assert_array_equal(counts, [1, 1, 0, 0, 1, 1, 0, 0, 0, 2])
    assert math.isnan(confidence[2]) and math.isfinite(calibration_error(p, correct))


def test_brier_by_hand():
    correct = np.array([True, False, True])
    assert brier_score([0.8, 0.3, 1.0], correct) == pytest.approx((0.04 + 0.09) / 3)


def test_prior_correction_undoes_class_balance():
    """A score that is the posterior under equal classes becomes the posterior under pc."""
    posterior, pc = np.array([0.05, 0.4, 0.9]), 0.3
    w_correct, w_incorrect = 1 / (2 * pc), 1 / (2 * (1 - pc))
    balanced = w_correct * posterior / (w_correct * posterior + w_incorrect * (1 - posterior))
    np.testing.assert_allclose(correct_class_prior(balanced, pc), posterior, atol=1e-12)
    np.testing.assert_allclose(correct_class_prior([-0.2, 1.4], pc), [0.0, 1.0])
    # Certain score against certain base rate: 0/0, the base rate stands.
    np.testing.assert_allclose(correct_class_prior([0.0, 0.5], 1.0), [1.0, 1.0])
    np.testing.assert_allclose(correct_class_prior([1.0, 0.5], 0.0), [0.0, 0.0])


def test_given_base_rate_is_used():
    scores, correct = _random_scores(7, 101)
    expected = calibration_error(correct_class_prior(scores, 0.8), correct)
    assert verify(scores, correct, base_rate=0.8)["ece_corrected"] == pytest.approx(expected)


def test_bad_input_is_named():
    correct = np.array([True, False])
    with pytest.raises(ValueError, match=r"one shape \[B\], got \(3,\), \(2,\)"):
        auroc([0.1, 0.2, 0.3], correct)
    with pytest.raises(ValueError, match="is_correct bool, got float64; pass rewards > 0.5"):
        auroc([0.1, 0.2], np.array([1.0, 0.0]))
    with pytest.raises(ValueError, match="finite scores, got nan at 1"):
        auroc([0.1, float("nan")], correct)
    with pytest.raises(ValueError, match="clip the scores first"):
        reliability([0.1, 1.2], correct)
    with pytest.raises(ValueError, match="base_rate"):
        correct_class_prior([0.5], 1.5)
    with pytest.raises(ValueError, match="is_finished bool"):
        verify([0.1, 0.2], correct, is_finished=np.array([1, 1]))


def test_lists_arrays_and_tensors_give_the_same_floats():
    scores, correct = _random_scores(5, 40)
    finished = scores < 0.9
    expected = verify(scores, correct, is_finished=finished)
    assert verify(scores.tolist(), correct.tolist(), is_finished=finished.tolist()) == expected
    tensors = [torch.from_numpy(values) for values in (scores, correct, finished)]
    assert verify(tensors[0], tensors[1], is_finished=tensors[2]) == expected
    assert all(type(value) is float for value in expected.values())


def test_zero_has_no_sign():
    assert auroc([0.0, -0.0, 0.0], [True, False, False]) == 0.5


def test_scores_whose_sum_overflows_are_finite():
    assert auroc([1e308, 1e308, -1.0], [True, True, False]) == 1.0


def test_the_algorithm_runs_without_numpy():
    """The base install has torch and triton only."""
    program = """
import sys
sys.modules["numpy"] = None
import warnings
warnings.simplefilter("ignore")  # torch says that it found no numpy
import importlib, pkgutil
import laser_fast.algorithm
for module in pkgutil.iter_modules(laser_fast.algorithm.__path__):
    importlib.import_module(f"laser_fast.algorithm.{module.name}")
from laser_fast.algorithm.verification import verify
from laser_fast.algorithm.vote import vote_at_k
assert verify([0.9, 0.2, 0.6], [True, False, False])["auroc"] == 1.0
assert vote_at_k([0, 0, 1], [False, False, True], 3) == 0.0
"""
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("seed", range(8))
def test_no_threshold_is_better_than_the_best(seed):
    rng = np.random.default_rng(seed)
    correct = rng.random(60) < 0.7
    scores = (0.3 * correct + rng.normal(0.5, 0.3, 60)).round(1)
    threshold = best_threshold(scores, correct)
    order = rng.permutation(60)
    assert best_threshold(scores[order], correct[order]) == threshold

    def f1(t):
        return harmonic_mean(*class_rates(scores.clip(0, 1), correct, threshold=t))

    rivals = {t: f1(t) for t in np.linspace(0, 0.999, 1000)}
    assert 0 <= threshold < 1 and f1(threshold) == pytest.approx(max(rivals.values()))
    # Of those as good none lies nearer to 1/2, but for the place within a gap of .1.
    nearest = min(abs(t - 0.5) for t, value in rivals.items() if value >= f1(threshold) - 1e-12)
    assert abs(threshold - 0.5) <= nearest + 0.05 + 1e-9


def test_best_threshold_by_hand():
    assert best_threshold([0.1, 0.6, 0.8, 0.9], [False, False, True, True]) == pytest.approx(0.7)
    # 1/4 and 3/4 are as good as each other: the lower one.
    assert best_threshold([0.0, 0.5, 0.5, 1.0], [False, True, False, True]) == 0.25
    # So are 1/5 and 3/4 here, and the latter is nearer to 1/2.
    assert best_threshold([0.1, 0.3, 0.6, 0.9], [False, True, False, True]) == 0.75
    # Scores beyond [0, 1] are clipped, so that no threshold lies there.
    assert best_threshold([-3.0, 7.0], [False, True]) == 0.5
    for scores, correct in (([0.2, 0.3], [True, True]), ([0.2, 0.2], [True, False]), ([], [])):
        assert best_threshold(scores, np.array(correct, bool)) == 0.5


def test_a_threshold_of_its_own_for_every_completion():
    scores, correct = [0.6, 0.6, 0.6, 0.2, 1.4], [True, True, False, False, True]
    found = verify(
        scores,
        correct,
        is_finished=[True, True, True, True, False],
        threshold=[0.5, 0.7, 0.7, 0.1, 0],
    )
    # The unfinished one has score 0, which is not above 0.
    assert (found["tpr_calibrated"], found["tnr_calibrated"]) == (pytest.approx(1 / 3), 0.5)
    assert found["f1_calibrated"] == pytest.approx(0.4) and found["tpr"] == pytest.approx(2 / 3)
    assert "f1_calibrated" not in verify(scores, correct)
