"""The oracle of the benchmarks, their random data and their bounds."""

import pytest
import torch
from tensor_core import truncating_mm

from bench import exact as exact_module
from bench import truncation
from bench.exact import Exact, allowed_error
from bench.providers import bare_gemms, weight_stream
from bench.shapes import SHAPES, Shape, make_input_sets, make_inputs
from laser_kernels import reference

CPU = torch.device("cpu")


@pytest.fixture
def inputs():
    return make_inputs(SHAPES["smoke"], 40, torch.float32, CPU, seed=3)


@pytest.mark.parametrize("rows_at_once", [16, 64])
def test_float64_results_equal_autograd_of_the_reference(inputs, rows_at_once, monkeypatch):
    monkeypatch.setattr(exact_module, "_ROWS_AT_ONCE", rows_at_once)
    h, w = (x.detach().double().requires_grad_() for x in inputs.leaves)
    logprobs = reference.linear_logprob(h, w, inputs.labels)
    exact = Exact(inputs, inputs.row_weight)
    torch.testing.assert_close(exact.logprobs, logprobs.detach())
    torch.testing.assert_close(exact.loss, (inputs.row_weight * logprobs).sum().detach())
    expected = torch.autograd.grad(logprobs, (h, w), inputs.row_weight.double())
    for found, grad in zip(exact.gradients, expected, strict=True):
        torch.testing.assert_close(found, grad.float())


def test_errors_tell_a_rounded_result_from_an_exact_one(inputs):
    exact = Exact(inputs, inputs.row_weight)
    off = exact.logprobs.clone()
    off[7] += 1e-2
    assert not exact.logprob_error(exact.logprobs.float(), is_exact=True).is_wrong
    error = exact.logprob_error(off, is_exact=True)
    assert error.is_wrong and error.value == pytest.approx(1e-2)
    off[7] = float("nan")
    assert exact.logprob_error(off, is_exact=True).is_wrong
    assert exact.loss_error(exact.loss + inputs.row_weight.abs().sum(), is_exact=True).is_wrong
    scaled = tuple(1.01 * grad for grad in exact.gradients)
    errors = exact.gradient_errors(scaled, is_exact=True)
    assert errors["grad_weight"].value == pytest.approx(1e-2, rel=1e-3)
    assert errors["grad_hidden"].is_wrong
    assert not exact.gradient_errors(exact.gradients, is_exact=True)["grad_hidden"].is_wrong


@pytest.fixture
def on_tensor_cores(monkeypatch):
    """Let the library truncate, and make bfloat16 inputs of a 7B model's D."""
    monkeypatch.setattr(exact_module, "library_logits", lambda h, w: truncating_mm(h, w.T))
    monkeypatch.setattr(truncation, "library_logits", lambda h, w: truncating_mm(h, w.T))
    inputs = make_inputs(Shape("deep", 3584, 8192), 64, torch.bfloat16, CPU, seed=0)
    h, w = (x.detach() for x in inputs.leaves)
    return Exact(inputs, inputs.row_weight), truncating_mm(h, w.T), h.double() @ w.double().T


def logprobs_of(exact, logits, target=None):
    """A provider's log-probs in float32; `target` may come from elsewhere than its logits."""
    labels = exact.inputs.labels[:, None]
    target = (logits if target is None else target).gather(1, labels).double()
    return (target[:, 0] - logits.double().logsumexp(1)).float()


def test_what_a_row_may_be_off_by_in_hand_computed_cases():
    weight = torch.empty(1, 2048, dtype=torch.bfloat16)  # 2^7 steps: |z| = 2^5 may lose 2^-12
    largest = torch.tensor([32.0, 32.0, 32.0, 64.0, 1.0])
    library = torch.tensor([0.0, 1e-4, 1.0, 0.0, 1.0])
    expected = torch.tensor([2e-5, 1.5e-4, 2.0**-12, 4e-5, 2e-5])
    torch.testing.assert_close(allowed_error(weight, largest, library), expected)
    torch.testing.assert_close(allowed_error(weight, largest, 2 * library, 2.0), 2 * expected)
    rounded = torch.tensor([2e-5, 2e-5, 2e-5, 4e-5, 2e-5])
    torch.testing.assert_close(allowed_error(weight.float(), largest, library), rounded)


def test_truncation_of_tensor_cores_is_allowed_and_bfloat16_logits_are_not(on_tensor_cores):
    exact, truncated, logits = on_tensor_cores
    error = exact.logprob_error(logprobs_of(exact, truncated), is_exact=True)
    assert error.value > 2e-5 and error.library == pytest.approx(error.value, rel=0.1)
    assert not error.is_wrong
    loss = (exact.row_weight * logprobs_of(exact, truncated)).sum()
    assert not exact.loss_error(loss, is_exact=True).is_wrong

    rounded = logprobs_of(exact, logits.bfloat16())
    error = exact.logprob_error(rounded, is_exact=True)
    assert error.is_wrong and error.value > 100 * error.tolerance
    loss = exact.loss_error((exact.row_weight * rounded).sum(), is_exact=True)
    assert loss.is_wrong and loss.library < loss.tolerance
    assert not exact.logprob_error(rounded, is_exact=False).is_wrong


def test_a_row_may_be_little_worse_than_the_library_in_that_row(on_tensor_cores):
    """A target that is summed in another order does not lose what its tile loses."""
    exact, truncated, logits = on_tensor_cores
    error = exact.logprob_error(logprobs_of(exact, truncated, target=logits), is_exact=True)
    largest = logits.abs().amax(1)
    assert error.is_wrong and error.value < (3584 / 16 * 2**-24 * largest).max()
    assert error.value > 2 * error.library


def test_truncation_is_told_from_rounding(on_tensor_cores, monkeypatch, tmp_path):
    rows = truncation.main(["--smoke", "--json", str(tmp_path / "truncation.json")])
    for row in rows:
        assert row["smaller in"] == 1 and 0.6 < row["too small by"] / row["predicted"] < 1
    monkeypatch.undo()
    for row in truncation.main(["--smoke"]):
        assert 0.2 < row["smaller in"] < 0.8
        assert abs(row["too small by"]) < 0.1 * row["predicted"]
    assert "| 1024 | 20.0 |" in (tmp_path / "truncation.md").read_text()


def test_float32_inputs_have_the_tolerance_of_rounding(inputs):
    exact = Exact(inputs, inputs.row_weight)
    tolerance = exact.logprob_error(exact.logprobs, is_exact=True).tolerance
    assert tolerance == pytest.approx(2e-5)


def test_data_are_peaked_like_a_language_model(inputs):
    inputs = make_inputs(SHAPES["smoke"], 400, torch.float32, CPU, seed=0)
    logprobs = Exact(inputs, inputs.row_weight).logprobs
    is_certain = logprobs > -0.1
    assert 0.3 < is_certain.float().mean() < 0.6  # about half, a few of them not quite
    assert (logprobs < -4).float().mean() > 0.4
    assert (inputs.row_weight > 0).any() and (inputs.row_weight < 0).any()


def test_input_sets_are_repeatable():
    (first,) = make_input_sets(SHAPES["smoke"], 8, torch.float32, CPU)
    again = make_inputs(SHAPES["smoke"], 8, torch.float32, CPU, seed=0)
    other = make_inputs(SHAPES["smoke"], 8, torch.float32, CPU, seed=1)
    assert torch.equal(first.weight, again.weight) and not torch.equal(first.weight, other.weight)


@pytest.mark.parametrize("num_gemms", [3, 4])
def test_bounds_do_the_work_that_they_stand_for(inputs, num_gemms):
    h, w = (x.detach() for x in inputs.leaves)
    run = bare_gemms([inputs], num_gemms, ("fwd", "fwd+bwd"))
    logits = run.calls["fwd"](0)
    torch.testing.assert_close(logits, h @ w.T)
    with torch.profiler.profile() as profiler:
        grad_hidden, grad_weight = run.calls["fwd+bwd"](0)
    torch.testing.assert_close(grad_hidden, logits @ w)
    torch.testing.assert_close(grad_weight, logits.T @ h)
    counts = {event.key: event.count for event in profiler.key_averages()}
    assert counts["aten::mm"] == num_gemms

    stream = weight_stream([inputs], {"fwd": 1, "fwd+bwd": 3})
    torch.testing.assert_close(stream.calls["fwd"](0), w)
    assert stream.scale == {"fwd": 0.5, "fwd+bwd": 1.5}
