"""Everything that one benchmark's samples say, each number with its bootstrap interval.

A report is plain JSON. `metrics` maps a name to {value, low, high}:

    accuracy, truncated, mean_length                           over completions
    pass@k, majority@k, weighted_majority@k, best_of@k         over problems (at_k.py)
    weighted_gain@k, best_gain@k                               minus majority@k, paired
    tpr, tnr, f1, verification_accuracy, auroc, auroc_within,
    ece, brier, aurc, risk@c, mean_correct, mean_incorrect     of the self-score (metrics.py)
    tpr_corrected, ..., ece_corrected, brier_corrected         after the class-prior correction

`auroc_within` is the mean AUROC of the problems that have both classes: what voting can use, while
`auroc` also knows easy problems from hard ones. None stands for what is undefined. The ECE of a
resample is biased upwards, the more so the fewer completions there are, so the interval of `ece`
may lie above its value.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from laser_fast.evaluation.at_k import best_at_k, pass_at_k, powers_of_two, vote_at_k
from laser_fast.evaluation.bootstrap import LEVEL, NUM_RESAMPLES, bootstrap, interval
from laser_fast.evaluation.metrics import auroc
from laser_fast.evaluation.pool import Pool, defined_mean
from laser_fast.evaluation.samples import SampleRecord
from laser_fast.evaluation.summary import group_by_prompt, has_scores, uses_scores, vote_weight
from laser_fast.evaluation.voting import answer_classes
from laser_fast.observe.jsonl import plain_value

Report = dict[str, Any]
Draws = dict[str, NDArray[np.float64]]  # by metric, [R]


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportOptions:
    """How samples become numbers; none of it needs a model.

    `ks` defaults to 1, 2, 4, ... and the number of samples. `base_rate` is the pc of the
    class-prior correction, by default the share of correct answers among the finished samples of
    the benchmark itself, which knows the answers.
    """

    ks: tuple[int, ...] | None = None
    base_rate: float | None = None
    num_resamples: int = NUM_RESAMPLES
    seed: int = 0


def build_report(
    records: Sequence[SampleRecord],
    *,
    same_answer: Callable[[str, str], bool] | None = None,
    options: ReportOptions = ReportOptions(),
) -> tuple[Report, Draws]:
    """Compute the report of one benchmark and the bootstrap draws behind its intervals.

    Completions whose grading failed are counted and left out; a problem with fewer than k graded
    ones enters the k column with those it has.

    Args:
        records: n samples of each problem, with scores for all finished ones or for none.
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
    is_scored = has_scores(records)
    is_used, score_std = uses_scores(graded) if is_scored else (False, float("nan"))
    pool = Pool(graded, is_scored=is_scored, base_rate=options.base_rate)

    rows = [
        _problem_values(ballot, ks, same_answer, is_scored, is_used, options.seed)
        for ballot in ballots
    ]
    names = list(rows[0]) if rows else []
    table = np.array([list(row.values()) for row in rows]).reshape(len(rows), len(names))
    members = np.split(np.arange(len(graded)), np.cumsum([len(b) for b in ballots])[:-1])
    pooled_names = list(pool.values(np.arange(len(graded))))

    def statistics(indices: NDArray[np.int64]) -> NDArray[np.float64]:
        drawn = np.concatenate([members[i] for i in indices])
        pooled = list(pool.values(drawn).values())
        return np.concatenate([defined_mean(table[indices]), pooled])

    values, draws = {}, {}
    if ballots:
        found = statistics(np.arange(len(ballots)))
        drawn = bootstrap(
            statistics, len(ballots), num_resamples=options.num_resamples, seed=options.seed
        )
        values = dict(zip([*names, *pooled_names], found, strict=True))
        draws = dict(zip([*names, *pooled_names], drawn.T, strict=True))
    report = {
        "num_prompts": len(problems),
        "samples_per_prompt": num_samples,
        "num_failed_grades": len(records) - len(graded),
        "ks": list(ks),
        "uses_scores": is_used,
        "score_std": score_std,
        "base_rate": pool.base_rate(np.arange(len(graded))),
        "interval": LEVEL,
        "metrics": _entries(values, draws),
        "reliability": pool.diagrams() if is_scored else {},
    }
    return plain_value(report), draws


def average(reports: Sequence[Report], draws: Sequence[Draws]) -> Report:
    """Macro average over benchmarks of every metric that all of them have, as in the paper."""
    shared = [name for name in draws[0] if all(name in other for other in draws)]
    values = {
        # One benchmark without a value leaves the average undefined: it would not compare.
        name: float(np.mean([_number(report["metrics"][name]["value"]) for report in reports]))
        for name in shared
    }
    means = {name: np.mean([other[name] for other in draws], axis=0) for name in shared}
    return plain_value({"num_benchmarks": len(reports), "metrics": _entries(values, means)})


def _problem_values(
    ballot: Sequence[SampleRecord],
    ks: Sequence[int],
    same_answer: Callable[[str, str], bool] | None,
    is_scored: bool,
    is_used: bool,
    seed: int,
) -> dict[str, float]:
    """What one problem contributes to the means over problems."""
    classes = answer_classes([record.answer for record in ballot], same_answer)
    correct = [record.is_correct for record in ballot]
    finished = [record.is_finished for record in ballot]
    weights = [vote_weight(record.score) for record in ballot] if is_used else None
    values: dict[str, float] = {}
    for k in ks:
        size = min(k, len(ballot))
        majority = vote_at_k(classes, correct, size, seed=seed)
        weighted = best = float("nan")
        if is_scored:
            weighted = vote_at_k(classes, correct, size, weights=weights, seed=seed)
            best = best_at_k([record.score for record in ballot], finished, correct, size)
        values |= {
            f"pass@{k}": pass_at_k(correct, size),
            f"majority@{k}": majority,
            f"weighted_majority@{k}": weighted,
            f"best_of@{k}": best,
            f"weighted_gain@{k}": weighted - majority,
            f"best_gain@{k}": best - majority,
        }
    values["auroc_within"] = float("nan")
    if is_scored:
        scores = [record.score for record in ballot]
        values["auroc_within"] = auroc(scores, np.array(correct, bool))
    return values


def _entries(values: dict[str, float], draws: Draws) -> dict[str, dict[str, float]]:
    entries = {}
    for name, value in values.items():
        low, high = interval(draws[name])
        entries[name] = {"value": float(value), "low": float(low), "high": float(high)}
    return entries


def _number(value: float | None) -> float:
    return float("nan") if value is None else value
