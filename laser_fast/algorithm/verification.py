"""Self-verification metrics: how well the scores tell correct completions from incorrect ones.

    TPR   = P(r_s > 1/2 | correct),   TNR = P(r_s <= 1/2 | incorrect)
    F1    = 2 TPR TNR / (TPR + TNR), what the LaSeR paper calls F1 (arXiv 2510.14943)
    AUROC = P(r_s of a correct > r_s of an incorrect) + 1/2 P(the two are equal)
    ECE   = sum_bins n_bin / N |mean correct - mean p|,   Brier = mean (p - correct)^2
    risk  = share of wrong completions among the c N with the highest scores;  AURC = its mean
            over c = 1/N, 2/N, ..., 1
    p     = clip(r_s, 0, 1) = r, or corrected: pc r / (pc r + (1 - pc) (1 - r))

The class-weighted MSE (eq. 14) fits r to the posterior under equal class frequencies; the
correction puts the base rate pc of correct completions back in.

Arguments are one-dimensional arrays or CPU tensors of B completions: scores float, probabilities in
[0, 1], is_correct bool. What is undefined, because a
class or everything is missing, is nan and never 0: a batch of correct completions has no F1, while
a verifier that always says "incorrect" has F1 = 0.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

THRESHOLD = 0.5
# Shares of the completions at which the risk is stated.
COVERAGES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


def verify(
    scores: ArrayLike,  # [B]
    is_correct: ArrayLike,  # [B] bool
    *,
    is_finished: ArrayLike | None = None,  # [B] bool
    base_rate: float | None = None,
) -> dict[str, float]:
    """All self-verification metrics at once; nan where undefined.

    Args:
        scores: self-scores r_s, not clipped; the values of unfinished completions are not read.
        is_correct: the verifier's word; leave completions whose grading failed out.
        is_finished: unfinished completions count as score 0, so as predicted incorrect.
        base_rate: pc of the class-prior correction; by default that of the finished completions
            given here, which knows the answers: pass a rate measured elsewhere where that matters.

    Returns:
        `tpr`, `tnr`, `f1`, `verification_accuracy` (of the verdict, not of the completions), `ece`
        and `brier`, each also as `NAME_corrected`; `auroc`; `aurc` and `risk@c`; `mean_correct` and
        `mean_incorrect`, means of the unclipped score over finished completions.

    Raises:
        ValueError: shapes that differ, `is_correct` not boolean, a score that is nan or infinite.
    """
    finished = np.ones(np.shape(scores), bool) if is_finished is None else np.asarray(is_finished)
    if finished.shape != np.shape(scores) or finished.dtype != bool:
        raise ValueError(
            f"verify: expected is_finished bool {np.shape(scores)} like scores, "
            f"got {finished.dtype} {finished.shape}"
        )
    scores = np.where(finished, np.asarray(scores, np.float64), 0.0)
    scores, correct = _check("verify", scores, is_correct)
    values = {
        "auroc": auroc(scores, correct),
        "mean_correct": _mean(scores[finished & correct]),
        "mean_incorrect": _mean(scores[finished & ~correct]),
    }
    for suffix, p in readings(scores, correct, finished, base_rate).items():
        tpr, tnr = class_rates(p, correct)
        values |= {
            f"tpr{suffix}": tpr,
            f"tnr{suffix}": tnr,
            f"f1{suffix}": harmonic_mean(tpr, tnr),
            f"verification_accuracy{suffix}": _mean((p > THRESHOLD) == correct),
            f"ece{suffix}": calibration_error(p, correct),
            f"brier{suffix}": brier_score(p, correct),
        }
    curve = risk_curve(scores, correct)
    values["aurc"] = _mean(curve)
    return values | {f"risk@{c:g}": risk_at(curve, c) for c in COVERAGES}


def readings(
    scores: NDArray, correct: NDArray, finished: NDArray, base_rate: float | None
) -> dict[str, NDArray[np.float64]]:
    """Both probabilities that a score states, by the suffix of their metrics' names."""
    rate = finished_rate(correct, finished) if base_rate is None else base_rate
    # A base rate of 1 would make the 0 of an unfinished completion a certain yes.
    corrected = np.where(finished, correct_class_prior(scores, rate), 0.0)
    return {"": np.clip(scores, 0.0, 1.0), "_corrected": corrected}


def finished_rate(correct: NDArray, finished: NDArray) -> float:
    """Share of correct ones among the finished; 0 without any, when every score is 0 anyway."""
    return float(correct[finished].mean()) if finished.any() else 0.0


def class_rates(scores: ArrayLike, is_correct: ArrayLike) -> tuple[float, float]:
    """TPR and TNR of the verdict score > 1/2; each is nan if its class is absent."""
    scores, correct = _check("class_rates", scores, is_correct)
    verdict = scores > THRESHOLD
    return _mean(verdict[correct]), _mean(~verdict[~correct])


def harmonic_mean(tpr: float, tnr: float) -> float:
    """The paper's F1, 2 TPR TNR / (TPR + TNR): 0 if either rate is 0, nan if either is nan."""
    if tpr == 0 or tnr == 0:
        # A rate of 0 beside an undefined one stays undefined: a class is missing.
        return float("nan") if np.isnan(tpr) or np.isnan(tnr) else 0.0
    return 2 * tpr * tnr / (tpr + tnr)


def auroc(scores: ArrayLike, is_correct: ArrayLike) -> float:
    """Area under the ROC curve by the rank sum, ties counting one half; nan without both classes.

    (sum of the ranks of the correct - n_c (n_c + 1) / 2) / (n_c n_i), tied scores sharing their
    mean rank.
    """
    scores, correct = _check("auroc", scores, is_correct)
    num_correct = int(correct.sum())
    num_incorrect = correct.size - num_correct
    if num_correct == 0 or num_incorrect == 0:
        return float("nan")
    _, value_of, counts = np.unique(scores, return_inverse=True, return_counts=True)
    mean_rank = np.cumsum(counts) - (counts - 1) / 2
    u = mean_rank[value_of][correct].sum() - num_correct * (num_correct + 1) / 2
    return float(u / (num_correct * num_incorrect))


def reliability(
    probabilities: ArrayLike, is_correct: ArrayLike, *, num_bins: int = 10
) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]:
    """The reliability diagram: count, mean probability and share correct of equal-width bins.

    Bin b holds b / num_bins <= p < (b + 1) / num_bins, the last one also p = 1. Empty bins are nan.
    """
    p, correct = _check("reliability", probabilities, is_correct)
    if p.size and not (p.min() >= 0 and p.max() <= 1):
        raise ValueError(
            f"reliability: expected probabilities in [0, 1], got {p.min()} to {p.max()}; "
            "clip the scores first"
        )
    bins = np.minimum((p * num_bins).astype(np.int64), num_bins - 1)
    counts = np.bincount(bins, minlength=num_bins)
    with np.errstate(invalid="ignore"):
        confidence = np.bincount(bins, weights=p, minlength=num_bins) / counts
        share_correct = np.bincount(bins, weights=correct, minlength=num_bins) / counts
    return counts, confidence, share_correct


def calibration_error(
    probabilities: ArrayLike, is_correct: ArrayLike, *, num_bins: int = 10
) -> float:
    """Expected calibration error over equal-width bins; nan without completions."""
    counts, confidence, share_correct = reliability(probabilities, is_correct, num_bins=num_bins)
    if not counts.any():
        return float("nan")
    return float(np.nansum(counts * np.abs(confidence - share_correct)) / counts.sum())


def brier_score(probabilities: ArrayLike, is_correct: ArrayLike) -> float:
    """Mean squared distance between probability and outcome; nan without completions."""
    p, correct = _check("brier_score", probabilities, is_correct)
    return _mean((p - correct) ** 2)


def correct_class_prior(scores: ArrayLike, base_rate: float) -> NDArray[np.float64]:
    """Probability of being correct from a class-balanced score: pc r / (pc r + (1-pc)(1-r)).

    r is the score clipped to [0, 1], pc the base rate of correct completions. Where the formula is
    0/0 (a certain score against a certain base rate) the base rate stands.
    """
    if not 0 <= base_rate <= 1:
        raise ValueError(f"correct_class_prior: expected base_rate in [0, 1], got {base_rate}")
    r = np.clip(np.asarray(scores, np.float64), 0.0, 1.0)
    correct = base_rate * r
    total = correct + (1 - base_rate) * (1 - r)
    return np.divide(correct, total, out=np.full_like(r, base_rate), where=total > 0)


def risk_curve(scores: ArrayLike, is_correct: ArrayLike) -> NDArray[np.float64]:
    """Risk at coverage 1/B, 2/B, ..., 1; [B].

    Tied scores cannot be told apart, so each of them counts as the mean of its tie: the curve does
    not depend on the order of the input, and a constant score gives a flat one.
    """
    scores, correct = _check("risk_curve", scores, is_correct)
    _, tie, counts = np.unique(-scores, return_inverse=True, return_counts=True)
    wrong = np.bincount(tie, weights=~correct, minlength=len(counts)) / counts
    return np.cumsum(np.repeat(wrong, counts)) / np.arange(1, scores.size + 1)


def risk_at(curve: NDArray[np.float64], coverage: float) -> float:
    """Risk of the best `coverage` of the completions, at least one; nan without any."""
    if not curve.size:
        return float("nan")
    return float(curve[max(int(np.ceil(coverage * curve.size - 1e-9)), 1) - 1])


def _check(
    name: str, scores: ArrayLike, is_correct: ArrayLike
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    scores, is_correct = np.asarray(scores, np.float64), np.asarray(is_correct)
    if scores.ndim != 1 or is_correct.shape != scores.shape:
        raise ValueError(
            f"{name}: expected two arrays of one shape [B], got {scores.shape}, {is_correct.shape}"
        )
    if is_correct.dtype != bool:
        raise ValueError(
            f"{name}: expected is_correct bool, got {is_correct.dtype}; pass rewards > 0.5"
        )
    if not np.isfinite(scores).all():
        bad = int(np.flatnonzero(~np.isfinite(scores))[0])
        raise ValueError(f"{name}: expected finite scores, got {scores[bad]} at {bad}")
    return scores, is_correct


def _mean(values: NDArray) -> float:
    return float(values.mean()) if values.size else float("nan")
