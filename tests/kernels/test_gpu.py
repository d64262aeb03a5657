"""What only a GPU can show: real sizes, both ways of addressing, memory, and no synchronisation."""

import os
import subprocess
import sys

import pytest
import torch

import laser_kernels
from bench.exact import allowed_error, library_logits
from bench.last_token import captured
from laser_kernels import (
    _extension,
    last_token_loss,
    linear_logprob,
    linear_logprob_entropy,
    linear_logprob_loss,
    reference,
)

pytestmark = pytest.mark.gpu
IMPLS = ["chunked", "triton"]
IS_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
MISSING_FOR_CUDA = _extension.missing() if IS_HOPPER else "needs a Hopper GPU"
if not MISSING_FOR_CUDA:
    IMPLS.append("cuda")
# Columns of a partial.
BLOCK_V = {"triton": 256, "cuda": 192}
# Hidden size and vocabulary of Qwen2.5 1.5B and 7B, Llama 3 8B, and one that no tile divides.
MODELS = [(1536, 151936), (3584, 152064), (4096, 128256), (1000, 32003)]
SCORE = dict(beta=0.1, ref_logprob=-23.0)


def random_head(num_rows, hidden_size, vocabulary, dtype=torch.bfloat16, spread=2.0):
    """Logits of standard deviation `spread`; every other row is half certain of its label.

    There the label's logit is within 4 nats of all others together, which for a spread of 2 and
    these vocabularies is a lead of 10 to 18. A certain row would hide an error of its logit, since
    its log-prob is 0 anyway.
    """
    weight = (torch.randn(vocabulary, hidden_size, device="cuda") / hidden_size**0.5).to(dtype)
    labels = torch.randint(vocabulary, (num_rows,), device="cuda")
    hidden_states = spread * torch.randn(num_rows, hidden_size, device="cuda")
    others = (hidden_states[:64] @ weight.float().T).logsumexp(1).mean()
    lead = others - 4 + 8 * torch.rand(num_rows, 1, device="cuda")
    hidden_states[::2] += lead[::2] * weight[labels[::2]]
    return hidden_states.to(dtype).requires_grad_(), weight.requires_grad_(), labels


def float64(head):
    return *(x.detach().double().requires_grad_() for x in head[:2]), head[2]


def assert_rows_are_exact(head, exact, logprobs, entropy=None):
    """Each row is within what bench/exact.py allows, and 1.5 times what cuBLAS loses there."""
    h, w, labels = (x.detach() for x in head)
    logits = library_logits(h, w).double()
    rows = logits.log_softmax(1)
    library = (rows.gather(1, labels[:, None])[:, 0], -(rows.exp() * rows).sum(1))
    # An error b of the logits changes an entropy S by sum p (log p + S) b, at most 2 S max |b|.
    sensitivity = (1.0, (2 * library[1]).clamp(min=1))
    found = (logprobs,) if entropy is None else (logprobs, entropy)
    for a, e, l, s in zip(found, exact, library, sensitivity, strict=False):
        errors, cublas = (a - e).abs(), (l - e).abs()
        allowed = allowed_error(w, logits.abs().amax(1), cublas, s)
        row = (errors / allowed).argmax()
        numbers = f"{errors[row]:.1e}, cuBLAS {cublas[row]:.1e}, allowed {allowed[row]:.1e}"
        assert errors[row] <= allowed[row], f"row {row}: error {numbers}"


def test_the_library_adds_to_a_float32_output():
    """First of all, since dW rests on it: before torch 2.10 these calls were errors."""
    dlogits, h = (torch.randn(512, size, device="cuda").bfloat16() for size in (384, 256))
    exact = dlogits.double().T @ h.double()
    out = torch.mm(dlogits.T, h, out_dtype=torch.float32)
    torch.testing.assert_close(out.double(), exact, rtol=0, atol=1e-3)  # bfloat16: 0.25
    result = torch.addmm(out, dlogits.T, h, out_dtype=torch.float32, out=out)
    assert result.data_ptr() == out.data_ptr()
    torch.testing.assert_close(out.double(), 2 * exact, rtol=0, atol=1e-3)


def test_cuda_extension_builds():
    if MISSING_FOR_CUDA:
        pytest.skip(MISSING_FOR_CUDA)
    assert _extension.load().ops is torch.ops.laser_kernels_cuda
    assert callable(torch.ops.laser_kernels_cuda.statistics.default)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("spread", [2, 14])  # the largest logits are about 20 and 70
@pytest.mark.parametrize(("hidden_size", "vocabulary"), MODELS)
def test_logprobs_and_entropy_of_real_heads(impl, spread, hidden_size, vocabulary):
    head = random_head(200, hidden_size, vocabulary, spread=spread)
    with torch.no_grad():
        actual = linear_logprob_entropy(*head, impl=impl)
        exact = reference.linear_logprob_entropy(*float64(head))
    assert_rows_are_exact(head, exact, *actual)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("form", ["logprob", "loss", "last_token"])
def test_gradients_of_a_real_head(impl, form, relative_error, baseline_gradients):
    h, w, labels = head = random_head(200, 1536, 151936)
    g = torch.randn(200, device="cuda")
    if form == "logprob":
        actual = torch.autograd.grad(linear_logprob(*head, impl=impl), head[:2], g)
    elif form == "loss":
        loss = linear_logprob_loss(*head, lambda x, rows: (g[rows] * x).sum(), impl=impl)
        actual = torch.autograd.grad(loss, head[:2])
    else:
        labels.fill_(5)
        rewards = torch.rand(200, device="cuda")
        loss, scores = last_token_loss(h, w, 5, rewards, impl=impl, **SCORE)
        actual = torch.autograd.grad(loss, head[:2])
        g = 2 * SCORE["beta"] * (scores - rewards) / 200
    double = float64(head)
    exact = torch.autograd.grad(reference.linear_logprob(*double), double[:2], g.double())
    baseline = baseline_gradients(head, g, torch.ones_like(g))
    for a, b, e in zip(actual, baseline, exact, strict=True):
        assert relative_error(a, e) <= min(4e-3, 1.1 * relative_error(b, e))


def logprobs_of(scores):
    return scores.double() / SCORE["beta"] + SCORE["ref_logprob"]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("num_rows", [1, 16, 64, 100, 129, 256])
def test_last_token_of_a_real_head(impl, num_rows, relative_error):
    """Every size of the batch dimension, of which a last tile of W may be ragged."""
    h, w, labels = head = random_head(num_rows, 1536, 151936)
    labels.fill_(5)
    rewards = torch.rand(num_rows, device="cuda")
    loss, scores = last_token_loss(h, w, 5, rewards, impl=impl, **SCORE)
    double = float64(head)
    exact, _ = reference.last_token_loss(*double[:2], 5, rewards, **SCORE)
    logprobs = reference.linear_logprob(*double).detach()
    assert_rows_are_exact(head, [logprobs], logprobs_of(scores))
    actual = torch.autograd.grad(loss, (h, w))
    for a, e in zip(actual, torch.autograd.grad(exact, double[:2]), strict=True):
        assert relative_error(a, e) <= 4e-3
    score = laser_kernels.last_token_score(h, w, 5, impl=impl, **SCORE)
    assert_rows_are_exact(head, [logprobs], logprobs_of(score))
    (only_weight,) = torch.autograd.grad(
        last_token_loss(h.detach(), w, 5, rewards, impl=impl, **SCORE)[0], w
    )
    assert torch.equal(only_weight, actual[1])


@pytest.mark.parametrize("impl", IMPLS)
def test_a_cuda_graph_of_the_last_token_gives_the_same_bits(impl):
    h, w, _ = random_head(64, 1536, 151936)
    rewards = torch.rand(64, device="cuda")

    def step():
        loss, scores = last_token_loss(h, w, 5, rewards, impl=impl, **SCORE)
        return scores, *torch.autograd.grad(loss, (h, w))

    replay = captured(lambda number: step(), num_sets=1)
    with torch.no_grad():
        h.copy_(h.flip(0))  # a replay reads its inputs anew
    for replayed, eager in zip(replay(0), step(), strict=True):
        assert torch.equal(replayed, eager)


@pytest.mark.parametrize("num_rows", [1, 8, 64, 300])
def test_descriptors_and_pointers_agree(num_rows):
    """Rows that start off a 16-byte boundary cannot be addressed by TMA."""
    h, w, labels = random_head(num_rows, 1536, 32000)
    rewards = torch.rand(num_rows, device="cuda")
    memory = torch.empty(h.numel() + 1, dtype=h.dtype, device="cuda")
    shifted = memory[1:].view_as(h).copy_(h.detach()).requires_grad_()
    for function in (
        lambda h: linear_logprob(h, w, labels, impl="triton").square().sum(),
        lambda h: linear_logprob_loss(h, w, labels, lambda x, _: x.square().sum(), impl="triton"),
        lambda h: last_token_loss(h, w, 5, rewards, impl="triton", **SCORE)[0],
    ):
        a, b = function(h), function(shifted)
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        grads = torch.autograd.grad(a, h) + torch.autograd.grad(b, shifted)
        torch.testing.assert_close(*grads, rtol=2e-2, atol=2e-2 * grads[0].abs().max().item())


@pytest.mark.parametrize("impl", IMPLS)
def test_runs_repeat_and_rows_do_not_depend_on_their_batch(impl):
    h, w, labels = random_head(700, 1536, 32000)

    def run():
        loss = linear_logprob_loss(h, w, labels, lambda x, _: x.square().sum(), impl=impl)
        return torch.autograd.grad(loss, (h, w))

    for a, b in zip(run(), run(), strict=True):
        assert torch.equal(a, b)
    if impl in BLOCK_V:
        with torch.no_grad():
            batch = linear_logprob(h, w, labels, impl=impl)
            alone = linear_logprob(h[600:601], w, labels[600:601], impl=impl)
        assert torch.equal(alone, batch[600:601])


@pytest.mark.parametrize("impl", IMPLS)
def test_guard_of_far_targets_at_real_tile_sizes(impl, push_away):
    h, w, labels = random_head(300, 1536, 32000, spread=0.5)
    push_away((h, w, labels), {1: 45, 131: 120, 299: 1000})  # rows without a lead
    double = float64((h, w, labels))
    loss = linear_logprob_loss(h, w, labels, lambda x, _: x.sum(), impl=impl)
    exact = reference.linear_logprob(*double)
    actual = linear_logprob(h, w, labels, impl=impl)
    assert_rows_are_exact((h, w, labels), [exact.detach()], actual.detach())
    for a, e in zip(
        torch.autograd.grad(loss, (h, w)), torch.autograd.grad(exact.sum(), double[:2]), strict=True
    ):
        assert (a.double() - e).norm() <= 4e-3 * e.norm()


@pytest.mark.parametrize("impl", IMPLS)
def test_nothing_waits_for_the_device(impl):
    h, w, labels = random_head(600, 1536, 32000)
    temperature = torch.rand(600, device="cuda") + 0.5
    rewards = torch.rand(600, device="cuda")

    def step():
        logprobs, entropy = linear_logprob_entropy(h, w, labels, temperature=temperature, impl=impl)
        (logprobs * rewards + entropy).sum().backward()
        linear_logprob_loss(h, w, labels, lambda x, _: x.square().sum(), impl=impl).backward()
        last_token_loss(h[:64], w, 5, rewards[:64], impl=impl, **SCORE)[0].backward()

    step()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert h.grad.isfinite().all()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("is_one_chunk", [False, True])
def test_peak_memory_obeys_the_formula(impl, is_one_chunk, monkeypatch):
    # 8192 rows take 2.5 GB in 16 bits, 5 GB in float32.
    workspace = 5.2e9 if is_one_chunk else 1.3e9
    monkeypatch.setenv("LASER_KERNELS_WORKSPACE_MB", str(workspace / 1e6))
    num_rows, hidden_size, vocabulary = 8192, 1536, 151936
    h, w, labels = random_head(num_rows, hidden_size, vocabulary)

    def peak(function):
        h.grad = w.grad = None
        torch.cuda.synchronize()
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        return torch.cuda.max_memory_allocated() - held

    def score():
        with torch.no_grad():
            linear_logprob(h, w, labels, impl=impl)

    def train():
        linear_logprob_loss(h, w, labels, lambda x, _: x.sum(), impl=impl).backward()

    train(), score()  # cuBLAS takes its own workspace once
    dh, dw = 4 * num_rows * hidden_size, 4 * vocabulary * hidden_size
    logits = num_rows * vocabulary * (4 if impl == "chunked" else 2)
    # One chunk: all logits and a rounded dW. Several: half of the workspace, or rounded copies.
    several = dw + max(workspace / 2, (dh + dw) / 2)
    assert peak(train) <= dh + (logits + dw / 2 if is_one_chunk else several) + dh / 2 + 64e6
    # The partials: three numbers a row and tile.
    partials = 12 * num_rows * (vocabulary / BLOCK_V.get(impl, 256) + 1)
    assert peak(score) <= (partials if impl in BLOCK_V else workspace) + 64e6


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("form", ["loss", "last_token"])
def test_gradients_of_an_odd_head_whose_graph_is_kept(impl, form, relative_error):
    """Rows that are padded to 16 bytes, an upstream that is not 1, and saved tensors used twice."""
    h, w, labels = head = random_head(200, 1000, 32003)
    if form == "loss":
        g = torch.randn(200, device="cuda")
        loss = linear_logprob_loss(*head, lambda x, rows: (g[rows] * x).sum(), impl=impl)
    else:
        labels.fill_(32002)  # the last: a GEMM that drops the end of an odd sum loses its row
        rewards = torch.rand(200, device="cuda")
        loss, scores = last_token_loss(h, w, 32002, rewards, impl=impl, **SCORE)
        g = 2 * SCORE["beta"] * (scores - rewards) / 200
    double = float64(head)
    exact = torch.autograd.grad(reference.linear_logprob(*double), double[:2], g.double())
    for upstream, is_last in ((1.0, False), (0.7, False), (0.7, True)):
        scale = torch.full_like(loss, upstream)
        actual = torch.autograd.grad(loss, head[:2], scale, retain_graph=not is_last)
        for a, e in zip(actual, exact, strict=True):
            assert relative_error(a, upstream * e) <= 6e-3


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("impl", IMPLS)
def test_tensors_may_be_on_another_device_than_the_current_one(impl, relative_error):
    h, w, labels = (x.detach().to("cuda:1") for x in random_head(64, 1000, 32003))
    h.requires_grad_(), w.requires_grad_()
    loss = linear_logprob_loss(h, w, labels, lambda x, rows: x.sum(), impl=impl)
    actual = torch.autograd.grad(loss, (h, w))
    double = float64((h, w, labels))
    exact = torch.autograd.grad(reference.linear_logprob(*double).sum(), double[:2])
    for a, e in zip(actual, exact, strict=True):
        assert a.device == h.device and relative_error(a, e) <= 6e-3


@pytest.mark.parametrize("impl", IMPLS)
def test_compiles_without_a_graph_break(impl):
    head = random_head(64, 64, 1000)
    with torch.no_grad():
        expected = linear_logprob(*head, impl=impl)
        compiled = torch.compile(linear_logprob, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(*head, impl=impl), expected)


@pytest.mark.slow
@pytest.mark.parametrize("impl", IMPLS)
def test_more_logits_than_32_bits_can_count(impl, monkeypatch):
    """One chunk of 16384 x 152064 logits; the last row lies beyond 2^31 of them."""
    monkeypatch.setenv("LASER_KERNELS_WORKSPACE_MB", "20000")
    h, w, labels = random_head(16384, 64, 152064)
    g = torch.randn(16384, device="cuda")
    loss = linear_logprob_loss(h, w, labels, lambda x, rows: (g[rows] * x).sum(), impl=impl)
    (grad,) = torch.autograd.grad(loss, h)
    tail = slice(16384 - 64, 16384)
    h64, w64, _ = float64((h[tail], w, labels))
    exact = reference.linear_logprob(h64, w64, labels[tail])
    with torch.no_grad():
        assert (linear_logprob(h, w, labels, impl=impl)[tail] - exact).abs().max() <= 1e-4
    (exact_grad,) = torch.autograd.grad(exact, h64, g[tail].double())
    assert (grad[tail].double() - exact_grad).norm() <= 4e-3 * exact_grad.norm()


@pytest.mark.skipif(bool(MISSING_FOR_CUDA), reason=MISSING_FOR_CUDA)
def test_cuda_refuses_what_tma_cannot_load():
    h, w, labels = random_head(4, 60, 100)
    with pytest.raises(ValueError, match="multiple of 8, got 60; use impl='triton'"):
        linear_logprob(h, w, labels, impl="cuda")
    h, w, labels = random_head(4, 64, 100)
    shifted = torch.empty(h.numel() + 1, dtype=h.dtype, device="cuda")[1:].view_as(h)
    with pytest.raises(RuntimeError, match="expected 16-byte aligned rows"):
        linear_logprob(shifted, w, labels, impl="cuda")


def test_tensors_on_two_devices_are_refused():
    h, w, labels = random_head(4, 64, 100)
    with pytest.raises(ValueError, match="expected weight on cuda:0 like hidden_states, got cpu"):
        linear_logprob(h, w.detach().cpu(), labels)
    with pytest.raises(ValueError, match="expected labels on cuda:0 like hidden_states, got cpu"):
        linear_logprob(h, w, labels.cpu())


def test_debug_mode_reports_a_bad_label():
    """In a process of its own: a failed device assertion ends the CUDA context."""
    code = (
        "import torch; from laser_kernels import linear_logprob\n"
        "h, w = (torch.ones(8, 64, device='cuda').bfloat16() for _ in range(2))\n"
        "linear_logprob(h, w, torch.full((8,), 8, device='cuda'))\n"
        "torch.cuda.synchronize()"
    )
    path = os.path.dirname(laser_kernels.__path__[0])
    env = {**os.environ, "PYTHONPATH": path, "LASER_KERNELS_DEBUG": "1"}
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert run.returncode != 0 and "assert" in run.stderr


def test_auto_follows_the_device():
    h, w, labels = random_head(4, 64, 100)
    linear_logprob(h, w, labels)
    major, _ = torch.cuda.get_device_capability()
    assert laser_kernels.last_impl() == ("triton" if major in (9, 10) else "chunked")
    linear_logprob(h.float(), w.float(), labels)
    assert laser_kernels.last_impl() == "chunked"
