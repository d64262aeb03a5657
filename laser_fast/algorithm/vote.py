"""Voting over the answers of several completions, plain or weighted by self-scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

Answer = TypeVar("Answer")


def majority_vote(
    answers: Sequence[Answer | None],
    weights: Sequence[float] | None = None,
    *,
    equal: Callable[[Answer, Answer], bool] | None = None,
) -> Answer | None:
    """The answer with the most votes: argmax_a sum_i weights_i 1[answers_i equals a].

    LaSeR's score-weighted voting is `weights = clip(r_s, 0, 1)`. A completion without an answer
    (None) casts no vote; ties go to the answer seen first; without any answer the result is None.

    Args:
        answers: one per completion.
        weights: votes of each completion, not negative; 1 each by default.
        equal: equivalence of two answers, `==` by default. Each answer is compared with the
            first member of every class so far.

    Raises:
        ValueError: if `weights` has another length or a negative or NaN entry.

    Example: `majority_vote(["4", "5", "5", None])` is "5"; with weights `[0.9, 0.2, 0.3, 1.0]`
    it is "4".
    """
    if weights is None:
        weights = [1.0] * len(answers)
    if len(weights) != len(answers):
        raise ValueError(
            f"majority_vote: expected one weight per answer, got {len(weights)} weights for "
            f"{len(answers)} answers"
        )
    same = equal if equal is not None else lambda first, second: first == second
    classes: list[tuple[Answer, float]] = []
    for answer, weight in zip(answers, weights, strict=True):
        if not weight >= 0:
            raise ValueError(f"majority_vote: expected weights >= 0, got {weight}; clip the scores")
        if answer is None:
            continue
        for index, (member, votes) in enumerate(classes):
            if same(member, answer):
                classes[index] = (member, votes + weight)
                break
        else:
            classes.append((answer, weight))
    return max(classes, key=lambda entry: entry[1])[0] if classes else None
