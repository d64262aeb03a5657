"""The specification against hand-computed numbers and finite differences."""

import math

import pytest
import torch

from laser_kernels import reference


def test_logprob_and_entropy_of_a_hand_computed_row():
    # Logits (0, ln 3) at T = 1 give p = (1/4, 3/4); at T = 1/2 logits (0, ln 9), p = (1/10, 9/10).
    hidden_states = torch.ones(2, 1)
    weight = torch.tensor([[0.0], [math.log(3)]])
    labels = torch.tensor([1, 0])
    temperature = torch.tensor([1.0, 0.5])
    logprobs, entropy = reference.linear_logprob_entropy(
        hidden_states, weight, labels, temperature=temperature
    )
    torch.testing.assert_close(logprobs.exp(), torch.tensor([0.75, 0.1]))
    expected = [-(p * math.log(p) + (1 - p) * math.log(1 - p)) for p in (0.75, 0.1)]
    torch.testing.assert_close(entropy, torch.tensor(expected))


def test_last_token_loss_of_hand_computed_rows():
    # p = 1/4 and 3/4: scores 2 (ln p + 1); weights 1 and 3; targets 0 and 1.
    hidden_states = torch.tensor([[1.0], [-1.0]])
    weight = torch.tensor([[0.0], [math.log(3)]])
    args = dict(beta=2.0, ref_logprob=-1.0, sample_weight=torch.tensor([1.0, 3.0]))
    loss, scores = reference.last_token_loss(
        hidden_states, weight, 0, torch.tensor([0.0, 1.0]), **args
    )
    s0, s1 = 2 * (math.log(0.25) + 1), 2 * (math.log(0.75) + 1)
    torch.testing.assert_close(scores, torch.tensor([s0, s1]))
    torch.testing.assert_close(loss, torch.tensor(s0**2 + 3 * (s1 - 1) ** 2))


def test_last_token_loss_weighs_rows_equally_by_default():
    hidden_states, weight = torch.randn(5, 3), torch.randn(7, 3)
    rewards = torch.rand(5)
    args = dict(beta=0.1, ref_logprob=-2.0)
    loss, scores = reference.last_token_loss(hidden_states, weight, 4, rewards, **args)
    torch.testing.assert_close(loss, (scores - rewards).square().mean())


def test_fused_loss_is_the_loss_of_the_logprobs():
    hidden_states, weight = torch.randn(5, 3), torch.randn(7, 3)
    labels, advantages = torch.randint(7, (5,)), torch.randn(5)
    loss = reference.linear_logprob_loss(
        hidden_states, weight, labels, lambda logprobs, rows: (advantages[rows] * logprobs).sum()
    )
    logprobs = reference.linear_logprob(hidden_states, weight, labels)
    torch.testing.assert_close(loss, advantages @ logprobs)


@pytest.mark.parametrize("op", ["linear_logprob_entropy", "last_token_loss"])
def test_gradients_match_finite_differences(op):
    hidden_states = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    if op == "linear_logprob_entropy":
        labels = torch.tensor([0, 4, 2])
        temperature = torch.tensor([0.7, 1.0, 2.0])

        def function(h, w):
            return reference.linear_logprob_entropy(h, w, labels, temperature=temperature)
    else:
        rewards = torch.rand(3, dtype=torch.float64)

        def function(h, w):
            return reference.last_token_loss(h, w, 1, rewards, beta=0.5, ref_logprob=-3.0)[0]

    assert torch.autograd.gradcheck(function, (hidden_states, weight))


def test_float64_stays_float64():
    hidden_states, weight = torch.randn(3, 4).double(), torch.randn(5, 4).double()
    logprobs = reference.linear_logprob(hidden_states, weight, torch.zeros(3, dtype=torch.int64))
    assert logprobs.dtype == torch.float64
