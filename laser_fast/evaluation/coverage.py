"""Risk and coverage: how many answers a user may keep, and how many of those are wrong.

    risk(c) = share of wrong completions among the c B with the highest scores
    AURC    = mean of risk over c = 1/B, 2/B, ..., 1

Tied scores cannot be told apart, so each of them counts as the mean of its tie: the curve does not
depend on the order of the input, and a constant score gives a flat one.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

# Shares of the completions at which a report states the risk.
COVERAGES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


def risk_curve(
    scores: ArrayLike,  # [B]
    is_correct: ArrayLike,  # [B] bool
) -> NDArray[np.float64]:
    """Risk at coverage 1/B, 2/B, ..., 1; [B]."""
    scores, correct = np.asarray(scores, np.float64), np.asarray(is_correct)
    if scores.ndim != 1 or correct.shape != scores.shape or correct.dtype != bool:
        raise ValueError(
            f"risk_curve: expected scores [B] and is_correct [B] bool, got {scores.shape} and "
            f"{correct.shape} {correct.dtype}"
        )
    _, tie, counts = np.unique(-scores, return_inverse=True, return_counts=True)
    wrong = np.bincount(tie, weights=~correct, minlength=len(counts)) / counts
    return np.cumsum(np.repeat(wrong, counts)) / np.arange(1, scores.size + 1)


def risk_at(curve: NDArray[np.float64], coverage: float) -> float:
    """Risk of the best `coverage` of the completions, at least one; nan without any."""
    if not curve.size:
        return float("nan")
    return float(curve[max(int(np.ceil(coverage * curve.size - 1e-9)), 1) - 1])
