"""Votes that stop early, replayed on samples that are there: accuracy against mean samples.

    posterior  stop when the winner's posterior reaches a threshold (algorithm.vote)
    agreement  stop when the first answer leads the second by k plain votes
    fixed      stop after k samples; plain votes

Samples are exchangeable, so each problem is replayed in `NUM_ORDERS` random orders. The points of a
rule, one per threshold or k, are joined by lines: between two of them one would choose at random.
The point that suffices is read off the same problems, so the number of samples that it takes is a
little too good, for each of the rules.
"""

import math
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from random import Random

import numpy as np
from numpy.typing import NDArray

from laser_fast.algorithm.verification import best_threshold, finished_rate
from laser_fast.algorithm.vote import UNCALIBRATED, Calibrated, PosteriorVote
from laser_fast.log.samples import SampleRecord

Ballot = Sequence[SampleRecord]  # one problem's graded completions
Classes = Sequence[int | None]  # of `answer_classes`, one per completion

NUM_ORDERS = 16
TOLERANCE = 0.005  # below the accuracy of all samples that counts as reaching it
_POSTERIORS = (*(1 - 2 ** (-i / 2) for i in range(23)), math.inf)  # 0, .5, .75, ... .9995, never


def stops(rule: str, num_samples: int) -> list[float]:
    """What a rule may wait for, from one sample to all of them."""
    return list(_POSTERIORS if rule == "posterior" else range(num_samples + 1))


def calibrate_votes(ballots: Sequence[Ballot], classes: Sequence[Classes]) -> Calibrated:
    """What scored completions tell of the scores; the defaults without a finished one."""
    records = [record for ballot in ballots for record in ballot]
    correct, finished = ([getattr(r, f"is_{x}") for r in records] for x in ("correct", "finished"))
    if not any(finished):
        return UNCALIBRATED
    pairs = agreeing = 1  # as if one pair had agreed: no pair at all is no reason to trust one
    for ballot, numbers in zip(ballots, classes, strict=True):
        members = [(n, r) for n, r in zip(numbers, ballot, strict=True) if n is not None]
        wrong = Counter(n for n, r in members if r.is_finished and not r.is_correct)
        pairs += math.comb(wrong.total(), 2)
        agreeing += sum(math.comb(count, 2) for count in wrong.values())
    return Calibrated(
        threshold=best_threshold([record.score or 0.0 for record in records], correct),
        base_rate=finished_rate(correct, finished),
        num_wrong=pairs / agreeing,
    )


def replay(
    ballot: Ballot, classes: Classes, calibrated: Calibrated | None, num_samples: int
) -> dict[str, NDArray[np.float64]]:
    """Mean samples and share right [2, S] of one problem, by rule and then by its `stops`.

    Without calibration there is no posterior.
    """
    scores = [record.score if record.is_finished else None for record in ballot]
    members = list(zip(classes, scores, [record.is_correct for record in ballot], strict=True))
    reader = calibrated or UNCALIBRATED
    walks = np.array([_walk([members[i] for i in o], reader) for o in _orders(len(ballot))])
    found = {}
    for rule, signal, is_right in (("posterior", 0, 1), ("agreement", 2, 3), ("fixed", 4, 3)):
        if rule != "posterior" or calibrated is not None:
            reached = walks[:, :, signal, None] >= np.array(stops(rule, num_samples))  # [O, n, S]
            last = np.where(reached.any(1), reached.argmax(1), len(ballot) - 1)
            right = np.take_along_axis(walks[:, :, is_right], last, 1)
            found[rule] = np.array([last + 1, right]).mean(1)
    return found


def compare(curves: dict[str, NDArray[np.float64]]) -> dict[str, float]:
    """What curves [2, S] say: samples that reach the plain vote of all, and areas between them.

    An area is divided by the range of samples, so it is the mean gain in accuracy. nan where a
    rule is missing or does not reach that accuracy.
    """
    samples = np.linspace(1, curves["fixed"][0, -1], 256)
    accuracy = {rule: np.interp(samples, *curve) for rule, curve in curves.items()}
    own, enough = accuracy.get("posterior", np.nan), curves["fixed"][1, -1] - TOLERANCE
    values = {f"area_{r}": float(np.mean(own - accuracy[r])) for r in ("fixed", "agreement")}
    for rule in ("posterior", "agreement", "fixed"):
        reached = accuracy.get(rule, np.full(1, np.nan)) >= enough - 1e-9
        values[f"samples_{rule}"] = float(samples[reached.argmax()]) if reached.any() else math.nan
    return values


def _walk(
    members: Sequence[tuple[int | None, float | None, bool]], calibrated: Calibrated
) -> list[tuple[float, ...]]:
    """After each (class, score, correct): posterior, is its winner right, lead, its own, count."""
    vote: PosteriorVote[int] = PosteriorVote(calibrated)
    counts: Counter[int] = Counter()
    right: set[int | None] = set()
    rows: list[tuple[float, ...]] = []
    for place, (number, score, is_correct) in enumerate(members, 1):
        if number is not None:
            counts[number] += 1
            vote.add(number, score)
            right |= {number} if is_correct else set()
        (first, votes), (_, second) = (*counts.most_common(2), (None, 0), (None, 0))[:2]
        rows.append((vote.confidence, vote.winner in right, votes - second, first in right, place))
    return rows


@lru_cache(maxsize=64)
def _orders(n: int) -> list[list[int]]:
    rng = Random(n)
    return [rng.sample(range(n), n) for _ in range(NUM_ORDERS)]
