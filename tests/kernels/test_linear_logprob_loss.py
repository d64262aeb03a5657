"""The fused loss: gradients formed in the forward, for any row-separable loss."""

import importlib
import types

import pytest
import torch

from laser_kernels import linear_logprob_loss, reference

# The package gives its name to the function.
loss_module = importlib.import_module("laser_kernels.linear_logprob_loss")
GRADIENT_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 1.5e-3}


def policy_loss(num_rows, device):
    """A clipped policy loss with a quadratic term: g depends on the log-probs."""
    advantages, old = torch.randn(num_rows, device=device), torch.randn(num_rows, device=device)

    def loss_fn(logprobs, rows):
        ratio = (logprobs - old[rows].to(logprobs) * 0.3 + 3).exp().clamp(max=1.2)
        surrogate = advantages[rows].to(logprobs) * ratio
        return (0.05 * logprobs.square() - surrogate).sum() / num_rows

    return loss_fn


@pytest.mark.parametrize("shape", [(1, 16, 97), (37, 48, 203), (33, 25, 64)])
def test_loss_and_gradients_are_exact(case, shape, make_head, relative_error):
    impl, dtype = case
    head = make_head(*shape, dtype, max_logit=8)
    temperature = torch.rand(shape[0], device=head.labels.device) + 0.5
    loss_fn = policy_loss(shape[0], head.labels.device)
    loss = linear_logprob_loss(*head, loss_fn, temperature=temperature, impl=impl)
    actual = torch.autograd.grad(loss, head[:2], torch.tensor(0.73, device=loss.device))
    double = head.float64()
    exact_loss = reference.linear_logprob_loss(*double, loss_fn, temperature=temperature)
    exact = torch.autograd.grad(exact_loss, double[:2], torch.full_like(exact_loss, 0.73))
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), exact_loss, rtol=1e-4, atol=1e-5)
    for a, e, x in zip(actual, exact, head[:2], strict=True):
        assert a.dtype == x.dtype
        assert relative_error(a, e) <= GRADIENT_TOLERANCE[dtype]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy reports the overflow that is meant
@pytest.mark.parametrize("gap", [120, 1000])
def test_target_far_below_the_maximum(case, gap, make_head, push_away, relative_error):
    impl, dtype = case
    head = make_head(20, 16, 97, dtype, max_logit=3)
    push_away(head, {1: gap, 18: gap})
    g = torch.randn(20, device=head.labels.device)

    def loss_fn(logprobs, rows):
        return (g[rows].to(logprobs) * logprobs).sum()

    actual = torch.autograd.grad(linear_logprob_loss(*head, loss_fn, impl=impl), head[:2])
    double = head.float64()
    exact = torch.autograd.grad(reference.linear_logprob_loss(*double, loss_fn), double[:2])
    for a, e in zip(actual, exact, strict=True):
        assert relative_error(a, e) <= GRADIENT_TOLERANCE[dtype]


def test_loss_fn_sees_every_row_once_in_chunks(make_head, monkeypatch, relative_error):
    head = make_head(300, 16, 97, torch.float32)
    seen = []

    def loss_fn(logprobs, rows):
        assert (
            logprobs.is_leaf and logprobs.requires_grad and len(logprobs) == rows.stop - rows.start
        )
        seen.append(rows)
        return logprobs.square().sum()

    def run():
        loss = linear_logprob_loss(*head, loss_fn, impl="chunked")
        return loss, *torch.autograd.grad(loss, head[:2])

    monkeypatch.setenv("LASER_KERNELS_WORKSPACE_MB", "0.0001")
    split = run()
    assert seen == [slice(0, 128), slice(128, 256), slice(256, 300)]
    monkeypatch.setenv("LASER_KERNELS_WORKSPACE_MB", "100")
    whole = run()
    assert seen[3:] == [slice(0, 300)]
    for a, b in zip(split, whole, strict=True):
        assert relative_error(a, b.double()) <= 1e-5


@pytest.mark.parametrize("mode", ["no_grad", "frozen"])
def test_without_gradients_only_the_loss_is_computed(case, mode, make_head):
    impl, dtype = case
    head = make_head(37, 16, 97, dtype)
    loss_fn = policy_loss(37, head.labels.device)
    with_gradients = linear_logprob_loss(*head, loss_fn, impl=impl)
    if mode == "frozen":
        head.hidden_states.requires_grad_(False), head.weight.requires_grad_(False)
    with torch.set_grad_enabled(mode != "no_grad"):
        alone = linear_logprob_loss(*head, loss_fn, impl=impl)
    assert not alone.requires_grad
    assert torch.equal(alone, with_gradients.detach())


def test_a_loss_that_ignores_the_logprobs_has_zero_gradients(make_head):
    head = make_head(5, 16, 97, torch.float32)
    loss = linear_logprob_loss(*head, lambda logprobs, rows: torch.tensor(2.0), impl="chunked")
    loss.backward()
    assert loss.item() == 2
    assert head.hidden_states.grad.abs().max() == head.weight.grad.abs().max() == 0


def test_graph_of_the_loss_itself_can_be_retained(case, make_head):
    impl, dtype = case
    head = make_head(20, 16, 97, dtype)
    loss = linear_logprob_loss(*head, policy_loss(20, head.labels.device), impl=impl)
    first = torch.autograd.grad(loss, head[:2], retain_graph=True)
    for x in torch.autograd.grad(loss, head[:2], retain_graph=True):
        x.mul_(0.5)  # the caller's own: neither `first` nor what is saved
    for _ in range(2):
        loss.backward(retain_graph=True)  # accumulates into .grad in place
    second = torch.autograd.grad(3 * loss, head[:2])
    for x, a, b in zip(head[:2], first, second, strict=True):
        assert torch.equal(x.grad, 2 * a)
        torch.testing.assert_close(b, 3 * a)


def test_upstream_scalar_is_applied_before_the_one_rounding(make_head, relative_error, monkeypatch):
    """Rounding to bfloat16 before and after a factor of 0.7 would show as 1.4 times the error."""
    float32 = torch.float32  # as with several chunks, on a GPU too
    monkeypatch.setattr(loss_module, "_weight_gradient_dtype", lambda weight, _: float32)
    head = make_head(64, 32, 97, torch.bfloat16)
    g = torch.randn(64, device=head.labels.device)
    loss = linear_logprob_loss(*head, lambda logprobs, rows: (g[rows] * logprobs).sum())
    actual = torch.autograd.grad(loss, head[:2], torch.full_like(loss, 0.7))
    double = head.float64()
    exact = torch.autograd.grad(reference.linear_logprob(*double), double[:2], 0.7 * g.double())
    for a, e in zip(actual, exact, strict=True):
        # The CPU rounds nothing but the result; a GPU also rounds dlogits.
        limit = 1.05 if a.device.type == "cpu" else 1.7
        assert relative_error(a, e) <= limit * relative_error(e.bfloat16(), e)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_loss_scale_reaches_gradients_that_float16_cannot_hold(
    dtype, make_head, monkeypatch, relative_error
):
    """A mean over 1e5 tokens under a scale of 65536; as on a GPU, but for the choice of dtype."""
    choose = loss_module._weight_gradient_dtype
    on_gpu = types.SimpleNamespace(is_cuda=True, dtype=dtype)
    monkeypatch.setattr(loss_module, "_weight_gradient_dtype", lambda _, n: choose(on_gpu, n))
    head = make_head(64, 32, 97, dtype)
    g = torch.randn(64, device=head.labels.device) / 1e5
    loss = linear_logprob_loss(*head, lambda logprobs, rows: (g[rows] * logprobs).sum())
    actual = torch.autograd.grad(loss, head[:2], torch.full_like(loss, 65536.0))
    double = head.float64()
    exact = torch.autograd.grad(reference.linear_logprob(*double), double[:2], 65536 * g.double())
    limit = {torch.float16: 5e-4, torch.bfloat16: 4e-3}[dtype]
    for a, e in zip(actual, exact, strict=True):
        assert relative_error(a, e) <= limit


@pytest.mark.parametrize(("upstream", "limit"), [(1.0, 1.05), (0.5, 1.05), (0.7, 1.6)])
def test_dw_of_one_chunk_is_rounded_by_its_gemm_as_on_a_gpu(
    upstream, limit, make_head, monkeypatch, relative_error
):
    """What the docstring says of upstream scalars: a power of two costs nothing."""
    monkeypatch.setattr(loss_module, "_weight_gradient_dtype", lambda weight, _: weight.dtype)
    head = make_head(64, 32, 9000, torch.bfloat16)  # more than a block of columns
    g = torch.randn(64, device=head.labels.device)
    saved = []

    def grads():
        loss = linear_logprob_loss(*head, lambda logprobs, rows: (g[rows] * logprobs).sum())
        saved.append(loss.grad_fn.saved_tensors[1])
        return torch.autograd.grad(loss, head[:2], torch.full_like(loss, upstream))

    grad_hidden, grad_weight = grads()
    assert saved[0].dtype == torch.bfloat16
    is_handed_over = grad_weight.data_ptr() == saved[0].data_ptr()
    assert is_handed_over == (upstream == 1 or grad_weight.is_cuda)
    double = head.float64()
    exact = torch.autograd.grad(
        reference.linear_logprob(*double), double[:2], upstream * g.double()
    )
    if grad_weight.is_cuda:
        limit *= 1.7  # dlogits are rounded, too
    for a, e in zip((grad_hidden, grad_weight), exact, strict=True):
        assert relative_error(a, e) <= limit * relative_error(e.bfloat16(), e)


@pytest.mark.parametrize("factor", [1.0, 0.7])
def test_the_scale_kernel_multiplies_every_element_once(factor, device, monkeypatch):
    from laser_kernels import _row_kernels

    monkeypatch.setattr(_row_kernels, "MAX_PROGRAMS", 2)
    dtype = torch.bfloat16 if device == "cuda" else torch.float16
    for size in (0, 1, 3 * _row_kernels.BLOCK_V + 5):
        grad = torch.randn(size, 1, device=device).to(dtype)
        expected = (grad.float() * factor).to(dtype)
        result = _row_kernels.scale_(grad, torch.tensor(factor, device=device))
        assert result is grad and torch.equal(grad, expected)
