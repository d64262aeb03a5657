"""Bootstrap intervals over problems.

Completions of one problem are alike, so whole problems are drawn, P of P with replacement; a
statistic that pools completions (AUROC, ECE) is computed anew from those of the drawn problems.
Every statistic sees the same draws, so differences and means of statistics have intervals too.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

NUM_RESAMPLES = 1000
LEVEL = 0.95


def bootstrap(
    statistics: Callable[[NDArray[np.int64]], NDArray[np.float64]],
    num_problems: int,
    *,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> NDArray[np.float64]:
    """Draws [R, S] of S statistics.

    Args:
        statistics: from the indices of the drawn problems, [P] with repeats, to S values.
        num_problems: P.
        num_resamples: R.
        seed: names the draws.
    """
    rng = np.random.default_rng(seed)
    draws = [
        statistics(rng.integers(num_problems, size=num_problems)) for _ in range(num_resamples)
    ]
    return np.array(draws)


def interval(
    draws: NDArray[np.float64],  # [R] or [R, S]
    *,
    level: float = LEVEL,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Percentile interval of each statistic: low and high, [] or [S].

    Draws that leave a statistic undefined (nan: a class is missing) are left out; without any
    other it is nan.
    """
    tail = 100 * (1 - level) / 2
    known = np.isfinite(draws)
    # nanpercentile warns about columns without a value, for which nan is the answer.
    filled = np.where(known.any(0), draws, 0.0)
    low, high = np.nanpercentile(filled, [tail, 100 - tail], axis=0)
    return np.where(known.any(0), low, np.nan), np.where(known.any(0), high, np.nan)
