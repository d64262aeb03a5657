"""impl="chunked": float32 logits of a chunk of rows, from a plain GEMM, on any device.

The chunk [n, V] is the only large buffer, and everything happens in it. On a GPU two Triton row
kernels read the logits and then turn them into dlogits (`_row_kernels.py`). On the CPU the chunk
becomes E = exp(z - max z) and, by a factor per row, dlogits; only the entropy needs a temporary,
of a few rows. Rows are reduced around their own maximum, so no logit is too large. The functions
are those of `_dispatch.Backend`; a GEMM library chooses its own tiles, so `few` changes nothing.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ._dispatch import row_chunks
from ._maths import Head, RowGradient, Statistics, concatenate, logits

LN_2 = math.log(2)
# Rows of the chunk that a temporary on the CPU copies at a time.
TEMPORARY_ROWS = 16


def statistics(head: Head, with_entropy: bool = False, few: bool = False) -> Statistics:
    """Score any number of rows and keep nothing."""
    chunks = row_chunks(head.hidden_states, head.weight, "chunked")
    parts = [keep(head.rows(rows), with_entropy=with_entropy)[0] for rows in chunks]
    return concatenate(parts, like=head.inv_temperature)


def empty_kept(hidden_states: Tensor, weight: Tensor) -> Tensor:
    """Return an uninitialised buffer [n, V] like the one that `keep` returns."""
    return hidden_states.new_empty(len(hidden_states), len(weight), dtype=torch.float32)


def keep(
    head: Head, few: bool = False, out: Tensor | None = None, with_entropy: bool = False
) -> tuple[Statistics, Tensor, Tensor]:
    """Score a chunk; return statistics, kept logits [n, V] (`out` if given), offset [n]."""
    hidden_states, weight, labels, inv_temperature = head
    if hidden_states.is_cuda:
        from . import _row_kernels

        z = logits(hidden_states, weight, out)
        stats = _row_kernels.statistics(z, labels, inv_temperature)
        return stats, z, stats.logsumexp.clone()  # outputs of an op may not share memory
    # Tempering H instead of the logits saves a pass over the chunk. In units of log 2, because the
    # CPU's exp2 takes 0.4 times as long as its exp.
    z = logits(hidden_states.float() * (inv_temperature / LN_2)[:, None], weight, out)
    anchor = z.amax(1)
    shifted = z.sub_(anchor[:, None])
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


def dlogits_from_kept(kept: Tensor, offset: Tensor, head: Head, gradient: RowGradient) -> Tensor:
    """Turn kept logits into dlogits [n, V], in the same memory."""
    if kept.is_cuda:
        from . import _row_kernels

        return _row_kernels.dlogits_(kept, offset, head, gradient)
    assert gradient.slope is None  # what is kept serves a loss of log-probs only
    dlogits = kept.mul_((gradient.constant * (-offset).exp())[:, None])
    return _set_target_(dlogits, head.labels, gradient.target)


def recompute_dlogits(head: Head, logsumexp: Tensor, gradient: RowGradient) -> Tensor:
    """Form dlogits [n, V] of rows whose logsumexp [n] is known."""
    hidden_states, weight, labels, inv_temperature = head
    if hidden_states.is_cuda:
        from . import _row_kernels

        z = logits(hidden_states, weight)
        return _row_kernels.dlogits_(z, logsumexp, head, gradient)
    z = logits(hidden_states.float() * inv_temperature[:, None], weight)
    logprobs = z.sub_(logsumexp[:, None])
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


def _set_target_(dlogits: Tensor, labels: Tensor, target: Tensor) -> Tensor:
    """Write the column of the label, unless another shard has it."""
    column = labels.clamp(min=0)[:, None]
    is_elsewhere = labels[:, None] < 0
    return dlogits.scatter_(
        1, column, torch.where(is_elsewhere, dlogits.gather(1, column), target[:, None])
    )
