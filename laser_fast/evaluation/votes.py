r"""What k completions of a problem are worth, estimated from all n >= k that were sampled.

    pass@k          1 - C(n - c, k) / C(n, k), c of n correct (Chen et al. 2021, arXiv 2107.03374)
    best-of-k       the completion with the highest r_s is correct
                    sum_i C(n - 1 - i, k - 1) / C(n, k) correct_(i), (i) by falling score
    maj@k           argmax_a sum_i 1[a_i = a] is right
    weighted maj@k  argmax_a sum_i clip(r_s^i, 0, 1) 1[a_i = a] is right

Each is the mean over all subsets of k completions: unbiased for k fresh samples, and with less
variance than the first k alone. The first two have closed forms. Votes are counted on every subset
where there are at most `MAX_SUBSETS`, else on that many drawn with a fixed seed; k = n is one
subset, the vote itself. The mean of avg@k over subsets is the plain mean for every k.

Ties go to the answer, or the completion, sampled first among the k. Samples are exchangeable, so
that is a fair draw.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import combinations
from math import comb

import numpy as np
from numpy.typing import NDArray

MAX_SUBSETS = 256


def answer_classes(
    answers: Sequence[str | None],
    same_answer: Callable[[str, str], bool] | None = None,
) -> list[int | None]:
    """Number the distinct answers of a problem in the order of their first member.

    Comparing can be costly, so it is done once per problem, here; votes then count numbers, for any
    subset of the completions. Each answer is compared with the first member of every class so far,
    as in `algorithm.vote.majority_vote`; equal strings are equal without asking `same_answer`.

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


def powers_of_two(num_samples: int) -> tuple[int, ...]:
    """The k of a report: 1, 2, 4, ... and `num_samples` itself.

    Example: `powers_of_two(6)` is `(1, 2, 4, 6)`.
    """
    powers = [1 << i for i in range(num_samples.bit_length())]
    return tuple(dict.fromkeys([*(k for k in powers if k <= num_samples), num_samples]))


def pass_at_k(is_correct: Sequence[bool], k: int) -> float:
    """Chance that at least one of k completions is correct."""
    n, c = len(is_correct), sum(is_correct)
    _check("pass_at_k", n, k)
    return 1.0 - comb(n - c, k) / comb(n, k)


def best_at_k(
    scores: Sequence[float], is_finished: Sequence[bool], is_correct: Sequence[bool], k: int
) -> float:
    """Chance that the completion with the highest score of k is correct.

    Unfinished completions lose to every finished one, whose score may be below their 0.
    """
    n = len(scores)
    _check("best_at_k", n, k)
    order = sorted(range(n), key=lambda i: (not is_finished[i], -scores[i], i))
    ways = sum(comb(n - 1 - rank, k - 1) for rank, i in enumerate(order) if is_correct[i])
    return ways / comb(n, k)


def vote_at_k(
    classes: Sequence[int | None],
    is_correct: Sequence[bool],
    k: int,
    *,
    weights: Sequence[float] | None = None,
    seed: int = 0,
) -> float:
    """Chance that the (weighted) majority answer of k completions is right.

    An answer is right when a completion that gave it, among the k, was graded correct: grading may
    also ask for a form that another completion with the same answer missed. No answer is wrong.

    Args:
        classes: answers numbered by `answer_classes`; None casts no vote.
        is_correct: of each completion.
        k: completions that vote.
        weights: votes of each completion, not negative; 1 each by default.
        seed: names the subsets where not all of them are counted.
    """
    n = len(classes)
    _check("vote_at_k", n, k)
    numbers = np.array([-1 if answer is None else answer for answer in classes])
    if numbers.max() < 0:
        return 0.0
    votes = np.ones(n) if weights is None else np.asarray(weights, np.float64)
    subsets = _subsets(n, k, seed)  # [M, k], indices in rising order
    gave = (numbers[:, None] == np.arange(numbers.max() + 1))[subsets]  # [M, k, classes]
    tally = np.where(gave.any(1), (gave * votes[subsets][..., None]).sum(1), -1.0)
    # Of the classes with most votes, the one whose first member comes first.
    is_top = tally == tally.max(1, keepdims=True)
    winner = np.where(is_top, gave.argmax(1), k).argmin(1)
    is_right = (gave & np.asarray(is_correct, bool)[subsets][..., None]).any(1)
    return float(is_right[np.arange(len(subsets)), winner].mean())


@lru_cache(maxsize=64)
def _subsets(n: int, k: int, seed: int) -> NDArray[np.int64]:
    if comb(n, k) <= MAX_SUBSETS:
        return np.array(list(combinations(range(n), k)))
    rng = np.random.default_rng([seed, n, k])
    drawn = np.argsort(rng.random((MAX_SUBSETS, n)), axis=1)[:, :k]
    return np.sort(drawn, axis=1)


def _check(name: str, num_samples: int, k: int) -> None:
    if not 1 <= k <= num_samples:
        raise ValueError(f"{name}: expected 1 <= k <= {num_samples} samples, got k = {k}")
