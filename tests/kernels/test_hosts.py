"""What other trainers do around the ops: autocast, torch.func, bias, logit scale and softcap."""

import pytest
import torch

import laser_kernels
from laser_kernels import last_token_loss, linear_logprob_entropy, linear_logprob_loss, reference

GRADIENT_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 1.5e-3}
OPS = ["logprob", "entropy", "loss", "last_token"]
# With 1030 rows the last-token op keeps no logits.
OPS_AND_ROWS = [*((name, 5) for name in OPS), ("last_token", 1030)]
AUTOCASTS = [("reference", torch.bfloat16), ("chunked", torch.bfloat16), ("triton", torch.float16)]


def value_and_gradients(op, head, *args):
    value = op(*head, *args)
    return value, *torch.autograd.grad(value, head[:2])


@pytest.mark.parametrize("impl, dtype", AUTOCASTS)
@pytest.mark.parametrize("name", OPS)
def test_autocast_is_followed_as_a_linear_does(name, impl, dtype, make_head, scalar_ops):
    op, head = scalar_ops[name], make_head(5, 16, 97, torch.float32)
    device, g = head.labels.device.type, torch.randn(5, device=head.labels.device)
    rounded = head._replace(**{k: getattr(head, k).to(dtype) for k in ("hidden_states", "weight")})
    value, *grads = value_and_gradients(op, rounded, impl, g)
    mixed = head._replace(hidden_states=rounded[0].detach().requires_grad_())
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    # The backward of the reference is autograd's, which autocast does reach, and compiled always.
    is_op = impl != "reference"
    for inputs, call in ((head, op), (mixed, op), (head, compiled if is_op else op)):
        with torch.autocast(device, dtype):
            actual = call(*inputs, impl, g)
        with torch.autocast(device, dtype, enabled=is_op):
            actual_grads = torch.autograd.grad(actual, inputs[:2])
        assert torch.equal(actual, value)
        for a, e, x in zip(actual_grads, grads, inputs[:2], strict=True):
            assert a.dtype == x.dtype and torch.equal(a.float(), e.float())


@pytest.mark.parametrize("name", OPS)
def test_autocast_can_be_switched_off(name, make_head, scalar_ops):
    op, head = scalar_ops[name], make_head(5, 16, 97, torch.float32)
    device, g = head.labels.device.type, torch.randn(5, device=head.labels.device)
    expected = value_and_gradients(op, head, "chunked", g)
    with torch.autocast(device, torch.bfloat16), torch.autocast(device, enabled=False):
        actual = value_and_gradients(op, head, "chunked", g)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # vmap calls once per sample
@pytest.mark.parametrize("name, num_rows", [x for x in OPS_AND_ROWS if x[0] != "loss"])
def test_torch_func_differentiates(name, num_rows, case, make_head, scalar_ops):
    impl, dtype = case
    op, head = scalar_ops[name], make_head(num_rows, 16, 97, dtype)
    g = torch.randn(num_rows, device=head.labels.device)
    value, *grads = value_and_gradients(op, head, impl, g)

    def scalar(h, w):
        return op(h, w, head.labels, impl, g)

    h, w = (x.detach() for x in head[:2])
    func_grads, func_value = torch.func.grad_and_value(scalar, argnums=(0, 1))(h, w)
    assert torch.equal(func_value, value)
    assert all(torch.equal(a, e) for a, e in zip(func_grads, grads, strict=True))
    if num_rows == 5:
        per_sample = torch.func.vmap(torch.func.grad(scalar), in_dims=(0, None))
        assert torch.equal(per_sample(torch.stack([2 * h, h]), w)[1], grads[0])
        forward = torch.func.vmap(scalar, in_dims=(0, None))
        assert torch.equal(forward(torch.stack([2 * h, h]), w)[1], value)


def test_torch_func_inside_a_compiled_function_runs_eagerly(make_head, scalar_ops):
    head = make_head(5, 16, 97, torch.float32)
    g = torch.randn(5, device=head.labels.device)

    def scalar(h):
        return scalar_ops["entropy"](h, head.weight.detach(), head.labels, "chunked", g)

    h, transformed = head.hidden_states.detach(), torch.func.grad(scalar)
    assert torch.equal(torch.compile(transformed, backend="aot_eager")(h), transformed(h))
    with pytest.raises(Exception, match="torch.func of laser_kernels needs fullgraph=False"):
        torch.compile(lambda h: transformed(h), backend="aot_eager", fullgraph=True)(h)


@pytest.mark.parametrize("name", OPS)
def test_what_torch_func_cannot_do_is_refused(name, make_head, scalar_ops):
    head = make_head(5, 16, 97, torch.float32)
    g = torch.randn(5, device=head.labels.device)

    def scalar(h, impl="chunked"):
        return scalar_ops[name](h, head.weight.detach(), head.labels, impl, g)

    h = head.hidden_states.detach()
    message = "double backward is not supported"
    if name == "loss":
        message = "torch.func cannot transform a loss .* use loss.backward"
        with pytest.raises(RuntimeError, match=message):
            torch.func.grad(scalar)(h)
    with pytest.raises(RuntimeError, match=message):
        torch.func.grad(lambda h: torch.func.grad(scalar)(h).sum())(h)
    with pytest.raises(RuntimeError, match="jvp" if name != "loss" else message):
        torch.func.jvp(scalar, (h,), (h,))
    torch.func.grad(lambda h: torch.func.grad(lambda h: scalar(h, "reference"))(h).sum())(h)


@pytest.mark.parametrize("softcap", [None, 20.0])
@pytest.mark.parametrize("form", ["entropy", "loss", "last_token"])
def test_bias_logit_scale_and_softcap(case, form, softcap, make_head, relative_error):
    """Against plain logits in float64: a bias is one more column, a scale is in the temperature."""
    impl, dtype = case
    head, scale = make_head(37, 47, 203, dtype, max_logit=50), 0.25
    h, w, labels = head
    bias = (4 * torch.randn(203, 1, device=h.device)).to(dtype).requires_grad_()
    g, e = (torch.randn(37, device=h.device) for _ in range(2))
    temperature = torch.rand(37, device=h.device) + 0.5
    inputs = (h, w, bias)
    exact_inputs = [x.detach().double().requires_grad_() for x in inputs]

    logits = exact_inputs[0] @ exact_inputs[1].T + exact_inputs[2].T
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    if form != "last_token":
        logits = scale * logits / temperature[:, None].double()
    logp = torch.log_softmax(logits, 1)
    rows = torch.arange(37, device=h.device)
    exact = {
        "entropy": lambda: (logp[rows, labels] * g - (logp.exp() * logp).sum(1) * e).sum(),
        "loss": lambda: (logp[rows, labels].exp() * g + logp[rows, labels] * e).sum(),
        "last_token": lambda: ((0.1 * (logp[:, 3] + 4) - g).square() * e).sum(),
    }[form]()

    columns = (torch.cat([h, h.new_ones(37, 1)], 1), torch.cat([w, bias], 1))
    how = dict(temperature=temperature / scale, softcap=softcap, impl=impl)
    if form == "entropy":
        logprobs, entropy = linear_logprob_entropy(*columns, labels, **how)
        actual = (logprobs * g + entropy * e).sum()
    elif form == "loss":
        actual = linear_logprob_loss(
            *columns, labels, lambda x, rows: (x.exp() * g[rows] + x * e[rows]).sum(), **how
        )
    else:
        actual, _ = last_token_loss(
            *columns, 3, g, beta=0.1, ref_logprob=-4.0, sample_weight=e, softcap=softcap, impl=impl
        )
    torch.testing.assert_close(actual.double(), exact, rtol=1e-5, atol=1e-4)
    grads = torch.autograd.grad(actual, inputs)
    exact_grads = torch.autograd.grad(exact, exact_inputs)
    for a, x in zip(grads, exact_grads, strict=True):
        assert relative_error(a, x) <= GRADIENT_TOLERANCE[dtype]


@pytest.mark.parametrize("name, num_rows", OPS_AND_ROWS)
def test_softcap_of_every_op(case, name, num_rows, make_head, relative_error):
    """Logits of up to five caps, temperatures by row, random upstream gradients of every output."""
    impl, dtype = case
    head = make_head(num_rows, 16, 97, dtype, max_logit=100)
    device, softcap = head.labels.device, 20.0
    g, e = (torch.randn(num_rows, device=device) for _ in range(2))
    temperature = torch.rand(num_rows, device=device) + 0.5

    def run(ops, head, **how):
        rows = dict(temperature=temperature, softcap=softcap, **how)
        if name == "logprob":
            outputs, upstream = [ops.linear_logprob(*head, **rows)], [g]
        elif name == "entropy":
            outputs, upstream = ops.linear_logprob_entropy(*head, **rows), [g, e]
        elif name == "loss":
            loss = ops.linear_logprob_loss(*head, lambda x, rows: (x * x * g[rows]).sum(), **rows)
            outputs, upstream = [loss], [g[0]]
        else:
            how |= dict(beta=0.1, ref_logprob=-4.0, sample_weight=e, softcap=softcap)
            outputs, upstream = [ops.last_token_loss(*head[:2], 3, g, **how)[0]], [g[0]]
        upstream = [x.to(y) for x, y in zip(upstream, outputs, strict=True)]
        return outputs, torch.autograd.grad(outputs, head[:2], upstream)

    outputs, grads = run(laser_kernels, head, impl=impl)
    exact_outputs, exact_grads = run(reference, head.float64())
    for actual, exact in zip(outputs, exact_outputs, strict=True):
        torch.testing.assert_close(actual.double(), exact, rtol=1e-5, atol=2e-5)
    for actual, exact in zip(grads, exact_grads, strict=True):
        assert relative_error(actual, exact) <= GRADIENT_TOLERANCE[dtype]
