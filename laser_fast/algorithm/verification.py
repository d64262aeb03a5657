"""Self-verification metrics: how well the scores tell correct completions from incorrect ones.

    TPR   = P(r_s > 1/2 | correct),   TNR = P(r_s <= 1/2 | incorrect)
    F1    = 2 TPR TNR / (TPR + TNR), what the LaSeR paper calls F1 (arXiv 2510.14943)
    AUROC = P(r_s of a correct > r_s of an incorrect) + 1/2 P(the two are equal)
    ECE   = sum_bins n_bin / N |mean correct - mean p|,   Brier = mean (p - correct)^2
    p     = clip(r_s, 0, 1) = r, or corrected: pc r / (pc r + (1 - pc) (1 - r))

Only the mean AUROC within the problems that have both classes (evaluation.statistics) says what
votes can gain: the pooled one also tells hard problems apart.
The class-weighted MSE (eq. 14) fits r to the posterior under equal class frequencies; the
correction puts the base rate pc of correct completions back in. Arguments are lists, arrays or CPU
tensors [B]: scores float, probabilities in [0, 1], is_correct bool. A value that a missing class
leaves undefined is nan and never 0: a batch of correct completions has no F1, while a verifier that
always says "incorrect" has F1 = 0.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from numpy.typing import ArrayLike as Array  # the base install has no numpy at run time

THRESHOLD = 0.5


def verify(
    scores: Array,  # [B]
    is_correct: Array,  # [B] bool
    *,
    is_finished: Array | None = None,  # [B] bool
    base_rate: float | None = None,
    threshold: Array | float | None = None,  # [B] or one for all
) -> dict[str, float]:
    """All self-verification metrics at once.

    Args:
        scores: self-scores r_s, not clipped; the values of unfinished completions are not read.
        is_correct: the verifier's word; leave completions whose grading failed out.
        is_finished: unfinished completions count as score 0, so as predicted incorrect.
        base_rate: pc of the class-prior correction; by default that of the finished completions
            given here, which knows the answers: pass a rate measured elsewhere where that matters.
        threshold: of the verdict, in [0, 1), chosen on other problems; adds `tpr_calibrated`,
            `tnr_calibrated` and `f1_calibrated`, beside those at 1/2.

    Returns:
        `tpr`, `tnr`, `f1`, `verification_accuracy` (of the verdict, not of the completions), `ece`
        and `brier`, each also as `NAME_corrected`; `auroc`; `mean_correct` and `mean_incorrect`,
        means of the unclipped score over finished completions.
    """
    r_s = torch.as_tensor(scores, dtype=torch.float64)
    finished = torch.ones_like(r_s).bool() if is_finished is None else torch.as_tensor(is_finished)
    if finished.shape != r_s.shape or finished.dtype != torch.bool:
        found = f"{finished.dtype} {tuple(finished.shape)}"
        raise ValueError(f"verify: expected is_finished bool {tuple(r_s.shape)}, got {found}")
    r_s, correct = _check("verify", torch.where(finished, r_s, 0.0), is_correct)
    values = {
        "auroc": auroc(r_s, correct),
        "mean_correct": _mean(r_s, finished & correct),
        "mean_incorrect": _mean(r_s, finished & ~correct),
    }
    for suffix, p in readings(r_s, correct, finished, base_rate).items():
        tpr, tnr = class_rates(p, correct)
        values |= {
            f"tpr{suffix}": tpr,
            f"tnr{suffix}": tnr,
            f"f1{suffix}": harmonic_mean(tpr, tnr),
            f"verification_accuracy{suffix}": ((p > THRESHOLD) == correct).double().mean().item(),
            f"ece{suffix}": calibration_error(p, correct),
            f"brier{suffix}": brier_score(p, correct),
        }
    if threshold is not None:
        tpr, tnr = class_rates(r_s, correct, threshold=threshold)
        values |= {"tpr_calibrated": tpr, "tnr_calibrated": tnr}
        values["f1_calibrated"] = harmonic_mean(tpr, tnr)
    return values


def readings(
    scores: Array, is_correct: Array, is_finished: Array, base_rate: float | None
) -> dict[str, Tensor]:
    """Both probabilities that a score states, [B] each, by the suffix of their metrics' names."""
    rate = finished_rate(is_correct, is_finished) if base_rate is None else base_rate
    r = torch.as_tensor(scores, dtype=torch.float64).clamp(0.0, 1.0)
    # A base rate of 1 would make the 0 of an unfinished completion a certain yes.
    corrected = torch.where(torch.as_tensor(is_finished), correct_class_prior(r, rate), 0.0)
    return {"": r, "_corrected": corrected}


def finished_rate(is_correct: Array, is_finished: Array) -> float:
    """Share of correct ones among the finished; 0 without any, when every score is 0 anyway."""
    rate = _mean(torch.as_tensor(is_correct), torch.as_tensor(is_finished))
    return 0.0 if math.isnan(rate) else rate


def class_rates(
    scores: Array, is_correct: Array, *, threshold: Array | float = THRESHOLD
) -> tuple[float, float]:
    """TPR and TNR of the verdict score > threshold; each is nan if its class is absent."""
    r_s, correct = _check("class_rates", scores, is_correct)
    verdict = r_s > torch.as_tensor(threshold, dtype=torch.float64)
    return _mean(verdict, correct), _mean(~verdict, ~correct)


def harmonic_mean(tpr: float, tnr: float) -> float:
    """The paper's F1, 2 TPR TNR / (TPR + TNR): 0 if either rate is 0, nan if either is nan."""
    return 2 * tpr * tnr / (tpr + tnr) if tpr + tnr != 0 else 0.0


def best_threshold(scores: Array, is_correct: Array) -> float:
    """The threshold in [0, 1) with the highest F1 of the verdict score > threshold.

    Thresholds between two neighbouring scores, clipped to [0, 1], give the same verdicts: the
    middle stands for them. Of several with the highest F1 the one nearest to 1/2 is taken, the
    lower of two, whatever the order of the samples; 1/2 where there is nothing to choose by.
    """
    r_s, correct = _check("best_threshold", scores, is_correct)
    values, value_of = r_s.clamp(0.0, 1.0).unique(return_inverse=True)
    right, wrong = (torch.bincount(value_of, of.double()).cumsum(0) for of in (correct, ~correct))
    if len(values) < 2 or not right[-1] or not wrong[-1]:
        return THRESHOLD
    tpr, tnr = 1 - right[:-1] / right[-1], wrong[:-1] / wrong[-1]
    f1 = (2 * tpr * tnr / (tpr + tnr)).nan_to_num()
    best = ((values[1:] + values[:-1]) / 2)[f1 == f1.max()].tolist()
    return min(best, key=lambda t: (abs(t - THRESHOLD), t))


def auroc(scores: Array, is_correct: Array) -> float:
    """Area under the ROC curve, ties counting one half; nan without both classes."""
    r_s, correct = _check("auroc", scores, is_correct)
    _, value_of, counts = r_s.unique(return_inverse=True, return_counts=True)
    # By rising score: a correct one wins against the incorrect ones below and half of its equals.
    right = torch.bincount(value_of, correct.double())
    wrong = counts - right
    won = (right * (wrong.cumsum(0) - wrong / 2)).sum()
    return (won / (right.sum() * wrong.sum())).item()


def reliability(
    probabilities: Array, is_correct: Array, *, num_bins: int = 10
) -> tuple[Tensor, Tensor, Tensor]:
    """The reliability diagram: count, mean probability and share correct of equal-width bins.

    Bin b holds b / num_bins <= p < (b + 1) / num_bins, the last one also p = 1. Empty bins are nan.
    """
    p, correct = _check("reliability", probabilities, is_correct)
    if ((p < 0) | (p > 1)).any():
        found = f"{p.min()} to {p.max()}; clip the scores first"
        raise ValueError(f"reliability: expected probabilities in [0, 1], got {found}")
    bins = (p * num_bins).long().clamp(max=num_bins - 1)
    counts = torch.bincount(bins, minlength=num_bins)
    confidence = torch.bincount(bins, p, num_bins) / counts
    return counts, confidence, torch.bincount(bins, correct.double(), num_bins) / counts


def calibration_error(probabilities: Array, is_correct: Array, *, num_bins: int = 10) -> float:
    """Expected calibration error over equal-width bins; nan without completions."""
    counts, confidence, share_correct = reliability(probabilities, is_correct, num_bins=num_bins)
    return ((counts * (confidence - share_correct).abs()).nansum() / counts.sum()).item()


def brier_score(probabilities: Array, is_correct: Array) -> float:
    """Mean squared distance between probability and outcome; nan without completions."""
    p, correct = _check("brier_score", probabilities, is_correct)
    return (p - correct.double()).square().mean().item()


def correct_class_prior(scores: Array, base_rate: float) -> Tensor:
    """Probability of being correct from a class-balanced score: pc r / (pc r + (1-pc)(1-r)).

    r is the score clipped to [0, 1], pc the base rate of correct completions, which also stands
    where the formula is 0/0: a certain score against a certain base rate.
    """
    if not 0 <= base_rate <= 1:
        raise ValueError(f"correct_class_prior: expected base_rate in [0, 1], got {base_rate}")
    r = torch.as_tensor(scores, dtype=torch.float64).clamp(0.0, 1.0)
    correct = base_rate * r
    total = correct + (1 - base_rate) * (1 - r)
    return torch.where(total > 0, correct / total, base_rate)


def _check(name: str, scores: Array, is_correct: Array) -> tuple[Tensor, Tensor]:
    r_s, correct = torch.as_tensor(scores, dtype=torch.float64), torch.as_tensor(is_correct)
    if r_s.ndim != 1 or correct.shape != r_s.shape:
        shapes = f"{tuple(r_s.shape)}, {tuple(correct.shape)}"
        raise ValueError(f"{name}: expected two arrays of one shape [B], got {shapes}")
    if correct.dtype != torch.bool:
        found = str(correct.dtype).removeprefix("torch.")
        raise ValueError(f"{name}: expected is_correct bool, got {found}; pass rewards > 0.5")
    # A finite sum says that all are finite, at a third of the time of asking each.
    if not math.isfinite(r_s.sum().item()) and not r_s.isfinite().all():
        bad = int((~r_s.isfinite()).nonzero()[0])
        raise ValueError(f"{name}: expected finite scores, got {r_s[bad]} at {bad}")
    return r_s, correct


def _mean(values: Tensor, members: Tensor) -> float:
    """Mean of the members in float64; nan without any."""
    return ((values.double() * members).sum() / members.sum()).item()
