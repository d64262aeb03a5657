"""Everything that one benchmark's samples say, each number with its bootstrap interval.

A report is plain JSON. `metrics` maps a name to {value, low, high}:

    accuracy, truncated, mean_length                           over completions
    pass@k, majority@k, weighted_majority@k, best_of@k         over problems (votes.py)
    weighted_gain@k, best_gain@k                               minus majority@k, paired
    tpr, tnr, f1, verification_accuracy, auroc, auroc_within,
    ece, brier, aurc, risk@c, mean_correct, mean_incorrect     of the self-score (metrics.py)
    tpr_corrected, ..., ece_corrected, brier_corrected         after the class-prior correction

`auroc_within` is the mean AUROC of the problems that have both classes: what voting can use, while
`auroc` also knows easy problems from hard ones. None stands for what is undefined.

Completions of one problem are alike, so the bootstrap draws whole problems, P of P with
replacement; a statistic that pools completions (AUROC, ECE) is computed anew from those of the
drawn problems. Every statistic sees the same draws, so differences and means of statistics have
intervals too. The ECE of a resample is biased upwards, the more so the fewer completions there
are, so the interval of `ece` may lie above its value.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from zlib import crc32

import numpy as np
from numpy.typing import ArrayLike, NDArray

from laser_fast.algorithm.verification import auroc, finished_rate, readings, reliability, verify
from laser_fast.evaluation.votes import (
    answer_classes,
    best_at_k,
    pass_at_k,
    powers_of_two,
    vote_at_k,
)
from laser_fast.log.jsonl import plain_value
from laser_fast.log.samples import SampleRecord, group_by_prompt

Report = dict[str, Any]
Draws = dict[str, NDArray[np.float64]]  # by metric, [R]
SameAnswer = Callable[[str, str], bool]

NUM_RESAMPLES = 1000
LEVEL = 0.95
# Scores of a model that never trained them spread by .01-.02: as vote weights they are noise, and
# those below 0 would silence their votes.
MIN_SCORE_STD = 0.1
_VERIFICATION = (
    "verification_accuracy", "tpr", "tnr", "f1", "auroc", "ece", "brier", "ece_corrected",
    "brier_corrected", "mean_correct", "mean_incorrect",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportOptions:
    """How samples become numbers; none of it needs a model.

    `ks` defaults to 1, 2, 4, ... and the number of samples. `base_rate` is the pc of the
    class-prior correction, by default the share of correct answers among the finished samples of
    the benchmark itself, which knows the answers. `seed` names the resamples and the subsets.
    """

    ks: tuple[int, ...] | None = None
    base_rate: float | None = None
    num_resamples: int = NUM_RESAMPLES
    seed: int = 0


DEFAULTS = ReportOptions()


def build_report(
    records: Sequence[SampleRecord],
    *,
    name: str = "",
    same_answer: SameAnswer | None = None,
    options: ReportOptions = DEFAULTS,
) -> tuple[Report, Draws]:
    """Compute the report of one benchmark and the bootstrap draws behind its intervals.

    Completions whose grading failed are counted and left out; a problem with fewer than k graded
    ones enters the k column with those it has. When the clipped scores of all finished completions
    spread by no more than `MIN_SCORE_STD`, they say nothing yet: `uses_scores` is False and
    `weighted_majority` is the plain one.

    Args:
        records: n samples of each problem. Either every finished one has a score, or none has.
        name: of the benchmark; with the seed it names the resamples, so that benchmarks of one
            size are drawn independently and their mean has its own interval.
        same_answer: equivalence of two answers in the votes; equal strings always are.
        options: see `ReportOptions`.

    Raises:
        ValueError: records that do not fit together, or a k above n.
    """
    problems = group_by_prompt(records)
    num_samples = len(problems[0])
    ks = options.ks or powers_of_two(num_samples)
    if max(ks) > num_samples or min(ks) < 1:
        raise ValueError(f"build_report: expected 1 <= k <= {num_samples} samples, got {ks}")
    ballots = [[record for record in problem if record.reward is not None] for problem in problems]
    ballots = [ballot for ballot in ballots if ballot]
    graded = [record for ballot in ballots for record in ballot]
    correct = np.array([record.is_correct for record in graded], bool)
    finished = np.array([record.is_finished for record in graded], bool)
    lengths = np.array([record.num_tokens for record in graded], np.float64)
    scores, std = None, np.nan
    if _has_scores(records):
        scores = np.array([record.score for record in graded], np.float64)
        if finished.any():
            std = float(scores[finished].clip(0.0, 1.0).std())
    weighs = std > MIN_SCORE_STD

    rows = [
        _problem_values(ballot, ks, same_answer, scores is not None, weighs, options.seed)
        for ballot in ballots
    ]
    table = np.array([list(row.values()) for row in rows])  # [P, S]
    members = np.split(np.arange(len(graded)), np.cumsum([len(b) for b in ballots])[:-1])

    def statistics(indices: NDArray[np.int64]) -> dict[str, float]:
        drawn = np.concatenate([members[i] for i in indices])
        pooled = {
            "accuracy": defined_mean(correct[drawn]),
            "truncated": defined_mean(~finished[drawn]),
            "mean_length": defined_mean(lengths[drawn]),
        }
        if scores is not None:
            pooled |= verify(
                scores[drawn],
                correct[drawn],
                is_finished=finished[drawn],
                base_rate=options.base_rate,
            )
        return dict(zip(rows[0], defined_mean(table[indices]), strict=True)) | pooled

    values, draws = {}, {}
    if ballots:
        values = statistics(np.arange(len(ballots)))
        drawn = bootstrap(
            lambda indices: list(statistics(indices).values()),
            len(ballots),
            num_resamples=options.num_resamples,
            seed=(options.seed, crc32(name.encode())),
        ).reshape(-1, len(values))
        draws = dict(zip(values, drawn.T, strict=True))
    base_rate, diagrams = options.base_rate, {}
    if scores is not None and graded:
        diagrams = _diagrams(scores, correct, finished, base_rate)
    report = {
        "num_prompts": len(problems),
        "samples_per_prompt": num_samples,
        "num_failed_grades": len(records) - len(graded),
        "ks": list(ks),
        "uses_scores": bool(weighs),
        "score_std": std,
        "base_rate": finished_rate(correct, finished) if base_rate is None else base_rate,
        "interval": LEVEL,
        "metrics": _entries(values, draws),
        "reliability": diagrams,
    }
    return plain_value(report), draws


def summarize(
    records: Sequence[SampleRecord], *, same_answer: SameAnswer | None = None
) -> dict[str, float | int | bool | None]:
    """The numbers of a training run's evaluation: flat, without intervals, undefined ones None.

    `majority`, `weighted_majority` and `best_of` are shares of the problems for
    k = `samples_per_prompt`, `accuracy` is avg@k. Arguments as of `build_report`, in any order.
    """
    # One order for one set of records: sums of floats then do not depend on who gathered them.
    records = sorted(records, key=lambda record: (record.prompt_id, record.sample))
    k = len(group_by_prompt(records)[0])
    options = ReportOptions(ks=(k,), num_resamples=0)
    report, _ = build_report(records, same_answer=same_answer, options=options)
    value = {name: entry["value"] for name, entry in report["metrics"].items()}.get
    counts = ("num_prompts", "samples_per_prompt", "num_failed_grades")
    rules = ("majority", "weighted_majority", "best_of")
    return {
        **{name: report[name] for name in counts},
        "accuracy": value("accuracy"),
        **{name: value(f"{name}@{k}") for name in rules},
        **{name: report[name] for name in ("uses_scores", "score_std")},
        **{name: value(name) for name in ("truncated", "mean_length", *_VERIFICATION)},
    }


def average(reports: Sequence[Report], draws: Sequence[Draws]) -> Report:
    """Macro average over benchmarks of every metric that all of them have, as in the paper."""
    shared = [name for name in draws[0] if all(name in other for other in draws)]
    # One benchmark without a value (None, so nan) leaves the average undefined: it would not
    # compare.
    found = {
        name: np.array([report["metrics"][name]["value"] for report in reports], np.float64)
        for name in shared
    }
    values = {name: value.mean() for name, value in found.items()}
    means = {name: np.mean([other[name] for other in draws], axis=0) for name in shared}
    return plain_value(
        {
            "num_benchmarks": len(reports),
            "ks": sorted(set.intersection(*(set(report["ks"]) for report in reports))),
            "metrics": _entries(values, means),
        }
    )


def bootstrap(
    statistics: Callable[[NDArray[np.int64]], ArrayLike],
    num_problems: int,
    *,
    num_resamples: int = NUM_RESAMPLES,
    seed: int | Sequence[int] = 0,
) -> NDArray[np.float64]:
    """Draws [R, S]: `statistics` maps indices of drawn problems, [P] with repeats, to S values."""
    rng = np.random.default_rng(seed)
    draws = (rng.integers(num_problems, size=num_problems) for _ in range(num_resamples))
    return np.array([statistics(indices) for indices in draws], np.float64)


def interval(
    draws: NDArray[np.float64],  # [R] or [R, S]
    *,
    level: float = LEVEL,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Percentile interval, low and high, of each statistic over its defined draws; else nan."""
    known = np.isfinite(draws).any(0)
    if not known.any():
        return np.full(known.shape, np.nan), np.full(known.shape, np.nan)
    tail = 100 * (1 - level) / 2
    # nanpercentile warns about columns without a value, for which nan is the answer.
    low, high = np.nanpercentile(np.where(known, draws, 0.0), [tail, 100 - tail], axis=0)
    return np.where(known, low, np.nan), np.where(known, high, np.nan)


def defined_mean(values: ArrayLike) -> NDArray[np.float64]:
    """Mean over the first axis of what is defined; nan where nothing is."""
    values = np.asarray(values, np.float64)
    known = np.isfinite(values)
    total, count = np.where(known, values, 0.0).sum(0), known.sum(0)
    return np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0)


def _problem_values(
    ballot: Sequence[SampleRecord],
    ks: Sequence[int],
    same_answer: SameAnswer | None,
    is_scored: bool,
    weighs: bool,
    seed: int,
) -> dict[str, float]:
    """What one problem contributes to the means over problems."""
    classes = answer_classes([record.answer for record in ballot], same_answer)
    correct = [record.is_correct for record in ballot]
    finished = [record.is_finished for record in ballot]
    scores = [record.score for record in ballot]
    weights = np.clip(scores, 0.0, 1.0) if weighs else None
    values: dict[str, float] = {}
    for k in ks:
        size = min(k, len(ballot))
        majority = vote_at_k(classes, correct, size, seed=seed)
        weighted = best = np.nan
        if is_scored:
            weighted = vote_at_k(classes, correct, size, weights=weights, seed=seed)
            best = best_at_k(scores, finished, correct, size)
        values |= {
            f"pass@{k}": pass_at_k(correct, size),
            f"majority@{k}": majority,
            f"weighted_majority@{k}": weighted,
            f"best_of@{k}": best,
            f"weighted_gain@{k}": weighted - majority,
            f"best_gain@{k}": best - majority,
        }
    return values | {"auroc_within": auroc(scores, np.array(correct)) if is_scored else np.nan}


def _has_scores(records: Sequence[SampleRecord]) -> bool:
    """Whether scores were measured: for all finished completions or for none."""
    finished = [record for record in records if record.is_finished]
    num_scored = sum(record.score is not None for record in finished)
    if num_scored not in (0, len(finished)):
        raise ValueError(
            f"build_report: expected a score for all {len(finished)} finished completions or for "
            f"none, got {num_scored}; ask the engine for scores (sampling.needs_score)"
        )
    return num_scored > 0


def _diagrams(
    scores: NDArray, correct: NDArray, finished: NDArray, base_rate: float | None
) -> dict[str, list[dict[str, float]]]:
    """The bins of both reliability diagrams, empty ones left out."""
    return {
        suffix.lstrip("_") or "raw": [
            {"count": int(count), "confidence": stated, "accuracy": share}
            for count, stated, share in zip(*reliability(p, correct), strict=True)
            if count
        ]
        for suffix, p in readings(scores, correct, finished, base_rate).items()
    }


def _entries(values: dict[str, float], draws: Draws) -> dict[str, dict[str, float]]:
    entries = {}
    for name, value in values.items():
        low, high = interval(draws[name])
        entries[name] = {"value": float(value), "low": float(low), "high": float(high)}
    return entries
