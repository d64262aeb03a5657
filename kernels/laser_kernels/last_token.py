"""The last-token score and its squared error: one reserved token, few rows.

For B rows of hidden states (the EOS positions of B answers), token c and symbols of `reference.py`:

    logprob_b = log softmax(W H_b)_c           score_b = beta (logprob_b - ref_logprob)
    loss = sum_b w_b (score_b - reward_b)^2    dloss/dlogprob_b = 2 beta w_b (score_b - reward_b)

With few rows the only cost is the traffic of W: it is read in the forward and again for dH, and
as much is written for dW. Up to 1024 rows the forward keeps the logits (2 B V bytes with Triton),
so that the backward recomputes nothing; above, it recomputes. The upstream scalar is applied before
the GEMMs, so dW needs no float32 copy: the GEMM rounds it, once.

The rest is vectors of B numbers, where a launch costs the host more than the GPU: the forward
leaves w (score - reward), labels and temperatures for the backward instead of forming them again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import reference
from ._dispatch import (
    check_matrices,
    check_score,
    check_softcap,
    check_targets,
    choose_impl,
    differentiable,
    is_last_use,
    load_backend,
    max_chunk_rows,
    refuse_double_backward,
)
from ._maths import Head, Statistics, factor_out_exponent, row_gradient
from ._ops import add_op_namespace_prefix
from .linear_logprob import apply_dlogits, linear_logprob_bwd

# Beyond this or the workspace the backward recomputes the logits, which is a fourth GEMM. 1024 rows
# of a 152k vocabulary take 0.31 GB in 16 bits; 256 about fill the L2 cache of a Hopper GPU.
MAX_KEPT_ROWS = 1024


@torch.library.custom_op(add_op_namespace_prefix("last_token_fwd"), mutates_args=())
def _last_token_fwd_op(
    hidden_states: Tensor,  # [B, D]
    weight: Tensor,  # [V, D]
    labels: Tensor,  # [B]
    inv_temperature: Tensor,  # [B] float32, ones
    softcap: float,
    rewards: Tensor,  # [B] float32
    sample_weight: Tensor,  # [B] float32
    beta: float,
    ref_logprob: float,
    keeps_logits: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return loss, scores, w (score - reward), logprobs, anchor, log_total [B], kept [B, V]."""
    head = Head(hidden_states, weight, labels, inv_temperature, softcap)
    if keeps_logits:
        stats, kept = load_backend(impl).keep(head, few=True)
    else:
        stats = load_backend(impl).statistics(head, few=True)
        kept = hidden_states.new_empty(0)
    scores = (stats.logprobs - ref_logprob).mul_(beta)
    errors = scores - rewards
    weighted = sample_weight * errors
    return torch.dot(weighted, errors), scores, weighted, *stats[:3], kept


@_last_token_fwd_op.register_fake
def _(hidden_states, weight, labels, inv_temperature, softcap, rewards, *rest):
    *_, keeps_logits, impl = rest
    kept = hidden_states.new_empty(0)
    if keeps_logits:
        kept = load_backend(impl).empty_kept(hidden_states, weight)
    return rewards.new_empty(()), *(torch.empty_like(rewards) for _ in range(5)), kept


def _gradients_from_kept(
    grad_logprobs: Tensor,  # [B]
    kept: Tensor,  # [B, V], overwritten
    head: Head,
    stats: Statistics,
    needs_hidden: bool,
    needs_weight: bool,
    impl: str,
) -> tuple[Tensor, Tensor]:
    gradient = row_gradient(head, stats, grad_logprobs)
    gradient, scale = factor_out_exponent(gradient, head.hidden_states.dtype)
    dlogits = load_backend(impl).dlogits_from_kept(kept, head, stats, gradient)
    grad_hidden = torch.empty_like(head.hidden_states) if needs_hidden else None
    grad_weight = torch.empty_like(head.weight) if needs_weight else None
    apply_dlogits(dlogits, scale, head, grad_hidden, grad_weight, True, "")
    none = head.hidden_states.new_empty(0)
    return (
        none if grad_hidden is None else grad_hidden,
        none if grad_weight is None else grad_weight,
    )


@torch.library.custom_op(add_op_namespace_prefix("last_token_bwd"), mutates_args=())
def _last_token_bwd_op(
    grad_logprobs: Tensor,  # [B]
    kept: Tensor,  # [B, V]
    hidden_states: Tensor,  # [B, D]
    weight: Tensor,  # [V, D]
    labels: Tensor,  # [B]
    inv_temperature: Tensor,  # [B]
    softcap: float,
    logprobs: Tensor,  # [B]
    anchor: Tensor,  # [B]
    log_total: Tensor,  # [B]
    needs_hidden: bool,
    needs_weight: bool,
    impl: str,
) -> tuple[Tensor, Tensor]:  # [B, D] and [V, D], or [0] where not needed
    """Leave the kept logits to a later backward."""
    head = Head(hidden_states, weight, labels, inv_temperature, softcap)
    stats = Statistics(logprobs, anchor, log_total, logprobs[:0])
    needs = (needs_hidden, needs_weight)
    # A clone would lose the padding of the rows.
    copy = load_backend(impl).empty_kept(hidden_states, weight).copy_(kept)
    return _gradients_from_kept(grad_logprobs, copy, head, stats, *needs, impl)


@_last_token_bwd_op.register_fake
def _(grad_logprobs, kept, hidden_states, weight, *rest):
    needs_hidden, needs_weight = rest[-3:-1]
    return (
        torch.empty_like(hidden_states) if needs_hidden else hidden_states.new_empty(0),
        torch.empty_like(weight) if needs_weight else weight.new_empty(0),
    )


def _save(ctx, inputs, output):
    *rows, ctx.softcap, _, _, ctx.beta, _, _, ctx.impl = inputs
    _, *others = output
    ctx.save_for_backward(*rows, *others[1:])
    ctx.mark_non_differentiable(*others)
    ctx.set_materialize_grads(False)  # else zeros for each of them, [B, V] too


def _backward(ctx, grad_loss, *_):
    h, w, labels, inv_temperature, weighted, logprobs, anchor, log_total, kept = ctx.saved_tensors
    head = Head(h, w, labels, inv_temperature, ctx.softcap)
    stats = Statistics(logprobs, anchor, log_total, logprobs[:0])
    needs = ctx.needs_input_grad[:2]
    how = (*needs, ctx.impl)
    grad_logprobs = weighted * (grad_loss * (2 * ctx.beta))
    if not kept.numel():
        grads = linear_logprob_bwd(grad_logprobs, None, *head, *stats, *how, "")
    elif is_last_use(kept):
        grads = _gradients_from_kept(grad_logprobs, kept, head, stats, *how)
    else:
        grads = _last_token_bwd(grad_logprobs, kept, *head, *stats[:3], *how)
    wanted = (grad if need else None for grad, need in zip(grads, needs, strict=True))
    return *wanted, *[None] * 9


_last_token_fwd = differentiable(_last_token_fwd_op, _backward, _save)
_last_token_bwd = refuse_double_backward(_last_token_bwd_op)


def _loss_and_scores(
    op: str,
    hidden_states: Tensor,
    weight: Tensor,
    token_id: int,
    rewards: Tensor | None,
    beta: float,
    ref_logprob: float,
    sample_weight: Tensor | None,
    softcap: float | None,
    impl: str,
) -> tuple[Tensor, Tensor]:
    hidden_states, weight = check_matrices(op, hidden_states, weight, impl)
    check_score(op, token_id, weight, beta, ref_logprob)
    num_rows = len(hidden_states)
    if rewards is None:
        rewards = hidden_states.new_zeros(num_rows)
    if sample_weight is None:
        share = 1 / max(num_rows, 1)
        sample_weight = hidden_states.new_full((num_rows,), share, dtype=torch.float32)
    rewards = check_targets(op, "rewards", rewards, hidden_states)
    sample_weight = check_targets(op, "sample_weight", sample_weight, hidden_states)
    cap = check_softcap(op, softcap)
    impl = choose_impl(op, impl, hidden_states)
    if impl == "reference":
        return reference.last_token_loss(
            hidden_states,
            weight,
            token_id,
            rewards,
            beta=beta,
            ref_logprob=ref_logprob,
            sample_weight=sample_weight,
            softcap=softcap,
        )
    labels = torch.full_like(rewards, token_id, dtype=torch.int64)
    tensors = (hidden_states.contiguous(), weight.contiguous(), labels, torch.ones_like(rewards))
    has_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in tensors[:2])
    max_rows = min(MAX_KEPT_ROWS, max_chunk_rows(weight, impl))
    keeps_logits = has_gradient and 0 < num_rows <= max_rows
    score = (rewards, sample_weight, beta, ref_logprob)
    loss, scores, *_ = _last_token_fwd(*Head(*tensors, cap), *score, keeps_logits, impl)
    return loss, scores


def last_token_loss(
    hidden_states: Tensor,  # [B, D]
    weight: Tensor,  # [V, D]
    token_id: int,
    rewards: Tensor,  # [B]
    *,
    beta: float,
    ref_logprob: float,
    sample_weight: Tensor | None = None,  # [B]
    softcap: float | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:  # scalar float32, [B] float32
    """Return loss = sum_b w_b (score_b - reward_b)^2 and the scores, which carry no gradient.

    The self-reward loss of LaSeR (arXiv 2510.14943): a score of 0 or 1 grades the answer. Made for
    B = 1..1024 rows.

    Args:
        hidden_states: [B, D] bfloat16, float16 or float32, at the position before the token;
            autocast as in `linear_logprob`.
        weight: [V, D] of the same dtype.
        token_id: the reserved token, in [0, V).
        rewards: [B], the targets of the scores.
        beta: scale of the score, > 0.
        ref_logprob: the reference log-probability of the token, nats.
        sample_weight: [B], w; 1/B each by default.
        softcap: as in `linear_logprob`.
        impl: "auto", "reference", "chunked", "triton" or "cuda".

    Raises:
        ValueError: shapes, dtypes, devices or values that do not fit.
        RuntimeError: the named implementation cannot run here.
    """
    op = "last_token_loss"
    return _loss_and_scores(
        op,
        hidden_states,
        weight,
        token_id,
        rewards,
        beta,
        ref_logprob,
        sample_weight,
        softcap,
        impl,
    )


def last_token_score(
    hidden_states: Tensor,  # [B, D]
    weight: Tensor,  # [V, D]
    token_id: int,
    *,
    beta: float,
    ref_logprob: float,
    softcap: float | None = None,
    impl: str = "auto",
) -> Tensor:  # [B] float32
    """Return score_b = beta (log softmax(W H_b)[token_id] - ref_logprob), without gradient.

    Arguments and errors are those of `last_token_loss`.
    """
    op = "last_token_score"
    with torch.no_grad():
        return _loss_and_scores(
            op, hidden_states, weight, token_id, None, beta, ref_logprob, None, softcap, impl
        )[1]
