"""Self-verification metrics: how well the scores tell correct completions from incorrect ones.

    TPR   = P(r_s > 1/2 | correct),   TNR = P(r_s <= 1/2 | incorrect)
    F1    = 2 TPR TNR / (TPR + TNR), what the LaSeR paper calls F1 (arXiv 2510.14943)
    AUROC = P(r_s of a correct > r_s of an incorrect) + 1/2 P(the two are equal)
    ECE   = sum_bins n_bin / N |mean correct - mean p|,   Brier = mean (p - correct)^2
    p     = pc r / (pc r + (1 - pc) (1 - r)),   r = clip(r_s, 0, 1)

The class-weighted MSE (eq. 14) fits r to the posterior under equal class frequencies; the last line
puts the base rate pc of correct completions back in.

Arguments are one-dimensional arrays or CPU tensors of B completions. What is undefined, because a
class or everything is missing, is nan and never 0: a batch of correct completions has no F1, while
a verifier that always says "incorrect" has F1 = 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

THRESHOLD = 0.5


@dataclass(frozen=True, kw_only=True, slots=True)
class Verification:
    """The self-verification metrics of one set of completions; nan where undefined.

    `accuracy` is that of the verdict r_s > 1/2, not of the completions. `mean_correct` and
    `mean_incorrect` are means of the unclipped score over finished completions.
    `ece_corrected` and `brier_corrected` are those of p after the class-prior correction.
    """

    tpr: float
    tnr: float
    f1: float
    accuracy: float
    auroc: float
    ece: float
    brier: float
    ece_corrected: float
    brier_corrected: float
    mean_correct: float
    mean_incorrect: float


def verify(
    scores: ArrayLike,  # [B]
    is_correct: ArrayLike,  # [B] bool
    *,
    is_finished: ArrayLike | None = None,  # [B] bool
    base_rate: float | None = None,
) -> Verification:
    """All self-verification metrics at once.

    Args:
        scores: self-scores r_s, not clipped; the values of unfinished completions are not read.
        is_correct: the verifier's word; leave completions whose grading failed out.
        is_finished: unfinished completions count as score 0, so as predicted incorrect.
        base_rate: pc of the class-prior correction; by default that of the finished completions
            given here, which knows the answers: pass a rate measured elsewhere where that matters.

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
    tpr, tnr = class_rates(scores, correct)
    probabilities = np.clip(scores, 0.0, 1.0)
    if base_rate is None:
        base_rate = _mean(correct[finished])
    if np.isnan(base_rate):
        # Nothing finished: every score is 0 and so is every corrected one, whatever the rate.
        base_rate = 0.0
    corrected = correct_class_prior(scores, base_rate)
    return Verification(
        tpr=tpr,
        tnr=tnr,
        f1=harmonic_mean(tpr, tnr),
        accuracy=_mean((scores > THRESHOLD) == correct),
        auroc=auroc(scores, correct),
        ece=calibration_error(probabilities, correct),
        brier=brier_score(probabilities, correct),
        ece_corrected=calibration_error(corrected, correct),
        brier_corrected=brier_score(corrected, correct),
        mean_correct=_mean(scores[finished & correct]),
        mean_incorrect=_mean(scores[finished & ~correct]),
    )


def class_rates(
    scores: ArrayLike,  # [B]
    is_correct: ArrayLike,  # [B] bool
    *,
    threshold: float = THRESHOLD,
) -> tuple[float, float]:
    """TPR and TNR of the verdict score > threshold; each is nan if its class is absent."""
    scores, correct = _check("class_rates", scores, is_correct)
    verdict = scores > threshold
    return _mean(verdict[correct]), _mean(~verdict[~correct])


def harmonic_mean(tpr: float, tnr: float) -> float:
    """The paper's F1, 2 TPR TNR / (TPR + TNR): 0 if either rate is 0, nan if either is nan."""
    if tpr == 0 or tnr == 0:
        # A rate of 0 beside an undefined one stays undefined: a class is missing.
        return float("nan") if np.isnan(tpr) or np.isnan(tnr) else 0.0
    return 2 * tpr * tnr / (tpr + tnr)


def auroc(
    scores: ArrayLike,  # [B]
    is_correct: ArrayLike,  # [B] bool
) -> float:
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
    rank_sum = mean_rank[value_of][correct].sum()
    u = rank_sum - num_correct * (num_correct + 1) / 2
    return float(u / (num_correct * num_incorrect))


def reliability(
    probabilities: ArrayLike,  # [B] in [0, 1]
    is_correct: ArrayLike,  # [B] bool
    *,
    num_bins: int = 10,
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
    probabilities: ArrayLike,  # [B] in [0, 1]
    is_correct: ArrayLike,  # [B] bool
    *,
    num_bins: int = 10,
) -> float:
    """Expected calibration error over equal-width bins; nan without completions."""
    counts, confidence, share_correct = reliability(probabilities, is_correct, num_bins=num_bins)
    filled = counts > 0
    if not filled.any():
        return float("nan")
    gaps = np.abs(confidence[filled] - share_correct[filled])
    return float((counts[filled] * gaps).sum() / counts.sum())


def brier_score(
    probabilities: ArrayLike,  # [B] in [0, 1]
    is_correct: ArrayLike,  # [B] bool
) -> float:
    """Mean squared distance between probability and outcome; nan without completions."""
    p, correct = _check("brier_score", probabilities, is_correct)
    return _mean((p - correct) ** 2)


def correct_class_prior(
    scores: ArrayLike,  # [B]
    base_rate: float,
) -> NDArray[np.float64]:
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
