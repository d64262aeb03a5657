"""What holds for every op with a gradient: frozen and empty inputs, kept graphs, refusals."""

import pytest
import torch

from laser_kernels import (
    last_token_loss,
    linear_logprob,
    linear_logprob_entropy,
    linear_logprob_loss,
    reference,
)

SCORE = dict(beta=0.1, ref_logprob=-23.0)


@pytest.fixture(params=["logprob", "entropy", "loss", "last_token"])
def op(request, scalar_ops):
    """An op as a function of a head, an implementation and one number a row."""
    return scalar_ops[request.param]


def upstream(head):
    return torch.randn(len(head.labels), device=head.labels.device)


@pytest.mark.parametrize("frozen", ["hidden_states", "weight"])
def test_a_frozen_input_gets_no_gradient(case, op, frozen, make_head):
    impl, dtype = case
    head = make_head(5, 16, 97, dtype)
    g = upstream(head)
    both = torch.autograd.grad(op(*head, impl, g), head[:2])
    getattr(head, frozen).requires_grad_(False)
    op(*head, impl, g).backward()
    assert getattr(head, frozen).grad is None
    kept, expected = (head.weight, both[1]) if frozen == "hidden_states" else (head[0], both[0])
    assert torch.equal(kept.grad, expected) and kept.grad.abs().max() > 0


def test_empty_input_is_a_connected_zero(case, op, make_head):
    impl, dtype = case
    head = make_head(0, 16, 97, dtype)
    result = op(*head, impl, upstream(head))
    assert result.item() == 0
    result.backward()
    assert head.hidden_states.grad.shape == (0, 16)
    assert head.weight.grad.abs().max() == 0


def test_empty_input_gives_empty_rows_and_asks_no_loss(case, make_head):
    impl, dtype = case
    head = make_head(0, 16, 97, dtype)
    logprobs, entropy = linear_logprob_entropy(*head, impl=impl)
    _, scores = last_token_loss(*head[:2], 3, torch.empty(0).to(entropy), impl=impl, **SCORE)
    assert logprobs.shape == entropy.shape == scores.shape == (0,)
    # The mean of nothing would be NaN.
    assert linear_logprob_loss(*head, lambda x, rows: x.mean(), impl=impl).item() == 0


def test_graph_can_be_retained_and_runs_repeat(case, op, make_head):
    """Deterministic mode fills every uninitialised buffer with NaN or the largest integer."""
    impl, dtype = case
    head = make_head(37, 48, 203, dtype)
    g = upstream(head)

    def grads(result, **options):
        return torch.autograd.grad(result, head[:2], torch.full_like(result, 3.0), **options)

    result = op(*head, impl, g)
    first, second = grads(result, retain_graph=True), grads(result)
    torch.use_deterministic_algorithms(True)
    try:
        again = op(*head, impl, g)
        third = grads(again)
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(result, again)
    for a, b, c in zip(first, second, third, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


def test_double_backward_is_refused(case, op, make_head):
    impl, dtype = case
    head = make_head(5, 16, 97, dtype)
    result = op(*head, impl, upstream(head)).square()
    (grad,) = torch.autograd.grad(result, head.hidden_states, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        grad.sum().backward()


@pytest.mark.parametrize("name", ["logprob", "loss"])
def test_rows_without_upstream_gradient_contribute_exactly_nothing(
    case, name, scalar_ops, make_head
):
    impl, dtype = case
    head = make_head(40, 16, 97, dtype)
    g = upstream(head)
    g[::3] = 0

    def grads():
        return torch.autograd.grad(scalar_ops[name](*head, impl, g), head[:2])

    grad_hidden, grad_weight = grads()
    assert grad_hidden[::3].abs().max() == 0
    with torch.no_grad():
        head.hidden_states[::3] = 1
    assert torch.equal(grads()[1], grad_weight)


@pytest.mark.parametrize("form", ["logprob", "loss"])
def test_gradients_are_as_good_as_rounding_dlogits_alone(
    case, form, make_head, relative_error, baseline_gradients
):
    impl, dtype = case
    head = make_head(37, 48, 203, dtype)
    temperature = torch.rand(37, device=head.labels.device) + 0.5
    how = dict(temperature=temperature, impl=impl)
    g = upstream(head)
    if form == "logprob":
        result = (linear_logprob(*head, **how) * g).sum()
    else:
        result = linear_logprob_loss(*head, lambda x, rows: (g[rows] * x).sum(), **how)
    actual = torch.autograd.grad(result, head[:2])
    baseline = baseline_gradients(head, g, temperature)
    double = head.float64()
    logprobs = reference.linear_logprob(*double, temperature=temperature)
    exact = torch.autograd.grad(logprobs, double[:2], g.double())
    for a, b, e in zip(actual, baseline, exact, strict=True):
        assert relative_error(a, e) <= 1.1 * relative_error(b, e)
