"""A head whose weight is split by rows over the ranks of a process group, in the order of ranks.

Hidden states and labels are the same on every rank, and so are the results. Shards may have any
number of rows. A call adds up two zeroed buffers in which every rank writes its own slot: all but
one term of a sum are zero, so it is exact and the same everywhere. The first gives the sizes of the
shards, and stays on the device; a cache would save it, and deadlock when a rank remembers the size
that another has not seen. The second gives the logsumexps, so that no maximum has to be agreed on
first and nothing can overflow. Where chunks of rows hold collectives (a loss, a reduced dH), the
host waits for the size of the largest shard, so that all ranks split alike.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from ._dispatch import check_label_values
from ._maths import LN2, Head, Statistics
from ._ops import add_op_namespace_prefix


def _resolve(group: str) -> dist.ProcessGroup:
    c10d = dist.distributed_c10d
    return c10d._resolve_process_group(c10d.GroupName(group))


def localize(head: Head, group: str) -> Head:
    """Return the head with the labels as rows of this shard, -1 where another shard has one."""
    if not group:
        return head
    return head._replace(labels=_local_labels(head.labels, len(head.weight), group))


@torch.library.custom_op(add_op_namespace_prefix("local_labels"), mutates_args=())
def _local_labels(labels: Tensor, num_local: int, group: str) -> Tensor:
    process_group = _resolve(group)
    rank = dist.get_rank(process_group)
    sizes = labels.new_zeros(dist.get_world_size(process_group))
    sizes[rank] = num_local
    dist.all_reduce(sizes, group=process_group)
    check_label_values(labels, sizes.sum())
    local = labels - sizes[:rank].sum()
    return torch.where((local >= 0) & (local < num_local), local, -1)


@_local_labels.register_fake
def _(labels: Tensor, num_local: int, group: str) -> Tensor:
    return torch.empty_like(labels)


def largest_shard(weight: Tensor, group: str) -> int:
    """Return the rows of the largest shard, for which the host waits."""
    if not group:
        return len(weight)
    size = torch.tensor(len(weight), device=weight.device)
    dist.all_reduce(size, dist.ReduceOp.MAX, group=_resolve(group))
    return int(size)


def combine(stats: Statistics, local_labels: Tensor, group: str) -> Statistics:
    """Merge the statistics of the shards, whose exponentials add up to S_r.

    log S = log sum_r S_r,  entropy = sum_r p_r (entropy_r - log p_r),  p_r = S_r / S.

    Every logarithm is relative to an anchor that is subtracted from another first: absolute ones
    would round by 4e-6 at a logit of 64.
    """
    if not group:
        return stats
    process_group = _resolve(group)
    has_entropy = len(stats.entropy) == len(local_labels)
    own = torch.stack([*stats[:3], stats.entropy if has_entropy else stats.logprobs])
    slots = own.new_zeros(1 + dist.get_world_size(process_group), *own.shape)
    slots[0] = torch.where(local_labels >= 0, own, 0)
    slots[1 + dist.get_rank(process_group)] = own
    dist.all_reduce(slots, group=process_group)
    logprobs, anchor, log_total, _ = slots[0]  # of the shard that has the target
    _, anchors, log_totals, entropies = slots[1:].unbind(1)

    log_masses = LN2 * (anchors - anchor + log_totals)
    total = log_masses.logsumexp(0)
    logprobs = (logprobs + (LN2 * log_total - total)).clamp(max=0)
    log_p = log_masses - total
    entropy = (log_p.exp() * (entropies - log_p)).sum(0) if has_entropy else stats.entropy
    # The anchor stays: kept logits are relative to it.
    own_total = (LN2 * (anchors - stats.anchor + log_totals)).logsumexp(0) / LN2
    return Statistics(logprobs, stats.anchor, own_total, entropy)


def sum_over_shards(x: Tensor, group: str) -> Tensor:
    """Add a partial result of all shards, in place."""
    if group:
        dist.all_reduce(x, group=_resolve(group))
    return x
