"""Per-row log-probs and entropies, and their gradients, of every implementation."""

import pytest
import torch

import laser_kernels
from laser_kernels import linear_logprob, linear_logprob_entropy, linear_logprob_loss, reference

# N below, at and above a tile; D and V that no tile divides, and that TMA cannot address.
SHAPES = [(1, 16, 97), (37, 48, 203), (33, 25, 64)]
GRADIENT_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 1.5e-3}


def logprob_tolerance(head, temperature=1.0) -> float:
    logits = head.hidden_states.detach().double() @ head.weight.detach().double().T
    largest = (logits / torch.as_tensor(temperature).double().reshape(-1, 1).to(logits)).abs().max()
    return 2e-5 * max(1.0, largest.item() / 32)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy reports the overflow that is meant
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("max_logit", [30, 70, 1000])
def test_logprobs_and_entropy_are_exact(case, shape, max_logit, make_head):
    impl, dtype = case
    head = make_head(*shape, dtype, max_logit)
    temperature = torch.rand(shape[0], device=head.labels.device) + 0.5
    logprobs, entropy = linear_logprob_entropy(*head, temperature=temperature, impl=impl)
    exact = reference.linear_logprob_entropy(*head.float64(), temperature=temperature)
    tolerance = logprob_tolerance(head, temperature)
    assert logprobs.dtype == entropy.dtype == torch.float32
    assert (logprobs - exact[0]).abs().max() <= tolerance
    assert (entropy - exact[1]).abs().max() <= tolerance
    assert laser_kernels.last_impl() == impl


@pytest.mark.parametrize("vocabulary", [151936, 152064, 128256, 32003, 97])
def test_logprobs_are_exact_for_real_vocabularies(vocabulary, make_head, device):
    # The Triton kernels take their turn on a GPU; the interpreter would step over 10^4 tiles.
    impl = "triton" if device == "cuda" else "chunked"
    head = make_head(5, 64, vocabulary, torch.bfloat16, max_logit=70)
    with torch.no_grad():
        logprobs = linear_logprob(*head, impl=impl)
        exact = reference.linear_logprob(*head.float64())
    assert (logprobs - exact).abs().max() <= logprob_tolerance(head)


def test_all_negative_logits(case, make_head):
    impl, dtype = case
    head = make_head(8, 16, 97, dtype)
    with torch.no_grad():
        head.hidden_states.copy_(head.hidden_states.abs())
        head.weight.copy_(-head.weight.abs() - 1)
        logprobs = linear_logprob(*head, impl=impl)
        exact = reference.linear_logprob(*head.float64())
    assert (logprobs - exact).abs().max() <= logprob_tolerance(head)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy reports the overflow that is meant
@pytest.mark.parametrize("gap", [60, 120, 1000])
def test_target_far_below_the_maximum(case, gap, make_head, push_away):
    """The anchor's guard: e^gap overflows or nearly so, in two of otherwise plain rows."""
    impl, dtype = case
    head = make_head(20, 16, 97, dtype, max_logit=3)
    push_away(head, {1: gap, 18: gap})
    with torch.no_grad():
        logprobs, entropy = linear_logprob_entropy(*head, impl=impl)
        exact = reference.linear_logprob_entropy(*head.float64())
    assert exact[0][1] < -gap + 10
    assert (logprobs - exact[0]).abs().max() <= logprob_tolerance(head)
    assert (entropy - exact[1]).abs().max() <= logprob_tolerance(head)


def test_a_sure_row_has_no_positive_logprob(case, make_head):
    impl, dtype = case
    head = make_head(64, 48, 97, dtype)
    with torch.no_grad():
        head.hidden_states.copy_(3 * head.weight[head.labels])
        logprobs = linear_logprob(*head, impl=impl)
    assert -1e-3 < logprobs.max() <= 0


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy reports the NaN that is meant
def test_nan_stays_in_its_row(case, make_head):
    impl, dtype = case
    head = make_head(20, 16, 97, dtype)
    with torch.no_grad():
        expected = linear_logprob_entropy(*head, impl=impl)
        head.hidden_states[3, 5] = float("nan")
        actual = linear_logprob_entropy(*head, impl=impl)
    others = torch.arange(20, device=head.labels.device) != 3
    for a, e in zip(actual, expected, strict=True):
        assert a[3].isnan()
        assert torch.equal(a[others], e[others])


def test_common_offset_of_all_logits_costs_only_the_rounding_of_the_gemm(make_head):
    head = make_head(8, 16, 97, torch.float32)
    with torch.no_grad():
        head.weight[:, 0] = 64
        head.hidden_states[:, 0] = 64
        logprobs = linear_logprob(*head, impl="chunked")
        exact = reference.linear_logprob(*head.float64())
    assert (logprobs - exact).abs().max() <= 1e-2


@pytest.mark.parametrize("upstream", ["logprobs", "entropy", "both"])
def test_gradients_are_exact(case, upstream, make_head, relative_error):
    impl, dtype = case
    head = make_head(37, 48, 203, dtype)
    temperature = torch.rand(37, device=head.labels.device) + 0.5
    gradients = (torch.randn_like(temperature), torch.randn_like(temperature))
    chosen = {"logprobs": [0], "entropy": [1], "both": [0, 1]}[upstream]

    def grads(outputs, inputs):
        outputs = [outputs[i] for i in chosen]
        upstreams = [gradients[i].to(output) for i, output in zip(chosen, outputs, strict=True)]
        return torch.autograd.grad(outputs, inputs, upstreams)

    actual = grads(linear_logprob_entropy(*head, temperature=temperature, impl=impl), head[:2])
    double = head.float64()
    exact = grads(reference.linear_logprob_entropy(*double, temperature=temperature), double[:2])
    for a, e, x in zip(actual, exact, head[:2], strict=True):
        assert a.dtype == x.dtype
        assert relative_error(a, e) <= GRADIENT_TOLERANCE[dtype]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize(("max_logit", "softcap"), [(8, None), (30, None), (200, None), (60, 30.0)])
@pytest.mark.parametrize("form", ["logprob", "loss"])
def test_float32_gradients_are_as_exact_as_those_of_torch(
    form, max_logit, softcap, temperature, make_head, relative_error
):
    """Recomputed logits have the bits of the forward, and a logsumexp of 200 is not rounded."""

    def plain(h, w, labels):
        logits = h @ w.T
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        return torch.log_softmax(logits / temperature, 1).gather(1, labels[:, None]).squeeze(1)

    how = dict(temperature=temperature, softcap=softcap, impl="chunked")
    ours, torchs = [], []
    for _ in range(4):  # the largest logits, of a few rows, make the error of a head
        head, g = make_head(128, 64, 1000, torch.float32, max_logit), torch.randn(128)
        g = g.to(head.labels.device)
        if form == "logprob":
            result = (linear_logprob(*head, **how) * g).sum()
        else:
            result = linear_logprob_loss(*head, lambda x, rows, g=g: (g[rows] * x).sum(), **how)
        double = head.float64()
        exact = torch.autograd.grad(plain(*double), double[:2], g.double())
        for found, grads in (
            (ours, torch.autograd.grad(result, head[:2])),
            (torchs, torch.autograd.grad(plain(*head), head[:2], g)),
        ):
            found.append([relative_error(a, e) for a, e in zip(grads, exact, strict=True)])
    our_errors, torch_errors = (torch.tensor(x).square().mean(0).sqrt() for x in (ours, torchs))
    assert (our_errors <= 1.5 * torch_errors).all(), (our_errors, torch_errors)


@pytest.mark.parametrize("impl", ["chunked", "triton"])
def test_tiny_float16_gradients_do_not_vanish(impl, make_head):
    """dlogits of a loss averaged over 2^20 tokens lie below float16; their sums need not."""
    head = make_head(16, 16, 97, torch.float16)
    with torch.no_grad():
        head.hidden_states.mul_(256)
        head.weight.div_(256)
    g = torch.rand(16, device=head.labels.device)
    (unit,) = torch.autograd.grad(linear_logprob(*head, impl=impl), head.weight, g)
    (tiny,) = torch.autograd.grad(linear_logprob(*head, impl=impl), head.weight, g * 2.0**-20)
    assert unit.abs().max() > 256
    # Subnormal float16 numbers are 2^-24 apart.
    assert (tiny.double() - unit.double() * 2.0**-20).abs().max() <= 2.0**-24


def test_tied_weight_sums_both_gradients(case, make_head, relative_error):
    """The same matrix embeds the inputs and scores the outputs."""
    impl, dtype = case
    head = make_head(9, 16, 97, dtype)
    tokens = torch.randint(97, (9,), device=head.labels.device)
    g = torch.randn(9, device=head.labels.device)
    actual = linear_logprob(head.weight[tokens], head.weight, head.labels, impl=impl)
    (actual,) = torch.autograd.grad(actual, head.weight, g)
    weight = head.float64().weight
    exact = reference.linear_logprob(weight[tokens], weight, head.labels)
    (exact,) = torch.autograd.grad(exact, weight, g.double())
    assert relative_error(actual, exact) <= 2 * GRADIENT_TOLERANCE[dtype]


def test_non_contiguous_inputs(case, make_head):
    impl, dtype = case
    head = make_head(12, 16, 97, dtype)
    g = torch.randn(12, device=head.labels.device)
    logprobs = linear_logprob(*head, temperature=1.5 - g.sigmoid(), impl=impl)
    expected = torch.autograd.grad(logprobs, head[:2], g)
    h, w = (x.detach().T.contiguous().T.requires_grad_() for x in head[:2])
    labels, temperature = (torch.stack([x, x], 1)[:, 0] for x in (head.labels, 1.5 - g.sigmoid()))
    logprobs = linear_logprob(h, w, labels, temperature=temperature, impl=impl)
    actual = torch.autograd.grad(logprobs, (h, w), g)
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a, e)


def test_no_grad_gives_the_same_logprobs(case, make_head):
    impl, dtype = case
    head = make_head(12, 16, 97, dtype)
    logprobs = linear_logprob(*head, impl=impl)
    with torch.no_grad():
        alone = linear_logprob(*head, impl=impl)
    assert logprobs.requires_grad and not alone.requires_grad
    assert torch.equal(alone, logprobs)


@pytest.mark.parametrize("dtype", [torch.float16])
def test_a_row_alone_equals_the_row_in_a_batch(dtype, make_head):
    head = make_head(37, 48, 203, dtype)
    with torch.no_grad():
        batch = linear_logprob_entropy(*head, impl="triton")
        for row in (0, 17, 36):
            i = slice(row, row + 1)
            alone = linear_logprob_entropy(head[0][i], head.weight, head.labels[i], impl="triton")
            assert all(torch.equal(a, b[i]) for a, b in zip(alone, batch, strict=True))


def test_chunks_are_invisible(case, make_head, monkeypatch, relative_error):
    impl, dtype = case
    head = make_head(130, 16, 40, dtype)
    g = torch.randn(130, device=head.labels.device)

    def run():
        logprobs = linear_logprob(*head, impl=impl)
        return logprobs, *torch.autograd.grad(logprobs, head[:2], g)

    whole = run()
    monkeypatch.setenv("LASER_KERNELS_WORKSPACE_MB", "0.01")
    split = run()
    torch.testing.assert_close(split[0], whole[0], rtol=0, atol=1e-5)
    for a, b in zip(split[1:], whole[1:], strict=True):
        assert relative_error(a, b.double()) <= GRADIENT_TOLERANCE[dtype]
