"""The joint loss of one microbatch, from log-probs of its head rows (LaSeR eq. 13).

    L = sum_policy rows token_weight * tis * (policy loss + kl_coef * k3)  - entropy_coef * H
      + score_coef * sum_score rows score_weight * (beta (logprob - ref_logprob) - reward)^2

Both weights already hold global denominators, so L is summed over microbatches and ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from laser_fast.algorithm.loss import kl_penalty, policy_loss, tis_weights
from laser_fast.algorithm.score import score_loss
from laser_fast.config import LossConfig
from laser_fast.records import Microbatch
from laser_kernels import linear_logprob, linear_logprob_entropy, linear_logprob_loss


@dataclass(frozen=True, kw_only=True, slots=True)
class Objective:
    """What the loss needs besides the rows.

    `score_coef` is alpha as it acts in this step. `ref_logprob` may be None in plain GRPO, where
    no microbatch has score rows.
    """

    loss: LossConfig
    beta: float
    ref_logprob: float | None
    score_coef: float


class HeadResult(NamedTuple):
    """Loss of a microbatch and what is measured on the way; everything but `loss` is detached.

    A NamedTuple, because FSDP2 finds the tensors of an output only in pytree containers.
    """

    loss: Tensor  # scalar
    logprobs: Tensor  # [N]
    policy_loss: Tensor  # scalar, its share of `loss`
    score_loss: Tensor  # scalar, before score_coef


def linear_logprobs(batch: Microbatch) -> Callable[[Tensor, Tensor], Tensor]:
    """Head function of a pass that only reads log-probs, [N]."""

    def head(hidden_states: Tensor, weight: Tensor) -> Tensor:
        return linear_logprob(
            hidden_states, weight, batch.labels, temperature=batch.temperature
        ).detach()

    return head


def joint_loss(
    objective: Objective,
    batch: Microbatch,
    *,
    old_logprobs: Tensor | None = None,  # [N_p]; None: this is the first update of the rollout
    ref_logprobs: Tensor | None = None,  # [N_p]; None: no KL penalty
) -> Callable[[Tensor, Tensor], HeadResult]:
    """Head function that forms the loss and its gradients in one call.

    A row-separable loss takes the three-GEMM form; "gspo" couples the rows of a sequence and the
    entropy bonus needs every logit, so those recompute logits in the backward.
    """
    config = objective.loss

    def head(hidden_states: Tensor, weight: Tensor) -> HeadResult:
        measured = HeadResult(
            loss=hidden_states.new_zeros((), dtype=torch.float32),
            logprobs=hidden_states.new_zeros(len(batch.labels), dtype=torch.float32),
            policy_loss=hidden_states.new_zeros((), dtype=torch.float32),
            score_loss=hidden_states.new_zeros((), dtype=torch.float32),
        )

        def loss_fn(logprobs: Tensor, rows: slice) -> Tensor:
            policy_term, score_term = _row_losses(
                objective, batch, logprobs, rows, old_logprobs, ref_logprobs
            )
            measured.logprobs[rows] = logprobs.detach()
            measured.policy_loss.add_(policy_term.detach())
            measured.score_loss.add_(score_term.detach())
            return policy_term + objective.score_coef * score_term

        arguments = (hidden_states, weight, batch.labels)
        everything = slice(0, len(batch.labels))
        if config.entropy_coef > 0:
            logprobs, entropy = linear_logprob_entropy(*arguments, temperature=batch.temperature)
            weighted = (batch.token_weight * entropy[: batch.num_policy_rows]).sum()
            loss = loss_fn(logprobs, everything) - config.entropy_coef * weighted
        elif config.kind == "gspo":
            logprobs = linear_logprob(*arguments, temperature=batch.temperature)
            loss = loss_fn(logprobs, everything)
        else:
            loss = linear_logprob_loss(*arguments, loss_fn, temperature=batch.temperature)
        return measured._replace(loss=loss)

    return head


def _row_losses(
    objective: Objective,
    batch: Microbatch,
    logprobs: Tensor,  # [n]
    rows: slice,
    old_logprobs: Tensor | None,
    ref_logprobs: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Policy and score terms of the head rows `rows`; score rows follow the policy rows."""
    config = objective.loss
    boundary = batch.num_policy_rows
    policy = slice(min(rows.start, boundary), min(rows.stop, boundary))
    score = slice(max(rows.start, boundary) - boundary, max(rows.stop, boundary) - boundary)
    policy_logprobs, score_logprobs = logprobs.split(
        [policy.stop - policy.start, score.stop - score.start]
    )
    old = policy_logprobs.detach() if old_logprobs is None else old_logprobs[policy]
    terms = policy_loss(
        policy_logprobs,
        old,
        batch.advantages[policy],
        kind=config.kind,
        clip_low=config.clip_low,
        clip_high=config.clip_high,
        clip_dual=config.clip_dual or None,
        sequence_ids=batch.sequence_ids[policy],
    )
    if config.tis_cap > 0:
        terms = terms * tis_weights(old, batch.rollout_logprobs[policy], cap=config.tis_cap)
    if ref_logprobs is not None:
        terms = terms + config.kl_coef * kl_penalty(policy_logprobs, ref_logprobs[policy])
    weighted_policy = (batch.token_weight[policy] * terms).sum()
    if len(score_logprobs) == 0:
        return weighted_policy, weighted_policy.new_zeros(())
    assert objective.ref_logprob is not None
    score_terms = score_loss(
        score_logprobs,
        batch.rewards[score],
        batch.score_weight[score],
        beta=objective.beta,
        ref_logprob=objective.ref_logprob,
    )
    return weighted_policy, score_terms.sum()
