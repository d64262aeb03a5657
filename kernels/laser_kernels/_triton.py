"""Triton functions that several kernels share: the formulas of `_rows.py` in base 2."""

from __future__ import annotations

import triton
import triton.language as tl

LN2 = tl.constexpr(0.6931471805599453)
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def row_statistics(target, anchor, total, weighted):
    """Return logprob, logsumexp and entropy, in nats, of a row.

    In base 2: target and anchor are logits, total = sum 2^(z - anchor), weighted = sum of the same
    terms times (z - anchor). target - anchor is formed first, so that a common offset of all logits
    cancels exactly. A log-prob that comes out a rounding above 0 is set to 0; NaN stays.
    """
    log_total = tl.log2(total)
    logprob = ((target - anchor) - log_total) * LN2
    logprob = tl.where(logprob > 0, 0.0, logprob)
    return logprob, (anchor + log_total) * LN2, (log_total - weighted / total) * LN2


@triton.jit
def dlogits_from_logprob(logprob2, constant, slope, target, is_target):
    """Return dL/dlogits from log2 p and the three numbers of the row."""
    other = tl.exp2(logprob2) * (constant + slope * (logprob2 * LN2))
    return tl.where(is_target, target, other)
