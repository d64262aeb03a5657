"""Score and loss of one reserved token."""

import pytest
import torch

import laser_kernels
from laser_kernels import last_token, last_token_loss, last_token_score, reference

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
