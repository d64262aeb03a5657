"""The arithmetic that all implementations share: rows as vectors, and the GEMMs around the softmax.

With log p_iv = z_iv - lse_i and upstream gradients g = dL/dlogprob, e = dL/dentropy:

    dL/dz_iv = g_i (1[v = y_i] - p_iv) - e_i p_iv (log p_iv + entropy_i)
             = p_iv (constant_i + slope_i log p_iv)                  v != y_i
             = target_i                                              v  = y_i

so three numbers a row describe the whole row of dlogits. They carry the factor 1/T_i of z = l / T.
With a softcap C, l = C tanh(H W^T / C), and every element is also multiplied by

    dl/d(H W^T) = 1 - (l / C)^2

Every GEMM has a float32 accumulator that is never rounded. On a GPU 16-bit operands go to cuBLAS
with float32 output. The CPU has no such GEMM: there operands are widened, the weight block by
block, so that no float32 copy of a 16-bit weight ever exists.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

LN2 = math.log(2)
# Rows of a 16-bit weight that are widened, or of a scaled product that exists, at a time.
BLOCK_V = 8192


class Head(NamedTuple):
    """What a pass over the vocabulary reads; the tensors are contiguous."""

    hidden_states: Tensor  # [n, D]
    weight: Tensor  # [V, D]
    labels: Tensor  # [n]; in a gradient, -1: another shard of the vocabulary has the target
    inv_temperature: Tensor  # [n] float32
    softcap: float = 0.0  # none

    def rows(self, rows: slice) -> Head:
        """Return a range of rows."""
        h, w, labels, inv_temperature, softcap = self
        return Head(h[rows], w, labels[rows], inv_temperature[rows], softcap)


class Statistics(NamedTuple):
    """What a pass over the vocabulary leaves of each row; all float32 [n].

    The logsumexp is in two parts, log2 p_v = (z_v - anchor) - log_total in base 2, since their sum
    would round what the backward needs: 1e-5 at a logit of 200.
    """

    logprobs: Tensor
    anchor: Tensor  # a logit, in base 2
    log_total: Tensor  # log2 sum_v 2^(z_v - anchor)
    entropy: Tensor  # [0] where it was not asked for

    def rows(self, rows: slice) -> Statistics:
        """Return a range of rows, without the entropy, which only `row_gradient` reads."""
        logprobs, anchor, log_total, entropy = self
        return Statistics(logprobs[rows], anchor[rows], log_total[rows], entropy[:0])

    @property
    def logsumexp(self) -> Tensor:
        """In nats."""
        return (self.anchor + self.log_total) * LN2


class RowGradient(NamedTuple):
    """dL/dlogits of a row in three numbers; all float32 [n]."""

    constant: Tensor
    slope: Tensor | None  # None: zero, no gradient came through the entropy
    target: Tensor

    def rows(self, rows: slice) -> RowGradient:
        """Return a range of rows."""
        slope = None if self.slope is None else self.slope[rows]
        return RowGradient(self.constant[rows], slope, self.target[rows])


def concatenate(parts: list[Statistics], like: Tensor) -> Statistics:
    """Join the statistics of row chunks; no chunk means no row."""
    if not parts:
        parts = [Statistics(*(like.new_empty(0) for _ in range(4)))]
    return Statistics(*(torch.cat(columns) for columns in zip(*parts, strict=True)))


def row_gradient(
    head: Head,
    stats: Statistics,
    grad_logprobs: Tensor | None,  # [n]
    grad_entropy: Tensor | None = None,  # [n]
) -> RowGradient:
    """Turn upstream gradients into row coefficients; a missing gradient is zero."""
    logprobs, inv_temperature, entropy = stats.logprobs, head.inv_temperature, stats.entropy
    if grad_logprobs is None:
        grad_logprobs = torch.zeros_like(logprobs)
    g = grad_logprobs.float() * inv_temperature
    constant, slope = -g, None
    target = constant * torch.expm1(logprobs)
    if grad_entropy is not None:
        e = grad_entropy.float() * inv_temperature
        target = target - e * logprobs.exp() * (logprobs + entropy)
        constant, slope = constant - e * entropy, -e
    if head.softcap:
        # Small numbers first: where the cap is reached, 1 - t^2 magnifies what t loses.
        logit = stats.anchor + (logprobs / LN2 + stats.log_total)
        t = logit * (LN2 / (inv_temperature * head.softcap))
        target = target * (1 - t.square())
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
    constant, slope, target = gradient
    parts = [part for part in gradient if part is not None]
    largest = torch.cat([constant.new_zeros(1), *parts]).abs().amax()
    scale = torch.where(largest > 0, torch.exp2(largest.log2().ceil()), 1)
    slope = None if slope is None else slope / scale
    return RowGradient(constant / scale, slope, target / scale), scale


def logits(hidden_states: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
    """Return H W^T as float32 [n, V], in `out` if there is one."""
    if hidden_states.is_cuda:
        return _mm(hidden_states, weight.T, out)
    if out is None:
        out = hidden_states.new_empty(len(hidden_states), len(weight), dtype=torch.float32)
    for columns in _weight_blocks(weight):
        _mm(hidden_states, weight[columns].T, out[:, columns])
    return out


def hidden_gradient(
    dlogits: Tensor, weight: Tensor, scale: Tensor | None, out: Tensor | None = None
) -> Tensor:
    """Return (dZ W) * scale as float32 [n, D], in `out` if there is one.

    Never by a GEMM with a 16-bit result: cuBLAS splits a sum over V and adds its parts in 16 bits.
    """
    if dlogits.is_cuda:
        out = _mm(dlogits, weight, out)
    else:
        first, *others = _weight_blocks(weight)
        out = _mm(dlogits[:, first], weight[first], out)
        for columns in others:
            out.addmm_(dlogits[:, columns].float(), weight[columns].float())
    return out if scale is None else out.mul_(scale)


def empty_weight_gradient(weight: Tensor, num_chunks: int, dtype: torch.dtype) -> Tensor:
    """Return a buffer for dW: the first chunk overwrites it, without chunks it is zero."""
    make = torch.empty if num_chunks else torch.zeros
    return make(weight.shape, dtype=dtype, device=weight.device)


def add_weight_gradient(
    out: Tensor,  # [V, D] float32, or of the dtype of H if there is only one chunk
    dlogits: Tensor,  # [n, V]
    hidden_states: Tensor,  # [n, D]
    is_first: bool,
    scale: Tensor | None,
) -> None:
    """Add (dZ^T H) * scale to `out`; the first chunk overwrites it and saves a fill and a read."""
    is_rounded = out.dtype != torch.float32
    if is_rounded and scale is None and _is_cublas_16_bit(dlogits) and len(out) > BLOCK_V:
        torch.mm(dlogits.T, hidden_states, out=out)  # of fewer, it could add split sums in 16 bits
    elif is_rounded or scale is not None:
        for start in range(0, len(out), BLOCK_V):
            columns = slice(start, start + BLOCK_V)
            product = _mm(dlogits[:, columns].T, hidden_states)
            product = product if scale is None else product.mul_(scale)
            out[columns].copy_(product) if is_first else out[columns].add_(product)
    elif is_first:
        _mm(dlogits.T, hidden_states, out)
    elif _is_cublas_16_bit(dlogits):
        torch.addmm(out, dlogits.T, hidden_states, out_dtype=torch.float32, out=out)
    else:
        out.addmm_(dlogits.T.float(), hidden_states.float())


def _is_cublas_16_bit(x: Tensor) -> bool:
    return x.is_cuda and x.dtype != torch.float32


def _mm(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """Return a b in float32, also under autocast, which would round the operands."""
    with torch.autocast(a.device.type, enabled=False):
        if not _is_cublas_16_bit(a):
            return torch.mm(a.float(), b.float(), out=out)
        if out is None:
            return torch.mm(a, b, out_dtype=torch.float32)
        return torch.mm(a, b, out_dtype=torch.float32, out=out)


def _weight_blocks(weight: Tensor) -> list[slice]:
    """Row blocks of the weight; a float32 weight needs no widening and is one block."""
    step = len(weight) if weight.dtype == torch.float32 else BLOCK_V
    return [slice(start, start + step) for start in range(0, len(weight), step)]
