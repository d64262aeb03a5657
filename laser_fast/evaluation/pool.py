"""The graded completions of all problems together, and the metrics that pool them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

import numpy as np
from numpy.typing import ArrayLike, NDArray

from laser_fast.evaluation.coverage import COVERAGES, risk_at, risk_curve
from laser_fast.evaluation.metrics import (
    THRESHOLD,
    class_rates,
    correct_class_prior,
    harmonic_mean,
    reliability,
    verify,
)
from laser_fast.evaluation.samples import SampleRecord


class Pool:
    """The graded completions of all problems as arrays [B]."""

    def __init__(
        self, graded: Sequence[SampleRecord], *, is_scored: bool, base_rate: float | None
    ) -> None:
        self.correct = np.array([record.is_correct for record in graded], bool)
        self.finished = np.array([record.is_finished for record in graded], bool)
        self.lengths = np.array([record.num_tokens for record in graded], np.float64)
        self.scores = None
        if is_scored:
            # That of unfinished completions is 0 by the definition of a record.
            self.scores = np.array([record.score for record in graded], np.float64)
        self._base_rate = base_rate

    def base_rate(self, rows: NDArray[np.int64]) -> float:
        """Given, or the share of correct ones among the finished `rows`; 0 without any."""
        if self._base_rate is not None:
            return self._base_rate
        finished = self.correct[rows][self.finished[rows]]
        return float(finished.mean()) if finished.size else 0.0

    def values(self, rows: NDArray[np.int64]) -> dict[str, float]:
        """Metrics of the completions `rows`."""
        correct, finished = self.correct[rows], self.finished[rows]
        values = {
            "accuracy": defined_mean(correct),
            "truncated": defined_mean(~finished),
            "mean_length": defined_mean(self.lengths[rows]),
        }
        if self.scores is None:
            return values
        scores, base_rate = self.scores[rows], self.base_rate(rows)
        found = asdict(verify(scores, correct, is_finished=finished, base_rate=base_rate))
        values |= {"verification_accuracy": found.pop("accuracy")} | found
        corrected = correct_class_prior(scores, base_rate)
        tpr, tnr = class_rates(corrected, correct)
        values |= {
            "tpr_corrected": tpr,
            "tnr_corrected": tnr,
            "f1_corrected": harmonic_mean(tpr, tnr),
            "verification_accuracy_corrected": defined_mean((corrected > THRESHOLD) == correct),
        }
        curve = risk_curve(scores, correct)
        values["aurc"] = defined_mean(curve)
        return values | {f"risk@{c:g}": risk_at(curve, c) for c in COVERAGES}

    def diagrams(self) -> dict[str, list[dict[str, float]]]:
        """The bins of both reliability diagrams, empty ones left out."""
        everything = np.arange(len(self.scores))
        readings = {
            "raw": np.clip(self.scores, 0.0, 1.0),
            "corrected": correct_class_prior(self.scores, self.base_rate(everything)),
        }
        return {
            name: [
                {"count": int(count), "confidence": p, "accuracy": share}
                for count, p, share in zip(*reliability(p, self.correct), strict=True)
                if count
            ]
            for name, p in readings.items()
        }


def defined_mean(values: ArrayLike) -> NDArray[np.float64]:
    """Mean over the first axis of what is defined; nan where nothing is."""
    values = np.asarray(values, np.float64)
    known = np.isfinite(values)
    total = np.where(known, values, 0.0).sum(0)
    count = known.sum(0)
    return np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0)
