"""impl="chunked": float32 logits of a chunk of rows, from a plain GEMM, on any device.

The chunk [n, V] is the only large buffer, and everything happens in it. On a GPU two Triton row
kernels read the logits and then turn them into dlogits (`_row_kernels.py`). On the CPU the chunk
becomes E = exp(z - max z) and, by a factor per row, dlogits; only the entropy needs a temporary,
of a few rows. Rows are reduced around their own maximum, so no logit is too large. The functions
are those of `_dispatch.Backend`; a GEMM library chooses its own tiles, so `few` changes nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._dispatch import row_chunks
from ._maths import LN2, Head, RowGradient, Statistics, concatenate, logits

# Rows of the chunk that a temporary on the CPU copies at a time.
TEMPORARY_ROWS = 16


def statistics(head: Head, with_entropy: bool = False, few: bool = False) -> Statistics:
    """Score any number of rows and keep nothing."""
    chunks = row_chunks(head.hidden_states, head.weight, "chunked")
    parts = [keep(head.rows(rows), with_entropy=with_entropy)[0] for rows in chunks]
    return concatenate(parts, like=head.inv_temperature)


def empty_kept(hidden_states: Tensor, weight: Tensor) -> Tensor:
    """Return an uninitialised buffer [n, V] like the one that `keep` returns."""
    if hidden_states.is_cuda:
        from . import _fused

        return _fused.empty_rows(hidden_states, weight, torch.float32)
    # Not len(), which would fix a symbolic number of rows.
    shape = (hidden_states.shape[0], weight.shape[0])
    return hidden_states.new_empty(shape, dtype=torch.float32)


def keep(
    head: Head, few: bool = False, out: Tensor | None = None, with_entropy: bool = False
) -> tuple[Statistics, Tensor]:
    """Score a chunk; return statistics and kept logits [n, V] (`out` if given)."""
    hidden_states, weight, labels, inv_temperature, _ = head
    if hidden_states.is_cuda:
        from . import _row_kernels

        z = logits(hidden_states, weight, empty_kept(hidden_states, weight) if out is None else out)
        return _row_kernels.statistics(z, head), z
    z = _tempered(head, out)
    anchor = z.amax(1)
    shifted = z.sub_(anchor[:, None])
    # (z_y - max) - log S, not z_y - lse: a common offset of all logits cancels exactly.
    target = shifted.gather(1, labels[:, None]).squeeze(1)
    weighted = anchor.new_empty(0)
    if with_entropy:
        weighted = torch.cat([(x.exp2() * x).sum(1) for x in shifted.split(TEMPORARY_ROWS)])
    exp = shifted.exp2_()
    total = exp.sum(1)
    log_total = total.log2()
    entropy = LN2 * (log_total - weighted / total) if with_entropy else weighted
    logprobs = (LN2 * (target - log_total)).clamp(max=0)
    return Statistics(logprobs, anchor, log_total, entropy), exp


def dlogits_from_kept(kept: Tensor, head: Head, stats: Statistics, gradient: RowGradient) -> Tensor:
    """Turn kept logits into dlogits [n, V], in the same memory."""
    if kept.is_cuda:
        from . import _row_kernels

        return _row_kernels.dlogits_(kept, head, stats, gradient)
    assert gradient.slope is None  # what is kept serves a loss of log-probs only
    factor = gradient.constant * (-stats.log_total).exp2()
    for rows in _row_blocks(kept, is_split=head.softcap > 0):
        dlogits = kept[rows]
        # Where the exponential underflowed, any finite slope gives 0.
        z = dlogits.clamp(min=1e-38).log2_() + stats.anchor[rows, None] if head.softcap else dlogits
        dlogits.mul_(factor[rows, None])
        _mul_cap_slope_(dlogits, z, head.rows(rows))
    return _set_target_(kept, head.labels, gradient.target)


def recompute_dlogits(head: Head, stats: Statistics, gradient: RowGradient) -> Tensor:
    """Form dlogits [n, V] of rows that were scored."""
    if head.hidden_states.is_cuda:
        from . import _row_kernels

        z = logits(*head[:2], empty_kept(*head[:2]))
        return _row_kernels.dlogits_(z, head, stats, gradient)
    z = _tempered(head)
    constant, slope, target = gradient
    if slope is None:
        constant = constant * (-stats.log_total).exp2()
    for rows in _row_blocks(z, is_split=slope is not None or head.softcap > 0):
        dlogits = z[rows]
        original = dlogits.clone() if head.softcap else dlogits
        dlogits.sub_(stats.anchor[rows, None])
        factor = constant[rows, None]
        if slope is not None:
            dlogits.sub_(stats.log_total[rows, None])
            factor = torch.addcmul(factor, dlogits, LN2 * slope[rows, None])
        dlogits.exp2_().mul_(factor)
        _mul_cap_slope_(dlogits, original, head.rows(rows))
    return _set_target_(z, head.labels, target)


def _row_blocks(chunk: Tensor, *, is_split: bool) -> list[slice]:
    """The rows of a chunk in blocks, if they need a temporary."""
    step = TEMPORARY_ROWS if is_split else max(len(chunk), 1)
    return [slice(start, start + step) for start in range(0, len(chunk), step)]


def _mul_cap_slope_(dlogits: Tensor, z: Tensor, head: Head) -> None:
    """Multiply by dl/d(H W^T) = 1 - (l / C)^2; overwrites the logits z, in units of log 2."""
    if head.softcap:
        t = z.mul_((LN2 / (head.inv_temperature * head.softcap))[:, None])
        dlogits.mul_(t.square_().neg_().add_(1))


def _tempered(head: Head, out: Tensor | None = None) -> Tensor:
    """Return capped and tempered logits [n, V] on a CPU, the same bits in forward and backward.

    In units of log 2, because a CPU's exp2 takes 0.4 times as long as its exp.
    """
    hidden_states, weight, _, inv_temperature, softcap = head
    scale = (inv_temperature / LN2)[:, None]
    if not softcap:
        # Tempering H instead of the logits saves a pass over the chunk.
        return logits(hidden_states.float() * scale, weight, out)
    z = logits(hidden_states.float() / softcap, weight, out)
    return z.tanh_().mul_(softcap * scale)


def _set_target_(dlogits: Tensor, labels: Tensor, target: Tensor) -> Tensor:
    """Write the column of the label, unless another shard has it."""
    column = labels.clamp(min=0)[:, None]
    is_elsewhere = labels[:, None] < 0
    return dlogits.scatter_(
        1, column, torch.where(is_elsewhere, dlogits.gather(1, column), target[:, None])
    )
