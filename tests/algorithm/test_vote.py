"""Plain and weighted votes against hand tables."""

import inspect

import pytest

from laser_fast.algorithm.vote import majority_vote


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
