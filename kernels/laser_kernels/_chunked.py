"""impl="chunked": float32 logits of a chunk of rows, from a plain GEMM, on any device.

The chunk [n, V] is the only large buffer, and everything happens in it. On a GPU two Triton row
kernels read the logits and then turn them into dlogits (`_row_kernels.py`). On the CPU the chunk
becomes E = exp(z - max z) and, by a factor per row, dlogits; only the entropy needs a temporary,
of a few rows. Rows are reduced around their own maximum, so no logit is too large.

Every implementation offers the functions below. How `keep` keeps the logits is its own business,
as long as a larger `offset` means as much smaller log-probs: so shards of a vocabulary learn of
the mass of the others.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import _gemm
from ._ops import row_chunks
from ._rows import RowGradient, Statistics, concatenate

LN_2 = math.log(2)
# Rows of the chunk that a temporary on the CPU copies at a time.
TEMPORARY_ROWS = 16


def statistics(
    hidden_states: Tensor,  # [N, D]
    weight: Tensor,  # [V, D]
    labels: Tensor,  # [N]
    inv_temperature: Tensor,  # [N] float32
    with_entropy: bool = False,
) -> Statistics:
    """Score any number of rows and keep nothing."""
    return concatenate(
        [
            keep(hidden_states[rows], weight, labels[rows], inv_temperature[rows], with_entropy)[0]
            for rows in row_chunks(hidden_states, weight, "chunked")
        ],
        inv_temperature,
    )


def empty_kept(hidden_states: Tensor, weight: Tensor) -> Tensor:
    """Return an uninitialised buffer like the one that `keep` returns."""
    return hidden_states.new_empty(len(hidden_states), len(weight), dtype=torch.float32)


def keep(
    hidden_states: Tensor,  # [n, D]
    weight: Tensor,  # [V, D]
    labels: Tensor,  # [n]
    inv_temperature: Tensor,  # [n] float32
    with_entropy: bool = False,
    out: Tensor | None = None,  # [n, V] float32: on a CPU, where to keep them
) -> tuple[Statistics, Tensor, Tensor]:
    """Score rows; return the statistics, the kept logits [n, V] and their offset [n]."""
    if hidden_states.is_cuda:
        from . import _row_kernels

        logits = _gemm.logits(hidden_states, weight)
        stats = _row_kernels.statistics(logits, labels, inv_temperature)
        return stats, logits, stats.logsumexp.clone()  # outputs of an op may not share memory
    # Tempering H instead of the logits saves a pass over the chunk. In units of log 2, because the
    # CPU's exp2 takes 0.4 times as long as its exp.
    scale = inv_temperature / LN_2
    logits = _gemm.logits(hidden_states.float() * scale[:, None], weight, out)
    anchor = logits.amax(1)
    shifted = logits.sub_(anchor[:, None])
    # (z_y - max) - log S, not z_y - lse: a common offset of all logits cancels exactly.
    target = shifted.gather(1, labels[:, None]).squeeze(1)
    weighted = anchor.new_empty(0)
    if with_entropy:
        weighted = torch.cat([(x.exp2() * x).sum(1) for x in shifted.split(TEMPORARY_ROWS)])
    exp = shifted.exp2_()
    total = exp.sum(1)
    log_total = total.log()
    entropy = log_total - LN_2 * weighted / total if with_entropy else weighted
    logprobs = (LN_2 * target - log_total).clamp(max=0)
    return Statistics(logprobs, LN_2 * anchor + log_total, entropy), exp, log_total


# A GEMM library chooses its own tiles, so few rows need nothing special here.
statistics_few, keep_few = statistics, keep


def dlogits_from_kept(
    kept: Tensor,  # [n, V], overwritten
    offset: Tensor,  # [n]
    labels: Tensor,  # [n]; -1: the target is in another shard
    inv_temperature: Tensor,  # [n]
    gradient: RowGradient,
    dtype: torch.dtype,
) -> Tensor:
    """Turn what was kept into dlogits [n, V], in the same memory."""
    if kept.is_cuda:
        from . import _row_kernels

        return _row_kernels.dlogits_(kept, offset, labels, inv_temperature, gradient, dtype)
    assert gradient.slope is None  # what is kept serves a loss of log-probs alone
    dlogits = kept.mul_((gradient.constant * (-offset).exp())[:, None])
    return _set_target_(dlogits, labels, gradient.target)


def _set_target_(dlogits: Tensor, labels: Tensor, target: Tensor) -> Tensor:
    column = labels.clamp(min=0)[:, None]
    is_elsewhere = labels[:, None] < 0
    return dlogits.scatter_(
        1, column, torch.where(is_elsewhere, dlogits.gather(1, column), target[:, None])
    )


def recompute_dlogits(
    hidden_states: Tensor,  # [n, D]
    weight: Tensor,  # [V, D]
    labels: Tensor,  # [n]; -1: the target is in another shard
    inv_temperature: Tensor,  # [n]
    logsumexp: Tensor,  # [n]
    gradient: RowGradient,
) -> Tensor:
    """Form dlogits [n, V] of rows whose logsumexp is known."""
    if hidden_states.is_cuda:
        from . import _row_kernels

        logits = _gemm.logits(hidden_states, weight)
        rows = (logsumexp, labels, inv_temperature, gradient)
        return _row_kernels.dlogits_(logits, *rows, hidden_states.dtype)
    logits = _gemm.logits(hidden_states.float() * inv_temperature[:, None], weight)
    logprobs = logits.sub_(logsumexp[:, None])
    constant, slope, target = gradient
    if slope is None:
        dlogits = logprobs.exp_().mul_(constant[:, None])
    else:
        for start in range(0, len(logprobs), TEMPORARY_ROWS):
            rows = slice(start, start + TEMPORARY_ROWS)
            factor = torch.addcmul(constant[rows, None], logprobs[rows], slope[rows, None])
            logprobs[rows].exp_().mul_(factor)
        dlogits = logprobs
    return _set_target_(dlogits, labels, target)
