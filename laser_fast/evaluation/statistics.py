"""Everything that one benchmark's samples say, each number with its bootstrap interval.

A report is plain JSON. `metrics` maps a name to {value, low, high}:

    accuracy, truncated, mean_length                           over completions
    mean_length_correct, mean_length_incorrect                 over those of one class
    pass@k, majority@k, weighted_majority@k, best_of@k         over problems (algorithm.vote)
    posterior_majority@k                                       the same
    weighted_gain@k, posterior_gain@k, best_gain@k             minus majority@k, paired
    best_over_mean@k                                           best_of@k minus accuracy, paired
    tpr, tnr, f1, verification_accuracy, auroc, ece, brier,
    mean_correct, mean_incorrect                               of the score (algorithm.verification)
    tpr_corrected, ..., ece_corrected, brier_corrected         after the class-prior correction
    tpr_calibrated, tnr_calibrated, f1_calibrated              at a threshold from other problems
    auroc_within                                               mean over problems with both classes
    samples_RULE, area_RULE                                    votes that stop (evaluation.stopping)

Votes can use `auroc_within`, while `auroc` also tells easy problems from hard ones. None stands for
what is undefined. Completions of one problem are alike, so the bootstrap draws whole problems, P of
P with replacement, and pools their completions. Every statistic sees the same draws, so differences
and means of statistics have intervals too. The ECE of a resample is biased upwards, and more so
with fewer completions: the interval of `ece` may lie above its value.

Threshold, base rate and number of wrong answers, by which calibrated verdicts and posterior votes
read a score, never come from the problem that they read: they are those stored with the model, or
each half of the problems, every second one, takes the other half's. The bootstrap keeps them.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any
from zlib import crc32

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from laser_fast.algorithm.verification import auroc, finished_rate, readings, reliability, verify
from laser_fast.algorithm.vote import (
    Calibrated,
    answer_classes,
    best_at_k,
    pass_at_k,
    powers_of_two,
    vote_at_k,
)
from laser_fast.evaluation.stopping import Ballot, Classes, calibrate_votes, compare, replay, stops
from laser_fast.log.jsonl import plain_value
from laser_fast.log.metrics import RUN, VOTES, shown_at
from laser_fast.log.samples import SampleRecord, group_by_prompt

Report = dict[str, Any]
Draws = dict[str, NDArray[np.float64]]  # by metric, [R]
SameAnswer = Callable[[str, str], bool]

NUM_RESAMPLES = 1000
LEVEL = 0.95
# Scores that were never trained spread by .01-.02 on the sandbox and up to .103 on SmolLM2-135M: as
# vote weights they are noise, and those below 0 would silence their votes.
MIN_SCORE_STD = 0.1
_CURVE = ("stop", "samples", "accuracy")


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportOptions:
    """How samples become numbers; none of it needs a model.

    `ks` defaults to 1, 2, 4, ... and the number of samples. `base_rate` is the pc of the
    class-prior correction, by default that of the benchmark's own finished samples, which knows
    the answers. `calibrated` was measured on other problems.
    """

    ks: tuple[int, ...] | None = None
    base_rate: float | None = None
    calibrated: Calibrated | None = None
    num_resamples: int = NUM_RESAMPLES


def build_report(
    records: Sequence[SampleRecord],
    *,
    name: str = "",
    same_answer: SameAnswer | None = None,
    options: ReportOptions = ReportOptions(),
) -> tuple[Report, Draws]:
    """Compute the report of one benchmark and the bootstrap draws behind its intervals.

    Completions whose grading failed are counted and left out; a problem with fewer than k graded
    ones enters the k column with those it has. When the clipped scores of all finished completions
    spread by no more than `MIN_SCORE_STD`, they say nothing yet: `uses_scores` is False, and the
    weighted and the posterior majority are the plain one; where one is no number, none counts.
    Equal strings are one answer, others if `same_answer` says so. Without `options.num_resamples`
    no votes are replayed that stop. `name` names the resamples, so that benchmarks of one size are
    drawn independently and their mean has its own interval. Records that do not fit together, or a
    k above the samples of a problem, raise ValueError.
    """
    problems = group_by_prompt(records)
    num_samples = len(problems[0])
    ks = options.ks or powers_of_two(num_samples)
    if max(ks) > num_samples or min(ks) < 1:
        raise ValueError(f"build_report: expected 1 <= k <= {num_samples} samples, got {ks}")
    ballots = [[record for record in problem if record.reward is not None] for problem in problems]
    ballots = [ballot for ballot in ballots if ballot]
    graded = [record for ballot in ballots for record in ballot]
    members = np.split(np.arange(len(graded)), np.cumsum([len(b) for b in ballots])[:-1])
    correct = np.array([record.is_correct for record in graded], bool)
    finished = np.array([record.is_finished for record in graded], bool)
    pooled = np.array([correct, ~finished, [r.num_tokens for r in graded]], np.float64)  # [3, N]
    scores = np.array([record.score for record in graded], np.float64)  # nan where not scored
    std = float(scores[finished].clip(0.0, 1.0).std()) if finished.any() else np.nan
    has_scores = bool(finished.any() and np.isfinite(scores[finished]).all())
    uses_scores = has_scores and std > MIN_SCORE_STD
    classes = [answer_classes([record.answer for record in b], same_answer) for b in ballots]
    readers = _readers(ballots, classes, options)
    thresholds = np.array([r.threshold for r, b in zip(readers, ballots, strict=True) for _ in b])
    base_rate = options.base_rate
    if base_rate is None and options.calibrated is not None:
        base_rate = options.calibrated.base_rate
    votes = list(zip(ballots, classes, readers, strict=True))
    rows = [_problem_values(*vote, ks, has_scores, uses_scores) for vote in votes]
    curves = _curves(votes if options.num_resamples else (), num_samples, uses_scores)
    table = np.array([list(row.values()) for row in rows])  # [P, S]
    is_known, table = np.isfinite(table), np.nan_to_num(table)

    def statistics(problems: NDArray[np.int64]) -> dict[str, float]:
        at = np.concatenate([members[i] for i in problems])
        with np.errstate(invalid="ignore"):
            means = table[problems].sum(0) / is_known[problems].sum(0)
            lengths = [pooled[2, at] @ part / part.sum() for part in (correct[at], ~correct[at])]
        names = [*rows[0], "accuracy", "truncated", "mean_length"]
        values = dict(zip(names, [*means.tolist(), *pooled[:, at].mean(1).tolist()], strict=True))
        values |= zip(("mean_length_correct", "mean_length_incorrect"), lengths, strict=True)
        if has_scores:
            read = {"is_finished": finished[at], "threshold": thresholds[at]}
            values |= verify(scores[at], correct[at], base_rate=base_rate, **read)
        if curves:
            values |= compare({rule: of[problems].mean(0) for rule, of in curves.items()})
        return values

    values, draws = {}, {}
    if graded:
        values = statistics(np.arange(len(ballots)))
        drawn = bootstrap(
            lambda problems: list(statistics(problems).values()),
            len(ballots),
            num_resamples=options.num_resamples,
            seed=(0, crc32(name.encode())),
        )
        draws = dict(zip(values, drawn.reshape(-1, len(values)).T, strict=True))
    stated = readings(scores, correct, finished, base_rate) if has_scores and graded else {}
    report = {
        "num_prompts": len(problems),
        "samples_per_prompt": num_samples,
        "num_failed_grades": len(records) - len(graded),
        "ks": list(ks),
        "uses_scores": uses_scores,
        "score_std": std,
        "base_rate": finished_rate(correct, finished) if base_rate is None else base_rate,
        "calibrated": asdict(calibrate_votes(ballots, classes)) if has_scores else None,
        "calibrated_by": "the other half" if options.calibrated is None else "the model's file",
        "interval": LEVEL,
        "metrics": _entries(values, draws),
        "stopping": {
            rule: dict(zip(_CURVE, (stops(rule, num_samples), *of.mean(0).tolist()), strict=True))
            for rule, of in curves.items()
        },
        "reliability": {name.lstrip("_") or "raw": _bins(p, correct) for name, p in stated.items()},
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
    sizes = ("num_prompts", "samples_per_prompt", "num_failed_grades", "uses_scores", "score_std")
    summary = {name: report[name] for name in sizes}
    for metric in shown_at(RUN):
        key = f"{metric.name}@{k}" if metric in VOTES else metric.name
        summary[metric.name] = report["metrics"].get(key, {}).get("value")
    return summary


def average(reports: Sequence[Report], draws: Sequence[Draws]) -> Report:
    """Macro average over benchmarks of every metric that all of them have, as in the paper."""
    shared = [name for name in draws[0] if all(name in other for other in draws)]
    # A benchmark without a value (None, so nan) leaves the average undefined: it would not compare.
    found = [[report["metrics"][name]["value"] for name in shared] for report in reports]
    values = dict(zip(shared, np.array(found, np.float64).mean(0).tolist(), strict=True))
    means = {name: np.mean([other[name] for other in draws], axis=0) for name in shared}
    ks = sorted(set.intersection(*(set(report["ks"]) for report in reports)))
    metrics = _entries(values, means)
    return plain_value({"num_benchmarks": len(reports), "ks": ks, "metrics": metrics})


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


def interval(draws: NDArray[np.float64], *, level: float = LEVEL) -> NDArray[np.float64]:
    """Low and high [2, ...] of the percentile interval of defined draws [R, ...]; nan without."""
    known = np.isfinite(draws).any(0)
    if not known.any():
        return np.full((2, *known.shape), np.nan)
    tail = 100 * (1 - level) / 2
    # nanpercentile warns about columns without a value, for which nan is the answer.
    bounds = np.nanpercentile(np.where(known, draws, 0.0), [tail, 100 - tail], axis=0)
    return np.where(known, bounds, np.nan)


def _readers(
    ballots: Sequence[Ballot], classes: Sequence[Classes], options: ReportOptions
) -> list[Calibrated]:
    """By what the scores of each problem are read, in which its own answers have no part."""
    halves = [calibrate_votes(ballots[i::2], classes[i::2]) for i in (1, 0)]
    readers = [options.calibrated or halves[i % 2] for i in range(len(ballots))]
    if options.base_rate is None:
        return readers
    return [replace(reader, base_rate=options.base_rate) for reader in readers]


def _curves(
    votes: Sequence[tuple[Ballot, Classes, Calibrated]], num_samples: int, uses_scores: bool
) -> dict[str, NDArray[np.float64]]:
    """The votes replayed: by rule, mean samples and share right of each problem, [P, 2, S]."""
    replayed = [
        replay(ballot, numbers, reader if uses_scores else None, num_samples)
        for ballot, numbers, reader in votes
    ]
    return {rule: np.array([one[rule] for one in replayed]) for rule in (replayed or [{}])[0]}


def _problem_values(
    ballot: Ballot,
    classes: Classes,
    reader: Calibrated,
    ks: Sequence[int],
    has_scores: bool,
    uses_scores: bool,
) -> dict[str, float]:
    """What one problem contributes to the means over problems."""
    correct = [record.is_correct for record in ballot]
    finished = [record.is_finished for record in ballot]
    scores = [record.score or 0.0 for record in ballot]
    weights = evidence = None
    judged = classes
    if uses_scores:
        weights = [min(max(score, 0.0), 1.0) for score in scores]
        evidence = [reader.evidence(score) for score in scores]
        # Without a score there is no evidence, not even against the answer.
        judged = [number if done else None for number, done in zip(classes, finished, strict=True)]
    values: dict[str, float] = {}
    for k in ks:
        size = min(k, len(ballot))
        majority = vote_at_k(classes, correct, size)
        weighted = posterior = best = np.nan
        if has_scores:
            weighted = vote_at_k(classes, correct, size, weights=weights)
            posterior = vote_at_k(judged, correct, size, weights=evidence)
            best = best_at_k(scores, finished, correct, size)
        values |= {
            f"pass@{k}": pass_at_k(correct, size),
            f"majority@{k}": majority,
            f"weighted_majority@{k}": weighted,
            f"posterior_majority@{k}": posterior,
            f"best_of@{k}": best,
            f"weighted_gain@{k}": weighted - majority,
            f"posterior_gain@{k}": posterior - majority,
            f"best_gain@{k}": best - majority,
            f"best_over_mean@{k}": best - pass_at_k(correct, 1),
        }
    return values | {"auroc_within": auroc(scores, correct) if has_scores else np.nan}


def _bins(probabilities: ArrayLike, correct: ArrayLike) -> list[dict[str, float]]:
    """The bins of a reliability diagram, empty ones left out."""
    bins = torch.stack(reliability(probabilities, correct), 1).tolist()
    return [{"count": int(n), "confidence": p, "accuracy": share} for n, p, share in bins if n]


def _entries(values: dict[str, float], draws: Draws) -> dict[str, dict[str, float]]:
    bounds = {name: interval(draws[name]).tolist() for name in values}
    return {k: {"value": values[k], "low": low, "high": high} for k, (low, high) in bounds.items()}
