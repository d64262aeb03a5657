"""impl="chunked": float32 logits of a chunk of rows, from a plain GEMM, on any device.

The chunk [n, V] is the only large buffer: it holds logits, then, in place, their gradient. On a GPU
two Triton row kernels walk it (`_row_kernels.py`); on the CPU torch does, with one temporary of the
same size. Rows are reduced around their own maximum, so no logit is too large.

Every implementation offers the four functions below. `kept` is its own business; `offset` makes it
absolute: log p = decode(kept) - offset.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _gemm
from ._ops import row_chunks
from ._rows import RowGradient, Statistics, concatenate


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
) -> tuple[Statistics, Tensor, Tensor]:
    """Score rows; return the statistics, the kept logits [n, V] and their offset [n]."""
    if hidden_states.is_cuda:
        from . import _row_kernels

        logits = _gemm.logits(hidden_states, weight)
        stats = _row_kernels.statistics(logits, labels, inv_temperature)
        return stats, logits, stats.logsumexp
    # Tempering H instead of the logits saves a pass over the chunk.
    logits = _gemm.logits(hidden_states.float() * inv_temperature[:, None], weight)
    anchor = logits.amax(1)
    logits.sub_(anchor[:, None])
    exp = logits.exp()
    sum_exp = exp.sum(1)
    log_sum = sum_exp.log()
    entropy = logits.new_empty(0)
    if with_entropy:
        entropy = log_sum - exp.mul_(logits).sum(1) / sum_exp
    # (z_y - anchor) - log S, not z_y - lse: a common offset of all logits cancels exactly.
    logprobs = logits.gather(1, labels[:, None]).squeeze(1) - log_sum
    return Statistics(logprobs, anchor + log_sum, entropy), logits, log_sum


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
    """Turn kept logits into dlogits [n, V], in place where the dtypes allow it."""
    if kept.is_cuda:
        from . import _row_kernels

        return _row_kernels.dlogits_(kept, offset, labels, inv_temperature, gradient, dtype)
    logprobs = kept.sub_(offset[:, None])
    if gradient.slope is None:
        dlogits = logprobs.exp_().mul_(gradient.constant[:, None])
    else:
        factor = torch.addcmul(gradient.constant[:, None], logprobs, gradient.slope[:, None])
        dlogits = logprobs.exp_().mul_(factor)
    is_here = labels >= 0
    column = labels.clamp(min=0)[:, None]
    target = torch.where(is_here[:, None], gradient.target[:, None], dlogits.gather(1, column))
    return dlogits.scatter_(1, column, target)


def recompute_dlogits(
    hidden_states: Tensor,  # [n, D]
    weight: Tensor,  # [V, D]
    labels: Tensor,  # [n]; -1: the target is in another shard
    inv_temperature: Tensor,  # [n]
    logsumexp: Tensor,  # [n]
    gradient: RowGradient,
) -> Tensor:
    """Form dlogits [n, V] of rows whose logsumexp is known."""
    if not hidden_states.is_cuda:
        hidden_states = hidden_states.float() * inv_temperature[:, None]
    logits = _gemm.logits(hidden_states, weight)
    dtype = hidden_states.dtype
    return dlogits_from_kept(logits, logsumexp, labels, inv_temperature, gradient, dtype)
