"""Executable specification of every public op: plain torch, any device, any size that fits.

Symbols, shared with the kernels: hidden_states H [N, D], weight W [V, D], labels y [N], temperature
T > 0 (one number or one per row). Everything is computed in float32, or in float64 when the inputs
are float64, and differentiated by autograd:

    z_iv = C tanh(<H_i, W_v> / C) / T_i        capped and tempered logits; without a softcap C
                                               z_iv = <H_i, W_v> / T_i
    lse_i = log sum_v exp(z_iv)        p_iv = exp(z_iv - lse_i)
    logprob_i = z_iy - lse_i           entropy_i = -sum_v p_iv (z_iv - lse_i)
    score_b = beta (logprob_b - ref_logprob)
    loss = sum_b w_b (score_b - reward_b)^2,  w_b = 1/B by default

The score and its loss are LaSeR's last-token self-reward (arXiv 2510.14943, equations 8 and 10).
Here the logits [N, V] do exist, in float32: 4 N V bytes, and several times that in the backward.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

LossFn = Callable[[Tensor, slice], Tensor]


def _log_softmax(
    hidden_states: Tensor, weight: Tensor, temperature: float | Tensor, softcap: float | None
) -> Tensor:  # [N, V]
    dtype = torch.promote_types(hidden_states.dtype, torch.float32)
    with torch.autocast(hidden_states.device.type, enabled=False):
        logits_NV = hidden_states.to(dtype) @ weight.to(dtype).T
    if softcap is not None:
        logits_NV = softcap * torch.tanh(logits_NV / softcap)
    temperature = torch.as_tensor(temperature, dtype=dtype, device=logits_NV.device)
    return torch.log_softmax(logits_NV / temperature.reshape(-1, 1), dim=-1)


def linear_logprob(
    hidden_states: Tensor,  # [N, D]
    weight: Tensor,  # [V, D]
    labels: Tensor,  # [N] int64
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
) -> Tensor:  # [N]
    """Return log softmax(H W^T / T) at the labels."""
    logprobs_NV = _log_softmax(hidden_states, weight, temperature, softcap)
    return logprobs_NV.gather(1, labels[:, None]).squeeze(1)


def linear_logprob_entropy(
    hidden_states: Tensor,  # [N, D]
    weight: Tensor,  # [V, D]
    labels: Tensor,  # [N] int64
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:  # [N], [N]
    """Return the log-probs of the labels and the entropy of each row, both differentiable."""
    logprobs_NV = _log_softmax(hidden_states, weight, temperature, softcap)
    entropy = -(logprobs_NV.exp() * logprobs_NV).sum(1)
    return logprobs_NV.gather(1, labels[:, None]).squeeze(1), entropy


def linear_logprob_loss(
    hidden_states: Tensor,  # [N, D]
    weight: Tensor,  # [V, D]
    labels: Tensor,  # [N] int64
    loss_fn: LossFn,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
) -> Tensor:  # scalar
    """Return loss_fn(logprobs, slice(0, N)): all rows at once; an empty input has loss 0."""
    logprobs = linear_logprob(
        hidden_states, weight, labels, temperature=temperature, softcap=softcap
    )
    if len(labels) == 0:
        return logprobs.sum()
    return loss_fn(logprobs, slice(0, len(labels)))


def last_token_score(
    hidden_states: Tensor,  # [B, D]
    weight: Tensor,  # [V, D]
    token_id: int,
    *,
    beta: float,
    ref_logprob: float,
    softcap: float | None = None,
) -> Tensor:  # [B]
    """Return beta (log p(token_id) - ref_logprob) of every row."""
    labels = torch.full((len(hidden_states),), token_id, device=hidden_states.device)
    return beta * (linear_logprob(hidden_states, weight, labels, softcap=softcap) - ref_logprob)


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
) -> tuple[Tensor, Tensor]:  # scalar, [B]
    """Return the weighted squared error between scores and rewards, and the detached scores."""
    scores = last_token_score(
        hidden_states, weight, token_id, beta=beta, ref_logprob=ref_logprob, softcap=softcap
    )
    if sample_weight is None:
        sample_weight = torch.full_like(scores, 1 / max(len(scores), 1))
    loss = (sample_weight.to(scores) * (scores - rewards.to(scores)).square()).sum()
    return loss, scores.detach()
