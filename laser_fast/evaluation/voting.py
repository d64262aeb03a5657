"""Three ways to choose among the completions of one problem, and whether the choice was right.

    maj@k           argmax_a sum_i 1[a_i = a]
    weighted maj@k  argmax_a sum_i clip(r_s^i, 0, 1) 1[a_i = a]
    best-of-k       the completion with the highest r_s

Equality of answers is decided once per problem by `answer_classes`, since comparing two answers
can be costly; votes then count class numbers, for any subset of the completions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from laser_fast.algorithm.vote import majority_vote


def answer_classes(
    answers: Sequence[str | None],
    same_answer: Callable[[str, str], bool] | None = None,
) -> list[int | None]:
    """Number the distinct answers in the order of their first member; None stays None.

    Each answer is compared with the first member of every class so far, as in `majority_vote`.
    Equal strings are equal without asking `same_answer`.

    Example: `["1/2", "3", "0.5", None]` with mathematical equality is `[0, 1, 0, None]`.
    """
    class_of: dict[str, int] = {}
    first_members: list[str] = []
    for answer in answers:
        if answer is None or answer in class_of:
            continue
        found = len(first_members)
        if same_answer is not None:
            matches = (i for i, member in enumerate(first_members) if same_answer(member, answer))
            found = next(matches, found)
        if found == len(first_members):
            first_members.append(answer)
        class_of[answer] = found
    return [None if answer is None else class_of[answer] for answer in answers]


def vote_is_correct(
    classes: Sequence[int | None],
    is_correct: Sequence[bool],
    weights: Sequence[float] | None = None,
) -> bool:
    """Whether the (weighted) majority answer is right.

    An answer is right when a completion that gave it was graded correct: grading may also ask for
    a form that another completion with the same answer missed. No answer at all is wrong.
    """
    winner = majority_vote(classes, weights)
    if winner is None:
        return False
    return any(
        correct
        for answer_class, correct in zip(classes, is_correct, strict=True)
        if answer_class == winner
    )


def best_is_correct(
    scores: Sequence[float],
    is_finished: Sequence[bool],
    is_correct: Sequence[bool],
) -> bool:
    """Whether the completion with the highest score is correct.

    Unfinished completions lose to every finished one, whose score may be below their 0; ties go
    to the first.
    """
    best = max(range(len(scores)), key=lambda i: (is_finished[i], scores[i]))
    return is_correct[best]
