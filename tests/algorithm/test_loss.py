"""Policy losses against float64 twins, finite differences and hand-computed numbers."""

import inspect
import math

import pytest
import torch

from laser_fast.algorithm.loss import (
    MAX_LOG_RATIO,
    importance_weights,
    is_clipped,
    kl_penalty,
    policy_loss,
    sequence_mean,
    token_weights,
)

T, F = True, False
KINDS = ["grpo", "gspo", "cispo"]
CLIPS = {"clip_low": 0.2, "clip_high": 0.28}


def naive_policy_loss(
    logprobs, old, advantages, *, kind, clip_low, clip_high, clip_dual=None, sequence_ids=None
):
    """The published formulas, token by token, on float64 scalars that autograd follows."""
    ratios = [(new - before).exp() for new, before in zip(logprobs, old, strict=True)]
    losses = []
    for t, advantage in enumerate(advantages.tolist()):
        ratio = ratios[t]
        if kind == "gspo":
            members = [i for i, sequence in enumerate(sequence_ids) if sequence == sequence_ids[t]]
            product = math.prod(ratios[i].item() for i in members)
            ratio = product ** (1 / len(members)) * logprobs[t].exp() / logprobs[t].exp().detach()
        bounded = min(max(ratio.item(), 1 - clip_low), 1 + clip_high)
        if kind == "cispo":
            losses.append(-bounded * advantage * logprobs[t])
            continue
        loss = -ratio * advantage
        if -bounded * advantage > loss.item():
            loss = 0 * ratio - bounded * advantage
        if clip_dual is not None and advantage < 0 and loss.item() > -clip_dual * advantage:
            loss = 0 * ratio - clip_dual * advantage
        losses.append(loss)
    return torch.stack(losses)


def make_tokens(num_tokens=60, num_sequences=7):
    """Log-probs whose ratios lie on all sides of the clips, and advantages of both signs."""
    double = {"dtype": torch.float64}
    sequence_ids = torch.randint(num_sequences, (num_tokens,))
    old = -torch.rand(num_tokens, **double) * 6
    shift = torch.randn(num_sequences, **double)[sequence_ids] * 0.4
    logprobs = (old + shift + 0.5 * torch.randn(num_tokens, **double)).requires_grad_()
    advantages = torch.randn(num_sequences, **double)[sequence_ids]
    advantages[sequence_ids == 0] = 0.0
    return logprobs, old, advantages, sequence_ids


def test_signatures_are_the_published_ones():
    parameters = inspect.signature(policy_loss).parameters
    defaults = {name: p.default for name, p in parameters.items() if p.default is not p.empty}
    assert list(parameters)[:3] == ["logprobs", "old_logprobs", "advantages"]
    assert list(parameters)[3:] == list(defaults)
    assert defaults == {
        "kind": "grpo",
        "clip_low": 0.2,
        "clip_high": 0.2,
        "clip_dual": None,
        "sequence_ids": None,
    }
    assert list(inspect.signature(importance_weights).parameters) == [
        *("old_logprobs", "rollout_logprobs", "cap", "kind", "sequence_ids")
    ]
    assert list(inspect.signature(kl_penalty).parameters) == ["logprobs", "ref_logprobs"]


@pytest.mark.parametrize(
    ("ratio", "advantage", "clip_dual", "loss", "slope"),
    [
        # Inside the clips: -ratio A, and dL/dlogprob the same.
        (1.0, 2.0, None, -2.0, -2.0),
        (1.1, 2.0, None, -2.2, -2.2),
        (0.9, -2.0, None, 1.8, 1.8),
        # The optimistic side is clipped and passes no gradient.
        (1.5, 2.0, None, -2.4, 0.0),
        (0.5, -2.0, None, 1.6, 0.0),
        # The pessimistic side is not clipped.
        (0.5, 2.0, None, -1.0, -1.0),
        (1.5, -2.0, None, 3.0, 3.0),
        (5.0, -2.0, None, 10.0, 10.0),
        # Dual clip: at most 3 |A| where A < 0, nothing elsewhere.
        (5.0, -2.0, 3.0, 6.0, 0.0),
        (2.5, -2.0, 3.0, 5.0, 5.0),
        (0.5, -2.0, 3.0, 1.6, 0.0),
        (5.0, 2.0, 3.0, -2.4, 0.0),
        (5.0, 0.0, 3.0, 0.0, 0.0),
    ],
)
def test_grpo_by_hand(ratio, advantage, clip_dual, loss, slope):
    logprobs = torch.tensor([math.log(ratio) - 1.0], dtype=torch.float64, requires_grad=True)
    old = torch.tensor([-1.0], dtype=torch.float64)
    actual = policy_loss(logprobs, old, torch.full_like(old, advantage), clip_dual=clip_dual)
    torch.testing.assert_close(actual.detach(), torch.full_like(old, loss))
    (grad,) = torch.autograd.grad(actual, logprobs, torch.full_like(old, 0.37))
    torch.testing.assert_close(grad, torch.full_like(old, 0.37 * slope))


@pytest.mark.parametrize("clip_dual", [None, 1.5])
@pytest.mark.parametrize("kind", KINDS)
def test_value_and_gradient_equal_the_naive_formula(kind, clip_dual):
    logprobs, old, advantages, sequence_ids = make_tokens()
    options = {"kind": kind, **CLIPS, "clip_dual": clip_dual, "sequence_ids": sequence_ids}
    expected = naive_policy_loss(
        logprobs, old, advantages, **{**options, "sequence_ids": sequence_ids.tolist()}
    )
    actual = policy_loss(logprobs, old, advantages, **options)
    upstream = torch.randn_like(old)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(
        torch.autograd.grad(actual, logprobs, upstream),
        torch.autograd.grad(expected, logprobs, upstream),
    )


def test_grpo_gradient_equals_finite_differences():
    logprobs, old, advantages, _ = make_tokens()
    upstream = torch.randn_like(old)

    def total(values):
        return (upstream * policy_loss(values, old, advantages, **CLIPS, clip_dual=1.5)).sum()

    (grad,) = torch.autograd.grad(total(logprobs), logprobs)
    step = 1e-6
    for t in range(len(old)):
        shift = torch.zeros_like(old)
        shift[t] = step
        difference = total(logprobs.detach() + shift) - total(logprobs.detach() - shift)
        torch.testing.assert_close(grad[t], difference / (2 * step), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("kind", KINDS)
def test_on_policy_every_kind_is_the_policy_gradient(kind):
    logprobs, _, advantages, sequence_ids = make_tokens()
    # Clips of zero leave no room: a ratio of exactly 1 must still pass the gradient.
    loss = policy_loss(
        logprobs,
        logprobs.detach(),
        advantages,
        kind=kind,
        clip_low=0.0,
        clip_high=0.0,
        sequence_ids=sequence_ids,
    )
    upstream = torch.randn_like(advantages)
    (grad,) = torch.autograd.grad(loss, logprobs, upstream)
    torch.testing.assert_close(grad, -upstream * advantages)


@pytest.mark.parametrize("kind", KINDS)
def test_no_gradient_reaches_the_behaviour_policy(kind):
    logprobs, old, advantages, sequence_ids = make_tokens()
    old.requires_grad_()
    loss = policy_loss(logprobs, old, advantages, kind=kind, sequence_ids=sequence_ids)
    (grad,) = torch.autograd.grad(loss.sum(), old, allow_unused=True)
    assert grad is None


def test_gspo_gradient_is_the_sequence_ratio():
    logprobs, old, advantages, sequence_ids = make_tokens()
    loss = policy_loss(logprobs, old, advantages, kind="gspo", sequence_ids=sequence_ids, **CLIPS)
    upstream = torch.randn_like(old)
    (grad,) = torch.autograd.grad(loss, logprobs, upstream)
    for sequence in sequence_ids.unique():
        members = sequence_ids == sequence
        ratio = (logprobs - old)[members].mean().exp().detach()
        advantage = advantages[members][0]
        stops = ratio > 1.28 if advantage > 0 else ratio < 0.8
        expected = 0.0 if stops else -ratio * advantage
        torch.testing.assert_close(grad[members], upstream[members] * expected)
        bounded = torch.maximum(-ratio * advantage, -ratio.clamp(0.8, 1.28) * advantage)
        torch.testing.assert_close(loss[members].detach(), bounded.expand(int(members.sum())))


def test_gspo_token_form_has_the_gradient_of_the_sequence_objective():
    # GSPO itself: -(1/B) sum_i min(s_i A_i, clip(s_i) A_i) with s_i a function of every token.
    logprobs, old, advantages, sequence_ids = make_tokens()
    loss = policy_loss(logprobs, old, advantages, kind="gspo", sequence_ids=sequence_ids, **CLIPS)
    sequences = sequence_ids.unique()
    objective = torch.zeros((), dtype=torch.float64)
    weights = torch.zeros_like(old)
    for sequence in sequences:
        members = sequence_ids == sequence
        ratio = (logprobs - old)[members].mean().exp()
        advantage = advantages[members][0]
        clipped = ratio.clamp(1 - CLIPS["clip_low"], 1 + CLIPS["clip_high"])
        objective = objective - torch.minimum(ratio * advantage, clipped * advantage)
        weights[members] = 1 / (len(sequences) * members.sum())  # seq-mean-token-mean
    (expected,) = torch.autograd.grad(objective / len(sequences), logprobs)
    (actual,) = torch.autograd.grad((weights * loss).sum(), logprobs)
    torch.testing.assert_close(actual, expected)


def test_gspo_ratio_is_not_rounded_at_the_size_of_logprobs():
    # GSPO clips at about 3e-4, so an error of 1e-6 in the ratio would show.
    old = torch.tensor([-17.3, -0.01, -3.0, -0.2])
    logprobs = old + torch.tensor([0.0, 3e-5, 0.0, 7e-5])
    sequence_ids = torch.zeros(4, dtype=torch.int64)
    loss = policy_loss(logprobs, old, -torch.ones(4), kind="gspo", sequence_ids=sequence_ids)
    exact = (logprobs - old).double().mean().exp()
    torch.testing.assert_close(loss.double(), exact.expand(4), rtol=0, atol=6e-8)


def test_gspo_sequences_may_be_interleaved():
    values = torch.tensor([1.0, 10.0, 3.0, 20.0, 30.0])
    assert sequence_mean(values, torch.tensor([0, 2, 0, 2, 2])).tolist() == [2, 20, 2, 20, 20]


def test_cispo_never_loses_a_gradient_to_the_clip():
    logprobs, old, advantages, _ = make_tokens()
    loss = policy_loss(logprobs, old, advantages, kind="cispo", **CLIPS)
    ratio = (logprobs - old).exp().detach()
    assert (ratio > 1.28).any() and (ratio < 0.8).any()
    (grad,) = torch.autograd.grad(loss.sum(), logprobs)
    assert (grad[advantages != 0] != 0).all()
    torch.testing.assert_close(grad, -ratio.clamp(0.8, 1.28) * advantages)


@pytest.mark.parametrize("kind", KINDS)
def test_no_tokens_give_no_losses(kind):
    empty = torch.zeros(0)
    ids = torch.zeros(0, dtype=torch.int64)
    assert policy_loss(empty, empty, empty, kind=kind, sequence_ids=ids).shape == (0,)


def test_policy_loss_refuses_nonsense():
    one = torch.zeros(1)
    with pytest.raises(ValueError, match='expected kind "grpo", "gspo" or "cispo", got "ppo"'):
        policy_loss(one, one, one, kind="ppo")
    with pytest.raises(ValueError, match="needs sequence_ids"):
        policy_loss(one, one, one, kind="gspo")
    for clip_dual in (1.0, 0.0, -3.0, float("nan")):
        with pytest.raises(ValueError, match="expected clip_dual > 1 or None"):
            policy_loss(one, one, one, clip_dual=clip_dual)


@pytest.mark.parametrize("kind", KINDS)
def test_clipped_tokens_are_those_whose_bound_decides(kind):
    logprobs, old, advantages, sequence_ids = make_tokens()
    options = {"kind": kind, "sequence_ids": sequence_ids}
    clipped = is_clipped(logprobs, old, advantages, **options, **CLIPS)
    assert 0 < clipped.sum() < len(old)
    loss = policy_loss(logprobs, old, advantages, **options, **CLIPS)
    wide = policy_loss(logprobs, old, advantages, **options, clip_low=1.0, clip_high=1e9)
    decides = loss.detach() != wide.detach()
    nonzero = advantages != 0
    assert torch.equal(clipped[nonzero], decides[nonzero])


def test_grpo_clipping_by_hand():
    ratio = torch.tensor([1.5, 1.5, 0.5, 0.5, 1.1, 1.5, 0.5])
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, 0.0, 0.0])
    clipped = is_clipped(ratio.log(), torch.zeros(7), advantages, clip_low=0.2, clip_high=0.2)
    assert clipped.tolist() == [T, F, F, T, F, F, F]


def test_kl_estimate_by_hand():
    # pi = 1/2 and pi_ref = 1/4 at the token: d = -log 2.
    logprobs = torch.tensor([math.log(0.5)], dtype=torch.float64, requires_grad=True)
    ref = torch.tensor([math.log(0.25)], dtype=torch.float64)
    estimate = kl_penalty(logprobs, ref)
    torch.testing.assert_close(estimate, torch.full_like(ref, 0.5 - 1 + math.log(2)))
    (grad,) = torch.autograd.grad(estimate, logprobs, torch.full_like(ref, -1.7))
    torch.testing.assert_close(grad, torch.full_like(ref, -1.7 * (1 - 0.5)))


def test_k3_estimates_the_divergence_without_bias():
    pi, ref = torch.randn(2, 50, dtype=torch.float64).log_softmax(-1)
    divergence = (pi.exp() * (pi - ref)).sum()
    torch.testing.assert_close((pi.exp() * kl_penalty(pi, ref)).sum(), divergence)
    assert (kl_penalty(pi, ref) >= 0).all()


def test_k3_of_close_policies_is_not_rounded_away():
    d = torch.tensor([1e-3])
    torch.testing.assert_close(kl_penalty(-d, torch.zeros(1)), d * d / 2, rtol=1e-2, atol=0)


@pytest.mark.parametrize("d", [-300.0, -3.0, 2.0, 4.99, 5.01, 19.0, 100.0, 1e4])
def test_k3_is_exact_up_to_its_bound_and_goes_on_as_its_tangent(d):
    logprobs = torch.tensor([-d], requires_grad=True)
    estimate = kl_penalty(logprobs, torch.zeros(1))
    (grad,) = torch.autograd.grad(estimate, logprobs)
    bounded = min(d, MAX_LOG_RATIO)
    slope = math.exp(bounded) - 1
    assert -grad.item() == pytest.approx(slope, rel=1e-5)
    expected = math.exp(bounded) - 1 - bounded + slope * (d - bounded)
    assert estimate.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("advantage", [-2.0, 0.0, 2.0])
@pytest.mark.parametrize("difference", [-1e4, -89.0, 4.9, 19.0, 89.0, 1e4])
def test_every_ratio_gives_a_finite_loss_and_gradient(kind, advantage, difference):
    """A ratio of inf times an advantage of 0 would be NaN, and so would the whole update."""
    logprobs = torch.tensor([difference, difference], requires_grad=True)
    advantages, ids = torch.full((2,), advantage), torch.zeros(2, dtype=torch.int64)
    options = {"kind": kind, "sequence_ids": ids}
    loss = policy_loss(logprobs, torch.zeros(2), advantages, **options)
    (grad,) = torch.autograd.grad(loss.sum(), logprobs)
    assert loss.isfinite().all() and grad.abs().max() <= 2 * math.exp(MAX_LOG_RATIO)
    if kind != "cispo" and advantage < 0 < difference < MAX_LOG_RATIO:  # below, nothing changes
        expected = torch.full((2,), -advantage * math.exp(difference))
        torch.testing.assert_close((loss.detach(), grad), (expected, expected))


@pytest.mark.parametrize(
    ("aggregation", "expected"),
    [
        # Lengths 2, 4 and 10, of which the last is not trained; limit 16.
        ("token-mean", [1 / 6, 1 / 6, 0]),
        ("seq-mean-token-mean", [1 / 4, 1 / 8, 0]),
        ("seq-mean-token-sum-norm", [1 / 32, 1 / 32, 0]),
    ],
)
def test_token_weights_by_hand(aggregation, expected):
    weights = token_weights(
        torch.tensor([2, 4, 10]),
        torch.tensor([T, T, F]),
        aggregation=aggregation,
        max_new_tokens=16,
    )
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights, torch.tensor(expected))


@pytest.mark.parametrize(
    "aggregation", ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum-norm"]
)
def test_weighted_sum_is_the_aggregation_of_the_whole_batch(aggregation):
    lengths = torch.randint(1, 30, (12,))
    is_trained = torch.rand(12) < 0.7
    is_trained[:2] = True
    losses = [torch.randn(int(length), dtype=torch.float64) for length in lengths]
    kept = [loss for loss, trained in zip(losses, is_trained, strict=True) if trained]
    expected = {
        "token-mean": torch.cat(kept).mean(),
        "seq-mean-token-mean": torch.stack([loss.mean() for loss in kept]).mean(),
        "seq-mean-token-sum-norm": torch.stack([loss.sum() / 32 for loss in kept]).mean(),
    }[aggregation]
    weights = token_weights(lengths, is_trained, aggregation=aggregation, max_new_tokens=32)
    # Summed in two halves, as two ranks or microbatches would, with denominators of the whole.
    halves = [
        sum(float(weights[i]) * losses[i].sum() for i in part) for part in (range(5), range(5, 12))
    ]
    torch.testing.assert_close(sum(halves), expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    "aggregation", ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum-norm"]
)
def test_nothing_trained_weighs_nothing(aggregation):
    weights = token_weights(
        torch.tensor([3, 5]), torch.tensor([F, F]), aggregation=aggregation, max_new_tokens=8
    )
    assert weights.tolist() == [0, 0]


def test_unknown_aggregation():
    with pytest.raises(ValueError, match='expected aggregation "token-mean".*got "sum"'):
        token_weights(torch.ones(1), torch.tensor([T]), aggregation="sum", max_new_tokens=8)
