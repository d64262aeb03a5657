import math

import pytest

from laser_fast.rollout.engine import DisagreementError, check_agreement


def test_disagreement_is_the_mean_over_tokens_not_over_completions():
    engine = [[-1.0], [-2.0, -3.0, -4.0]]
    policy = [[-1.5], [-2.0, -3.1, -4.0]]
    assert check_agreement(engine, policy) == pytest.approx((0.5 + 0.1) / 4)


def test_disagreement_without_tokens_is_zero():
    assert check_agreement([], []) == 0.0
    assert check_agreement([[]], [[]]) == 0.0


def test_a_nan_never_passes():
    assert check_agreement([[float("nan")]], [[-1.0]]) == math.inf
    with pytest.raises(DisagreementError, match="token 1 of completion 0"):
        check_agreement([[-1.0, float("nan")]], [[-1.0, -2.0]], max_disagreement=10.0)


def test_different_tokens_are_refused():
    for policy in ([[-1.0]], [[-1.0, -2.0], [-3.0]]):
        with pytest.raises(ValueError, match="argument 2 is"):
            check_agreement([[-1.0, -2.0]], policy)


def test_check_returns_the_value_at_the_limit_and_names_the_worst_token_above_it():
    engine, policy = [[-1.0, -2.0], [-3.0]], [[-1.0, -2.0], [-3.75]]
    assert check_agreement(engine, policy, max_disagreement=0.25) == 0.25
    with pytest.raises(DisagreementError) as caught:
        check_agreement(engine, policy, max_disagreement=0.2)
    for part in ("0.25 nats", "max_disagreement = 0.2", "token 0 of completion 1", "-3.75"):
        assert part in str(caught.value)
