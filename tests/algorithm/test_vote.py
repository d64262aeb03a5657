"""Plain and weighted votes against hand tables; estimates at k against brute force over subsets."""

import inspect
import math
import random
from fractions import Fraction
from itertools import combinations
from statistics import fmean

import pytest

from laser_fast.algorithm.vote import (
    LEAST,
    MARGIN,
    MAX_SUBSETS,
    Calibrated,
    PosteriorVote,
    answer_classes,
    best_at_k,
    majority_vote,
    pass_at_k,
    powers_of_two,
    vote_at_k,
)


def test_signature_is_the_published_one():
    parameters = inspect.signature(majority_vote).parameters
    assert list(parameters) == ["answers", "weights", "equal"]
    assert [p.default for p in parameters.values()][1:] == [None, None]
    assert parameters["weights"].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    assert parameters["equal"].kind is inspect.Parameter.KEYWORD_ONLY


@pytest.mark.parametrize(
    ("answers", "weights", "winner"),
    [
        (["4", "5", "5", None], None, "5"),
        (["4", "5", "5", None], [0.9, 0.2, 0.3, 1.0], "4"),
        # Ties go to the first seen, whatever comes between.
        (["b", "a", "a", "b"], None, "b"),
        (["a", "b", "c"], None, "a"),
        (["a", "b"], [0.5, 0.5], "a"),
        # No answer casts no vote, even as the largest class.
        ([None, None, None, "7"], None, "7"),
        ([None, "7"], [100.0, 0.0], "7"),
        ([None, None], None, None),
        ([], None, None),
        ([], [], None),
        # Votes of no weight are still ordered by sight.
        (["a", "b", "b"], [0, 0, 0], "a"),
        (["a", "b", "b"], [0, 0, 1e-9], "b"),
        # Answers need not be text, and may be false.
        ([0, 1, 0], None, 0),
        (["", "x", ""], None, ""),
    ],
)
def test_vote_by_hand(answers, weights, winner):
    assert majority_vote(answers, weights) == winner


def test_equivalence_joins_classes_under_the_first_member():
    answers = ["0.5", "2", "1/2", "2.0", "0.50"]
    assert majority_vote(answers) == "0.5"  # five classes of one
    numbers = {"0.5": 0.5, "1/2": 0.5, "0.50": 0.5, "2": 2.0, "2.0": 2.0}
    compared = []

    def equal(first, second):
        compared.append((first, second))
        return numbers[first] == numbers[second]

    assert majority_vote(answers, equal=equal) == "0.5"
    assert majority_vote(answers, [0.1, 1, 0.1, 1, 0.1], equal=equal) == "2"
    # Only representatives are compared, in order.
    assert compared[:3] == [("0.5", "2"), ("0.5", "1/2"), ("0.5", "2.0")]


def test_equivalence_is_never_asked_about_no_answer():
    def equal(first, second):
        assert first is not None and second is not None
        return first == second

    assert majority_vote([None, "a", None, "a"], equal=equal) == "a"


@pytest.mark.parametrize("weight", [-0.1, float("nan"), float("-inf")])
def test_weights_must_be_votes(weight):
    with pytest.raises(ValueError, match=f"expected weights >= 0, got {weight}; clip the scores"):
        majority_vote(["a", "b"], [1.0, weight])
    # Also that of a completion without an answer.
    with pytest.raises(ValueError, match="clip the scores"):
        majority_vote(["a", None], [1.0, weight])


@pytest.mark.parametrize("weights", [[1.0], [1.0, 1.0, 1.0], []])
def test_one_weight_per_answer(weights):
    with pytest.raises(ValueError, match=f"got {len(weights)} weights for 2 answers"):
        majority_vote(["a", "b"], weights)


def vote_is_correct(classes, correct, weights=None):
    """The definition: some completion of the winning answer is correct."""
    winner = majority_vote(classes, weights)
    return any(c for own, c in zip(classes, correct, strict=True) if own == winner is not None)


def best_is_correct(scores, finished, correct):
    """The definition: the first of the finished completions with the highest score."""
    return correct[max(range(len(scores)), key=lambda i: (finished[i], scores[i]))]


def _same_fraction(first: str, second: str) -> bool:
    return Fraction(first) == Fraction(second)


def test_classes_follow_the_first_member():
    answers = ["1/2", "3", None, "0.5", "3", "2/4"]
    assert answer_classes(answers) == [0, 1, None, 2, 1, 3]
    assert answer_classes(answers, _same_fraction) == [0, 1, None, 0, 1, 0]


def test_equal_answers_are_compared_once():
    asked = []

    def same(first, second):
        asked.append((first, second))
        return False

    assert answer_classes(["1", "2", "1", "2", "2"], same) == [0, 1, 0, 1, 1]
    assert asked == [("1", "2")]
    assert majority_vote(["1", "2", "1", "2", "2"], equal=same) == "2"


def test_answers_need_no_hash():
    assert majority_vote(([1], [2], [2])) == [2]
    assert majority_vote([[1], [2], [-1]], equal=lambda a, b: a[0] == -b[0]) == [1]


def test_classes_give_the_vote_of_majority_vote():
    answers = ["3", "1/2", "3", "0.5", "2/4", None]
    weights = [0.9, 0.1, 0.9, 0.2, 0.3, 1.0]
    classes = answer_classes(answers, _same_fraction)
    assert answers[classes.index(majority_vote(classes))] == majority_vote(
        answers, equal=_same_fraction
    )
    assert answers[classes.index(majority_vote(classes, weights))] == majority_vote(
        answers, weights, equal=_same_fraction
    )


def test_majority_and_weighted_majority():
    classes = [0, 0, 0, 1, 1, None]
    correct = [False, False, False, True, True, False]
    assert vote_at_k(classes, correct, 6) == 0.0
    assert vote_at_k(classes, correct, 6, weights=[0.1, 0.1, 0.1, 0.9, 0.9, 1.0]) == 1.0
    # All weights 0: a tie, which the first answer wins.
    assert vote_at_k(classes, correct, 6, weights=[0.0] * 6) == 0.0
    assert vote_at_k(classes[::-1], correct[::-1], 6, weights=[0.0] * 6) == 1.0


def test_answer_is_right_if_one_of_its_completions_was_graded_correct():
    """The first member has the right answer in a form that the grader refused."""
    assert vote_at_k([0, 0, 1], [False, True, False], 3) == 1.0


def test_no_answer_is_wrong():
    assert vote_at_k([None, None], [False, False], 2) == vote_at_k([None] * 2, [True] * 2, 1) == 0.0


def test_best_by_score():
    assert best_at_k([0.2, 0.7, 0.7], [True, True, True], [False, True, False], 3) == 1.0
    # A finished completion beats an unfinished one, though its score is below 0.
    assert best_at_k([0.0, -0.1], [False, True], [False, True], 2) == 1.0


def _problem(seed, n=7):
    """Random answers with ties: three classes or none, coarse weights, some unfinished."""
    rng = random.Random(seed)
    classes = [rng.choice([0, 0, 1, 2, None]) for _ in range(n)]
    correct = [answer == 1 or (answer == 0 and rng.random() < 0.1) for answer in classes]
    weights = [rng.choice([0.0, 0.25, 0.5, 1.0]) for _ in range(n)]
    finished = [rng.random() < 0.8 for _ in range(n)]
    return classes, correct, weights, finished


def _pick(values, subset):
    return [values[i] for i in subset]


def test_powers_of_two_end_with_the_number_of_samples():
    assert powers_of_two(1) == (1,)
    assert powers_of_two(6) == (1, 2, 4, 6)
    assert powers_of_two(32) == (1, 2, 4, 8, 16, 32)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("k", [1, 2, 3, 6, 7])
def test_estimates_are_means_over_all_subsets(seed, k):
    classes, correct, weights, finished = _problem(seed)
    subsets = list(combinations(range(7), k))
    assert pass_at_k(correct, k) == pytest.approx(fmean(any(_pick(correct, s)) for s in subsets))
    assert best_at_k(weights, finished, correct, k) == pytest.approx(
        fmean(
            best_is_correct(_pick(weights, s), _pick(finished, s), _pick(correct, s))
            for s in subsets
        )
    )
    plain = [vote_is_correct(_pick(classes, s), _pick(correct, s)) for s in subsets]
    assert vote_at_k(classes, correct, k) == pytest.approx(fmean(plain))
    weighted = [
        vote_is_correct(_pick(classes, s), _pick(correct, s), _pick(weights, s)) for s in subsets
    ]
    assert vote_at_k(classes, correct, k, weights=weights) == pytest.approx(fmean(weighted))


def test_the_textbook_value_of_pass_at_k():
    # 1 - C(7, 4) / C(10, 4) = 1 - 35/210.
    assert pass_at_k([True] * 3 + [False] * 7, 4) == pytest.approx(5 / 6)


def test_many_subsets_are_drawn_by_seed():
    classes, correct, weights, _ = _problem(3, n=24)
    first = vote_at_k(classes, correct, 8, weights=weights, seed=1)
    assert vote_at_k(classes, correct, 8, weights=weights, seed=1) == first
    others = {vote_at_k(classes, correct, 8, weights=weights, seed=s) for s in range(2, 6)}
    assert len(others | {first}) > 1
    assert all(value * MAX_SUBSETS == round(value * MAX_SUBSETS) for value in others)
    # A vote of 8 of 24 by twenty times as many draws, within its standard error of .5 / 256^.5.
    rng = random.Random(0)
    truth = fmean(
        vote_is_correct(_pick(classes, s), _pick(correct, s), _pick(weights, s))
        for s in (sorted(rng.sample(range(24), 8)) for _ in range(20 * MAX_SUBSETS))
    )
    assert first == pytest.approx(truth, abs=0.1)


@pytest.mark.parametrize("k", [0, 3])
def test_k_is_between_one_and_the_samples(k):
    for estimate in (
        lambda: pass_at_k([True, False], k),
        lambda: best_at_k([0.1, 0.2], [True, True], [True, False], k),
        lambda: vote_at_k([0, 1], [True, False], k),
    ):
        with pytest.raises(ValueError, match=f"expected 1 <= k <= 2 samples, got k = {k}"):
            estimate()


def test_evidence_is_the_log_odds_of_the_corrected_score():
    calibrated = Calibrated(base_rate=0.8, num_wrong=3.0)
    p = 0.8 * 0.6 / (0.8 * 0.6 + 0.2 * 0.4)
    assert calibrated.evidence(0.6) == pytest.approx(math.log(3 * p / (1 - p)))
    # No score counts for more than the margin, and no base rate for all.
    assert calibrated.evidence(1.7) == calibrated.evidence(1 - MARGIN)
    assert calibrated.evidence(-0.4) == calibrated.evidence(MARGIN)
    assert all(math.isfinite(Calibrated(base_rate=rate).evidence(0.5)) for rate in (0.0, 1.0))


def test_the_posterior_after_one_sample_is_the_corrected_score():
    for num_wrong in (1.0, 4.0, 1e6):
        vote = PosteriorVote(Calibrated(base_rate=0.8, num_wrong=num_wrong))
        assert (vote.winner, vote.confidence) == (None, 0.0)
        vote.add("a", 0.6)
        assert vote.confidence == pytest.approx(0.8 * 0.6 / (0.8 * 0.6 + 0.2 * 0.4))


def test_posterior_by_enumeration():
    """Bayes' rule over the m + 1 answers, from the likelihood of each."""
    samples = [("a", 0.7), ("b", 0.8), (None, 0.9), ("a", 0.4), ("c", None), ("b", 0.3)]
    m, answers = 4, ["a", "b", "c", "d", "e"]
    vote = PosteriorVote(Calibrated(num_wrong=m))
    for answer, score in samples:
        vote.add(answer, score)
    known = [(a, p) for a, p in samples if a is not None and p is not None]
    likelihood = {
        truth: math.prod(p if a == truth else (1 - p) / m for a, p in known) for truth in answers
    }
    winner = max(likelihood, key=likelihood.__getitem__)
    assert vote.winner == winner
    assert vote.confidence == pytest.approx(likelihood[winner] / sum(likelihood.values()))


def test_more_answers_than_there_should_be_leave_none_unseen():
    vote = PosteriorVote()  # m = 1: a right and a wrong one
    for answer in "abc":
        vote.add(answer, 0.5)
    assert vote.confidence == pytest.approx(1 / 3)


def test_what_has_no_answer_or_score_says_nothing():
    vote = PosteriorVote()
    for answer, score in ((None, 0.9), ("a", None), ("a", math.nan)):
        vote.add(answer, score)
    assert vote.winner is None and vote.confidence == 0.0


def test_equal_answers_vote_together_and_many_votes_do_not_overflow():
    vote = PosteriorVote(equal=lambda first, second: float(first) == float(second))
    for answer in ("0.5", "0.50", "2"):
        vote.add(answer, 0.8)
    assert vote.winner == "0.5" and list(vote.votes) == ["0.5", "2"]
    for score, confidence in ((0.99, 1.0), (0.0, 0.5)):
        vote = PosteriorVote(Calibrated(base_rate=0.5))
        for _ in range(1000):
            vote.add("a", score)
        assert vote.confidence == pytest.approx(confidence, abs=1e-3)


def test_low_scores_leave_a_plain_vote():
    """No sample counts against its own answer, else the answer said once would win."""
    calibrated = Calibrated(base_rate=0.4, num_wrong=3.0)
    vote = PosteriorVote(calibrated)
    for answer in ("a", "b", "b"):
        vote.add(answer, 0.1)
    assert vote.winner == "b" and vote.confidence == pytest.approx(1 / 4, abs=1e-5)
    vote.add("a", 0.9)
    assert vote.winner == "a"
    assert calibrated.evidence(0.1) == LEAST


def _simulate(num_problems, n, m, seed=0):
    """Problems of n samples with known posteriors, and errors spread over m other answers."""
    rng = random.Random(seed)
    for _ in range(num_problems):
        p = [rng.choice([0.26, 0.3, 0.4, 0.6, 0.9]) for _ in range(n)]
        yield [0 if rng.random() < own else rng.randint(1, m) for own in p], p


def test_with_known_posteriors_the_posterior_vote_is_the_best_rule():
    n, m = 5, 3
    rules = {
        "majority": lambda p: 1.0,
        "clipped sum": lambda p: p,
        "log-odds alone": Calibrated().evidence,
        "too many wrong": Calibrated(num_wrong=50.0).evidence,
        "posterior": Calibrated(num_wrong=m).evidence,
    }
    right, best, confidence = dict.fromkeys(rules, 0.0), 0.0, 0.0
    problems = list(_simulate(8000, n, m))
    for answers, p in problems:
        correct = [answer == 0 for answer in answers]
        for name, rule in rules.items():
            right[name] += vote_at_k(answers, correct, n, weights=[rule(x) for x in p])
        best += best_at_k(p, [True] * n, correct, n)
        vote = PosteriorVote(Calibrated(num_wrong=m))
        for sample in zip(answers, p, strict=True):
            vote.add(*sample)
        confidence += vote.confidence
    right["best of"] = best
    own = right.pop("posterior")
    # By at least two standard errors of a paired difference of a few per cent of the problems.
    assert own > max(right.values()) + 30, (own, right)
    # What it states is what comes true, within three standard errors.
    assert confidence == pytest.approx(own, abs=3 * (0.25 * len(problems)) ** 0.5)
