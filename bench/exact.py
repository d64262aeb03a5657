"""The float64 result, and how far from it a provider may be.

Log-probs are judged by their largest absolute error, gradients by their relative Frobenius error.
An unrounded float32 accumulator may be off by 2e-5 max(1, max|z| / 32) nats; a provider that rounds
its logits to 16 bits, as a plain model does, may be off by what that rounding costs.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from bench.harness import Error
from bench.shapes import Inputs

_ROWS_AT_ONCE = 1024


class Exact:
    """The float64 result for one set of inputs and the loss sum_i row_weight_i logprob_i."""

    def __init__(self, inputs: Inputs, row_weight: Tensor) -> None:
        self.inputs = inputs
        self.row_weight = row_weight.double()

    @cached_property
    def _forward(self) -> tuple[Tensor, float]:
        logprobs, largest = [], 0.0
        weight = self.inputs.weight.detach().double()
        for rows in self._chunks():
            logits = self.inputs.hidden_states[rows].detach().double() @ weight.T
            target = logits.gather(1, self.inputs.labels[rows, None]).squeeze(1)
            logprobs.append(target - logits.logsumexp(1))
            largest = max(largest, logits.abs().max().item())
        return torch.cat(logprobs), largest

    @property
    def logprobs(self) -> Tensor:
        """[N] float64."""
        return self._forward[0]

    @property
    def loss(self) -> Tensor:
        """Scalar float64."""
        return (self.row_weight * self.logprobs).sum()

    @property
    def largest_logit(self) -> float:
        """Max |z|, which scales the error of a float32 accumulator."""
        return self._forward[1]

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
        """Largest absolute error over the rows, nats."""
        tolerance = self._value_tolerance(is_exact)
        return Error((logprobs - self.logprobs).abs().max().item(), tolerance)

    def loss_error(self, loss: Tensor, *, is_exact: bool) -> Error:
        """Error of the loss as a weighted mean over the rows, nats."""
        error = (loss - self.loss).abs() / self.row_weight.abs().sum()
        return Error(error.item(), self._value_tolerance(is_exact))

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

    def _value_tolerance(self, is_exact: bool) -> float:
        if is_exact:
            return 2e-5 * max(1.0, self.largest_logit / 32)
        return 1e-3 if self.inputs.weight.dtype == torch.float32 else 0.2
