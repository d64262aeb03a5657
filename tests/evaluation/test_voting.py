"""The three choice rules on hand-made ballots."""

from fractions import Fraction

from laser_fast.algorithm.vote import majority_vote
from laser_fast.evaluation.voting import answer_classes, best_is_correct, vote_is_correct


def _same_fraction(first: str, second: str) -> bool:
    return Fraction(first) == Fraction(second)


def test_classes_follow_the_first_member():
    answers = ["1/2", "3", None, "0.5", "3", "2/4"]
    assert answer_classes(answers) == [0, 1, None, 2, 1, 3]
    assert answer_classes(answers, _same_fraction) == [0, 1, None, 0, 1, 0]


def test_equal_strings_are_compared_once():
    asked = []

    def same(first, second):
        asked.append((first, second))
        return False

    assert answer_classes(["1", "2", "1", "2", "2"], same) == [0, 1, 0, 1, 1]
    assert asked == [("1", "2")]


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
    assert not vote_is_correct(classes, correct)
    assert vote_is_correct(classes, correct, [0.1, 0.1, 0.1, 0.9, 0.9, 1.0])
    # All weights 0: a tie, which the first answer wins.
    assert not vote_is_correct(classes, correct, [0.0] * 6)


def test_answer_is_right_if_one_of_its_completions_was_graded_correct():
    """The first member has the right answer in a form that the grader refused."""
    assert vote_is_correct([0, 0, 1], [False, True, False])


def test_no_answer_is_wrong():
    assert not vote_is_correct([None, None], [False, False])


def test_best_by_score():
    assert best_is_correct([0.2, 0.7, 0.7], [True, True, True], [False, True, False])
    # A finished completion beats an unfinished one, though its score is below 0.
    assert best_is_correct([0.0, -0.1], [False, True], [False, True])
