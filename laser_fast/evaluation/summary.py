"""The report of one evaluation: pure, from the records of all ranks in any order."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, pstdev
from typing import NamedTuple

import numpy as np

from laser_fast.evaluation.metrics import Verification, verify
from laser_fast.evaluation.samples import SampleRecord
from laser_fast.evaluation.voting import answer_classes, best_is_correct, vote_is_correct

# Scores of a model that never trained them spread by .01-.02: as vote weights they are noise, and
# those below 0 would silence their votes.
MIN_SCORE_STD = 0.1


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalReport:
    """The result of one evaluation over k completions of each prompt; nan where undefined.

    Completions whose grading failed are counted in `num_failed_grades` and left out of everything
    else. `accuracy` is avg@k, the mean over completions; `majority`, `weighted_majority` and
    `best_of` are shares of the problems for k = `samples_per_prompt`. When the clipped scores of
    all finished completions spread by no more than `MIN_SCORE_STD`, the score says nothing yet:
    `uses_scores` is False and `weighted_majority` is the plain one.
    """

    num_prompts: int
    samples_per_prompt: int
    num_failed_grades: int
    accuracy: float
    majority: float
    weighted_majority: float
    best_of: float
    uses_scores: bool
    score_std: float
    truncated: float
    mean_length: float
    verification: Verification

    def to_dict(self) -> dict[str, float | int | bool | None]:
        """The report flat, for JSON and dashboards: nan as None, `verification` unfolded.

        The verdict's own accuracy becomes `verification_accuracy`.
        """
        values = asdict(self)
        verification = values.pop("verification")
        values["verification_accuracy"] = verification.pop("accuracy")
        values |= verification
        return {
            key: None if isinstance(value, float) and math.isnan(value) else value
            for key, value in values.items()
        }


def summarize(
    records: Sequence[SampleRecord],
    *,
    same_answer: Callable[[str, str], bool] | None = None,
) -> EvalReport:
    """Compute the report from the records of all prompts, in any order.

    Args:
        records: k records of each prompt. Either every finished one has a score, or none has:
            then what needs scores is nan.
        same_answer: equivalence of two answers in the votes; equal strings always are.

    Raises:
        ValueError: no records, a (prompt, sample) twice, prompts with different numbers of
            samples, or scores on a part of the finished completions only.
    """
    # One order for one set of records: sums of floats then do not depend on who gathered them.
    records = sorted(records, key=lambda record: (record.prompt_id, record.sample))
    problems = group_by_prompt(records)
    is_scored = has_scores(records)
    graded = [record for record in records if record.reward is not None]
    scored = graded if is_scored else []
    is_used, score_std = uses_scores(scored)
    ballots = [[record for record in problem if record.reward is not None] for problem in problems]
    outcomes = [_vote(ballot, same_answer, is_scored, is_used) for ballot in ballots if ballot]
    return EvalReport(
        num_prompts=len(problems),
        samples_per_prompt=len(problems[0]),
        num_failed_grades=len(records) - len(graded),
        accuracy=_mean([record.is_correct for record in graded]),
        majority=_mean([outcome.majority for outcome in outcomes]),
        weighted_majority=_mean([outcome.weighted for outcome in outcomes]),
        best_of=_mean([outcome.best for outcome in outcomes]),
        uses_scores=is_used,
        score_std=score_std,
        truncated=_mean([not record.is_finished for record in graded]),
        mean_length=_mean([record.num_tokens for record in graded]),
        verification=verify(
            [record.score for record in scored],
            np.array([record.is_correct for record in scored], bool),
            is_finished=np.array([record.is_finished for record in scored], bool),
        ),
    )


def group_by_prompt(records: Sequence[SampleRecord]) -> list[list[SampleRecord]]:
    """The k records of each prompt, samples in order, prompts in the order of their first record.

    Raises:
        ValueError: no records, a (prompt, sample) twice, or prompts with different k.
    """
    if not records:
        raise ValueError("group_by_prompt: expected at least one record, got none")
    problems: dict[str, dict[int, SampleRecord]] = {}
    for record in records:
        samples = problems.setdefault(record.prompt_id, {})
        if record.sample in samples:
            raise ValueError(
                f"group_by_prompt: sample {record.sample} of prompt {record.prompt_id} appears "
                "twice; gather every rank's records once and give each prompt its own id"
            )
        samples[record.sample] = record
    sizes = {prompt_id: len(samples) for prompt_id, samples in problems.items()}
    expected = next(iter(sizes.values()))
    for prompt_id, size in sizes.items():
        if size != expected:
            raise ValueError(
                f"group_by_prompt: expected {expected} samples of every prompt, "
                f"got {size} of {prompt_id}"
            )
    return [[samples[index] for index in sorted(samples)] for samples in problems.values()]


class _Outcome(NamedTuple):
    """Whether each rule chose a right answer for one problem, nan where a rule needs scores."""

    majority: float
    weighted: float
    best: float


def _vote(
    ballot: Sequence[SampleRecord],
    same_answer: Callable[[str, str], bool] | None,
    is_scored: bool,
    is_used: bool,
) -> _Outcome:
    classes = answer_classes([record.answer for record in ballot], same_answer)
    correct = [record.is_correct for record in ballot]
    majority = vote_is_correct(classes, correct)
    if not is_scored:
        return _Outcome(majority, math.nan, math.nan)
    weights = [vote_weight(record.score) for record in ballot] if is_used else None
    finished = [record.is_finished for record in ballot]
    return _Outcome(
        majority,
        vote_is_correct(classes, correct, weights),
        best_is_correct([record.score for record in ballot], finished, correct),
    )


def has_scores(records: Sequence[SampleRecord]) -> bool:
    """Whether scores were measured: for all finished completions or for none.

    Raises:
        ValueError: for a part of them.
    """
    finished = [record for record in records if record.is_finished]
    num_scored = sum(record.score is not None for record in finished)
    if num_scored not in (0, len(finished)):
        raise ValueError(
            f"summarize: expected a score for all {len(finished)} finished completions or for "
            f"none, got {num_scored}; ask the engine for scores (sampling.needs_score)"
        )
    return num_scored > 0


def uses_scores(scored: Sequence[SampleRecord]) -> tuple[bool, float]:
    """Whether the votes may be weighted by these scores, and the std that decides it."""
    std = _std([vote_weight(record.score) for record in scored if record.is_finished])
    return std > MIN_SCORE_STD, std


def vote_weight(score: float) -> float:
    """A score as a vote: clipped to [0, 1]."""
    return min(max(score, 0.0), 1.0)


def _std(values: Sequence[float]) -> float:
    return pstdev(values) if values else math.nan


def _mean(values: Sequence[float]) -> float:
    return fmean(values) if values else math.nan
