"""A head whose weight is split over the ranks of a process group, by rows of equal number.

Rank r holds rows [r V_local, (r + 1) V_local) of the weight; hidden states and labels are the same
on every rank, and so are the results. One all-reduce by SUM a call suffices: every rank writes its
logsumexp into its own slot of a zeroed buffer, so no maximum has to be agreed on first and nothing
can overflow. All but one term of a sum are zero, so it is exact and the same everywhere.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from ._dispatch import check_label_values
from ._maths import LN2, Statistics


def _resolve(group: str) -> dist.ProcessGroup:
    c10d = dist.distributed_c10d
    return c10d._resolve_process_group(c10d.GroupName(group))


def localize(labels: Tensor, num_local: int, group: str) -> Tensor:
    """Check global labels; return them as rows of this shard, -1 where another shard holds one."""
    if not group:
        check_label_values(labels, num_local)
        return labels
    process_group = _resolve(group)
    check_label_values(labels, num_local * dist.get_world_size(process_group))
    local = labels - num_local * dist.get_rank(process_group)
    return torch.where((local >= 0) & (local < num_local), local, -1)


def combine(stats: Statistics, local_labels: Tensor, group: str) -> Statistics:
    """Merge the statistics of the shards.

    lse = log sum_r exp(lse_r),  entropy = lse - sum_r p_r mean_logit_r,  p_r = exp(lse_r - lse).
    """
    if not group:
        return stats
    process_group = _resolve(group)
    world, rank = dist.get_world_size(process_group), dist.get_rank(process_group)
    local = stats.logsumexp
    has_entropy = len(stats.entropy) == len(local)
    slots = local.new_zeros(1 + 2 * world, len(local_labels))
    slots[0] = torch.where(local_labels >= 0, stats.logprobs + local, 0)
    slots[1 + rank] = local
    if has_entropy:
        slots[1 + world + rank] = local - stats.entropy
    dist.all_reduce(slots, group=process_group)
    shard_logsumexp, mean_logit = slots[1 : 1 + world], slots[1 + world :]
    logsumexp = shard_logsumexp.logsumexp(0)
    entropy = stats.entropy
    if has_entropy:
        entropy = logsumexp - ((shard_logsumexp - logsumexp).exp() * mean_logit).sum(0)
    # The anchor stays: kept logits are relative to it.
    log_total = stats.log_total + (logsumexp - local) / LN2
    return Statistics((slots[0] - logsumexp).clamp(max=0), stats.anchor, log_total, entropy)


def sum_over_shards(x: Tensor, group: str) -> Tensor:
    """Add a partial result of all shards, in place."""
    if group:
        dist.all_reduce(x, group=_resolve(group))
    return x
