"""Voting over the answers of completions, and what k completions are worth, from all n >= k.

    maj@k           argmax_a sum_i 1[a_i = a] is right
    weighted maj@k  argmax_a sum_i clip(r_s^i, 0, 1) 1[a_i = a] is right
    pass@k          1 - C(n - c, k) / C(n, k), c of n correct (Chen et al. 2021, arXiv 2107.03374)
    best-of-k       the completion with the highest r_s is correct
                    sum_i C(n - 1 - i, k - 1) / C(n, k) correct_(i), (i) by falling score
    posterior maj@k argmax_a V_a is right,   V_a = sum_i max(log(m p_i / (1 - p_i)), 0) 1[a_i = a]
                    p_i = pc r / (pc r + (1 - pc)(1 - r)),   r = clip(r_s, eps, 1 - eps)

But for the maximum the last is Bayes' rule where the right answer is any of m + 1, sample i gives
it with probability p_i, its score after the class-prior correction, and else any of the m wrong
ones alike:

    P(a | samples) = exp(V_a) / (sum_seen exp(V_b) + max(m + 1 - num_seen, 0))

After one sample that is p_1, or 1 / (m + 1) if that is more. m = 1 is the plain sum of log-odds; a
large m says that two samples hardly agree by chance and comes near to maj@k. Errors of one model
repeat themselves, so m is not the number of possible answers but 1 / P(two wrong samples of a
problem agree). A vote that stops once the largest posterior suffices is that of CGES (arXiv
2511.02603). The model takes samples of a problem as independent given p_i; what they share, a hard
problem, makes it too sure of itself.

By Bayes' rule alone a sample with p_i < 1 / (m + 1) counts against its own answer, so that of a
problem whose scores are all low the answer with least support wins. But low scores throughout say
that the problem is hard, which is no reason to prefer what was said once: no sample adds less than
`LEAST`. Where samples are independent that costs 1 vote of 100 (five samples, m = 3, known p_i);
over six runs of SmolLM2-135M votes of 8 were right in .593 of the problems without it, in .605 with
it, and in .606 by maj@8. The fault was found on these samples.

Each estimate at k is the mean over all subsets of k completions: unbiased for k fresh samples, and
with less variance than the first k. pass@k and best-of-k have closed forms. Votes are counted on
every subset, or on `MAX_SUBSETS` drawn with a fixed seed where there are more. Ties go to the
answer, or the completion, sampled first among the k: samples are exchangeable, so that is a fair
draw.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations
from math import comb, exp, isnan, log
from random import Random
from typing import Generic, TypeVar

Answer = TypeVar("Answer")
MAX_SUBSETS = 256
# A clipped score of 1 would decide alone. Of the quickstart's completions with r_s >= .95, 1.6% are
# wrong, a class-balanced posterior of .85: none has earned a claim beyond .95.
MARGIN = 0.05
# Breaks ties of answers without evidence by their number of samples, as a plain vote.
LEAST = 1e-6


@dataclass(frozen=True, kw_only=True, slots=True)
class Calibrated:
    """What labelled completions tell of a model's scores, for other problems of their kind."""

    threshold: float = 0.5
    """A score above it is the verdict "correct"."""
    base_rate: float = 0.5
    """pc, the share of correct ones among the finished completions."""
    num_wrong: float = 1.0
    """m: 1 / P(two wrong samples of one problem have the same answer); at least 1."""

    def evidence(self, score: float) -> float:
        """What one sample with this score r_s, not clipped, adds to its answer's V, in nats."""
        r = min(max(score, MARGIN), 1 - MARGIN)
        pc = min(max(self.base_rate, 1e-3), 1 - 1e-3)  # a few hundred may all be right, or wrong
        return max(log(self.num_wrong * r / (1 - r) * pc / (1 - pc)), LEAST)


# A poor guess: the base rate .5 for the quickstart's .92 costs votes of 2 samples .07 of accuracy.
UNCALIBRATED = Calibrated()


class PosteriorVote(Generic[Answer]):
    """A posterior vote that samples enter one by one; answers are hashable.

    Example: two samples "7" of score .7 and one "8" of score .8 make "7" the winner with
    `confidence` (7/3)^2 / ((7/3)^2 + 4) = .58 at the defaults.
    """

    def __init__(
        self,
        calibrated: Calibrated = UNCALIBRATED,
        *,
        equal: Callable[[Answer, Answer], bool] | None = None,
    ) -> None:
        self.calibrated = calibrated
        self.equal = equal
        self.votes: dict[Answer, float] = {}  # V by answer, in the order of the first samples

    def add(self, answer: Answer | None, score: float | None) -> None:
        """Count a sample; without answer or score, as of an unfinished one, it says nothing."""
        if answer is None or score is None or isnan(score):
            return
        if answer not in self.votes and self.equal is not None:
            answer = next((known for known in self.votes if self.equal(known, answer)), answer)
        self.votes[answer] = self.votes.get(answer, 0.0) + self.calibrated.evidence(score)

    @property
    def winner(self) -> Answer | None:
        """The most probable answer, the first seen of a tie; None without any."""
        return max(self.votes, key=self.votes.__getitem__, default=None)

    @property
    def confidence(self) -> float:
        """P(the winner is right | samples); 0 without any answer."""
        top = max([*self.votes.values(), 0.0])  # exponents stay below 0
        seen = [exp(votes - top) for votes in self.votes.values()]
        num_unseen = max(self.calibrated.num_wrong + 1 - len(seen), 0.0)
        return max(seen, default=0.0) / (sum(seen) + num_unseen * exp(-top))


def majority_vote(
    answers: Sequence[Answer | None],
    weights: Sequence[float] | None = None,
    *,
    equal: Callable[[Answer, Answer], bool] | None = None,
) -> Answer | None:
    """The answer with the most votes: argmax_a sum_i weights_i 1[answers_i equals a].

    Ties go to the answer seen first; without any answer the result is None.

    Args:
        answers: one per completion; None casts no vote.
        weights: votes of each completion, not negative; 1 each by default. LaSeR's score-weighted
            voting is `weights = clip(r_s, 0, 1)`.
        equal: equivalence of answers beyond `==`; each one is compared with the first member of
            every class so far.

    Example: `["4", "5", "5", None]` gives "5", and "4" with weights `[0.9, 0.2, 0.3, 1.0]`.
    """
    weights = [1.0] * len(answers) if weights is None else weights
    if len(weights) != len(answers):
        found = f"{len(weights)} weights for {len(answers)} answers"
        raise ValueError(f"majority_vote: expected one weight per answer, got {found}")
    for weight in weights:
        if not weight >= 0:
            raise ValueError(f"majority_vote: expected weights >= 0, got {weight}; clip the scores")
    classes = answer_classes(answers, equal)
    winner = _winner(classes, weights, range(len(classes)))
    return None if winner is None else answers[classes.index(winner)]


def answer_classes(
    answers: Sequence[Answer | None], same_answer: Callable[[Answer, Answer], bool] | None = None
) -> list[int | None]:
    """Number the distinct answers: `["1/2", "3", "0.5", None]` may be `[0, 1, 0, None]`.

    Comparing can be costly, so it is done once per problem; votes then count numbers, for any
    subset of the completions. `same_answer` is not asked about answers that are `==`.
    """
    answers = list(answers)
    first_members: list[Answer] = []
    classes: list[int | None] = []
    for answer in answers:
        number, seen = None, answers.index(answer)
        if seen < len(classes):
            number = classes[seen]
        elif answer is not None:
            same = (same_answer and same_answer(member, answer) for member in first_members)
            number = next((i for i, is_same in enumerate(same) if is_same), len(first_members))
            if number == len(first_members):
                first_members.append(answer)
        classes.append(number)
    return classes


def powers_of_two(num_samples: int) -> tuple[int, ...]:
    """The k of a report: 1, 2, 4, ... and `num_samples` itself; 1, 2, 4, 6 for six samples."""
    powers = [1 << i for i in range(num_samples.bit_length())]
    return tuple(dict.fromkeys([*powers, num_samples]))


def pass_at_k(is_correct: Sequence[bool], k: int) -> float:
    """Chance that at least one of k completions is correct."""
    n = _num_samples("pass_at_k", is_correct, k)
    return 1.0 - comb(n - sum(is_correct), k) / comb(n, k)


def best_at_k(
    scores: Sequence[float], is_finished: Sequence[bool], is_correct: Sequence[bool], k: int
) -> float:
    """Chance that the completion with the highest score of k is correct."""
    n = _num_samples("best_at_k", scores, k)
    # Unfinished completions lose to every finished one, whose score may be below their 0.
    order = sorted(range(n), key=lambda i: (not is_finished[i], -scores[i]))
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

    `classes` are those of `answer_classes`; None casts no vote. An answer is right when a
    completion that gave it, among the k, was graded correct: grading may also ask for a form that
    another completion with the same answer missed. No answer is wrong. `seed` names the subsets.
    """
    n = _num_samples("vote_at_k", classes, k)
    weights = [1.0] * n if weights is None else weights
    subsets = _subsets(n, k, seed)
    num_right = 0
    for subset in subsets:
        winner = _winner(classes, weights, subset)
        if winner is not None:
            num_right += any(is_correct[i] for i in subset if classes[i] == winner)
    return num_right / len(subsets)


def _winner(
    classes: Sequence[int | None], weights: Sequence[float], members: Iterable[int]
) -> int | None:
    """The class with most votes of the members, the first seen of a tie; None without answers."""
    votes: dict[int, float] = {}
    for i in members:
        if (number := classes[i]) is not None:
            votes[number] = votes.get(number, 0.0) + weights[i]
    return max(votes, key=votes.__getitem__, default=None)


@lru_cache(maxsize=64)
def _subsets(n: int, k: int, seed: int) -> list[Sequence[int]]:
    """Members of the subsets, each in rising order."""
    if comb(n, k) <= MAX_SUBSETS:
        return list(combinations(range(n), k))
    rng = Random(f"{seed} {n} {k}")
    return [sorted(rng.sample(range(n), k)) for _ in range(MAX_SUBSETS)]


def _num_samples(name: str, samples: Sequence[object], k: int) -> int:
    n = len(samples)
    if not 1 <= k <= n:
        raise ValueError(f"{name}: expected 1 <= k <= {n} samples, got k = {k}")
    return n
