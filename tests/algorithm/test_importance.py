"""Importance weights of tokens and sequences against their definition, sequence by sequence."""

import math

import pytest
import torch

from laser_fast.algorithm.loss import importance_weights, policy_loss

CAP = 1.5
KINDS = ["token-truncate", "token-mask", "sequence-truncate", "sequence-mask"]


def make_tokens():
    """Log-probs of 7 interleaved sequences, and their ids; sequence 3 is far above the cap."""
    ids = torch.arange(7).repeat_interleave(torch.tensor([1, 2, 3, 4, 5, 9, 17]))
    ids = ids[torch.randperm(len(ids))]
    rollout = -3 * torch.rand(len(ids), dtype=torch.float64)
    old = rollout + 0.4 * torch.randn(len(ids), dtype=torch.float64) + 0.5 * (ids == 3)
    return old, rollout, ids


def naive_weight(old, rollout, ids, token, kind):
    """The weight of one token, from scalars."""
    members = [token]
    if kind.startswith("sequence"):
        members = [i for i, sequence in enumerate(ids) if sequence == ids[token]]
    ratio = math.prod(math.exp(old[i] - rollout[i]) for i in members)
    if kind.endswith("mask"):
        return 0.0 if ratio > CAP else ratio
    return min(ratio, CAP)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_and_gradients_equal_their_definition(kind):
    old, rollout, ids = make_tokens()
    lists = old.tolist(), rollout.tolist(), ids.tolist()
    expected = [naive_weight(*lists, token, kind) for token in range(len(ids))]
    expected = torch.tensor(expected, dtype=torch.float64)
    # Both sides of the cap are there, in tokens and in sequences.
    is_cut = expected == (0.0 if kind.endswith("mask") else CAP)
    assert 0 < is_cut.sum() < len(ids)

    logprobs = old.clone().requires_grad_()
    options = {"cap": CAP, "kind": kind, "sequence_ids": ids}
    weights = importance_weights(logprobs, rollout.requires_grad_(), **options)
    torch.testing.assert_close(weights, expected, rtol=1e-12, atol=0)
    assert not weights.requires_grad
    # The weight scales each token's gradient, and nothing flows through it.
    advantages, upstream = torch.randn(2, len(ids), dtype=torch.float64)
    terms = policy_loss(logprobs, old - 0.05, advantages, clip_high=1.0)
    (grad,) = torch.autograd.grad(terms * weights, logprobs, upstream)
    ratio = torch.tensor(0.05, dtype=torch.float64).exp()
    torch.testing.assert_close(grad, -ratio * advantages * expected * upstream)


def test_the_cap_itself_is_kept_and_only_what_is_above_is_cut():
    old, rollout = torch.tensor([0.0, 0.5, -2.0, 200.0]), torch.zeros(4)
    cap = float(torch.tensor(0.5).exp())
    kept = [1.0, cap, math.exp(-2)]
    for kind, cut in (("token-truncate", cap), ("token-mask", 0.0)):
        weights = importance_weights(old, rollout, cap=cap, kind=kind)
        torch.testing.assert_close(weights, torch.tensor([*kept, cut]))


@pytest.mark.parametrize("kind", KINDS)
def test_no_token_and_any_difference_give_finite_weights(kind):
    ids = torch.zeros(0, dtype=torch.int64)
    assert importance_weights(
        torch.zeros(0), torch.zeros(0), cap=2.0, kind=kind, sequence_ids=ids
    ).shape == (0,)
    for difference in (-1e4, -89.0, 19.0, 89.0, 1e4):
        old, ids = torch.full((3,), difference), torch.zeros(3, dtype=torch.int64)
        weights = importance_weights(old, torch.zeros(3), cap=2.0, kind=kind, sequence_ids=ids)
        assert ((weights >= 0) & (weights <= 2)).all()


@pytest.mark.parametrize("kind", ["sequence-truncate", "sequence-mask"])
def test_sequences_are_summed_without_a_look_at_their_ids(kind):
    """Which would wait for the device: there is nothing to look at on this one."""
    old, ids = torch.zeros(5, device="meta"), torch.zeros(5, dtype=torch.int64, device="meta")
    assert importance_weights(old, old, cap=2.0, kind=kind, sequence_ids=ids).shape == (5,)


def test_what_is_refused():
    tokens = torch.zeros(2), torch.zeros(2)
    with pytest.raises(ValueError, match="whole sequences needs sequence_ids"):
        importance_weights(*tokens, cap=2.0, kind="sequence-mask")
    with pytest.raises(ValueError, match="expected a kind of .*'token-mask'.* got 'token_mask'"):
        importance_weights(*tokens, cap=2.0, kind="token_mask")
