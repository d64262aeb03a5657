"""The float64 result, and how far from it a provider may be.

Log-probs are judged row by row, gradients by their relative Frobenius error. A provider that rounds
its logits to 16 bits, as a plain model does, may be off by what that rounding costs. One that never
does may be off, in row i, by

    rounding_i = 2e-5 max(1, max|z_i| / 32)           float32 inputs
    min(truncation_i, max(rounding_i, 1.5 library_i))  16-bit inputs
    truncation_i = max(2e-5, D/16 2^-24 max|z_i|)

A tensor core adds 16 products at a time and cuts its float32 accumulator toward zero. That loses
half an ulp a step, 2^-24 of the sum at most: half of truncation_i where a logit grows to |z| step
by step (1.3e-4 nats at D = 3584 and |z| = 20), and up to 1.45 times as much in a simulation of
half-certain rows, where sums overshoot and target and normaliser both lose. cuBLAS loses it as
well, so what its GEMM loses in the same row, library_i, is the yardstick. Below rounding_i, five
ulps of a logit of 32, it is none: the error of a log-prob is a difference of two errors, and cuBLAS
is exact by chance, or because the target is certain and the two cancel.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from bench.harness import Error
from bench.shapes import Inputs

_ROWS_AT_ONCE = 1024


def library_logits(hidden_states: Tensor, weight: Tensor) -> Tensor:
    """[n, V] float32: cuBLAS's product of 16-bit matrices, a CPU's of the same in float32."""
    if weight.is_cuda and weight.dtype != torch.float32:
        # With a row or a few, cuBLAS may do without tensor cores or split D, and lose less.
        times = -(-128 // len(hidden_states))
        logits = torch.mm(hidden_states.repeat(times, 1), weight.T, out_dtype=torch.float32)
        return logits[: len(hidden_states)]
    return torch.mm(hidden_states.float(), weight.T.float())


def allowed_error(
    weight: Tensor,  # [V, D], for its dtype and D
    largest_logit: Tensor,  # [N]
    library_error: Tensor,  # [N]
    sensitivity: Tensor | float = 1.0,
) -> Tensor:  # [N]
    """What each row may be off by, nats; `sensitivity` scales it for a function of log-probs."""
    rounding = sensitivity * 2e-5 * (largest_logit / 32).clamp(min=1)
    if weight.dtype == torch.float32:
        return rounding
    steps = weight.shape[1] / 16
    truncation = sensitivity * (steps * 2**-24 * largest_logit).clamp(min=2e-5)
    return torch.minimum(truncation, torch.maximum(rounding, 1.5 * library_error))


class Exact:
    """The float64 result for one set of inputs and the loss sum_i row_weight_i logprob_i."""

    def __init__(self, inputs: Inputs, row_weight: Tensor) -> None:
        self.inputs = inputs
        self.row_weight = row_weight.double()

    @cached_property
    def _forward(self) -> tuple[Tensor, Tensor, Tensor]:
        found = []
        weight = self.inputs.weight.detach()
        double = weight.double()
        for rows in self._chunks():
            hidden_states = self.inputs.hidden_states[rows].detach()
            logits = hidden_states.double() @ double.T
            library = library_logits(hidden_states, weight).double()
            target = self.inputs.labels[rows, None]
            logprobs = [z.gather(1, target)[:, 0] - z.logsumexp(1) for z in (logits, library)]
            found.append((*logprobs, logits.abs().amax(1)))
        return tuple(map(torch.cat, zip(*found, strict=True)))

    @property
    def logprobs(self) -> Tensor:
        """[N] float64."""
        return self._forward[0]

    @property
    def library_logprobs(self) -> Tensor:
        """[N] float64: the softmax is exact, the logits are the library's."""
        return self._forward[1]

    @property
    def loss(self) -> Tensor:
        """Scalar float64."""
        return (self.row_weight * self.logprobs).sum()

    @cached_property
    def gradients(self) -> tuple[Tensor, Tensor]:
        """dL/dH [N, D] and dL/dW [V, D], float64 rounded to float32."""
        weight = self.inputs.weight.detach().double()
        grad_hidden = torch.empty_like(self.inputs.hidden_states.detach(), dtype=torch.float32)
        grad_weight = torch.zeros_like(weight)
        for rows in self._chunks():
            hidden_states = self.inputs.hidden_states[rows].detach().double()
            upstream = self.row_weight[rows, None]
            dlogits = (hidden_states @ weight.T).softmax(1).mul_(-upstream)
            dlogits.scatter_add_(1, self.inputs.labels[rows, None], upstream)
            grad_hidden[rows] = (dlogits @ weight).float()
            grad_weight.addmm_(dlogits.T, hidden_states)
        return grad_hidden, grad_weight.float()

    def _chunks(self) -> list[slice]:
        starts = range(0, len(self.inputs.labels), _ROWS_AT_ONCE)
        return [slice(start, start + _ROWS_AT_ONCE) for start in starts]

    def logprob_error(self, logprobs: Tensor, *, is_exact: bool) -> Error:
        """The largest error of a row; if rows are wrong, that of the worst; beside cuBLAS's own."""
        errors, library = (
            (found - self.logprobs).abs() for found in (logprobs, self.library_logprobs)
        )
        allowed = self._allowed(is_exact)
        excess = errors / allowed
        row = excess.argmax() if not excess.max() <= 1 else errors.argmax()
        return Error(errors[row].item(), allowed[row].item(), library.max().item())

    def loss_error(self, loss: Tensor, *, is_exact: bool) -> Error:
        """Error of the loss as a weighted mean over the rows, nats."""
        weights = self.row_weight.abs() / self.row_weight.abs().sum()
        library = (self.row_weight * self.library_logprobs).sum()
        errors = [
            ((found - self.loss).abs() / self.row_weight.abs().sum()).item()
            for found in (loss, library)
        ]
        return Error(errors[0], (weights * self._allowed(is_exact)).sum().item(), errors[1])

    def gradient_errors(self, gradients: tuple[Tensor, ...], *, is_exact: bool) -> dict[str, Error]:
        """Relative Frobenius errors of dL/dH and dL/dW."""
        is_float32 = self.inputs.weight.dtype == torch.float32
        tolerance = (1e-5 if is_exact else 1e-3) if is_float32 else (4e-3 if is_exact else 5e-2)
        return {
            name: Error(((grad.float() - exact).norm() / exact.norm()).item(), tolerance)
            for name, grad, exact in zip(
                ("grad_hidden", "grad_weight"), gradients, self.gradients, strict=True
            )
        }

    def _allowed(self, is_exact: bool) -> Tensor:
        """[N]."""
        _, library, largest = self._forward
        if is_exact:
            return allowed_error(self.inputs.weight, largest, (library - self.logprobs).abs())
        is_float32 = self.inputs.weight.dtype == torch.float32
        return torch.full_like(largest, 1e-3 if is_float32 else 0.2)
