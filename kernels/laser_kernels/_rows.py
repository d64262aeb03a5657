"""What happens to one row of logits, as vectors over the rows.

With log p_iv = z_iv - lse_i and upstream gradients g = dL/dlogprob, e = dL/dentropy:

    dL/dz_iv = g_i (1[v = y_i] - p_iv) - e_i p_iv (log p_iv + entropy_i)
             = p_iv (constant_i + slope_i log p_iv)                  v != y_i
             = target_i                                              v  = y_i

so three numbers a row describe the whole row of dlogits. They carry the factor 1/T_i
of z = H W^T / T.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Statistics(NamedTuple):
    """What a pass over the vocabulary leaves of each row; all float32 [n]."""

    logprobs: Tensor
    logsumexp: Tensor
    entropy: Tensor


def concatenate(parts: list[Statistics], like: Tensor) -> Statistics:
    """Join the statistics of row chunks; no chunk means no row."""
    if not parts:
        parts = [Statistics(*(like.new_empty(0) for _ in range(3)))]
    return Statistics(*(torch.cat(columns) for columns in zip(*parts, strict=True)))


class RowGradient(NamedTuple):
    """dL/dlogits of a row in three numbers; all float32 [n]."""

    constant: Tensor
    slope: Tensor | None  # None: zero, no gradient came through the entropy
    target: Tensor

    def rows(self, rows: slice) -> RowGradient:
        """Return a range of rows."""
        slope = None if self.slope is None else self.slope[rows]
        return RowGradient(self.constant[rows], slope, self.target[rows])


def row_gradient(
    logprobs: Tensor,  # [n]
    entropy: Tensor | None,  # [n]
    grad_logprobs: Tensor | None,  # [n]
    grad_entropy: Tensor | None,  # [n]
    inv_temperature: Tensor,  # [n]
) -> RowGradient:
    """Turn upstream gradients into row coefficients; a missing gradient is zero."""
    if grad_logprobs is None:
        grad_logprobs = torch.zeros_like(logprobs)
    g = grad_logprobs.float() * inv_temperature
    constant, slope, target = -g, None, -g * torch.expm1(logprobs)
    if grad_entropy is not None:
        e = grad_entropy.float() * inv_temperature
        constant, slope = constant - e * entropy, -e
        target = target - e * logprobs.exp() * (logprobs + entropy)
    return RowGradient(constant, slope, target)


def factor_out_exponent(
    gradient: RowGradient, dtype: torch.dtype
) -> tuple[RowGradient, Tensor | None]:
    """Divide float16 gradients by a power of two, the second result, to keep their digits.

    A loss averaged over 1e5 tokens has dlogits below the smallest float16; scaled to their
    largest row they lose only what is 2^-24 of it. The other dtypes have the range themselves.
    """
    if dtype != torch.float16:
        return gradient, None
    parts = [part for part in gradient if part is not None]
    largest = torch.cat([gradient.constant.new_zeros(1), *parts]).abs().amax()
    scale = torch.where(largest > 0, torch.exp2(largest.log2().ceil()), 1)
    return RowGradient(*(None if part is None else part / scale for part in gradient)), scale
