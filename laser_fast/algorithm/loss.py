"""Per-token policy losses, importance correction, KL, and how tokens become one number.

    ratio_t = exp(logprob_t - old_logprob_t)
    grpo    : -min(ratio A, clip(ratio, 1 - low, 1 + high) A)     PPO's objective (arXiv 2402.03300)
    gspo    : the same with ratio_t := sg[s] exp(logprob_t - sg[logprob_t]),
              s = exp(mean_t of the sequence's log ratios)          arXiv 2507.18071 eq. 13
    cispo   : -sg[clip(ratio, 1 - low, 1 + high)] A logprob_t       arXiv 2506.13585 eq. 4

sg stops the gradient. All losses are to be minimised. T tokens, B sequences.

Log ratios are bounded above by MAX_LOG_RATIO, so that one token cannot own an update. By Markov's
inequality a token of the policy that sampled it lies above with probability exp(-5) = 0.7% at most,
since its ratio is 1 on average. Without the bound the ratio is infinite in float32 from a
difference of 89 on, and k3 at 19 has a gradient of 1.8e8.
"""

import math
import warnings
from typing import Literal, get_args

import torch
from torch import Tensor

PolicyLossKind = Literal["grpo", "gspo", "cispo"]
Aggregation = Literal["token-mean", "seq-mean-token-mean", "seq-mean-token-sum-norm"]
Importance = Literal["token-truncate", "token-mask", "sequence-truncate", "sequence-mask"]

MAX_LOG_RATIO = 5.0  # a ratio of 148


def policy_loss(
    logprobs: Tensor,  # [T]
    old_logprobs: Tensor,  # [T]
    advantages: Tensor,  # [T]
    *,
    kind: PolicyLossKind = "grpo",
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    clip_dual: float | None = None,
    sequence_ids: Tensor | None = None,  # [T] int64
) -> Tensor:
    """Loss of every token, [T]; the module's docstring has the formulas.

    Args:
        logprobs: of the current policy, differentiable.
        old_logprobs: of the policy behind this rollout batch; no gradient flows into them.
        advantages: constant within a completion.
        kind: "grpo", "gspo" or "cispo".
        clip_low: ratios below 1 - clip_low are clipped.
        clip_high: ratios above 1 + clip_high are clipped.
        clip_dual: c > 1: where A < 0 the loss is at most -c A (arXiv 1912.09729). "cispo" ignores
            it: its weight never exceeds 1 + clip_high.
        sequence_ids: sequence of each token, numbered from 0; "gspo" needs it.
    """
    if clip_dual is not None and not clip_dual > 1:
        raise ValueError(f"policy_loss: expected clip_dual > 1 or None, got {clip_dual:g}")
    ratio = _ratio(logprobs, old_logprobs, kind, sequence_ids)
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    if kind == "cispo":
        return -clipped.detach() * advantages * logprobs
    loss = torch.maximum(-ratio * advantages, -clipped * advantages)
    if clip_dual is not None:
        loss = torch.where(advantages < 0, loss.minimum(-clip_dual * advantages), loss)
    return loss


def is_clipped(
    logprobs: Tensor,  # [T]
    old_logprobs: Tensor,  # [T]
    advantages: Tensor,  # [T]
    *,
    clip_low: float,
    clip_high: float,
    kind: PolicyLossKind = "grpo",
    sequence_ids: Tensor | None = None,  # [T] int64, for "gspo"
) -> Tensor:
    """Tokens whose clipped ratio decides the loss, [T] bool; with "cispo" they keep a gradient."""
    ratio = _ratio(logprobs, old_logprobs, kind, sequence_ids)
    too_high, too_low = ratio > 1 + clip_high, ratio < 1 - clip_low
    if kind == "cispo":
        return too_high | too_low
    return (too_high & (advantages > 0)) | (too_low & (advantages < 0))


def importance_weights(
    old_logprobs: Tensor,  # [T]
    rollout_logprobs: Tensor,  # [T]
    *,
    cap: float,
    kind: Importance = "token-truncate",
    sequence_ids: Tensor | None = None,  # [T] int64, for "sequence-"
) -> Tensor:
    """Weights that correct the sampler's distribution, [T] without gradient.

        r_t = exp(old_logprob_t - rollout_logprob_t), or with "sequence-" the sequence's product
        w_t = min(r_t, cap), or with "-mask" r_t where r_t <= cap and 0 above

    They correct the mismatch of two engines with the same weights, and one-step-off rollouts. The
    kinds are TRL's. Only the product is unbiased, but for long completions it nears 0 or infinity.
    `token_weights` counts what is masked, too, so that a mask makes the update smaller.
    """
    if kind not in get_args(Importance):
        raise ValueError(f"importance: expected a kind of {get_args(Importance)}, got {kind!r}")
    log_ratio = (old_logprobs - rollout_logprobs).detach()
    if kind.startswith("sequence"):
        log_ratio = sequence_sum(log_ratio, sequence_ids)
    return cap_ratios(log_ratio.exp(), cap=cap, kind=kind)


def cap_ratios(ratios: Tensor, *, cap: float, kind: Importance) -> Tensor:
    """The ratios, those above the cap replaced by it, or with "-mask" by 0."""
    return torch.where(ratios > cap, 0.0 if kind.endswith("mask") else cap, ratios)


def kl_penalty(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Unbiased estimate of KL(pi || pi_ref) per token, [T]: Schulman's k3 = exp(d) - 1 - d.

    d = ref_logprobs - logprobs. Above MAX_LOG_RATIO it goes on as its tangent: the gradient stays
    at 147, and still pulls a token back that the policy has all but given up.
    """
    d = ref_logprobs - logprobs
    bounded = d.clamp(max=MAX_LOG_RATIO)
    return torch.expm1(bounded) - bounded + math.expm1(MAX_LOG_RATIO) * (d - MAX_LOG_RATIO).relu()


def token_weights(
    lengths: Tensor,  # [B] tokens of each completion
    is_trained: Tensor,  # [B] bool
    *,
    aggregation: Aggregation,
    max_new_tokens: int,
) -> Tensor:
    """Weight of each token of a completion in the summed loss, [B] float32.

    "token-mean": 1 / all trained tokens. "seq-mean-token-mean": 1 / (completions x own length).
    "seq-mean-token-sum-norm": 1 / (completions x max_new_tokens), Dr.GRPO. Hand in every completion
    of the optimizer update, over all ranks: the result then does not depend on how it is split.
    Completions that are not trained (failed grade, over-long mask) weigh 0 and do not count.
    """
    lengths = lengths.float()
    num_trained = is_trained.sum().clamp(min=1)
    if aggregation == "token-mean":
        denominator = torch.where(is_trained, lengths, 0.0).sum().clamp(min=1)
    elif aggregation == "seq-mean-token-mean":
        denominator = num_trained * lengths.clamp(min=1)
    elif aggregation == "seq-mean-token-sum-norm":
        denominator = (num_trained * max_new_tokens).float()
    else:
        expected = ", ".join(f'"{name}"' for name in get_args(Aggregation))
        raise ValueError(f'token_weights: expected aggregation {expected}, got "{aggregation}"')
    return torch.where(is_trained, 1 / denominator, 0.0)


def check_gspo(clip: float, aggregation: Aggregation) -> None:
    """Warn where "gspo" is not the published one: arXiv 2507.18071 clips at 3e-4 and 4e-4."""
    doubts = []
    if clip > 0.01:
        doubts.append(
            f"its ratios are means over a sequence, which a clip of {clip:g} hardly ever meets; "
            "set loss.clip_low = 3e-4 and loss.clip_high = 4e-4"
        )
    if aggregation != "seq-mean-token-mean":
        doubts.append(
            f'"{aggregation}" weights long sequences more; set loss.aggregation = '
            '"seq-mean-token-mean"'
        )
    if doubts:
        warnings.warn(f'loss.kind = "gspo": {"; ".join(doubts)}', stacklevel=2)


def sequence_sum(values: Tensor, sequence_ids: Tensor | None) -> Tensor:
    """Sum of the values of a token's own sequence, given back to each of its tokens, [T]."""
    if sequence_ids is None:
        raise ValueError("a loss of whole sequences needs sequence_ids [T]")
    # As many sums as tokens: to count the sequences would wait for the device.
    return torch.zeros_like(values).index_add_(0, sequence_ids, values)[sequence_ids]


def sequence_mean(values: Tensor, sequence_ids: Tensor | None) -> Tensor:
    """Mean of the values of a token's own sequence, given back to each of its tokens, [T]."""
    return sequence_sum(values, sequence_ids) / sequence_sum(torch.ones_like(values), sequence_ids)


def _ratio(
    logprobs: Tensor, old_logprobs: Tensor, kind: PolicyLossKind, sequence_ids: Tensor | None
) -> Tensor:
    """Ratio of each token, [T]; with "gspo" that of its sequence."""
    if kind not in ("grpo", "gspo", "cispo"):
        raise ValueError(f'policy loss: expected kind "grpo", "gspo" or "cispo", got "{kind}"')
    log_ratio = logprobs - old_logprobs.detach()
    if kind == "gspo":
        # The value is the sequence's ratio, the gradient that of the single token. Its term is
        # exactly 0, where adding and then subtracting logprobs would round the ratio.
        own_gradient = logprobs - logprobs.detach()
        log_ratio = sequence_mean(log_ratio.detach(), sequence_ids) + own_gradient
    return log_ratio.clamp(max=MAX_LOG_RATIO).exp()
