"""Peak memory obeys the documented formula, seen by the allocator hooks of the profiler."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile

from laser_kernels import linear_logprob, linear_logprob_entropy, linear_logprob_loss
from laser_kernels._dispatch import row_chunks

N, D, V = 700, 64, 4000
WORKSPACE_MB = 5


def peak_bytes(function) -> int:
    """Largest number of bytes that `function` held at a time."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events = profiler.profiler.kineto_results.events()
    memory = sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns())
    held = peak = 0
    for event in memory:
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def test_the_peak_of_a_known_function():
    def function():
        a = torch.empty(1000)
        b = a + 1
        del a
        return b.exp()

    assert 8000 <= peak_bytes(function) < 8100


@pytest.mark.parametrize("form", ["score", "logprob", "loss"])
def test_peak_memory_is_bounded_by_the_formula(form, monkeypatch):
    monkeypatch.setenv("LASER_KERNELS_WORKSPACE_MB", str(WORKSPACE_MB))
    h, w = torch.randn(N, D, requires_grad=True), torch.randn(V, D, requires_grad=True)
    labels = torch.randint(V, (N,))

    def function():
        if form == "score":
            with torch.no_grad():
                linear_logprob_entropy(h, w, labels, impl="chunked")
        elif form == "logprob":
            linear_logprob(h, w, labels, impl="chunked").sum().backward()
        else:
            linear_logprob_loss(
                h, w, labels, lambda logprobs, rows: logprobs.sum(), impl="chunked"
            ).backward()

    function()
    h.grad = w.grad = None
    workspace, rows = 1e6 * WORKSPACE_MB, 64 * N
    dh, dw = 4 * N * D, 4 * V * D
    bound = {
        "score": workspace,
        "logprob": workspace + dh + dw,
        # Float32 dH and dW are held; the gradients come when the workspace is gone.
        "loss": dh + dw + max(workspace, dh + dw),
    }[form]
    peak = peak_bytes(function)
    assert 0.5 * bound < peak <= bound + rows
    assert peak < 4 * N * V  # the logits, not to mention their gradients


def test_backward_of_the_loss_itself_copies_no_gradient(monkeypatch):
    monkeypatch.setenv("LASER_KERNELS_WORKSPACE_MB", "0.0001")  # chunks of 128 rows
    h, w = torch.randn(N, 256, requires_grad=True), torch.randn(V, 256, requires_grad=True)
    labels = torch.randint(V, (N,))

    def function():
        loss = linear_logprob_loss(
            h, w, labels, lambda logprobs, rows: logprobs.sum(), impl="chunked"
        )
        loss.backward()

    function()
    h.grad = w.grad = None
    gradients = 4 * (N + V) * 256
    assert gradients < peak_bytes(function) < 1.6 * gradients  # 2.0 with a copy


@pytest.mark.parametrize(
    ("num_rows", "num_chunks", "rows", "gib"),
    # A 7B head in bfloat16: up to here one chunk; then two; and the bound of 4 GiB at 32768 rows.
    [(8192, 1, 8192, 2.5), (8448, 1, 8448, 2.6), (8449, 3, 2944, 3.1), (32768, 8, 4096, 3.7)],
)
def test_chunks_of_the_loss_on_a_gpu(num_rows, num_chunks, rows, gib, monkeypatch):
    """The formula of linear_logprob_loss.py: the chunk, dH in float32, and dW if it is summed."""
    monkeypatch.delenv("LASER_KERNELS_WORKSPACE_MB", raising=False)
    vocabulary, hidden = 152064, 3584
    with FakeTensorMode():
        hidden_states = torch.empty(num_rows, hidden, device="cuda")
        weight = torch.empty(vocabulary, hidden, device="cuda")
        chunks = row_chunks(hidden_states, weight, "triton")
    assert len(chunks) == num_chunks and chunks[0] == slice(0, rows)
    assert chunks[-1].stop == num_rows
    accumulated = 4 * vocabulary * hidden if num_chunks > 1 else 0
    assert 2 * rows * vocabulary + 4 * num_rows * hidden + accumulated <= gib * 2**30
