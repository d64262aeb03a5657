"""Score and loss of one reserved token."""

from typing import NamedTuple

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import laser_kernels
from laser_kernels import last_token, last_token_loss, last_token_score, reference
from laser_kernels._maths import Statistics

SCORE = dict(beta=0.1, ref_logprob=-23.0)
GRADIENT_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 1.5e-3}
TOKEN = 3


def rewards_and_weights(head):
    num_rows, device = len(head.labels), head.labels.device
    rewards = torch.randint(2, (num_rows,), device=device).float()
    return rewards, torch.rand(num_rows, device=device)


@pytest.mark.parametrize("num_rows", [1, 8, 33])
def test_loss_scores_and_gradients_are_exact(case, num_rows, make_head, relative_error):
    impl, dtype = case
    head = make_head(num_rows, 48, 203, dtype)
    h, w, _ = head
    rewards, weights = rewards_and_weights(head)
    loss, scores = last_token_loss(h, w, TOKEN, rewards, sample_weight=weights, impl=impl, **SCORE)
    actual = torch.autograd.grad(loss, (h, w), torch.full_like(loss, 0.73))
    hd, wd, _ = head.float64()
    exact_loss, exact_scores = reference.last_token_loss(
        hd, wd, TOKEN, rewards, sample_weight=weights, **SCORE
    )
    exact = torch.autograd.grad(exact_loss, (hd, wd), torch.full_like(exact_loss, 0.73))
    assert loss.dtype == scores.dtype == torch.float32
    assert (scores - exact_scores).abs().max() <= 0.1 * 2e-5
    torch.testing.assert_close(loss.double(), exact_loss, rtol=1e-5, atol=1e-6)
    for a, e, x in zip(actual, exact, (h, w), strict=True):
        assert a.dtype == x.dtype
        assert relative_error(a, e) <= GRADIENT_TOLERANCE[dtype]
    assert laser_kernels.last_impl() == impl


def test_recomputing_rows_gives_the_same_gradients(case, make_head, monkeypatch, relative_error):
    """Beyond MAX_KEPT_ROWS the backward recomputes the logits."""
    impl, dtype = case
    head = make_head(20, 16, 97, dtype)
    h, w, _ = head
    rewards, weights = rewards_and_weights(head)

    def run():
        loss, scores = last_token_loss(
            h, w, TOKEN, rewards, sample_weight=weights, impl=impl, **SCORE
        )
        return loss, scores, *torch.autograd.grad(loss, (h, w))

    kept = run()
    monkeypatch.setattr(last_token, "MAX_KEPT_ROWS", 19)
    recomputed = run()
    torch.testing.assert_close(recomputed[:2], kept[:2])
    for a, b in zip(recomputed[2:], kept[2:], strict=True):
        assert relative_error(a, b.double()) <= GRADIENT_TOLERANCE[dtype]


def test_score_is_that_of_the_loss_and_carries_no_gradient(case, make_head):
    impl, dtype = case
    head = make_head(8, 16, 97, dtype)
    h, w, _ = head
    rewards, _ = rewards_and_weights(head)
    score = last_token_score(h, w, TOKEN, impl=impl, **SCORE)
    loss, scores = last_token_loss(h, w, TOKEN, rewards, impl=impl, **SCORE)
    assert not score.requires_grad and not scores.requires_grad and loss.requires_grad
    assert torch.equal(score, scores)
    torch.testing.assert_close(loss.detach(), (scores - rewards).square().mean())


# What starts no kernel: allocations and views.
FREE = {"alias", "detach", "empty", "empty_like", "new_empty", "permute", "slice", "t", "view"}
SYNCS = {"_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select"}


class Launches(TorchDispatchMode):
    """Lists the aten ops that would start a kernel; one that waits for the device is an error."""

    def __init__(self):
        super().__init__()
        self.ops = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in SYNCS
        if name not in FREE:
            self.ops.append(name)
        return func(*args, **(kwargs or {}))


class Backend(NamedTuple):
    """Statistics and dlogits that cost nothing: what is left is the op's own."""

    stats: Statistics
    kept: torch.Tensor

    def keep(self, head, few):
        return self.stats, self.kept

    def empty_kept(self, hidden_states, weight):
        return torch.empty_like(self.kept)

    def dlogits_from_kept(self, kept, head, stats, gradient):
        return kept


@pytest.mark.parametrize("retains", [False, True])
def test_few_kernels_are_launched_around_the_gemms(retains, make_head, monkeypatch):
    """At 64 rows the launches cost the host as much as the weight costs the GPU."""
    h, w, _ = make_head(6, 16, 41, torch.float32)
    rows = [-torch.rand(6, device=h.device) for _ in range(3)]
    backend = Backend(Statistics(*rows, torch.empty(0)), torch.rand(6, 41, device=h.device))
    monkeypatch.setattr(last_token, "load_backend", lambda impl: backend)
    rewards, impl = rows[1].exp(), "chunked"
    with Launches() as around:
        loss, _ = last_token_loss(h, w, TOKEN, rewards, impl=impl, **SCORE)
    assert around.ops == ["new_full", "full_like", "ones_like", "last_token_fwd"]
    head = (h, w, torch.full_like(rewards, TOKEN, dtype=torch.int64), torch.ones_like(rewards), 0.0)
    with Launches() as forward:
        last_token._last_token_fwd_op._init_fn(*head, rewards, rewards, 0.1, -4.0, True, impl)
    assert forward.ops == ["sub", "mul_", "sub", "mul", "dot"]
    upstream = torch.ones_like(loss)
    with Launches() as backward:
        torch.autograd.grad(loss, (h, w), upstream, retain_graph=retains)
    if retains:  # the op copies the logits first
        assert backward.ops == ["mul", "mul", "last_token_bwd"]
    else:
        assert backward.ops == ["mul", "mul", "mul", "neg", "expm1", "mul", "mm", "mm"]
