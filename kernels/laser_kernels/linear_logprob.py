"""Log-probabilities of a language-model head, and their gradients, without the [N, V] logits.

Symbols as in `reference.py`. One pass over the vocabulary leaves three numbers of a row (log-prob,
logsumexp, entropy); given upstream gradients, `_maths.py` describes the row of dZ = dL/dlogits by
three more. dZ exists for one chunk of rows at a time, and two plain GEMMs consume it:

    dH = dZ W        dW = sum over chunks dZ^T H, accumulated in float32, rounded once

The log-probs take any upstream gradient g, so the backward comes when Z is gone and recomputes it:
4 GEMMs in all. It knows g and the logsumexp and so writes dZ at once. `linear_logprob_loss.py` has
the 3-GEMM form, for a loss that can run inside the op.

Memory beyond inputs and gradients: a chunk, LASER_KERNELS_WORKSPACE_MB if it holds all rows, else
half of that and 4 V D bytes for dW. Never materialised: anything of size N V.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from . import reference
from ._dispatch import (
    check_all,
    check_label_values,
    check_temperature_values,
    differentiable,
    load_backend,
    refuse_double_backward,
    row_chunks,
)
from ._maths import (
    Head,
    Statistics,
    add_weight_gradient,
    empty_weight_gradient,
    factor_out_exponent,
    hidden_gradient,
    row_gradient,
)
from ._ops import add_op_namespace_prefix
from ._vocab_parallel import combine, largest_shard, localize, sum_over_shards


def apply_dlogits(
    dlogits: Tensor,  # [n, V]
    scale: Tensor | None,  # the factor that dlogits lack
    head: Head,
    grad_hidden: Tensor | None,  # [n, D], written
    grad_weight: Tensor | None,  # [V, D], float32 if it is accumulated
    is_first: bool,
    group: str,
) -> None:
    """Turn the dlogits of a chunk into the gradients that are wanted."""
    if grad_hidden is not None:
        out = grad_hidden if grad_hidden.dtype == torch.float32 else None
        product = sum_over_shards(hidden_gradient(dlogits, head.weight, scale, out), group)
        if product is not grad_hidden:
            grad_hidden.copy_(product)
    if grad_weight is not None:
        add_weight_gradient(grad_weight, dlogits, head.hidden_states, is_first, scale)


@torch.library.custom_op(add_op_namespace_prefix("linear_logprob_fwd"), mutates_args=())
def _linear_logprob_fwd_op(
    hidden_states: Tensor,  # [N, D]
    weight: Tensor,  # [V, D]
    labels: Tensor,  # [N]; with a group, rows of this shard or -1
    inv_temperature: Tensor,  # [N] float32
    softcap: float,
    with_entropy: bool,
    impl: str,
    group: str,
    grad_group: str,  # sums dH in the backward
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # logprobs, anchor, log_total [N], entropy [N] or [0]
    """Score all rows; nothing of size N V is kept."""
    check_temperature_values(inv_temperature)
    if not group:
        check_label_values(labels, len(weight))
    head = Head(hidden_states, weight, labels.clamp(min=0), inv_temperature, softcap)
    stats = combine(load_backend(impl).statistics(head, with_entropy), labels, group)
    entropy = stats.entropy if with_entropy else stats.entropy.new_empty(0)
    return stats._replace(entropy=entropy)


@_linear_logprob_fwd_op.register_fake
def _(hidden_states, weight, labels, inv_temperature, softcap, with_entropy, *rest):
    rows = [torch.empty_like(inv_temperature) for _ in range(4 if with_entropy else 3)]
    return *rows, *(inv_temperature.new_empty(0) for _ in range(4 - len(rows)))


@torch.library.custom_op(add_op_namespace_prefix("linear_logprob_bwd"), mutates_args=())
def _linear_logprob_bwd_op(
    grad_logprobs: Tensor | None,  # [N]
    grad_entropy: Tensor | None,  # [N]
    hidden_states: Tensor,  # [N, D]
    weight: Tensor,  # [V, D]
    labels: Tensor,  # [N]
    inv_temperature: Tensor,  # [N]
    softcap: float,
    logprobs: Tensor,  # [N]
    anchor: Tensor,  # [N]
    log_total: Tensor,  # [N]
    entropy: Tensor,  # [N] or [0]
    needs_hidden: bool,
    needs_weight: bool,
    impl: str,
    grad_group: str,
) -> tuple[Tensor, Tensor]:  # [N, D] and [V, D], or [0] where not needed
    """Return dL/dH and dL/dW from the upstream gradients of log-probs and entropy."""
    backend = load_backend(impl)
    head = Head(hidden_states, weight, labels, inv_temperature, softcap)
    stats = Statistics(logprobs, anchor, log_total, entropy)
    gradient = row_gradient(head, stats, grad_logprobs, grad_entropy)
    gradient, scale = factor_out_exponent(gradient, hidden_states.dtype)
    grad_hidden = torch.empty_like(hidden_states) if needs_hidden else None
    dh_group = grad_group if needs_hidden else ""
    chunks = row_chunks(hidden_states, weight, impl, largest_shard(weight, dh_group))
    dtype = weight.dtype if len(chunks) == 1 else torch.float32
    grad_weight = empty_weight_gradient(weight, len(chunks), dtype) if needs_weight else None
    for rows in chunks:
        chunk = head.rows(rows)
        dlogits = backend.recompute_dlogits(chunk, stats.rows(rows), gradient.rows(rows))
        chunk_grad_hidden = None if grad_hidden is None else grad_hidden[rows]
        grads = (chunk_grad_hidden, grad_weight, rows.start == 0)
        apply_dlogits(dlogits, scale, chunk, *grads, dh_group)
        del dlogits  # before the next chunk is allocated
    return (
        hidden_states.new_empty(0) if grad_hidden is None else grad_hidden,
        weight.new_empty(0) if grad_weight is None else grad_weight.to(weight.dtype),
    )


@_linear_logprob_bwd_op.register_fake
def _(grad_logprobs, grad_entropy, hidden_states, weight, *rest):
    needs_hidden, needs_weight = rest[-4:-2]
    return (
        torch.empty_like(hidden_states) if needs_hidden else hidden_states.new_empty(0),
        weight.new_empty(weight.shape) if needs_weight else weight.new_empty(0),
    )


def _save_rows(ctx, inputs, output):
    *rows, ctx.softcap, _, ctx.impl, _, ctx.grad_group = inputs
    ctx.save_for_backward(*rows, *output)
    ctx.set_materialize_grads(False)


def _backward_rows(ctx, grad_logprobs, _anchor, _log_total, grad_entropy):
    needs = ctx.needs_input_grad[:2]
    *head, logprobs, anchor, log_total, entropy = ctx.saved_tensors
    rows = (*head, ctx.softcap, logprobs, anchor, log_total, entropy)
    grads = linear_logprob_bwd(grad_logprobs, grad_entropy, *rows, *needs, ctx.impl, ctx.grad_group)
    wanted = (grad if need else None for grad, need in zip(grads, needs, strict=True))
    return *wanted, *[None] * 7


linear_logprob_fwd = differentiable(_linear_logprob_fwd_op, _backward_rows, _save_rows)
linear_logprob_bwd = refuse_double_backward(_linear_logprob_bwd_op)


def linear_logprob(
    hidden_states: Tensor,  # [N, D]
    weight: Tensor,  # [V, D]
    labels: Tensor,  # [N] int64
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    impl: str = "auto",
    process_group: ProcessGroup | None = None,
    reduce_hidden_grad: bool = True,
) -> Tensor:  # [N] float32
    """Return the log-probability of each label, differentiable by any per-row upstream gradient.

    logprob_i = z_iy - log sum_v exp(z_iv), z_i = W H_i / T_i, from logits that are never rounded.
    The backward recomputes the logits (4 GEMMs in all) and returns the gradients that are required.

    Args:
        hidden_states: [N, D] bfloat16, float16 or float32. Under torch.autocast of their device
            they and the weight are cast to its dtype, as a Linear casts its inputs, and gradients
            come back in their own; torch.autocast(device_type, enabled=False) keeps float32.
        weight: [V, D] of the same dtype. A bias b of the head is one more column:
            H' = [H, 1], W' = [W, b].
        labels: [N] int64 in [0, V), already shifted; select the rows to score before the call.
        temperature: a float or a float32 tensor [N], > 0. A model's logit scale s is T / s.
        softcap: C > 0 of logits C tanh(W H / C), as in Gemma 2; they are tempered afterwards.
        impl: "auto", "reference", "chunked", "triton" or "cuda".
        process_group: ranks that hold row shards of the weight, of any sizes, in rank order; labels
            are rows of the whole weight, hidden states and results the same on every rank.
        reduce_hidden_grad: whether the hidden gradients are summed over the process_group. False
            leaves each rank its own part, for a host that reduces it, as Megatron does.

    Raises:
        ValueError: shapes, dtypes, devices or values that do not fit.
        RuntimeError: the named implementation cannot run here.
    """
    options = (temperature, softcap, impl, process_group, reduce_hidden_grad)
    head, impl, *groups = check_all("linear_logprob", hidden_states, weight, labels, *options)
    if impl == "reference":
        return reference.linear_logprob(*head[:3], temperature=temperature, softcap=softcap)
    return linear_logprob_fwd(*localize(head, groups[0]), False, impl, *groups)[0]


def linear_logprob_entropy(
    hidden_states: Tensor,  # [N, D]
    weight: Tensor,  # [V, D]
    labels: Tensor,  # [N] int64
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    impl: str = "auto",
    process_group: ProcessGroup | None = None,
    reduce_hidden_grad: bool = True,
) -> tuple[Tensor, Tensor]:  # [N], [N] float32
    """Return the log-probability of each label and the entropy of each row, both differentiable.

    entropy_i = -sum_v p_iv log p_iv of the tempered distribution. Arguments and errors are those of
    `linear_logprob`; an output whose gradient is not asked for costs nothing in the backward.
    """
    op = "linear_logprob_entropy"
    options = (temperature, softcap, impl, process_group, reduce_hidden_grad)
    head, impl, *groups = check_all(op, hidden_states, weight, labels, *options)
    if impl == "reference":
        return reference.linear_logprob_entropy(*head[:3], temperature=temperature, softcap=softcap)
    logprobs, _, _, entropy = linear_logprob_fwd(*localize(head, groups[0]), True, impl, *groups)
    return logprobs, entropy
