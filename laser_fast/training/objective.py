"""The joint loss of one microbatch, from log-probs of its head rows (LaSeR eq. 13).

    L = sum_policy rows weight * (w * policy loss + kl_coef * k3 - entropy_coef * H)
      + score_coef * sum_score rows weight * (beta (logprob - ref_logprob) - reward)^2
      + router_weight * load-balancing loss of the experts (families.balancer)

    w   = importance weight of exp(old - rollout logprob), without gradient: min(., tis_cap) by
          default (algorithm.loss.importance_weights), or 1 for tis_cap = 0
    k3  = exp(d) - 1 - d, d = reference - current logprob; neither w nor a ratio weights it
    H   = entropy of the row's whole distribution

All weights already hold global denominators, so L is summed over microbatches and ranks.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from laser_fast.algorithm.loss import cap_ratios, importance_weights, kl_penalty, policy_loss
from laser_fast.algorithm.score import SelfScore, score_loss
from laser_fast.config import LossConfig
from laser_fast.model.families import LmHead
from laser_fast.model.policy import Head
from laser_fast.records import Microbatch, PolicyRows
from laser_kernels import linear_logprob, linear_logprob_entropy, linear_logprob_loss


@dataclass(frozen=True, kw_only=True, slots=True)
class Objective:
    """What the loss needs besides the rows; `score_coef` is alpha as it acts in this step."""

    loss: LossConfig
    score: SelfScore
    score_coef: float


class HeadResult(NamedTuple):
    """Loss of a microbatch and what is measured on the way; everything but `loss` is detached.

    A NamedTuple, because FSDP2 finds the tensors of an output only in pytree containers.
    """

    loss: Tensor  # scalar
    logprobs: Tensor  # [N]
    policy_loss: Tensor  # scalar, its share of `loss`
    score_loss: Tensor  # scalar, before score_coef
    router_loss: Tensor  # scalar, its share of `loss`


def sampling_weights(config: LossConfig, rows: PolicyRows, old: Tensor) -> tuple[Tensor, Tensor]:
    """Importance ratios and `importance_weights` of policy rows, both [N_p]."""
    own, kind, ids = rows.rollout_logprobs, config.importance, rows.sequence_ids
    ratios = importance_weights(old, own, cap=math.inf, kind=kind, sequence_ids=ids)
    return ratios, cap_ratios(ratios, cap=config.tis_cap, kind=kind)


def clipping(config: LossConfig, rows: PolicyRows) -> dict[str, Any]:
    """How the ratios of policy rows are clipped, for `policy_loss` and `is_clipped`."""
    how = {"kind": config.kind, "clip_low": config.clip_low, "clip_high": config.clip_high}
    return how | {"sequence_ids": rows.sequence_ids}


def joint_loss(objective: Objective, batch: Microbatch) -> Head[HeadResult]:
    """Head function that forms the loss and its gradients in one call.

    A row-separable loss takes the three-GEMM form; "gspo" and importance weights of sequences
    couple the rows of a sequence, and the entropy bonus needs every logit, so those recompute
    logits in the backward.
    """
    config = objective.loss
    couples_rows = config.kind == "gspo" or config.importance.startswith("sequence")

    def read(hidden_states: Tensor, head: LmHead) -> HeadResult:
        zeros = partial(hidden_states.new_zeros, dtype=torch.float32)
        measured = HeadResult(
            loss=zeros(()),
            logprobs=zeros(len(batch.labels)),
            policy_loss=zeros(()),
            score_loss=zeros(()),
            router_loss=head.router_loss.detach(),
        )

        def loss_fn(logprobs: Tensor, rows: slice) -> Tensor:
            policy_term, score_term = _row_losses(objective, batch, logprobs, rows)
            measured.logprobs[rows] = logprobs.detach()
            measured.policy_loss.add_(policy_term.detach())
            measured.score_loss.add_(score_term.detach())
            return policy_term + objective.score_coef * score_term

        arguments, options = (hidden_states, head.weight, batch.labels), head.at(batch.temperature)
        everything = slice(0, len(batch.labels))
        if config.entropy_coef > 0:
            logprobs, entropy = linear_logprob_entropy(*arguments, **options)
            weighted = (batch.policy.weights * entropy[: len(batch.policy)]).sum()
            loss = loss_fn(logprobs, everything) - config.entropy_coef * weighted
        elif couples_rows:
            loss = loss_fn(linear_logprob(*arguments, **options), everything)
        else:
            loss = linear_logprob_loss(*arguments, loss_fn, **options)
        return measured._replace(loss=loss + head.router_loss)

    return read


def _row_losses(
    objective: Objective, batch: Microbatch, logprobs: Tensor, rows: slice
) -> tuple[Tensor, Tensor]:
    """Policy and score terms of the head rows `rows`, whose log-probs [n] are given."""
    config = objective.loss
    policy, score = batch.labelled(rows)
    policy_logprobs, score_logprobs = logprobs.split([len(policy), len(score)])
    old = policy_logprobs.detach() if policy.old_logprobs is None else policy.old_logprobs
    dual, how = config.clip_dual or None, clipping(config, policy)
    terms = policy_loss(policy_logprobs, old, policy.advantages, clip_dual=dual, **how)
    if config.tis_cap > 0:
        terms = terms * sampling_weights(config, policy, old)[1]
    if policy.ref_logprobs is not None:
        terms = terms + config.kl_coef * kl_penalty(policy_logprobs, policy.ref_logprobs)
    scale = objective.score
    score_terms = score_loss(
        score_logprobs, score.rewards, score.weights, beta=scale.beta, ref_logprob=scale.ref_logprob
    )
    return (policy.weights * terms).sum(), score_terms.sum()
